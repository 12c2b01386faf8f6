"""Failed events that can be fixed and retried, each here once."""

from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """The defaults are for rows from before, and for the code from before."""
    op.execute("""
        ALTER TABLE failed_events
            ADD COLUMN identity bytea NOT NULL DEFAULT uuid_send(gen_random_uuid()),
            ADD COLUMN step text NOT NULL DEFAULT 'insert',
            ADD COLUMN attempt_count integer NOT NULL DEFAULT 1,
            ADD COLUMN retry_id uuid,
            ADD COLUMN version integer NOT NULL DEFAULT 1,
            ADD COLUMN update_time timestamptz NOT NULL DEFAULT now(),
            ADD CONSTRAINT failed_events_once UNIQUE NULLS NOT DISTINCT (source_id, identity)
    """)
    op.execute("CREATE INDEX failed_events_by_retry ON failed_events (retry_id) WHERE retry_id IS NOT NULL")
