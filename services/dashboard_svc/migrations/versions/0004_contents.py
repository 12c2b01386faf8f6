"""What dashboards hold beside widgets, their versions, drafts, the bin and favourites."""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.execute("""
        ALTER TABLE dashboards
            ADD COLUMN tags text[] NOT NULL DEFAULT '{}',
            ADD COLUMN content bytea NOT NULL DEFAULT '',
            ADD COLUMN name text,
            ADD COLUMN published_version bigint,
            ADD COLUMN published_tags text[],
            ADD COLUMN delete_time timestamptz,
            ADD COLUMN purge_time timestamptz
    """)
    # What is in the bin gives up its name.
    op.execute("""
        CREATE UNIQUE INDEX dashboards_name_once ON dashboards (workspace_id, name) WHERE delete_time IS NULL
    """)
    op.execute("CREATE INDEX dashboards_to_purge ON dashboards (purge_time) WHERE purge_time IS NOT NULL")
    op.execute("""
        CREATE TABLE versions (
            workspace_id uuid NOT NULL,
            dashboard_id uuid NOT NULL,
            number bigint NOT NULL,
            author_id uuid NOT NULL,
            reason text NOT NULL,
            restored_number bigint,
            content bytea NOT NULL,
            begin_time timestamptz NOT NULL,
            create_time timestamptz NOT NULL,
            PRIMARY KEY (workspace_id, dashboard_id, number),
            FOREIGN KEY (workspace_id, dashboard_id) REFERENCES dashboards ON DELETE CASCADE
        )
    """)
    op.execute("""
        CREATE TABLE favourites (
            workspace_id uuid NOT NULL,
            user_id uuid NOT NULL,
            dashboard_id uuid NOT NULL,
            create_time timestamptz NOT NULL,
            PRIMARY KEY (workspace_id, user_id, dashboard_id),
            FOREIGN KEY (workspace_id, dashboard_id) REFERENCES dashboards ON DELETE CASCADE
        )
    """)
    op.execute("CREATE INDEX favourites_by_dashboard ON favourites (workspace_id, dashboard_id)")
    op.execute("CREATE INDEX favourites_by_user ON favourites (user_id)")
