"""Marks on the axes of time of dashboards."""

from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.execute("""
        CREATE TABLE annotations (
            workspace_id uuid NOT NULL,
            dashboard_id uuid NOT NULL,
            annotation_id uuid NOT NULL,
            time timestamptz NOT NULL,
            end_time timestamptz,
            text text NOT NULL,
            tags text[] NOT NULL,
            version bigint NOT NULL,
            creator_id uuid NOT NULL,
            request_id text,
            create_time timestamptz NOT NULL,
            update_time timestamptz NOT NULL,
            PRIMARY KEY (workspace_id, dashboard_id, annotation_id),
            FOREIGN KEY (workspace_id, dashboard_id) REFERENCES dashboards ON DELETE CASCADE,
            CONSTRAINT annotations_request_once UNIQUE (workspace_id, dashboard_id, creator_id, request_id)
        )
    """)
    op.execute(
        "CREATE INDEX annotations_by_time ON annotations (workspace_id, dashboard_id, time, annotation_id)"
    )
