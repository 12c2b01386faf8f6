"""Folders of dashboards, and the grants of a subject in the order of their resources."""

from alembic import op

from services.chassis.db import order_grants_of_subjects

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    with op.get_context().autocommit_block():
        order_grants_of_subjects(op)
    op.execute("""
        CREATE TABLE folders (
            workspace_id uuid NOT NULL,
            folder_id uuid NOT NULL,
            title text NOT NULL,
            parent_folder_id uuid,
            version bigint NOT NULL,
            creator_id uuid NOT NULL,
            request_id text,
            create_time timestamptz NOT NULL,
            update_time timestamptz NOT NULL,
            PRIMARY KEY (workspace_id, folder_id),
            FOREIGN KEY (workspace_id, parent_folder_id) REFERENCES folders,
            CONSTRAINT folders_request_once UNIQUE (workspace_id, creator_id, request_id)
        )
    """)
    op.execute("CREATE INDEX folders_by_parent ON folders (workspace_id, parent_folder_id, folder_id)")
    # Without NOT VALID every row would be looked at; none has a folder yet.
    op.execute("""
        ALTER TABLE dashboards
            ADD COLUMN folder_id uuid,
            ADD FOREIGN KEY (workspace_id, folder_id) REFERENCES folders NOT VALID
    """)
    op.execute("CREATE INDEX dashboards_by_folder ON dashboards (workspace_id, folder_id, dashboard_id)")
