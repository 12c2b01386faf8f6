"""Share links, and what snapshots keep."""

from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.execute("""
        CREATE TABLE share_links (
            workspace_id uuid NOT NULL,
            dashboard_id uuid NOT NULL,
            share_link_id uuid NOT NULL,
            token_hash bytea NOT NULL,
            title text NOT NULL,
            expire_time timestamptz,
            password_hash text,
            paused boolean NOT NULL,
            content bytea NOT NULL,
            view_count bigint NOT NULL,
            last_view_time timestamptz,
            version bigint NOT NULL,
            creator_id uuid NOT NULL,
            request_id text,
            create_time timestamptz NOT NULL,
            update_time timestamptz NOT NULL,
            PRIMARY KEY (workspace_id, dashboard_id, share_link_id),
            FOREIGN KEY (workspace_id, dashboard_id) REFERENCES dashboards ON DELETE CASCADE,
            CONSTRAINT share_links_token_once UNIQUE (token_hash),
            CONSTRAINT share_links_request_once UNIQUE (workspace_id, dashboard_id, creator_id, request_id)
        )
    """)
    # Views are counted in place: room on each page for the next version of its rows.
    op.execute("ALTER TABLE share_links SET (fillfactor = 80)")
    op.execute("""
        CREATE TABLE snapshots (
            workspace_id uuid NOT NULL,
            dashboard_id uuid NOT NULL,
            share_link_id uuid NOT NULL,
            content bytea NOT NULL,
            PRIMARY KEY (workspace_id, dashboard_id, share_link_id),
            FOREIGN KEY (workspace_id, dashboard_id, share_link_id) REFERENCES share_links ON DELETE CASCADE
        )
    """)
