"""Kinds of widgets that workspaces have made."""

from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.execute("""
        CREATE TABLE widget_kinds (
            workspace_id uuid NOT NULL,
            widget_kind_id uuid NOT NULL,
            name text NOT NULL,
            title text NOT NULL,
            description text NOT NULL,
            number int NOT NULL,
            version bigint NOT NULL,
            creator_id uuid NOT NULL,
            request_id text,
            create_time timestamptz NOT NULL,
            update_time timestamptz NOT NULL,
            PRIMARY KEY (workspace_id, widget_kind_id),
            CONSTRAINT widget_kinds_name_once UNIQUE (workspace_id, name),
            CONSTRAINT widget_kinds_request_once UNIQUE (workspace_id, creator_id, request_id)
        )
    """)
    op.execute("""
        CREATE TABLE widget_kind_versions (
            workspace_id uuid NOT NULL,
            widget_kind_id uuid NOT NULL,
            number int NOT NULL,
            content bytea NOT NULL,
            creator_id uuid NOT NULL,
            create_time timestamptz NOT NULL,
            PRIMARY KEY (workspace_id, widget_kind_id, number),
            FOREIGN KEY (workspace_id, widget_kind_id) REFERENCES widget_kinds ON DELETE CASCADE
        )
    """)
    # The release before has no widgets of such kinds, and leaves both null.
    for table in ("widgets", "library_widgets"):
        op.execute(f"ALTER TABLE {table} ADD COLUMN widget_kind_id uuid, ADD COLUMN kind_number int")
        op.execute(f"""
            CREATE INDEX {table}_by_kind ON {table} (workspace_id, widget_kind_id, kind_number)
            WHERE widget_kind_id IS NOT NULL
        """)
