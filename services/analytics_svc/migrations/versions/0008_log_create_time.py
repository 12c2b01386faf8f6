"""Which event log a place is one of."""

from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.execute("ALTER TABLE log_positions ADD COLUMN log_create_time timestamptz")
