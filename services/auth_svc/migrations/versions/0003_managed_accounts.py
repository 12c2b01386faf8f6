"""Accounts that an admin made, and users that were erased."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.execute("""
        ALTER TABLE accounts
            ADD COLUMN managing_workspace_id uuid,
            ADD COLUMN deactivate_time timestamptz,
            ADD COLUMN state_time timestamptz
    """)
    op.execute("CREATE TABLE erased_users (user_id uuid PRIMARY KEY, erase_time timestamptz NOT NULL)")
