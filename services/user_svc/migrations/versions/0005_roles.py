"""Custom roles."""

from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.execute("""
        CREATE TABLE roles (
            workspace_id uuid NOT NULL REFERENCES workspaces ON DELETE CASCADE,
            name text NOT NULL,
            title text NOT NULL,
            description text NOT NULL,
            permissions text[] NOT NULL,
            version integer NOT NULL DEFAULT 1,
            creator_id uuid NOT NULL,
            request_id text,
            create_time timestamptz NOT NULL,
            update_time timestamptz NOT NULL,
            PRIMARY KEY (workspace_id, name),
            CONSTRAINT roles_request_once UNIQUE (workspace_id, creator_id, request_id),
            CONSTRAINT roles_not_builtin CHECK (name NOT IN ('viewer', 'editor', 'admin', 'owner'))
        )
    """)
