"""Cohorts."""

from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.execute("""
        CREATE TABLE cohorts (
            workspace_id uuid NOT NULL,
            cohort_id uuid NOT NULL,
            title text NOT NULL,
            description text NOT NULL,
            definition bytea NOT NULL,
            version integer NOT NULL DEFAULT 1,
            creator_id uuid NOT NULL,
            request_id text,
            create_time timestamptz NOT NULL,
            update_time timestamptz NOT NULL,
            PRIMARY KEY (workspace_id, cohort_id),
            CONSTRAINT cohorts_request_once UNIQUE (workspace_id, creator_id, request_id)
        )
    """)
