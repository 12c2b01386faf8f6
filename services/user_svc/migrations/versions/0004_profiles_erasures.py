"""Profiles, avatars, managed users, erasures."""

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.execute("""
        ALTER TABLE users
            ADD COLUMN state text NOT NULL DEFAULT 'ACTIVE',
            ADD COLUMN managing_workspace_id uuid REFERENCES workspaces ON DELETE SET NULL,
            ADD COLUMN avatar_version integer,
            ADD COLUMN creator_id uuid,
            ADD COLUMN request_id text,
            ADD CONSTRAINT users_state CHECK (state IN ('ACTIVE', 'DEACTIVATED', 'ERASING')),
            ADD CONSTRAINT users_request_once UNIQUE (managing_workspace_id, creator_id, request_id)
    """)
    # A workspace outlives who made it.
    op.execute("ALTER TABLE workspaces DROP CONSTRAINT IF EXISTS workspaces_creator_id_fkey")
    op.execute("""
        CREATE TABLE profiles (
            user_id uuid PRIMARY KEY REFERENCES users ON DELETE CASCADE,
            locale text NOT NULL DEFAULT '',
            time_zone text NOT NULL DEFAULT '',
            theme text NOT NULL DEFAULT 'SYSTEM',
            notify_product_news boolean NOT NULL DEFAULT false,
            notify_reports boolean NOT NULL DEFAULT true,
            notify_alerts boolean NOT NULL DEFAULT true,
            version integer NOT NULL DEFAULT 1,
            update_time timestamptz NOT NULL
        )
    """)
    op.execute("""
        CREATE TABLE avatars (
            user_id uuid PRIMARY KEY REFERENCES users ON DELETE CASCADE,
            image bytea NOT NULL
        )
    """)
    op.execute("""
        CREATE TABLE erasures (
            erasure_id uuid PRIMARY KEY,
            user_id uuid NOT NULL CONSTRAINT erasures_user_once UNIQUE,
            managing_workspace_id uuid,
            token_hash bytea,
            receipt text,
            create_time timestamptz NOT NULL,
            request_time timestamptz NOT NULL,
            complete_time timestamptz
        )
    """)
    op.execute("CREATE INDEX erasures_running ON erasures (request_time) WHERE complete_time IS NULL")
    op.execute("""
        CREATE TABLE service_erasures (
            erasure_id uuid NOT NULL REFERENCES erasures ON DELETE CASCADE,
            service text NOT NULL,
            erased jsonb NOT NULL,
            kept jsonb NOT NULL,
            complete_time timestamptz NOT NULL,
            PRIMARY KEY (erasure_id, service)
        )
    """)
