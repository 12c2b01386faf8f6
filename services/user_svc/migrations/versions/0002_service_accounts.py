"""Users that are service accounts, or have a new address; workspaces that require a second factor."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.execute("ALTER TABLE users ADD COLUMN kind text NOT NULL DEFAULT 'PERSON'")
    op.execute("ALTER TABLE users ADD COLUMN email_time timestamptz")
    op.execute("ALTER TABLE workspaces ADD COLUMN require_second_factor boolean NOT NULL DEFAULT false")
