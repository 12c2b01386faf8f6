"""What people say about the events and properties of a source."""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.execute("""
        CREATE TABLE catalogue_entries (
            workspace_id uuid NOT NULL,
            source_id uuid NOT NULL,
            kind text NOT NULL CHECK (kind IN ('event', 'property')),
            name text NOT NULL,
            description text NOT NULL,
            tags text[] NOT NULL,
            hidden boolean NOT NULL,
            update_time timestamptz NOT NULL,
            PRIMARY KEY (workspace_id, source_id, kind, name),
            FOREIGN KEY (workspace_id, source_id) REFERENCES sources ON DELETE CASCADE
        )
    """)
