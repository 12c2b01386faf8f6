"""Accounts, sessions and signing keys."""

from alembic import op

from services.chassis.db import create_inbox, create_outbox

revision = "0001"
down_revision = None


def upgrade() -> None:
    create_outbox(op)
    create_inbox(op)
    op.execute("""
        CREATE TABLE accounts (
            user_id uuid PRIMARY KEY,
            email text NOT NULL,
            email_key text NOT NULL,
            password_hash text NOT NULL,
            display_name text NOT NULL,
            workspace_id uuid NOT NULL,
            last_workspace_id uuid,
            create_time timestamptz NOT NULL,
            try_time timestamptz NOT NULL,
            activate_time timestamptz,
            user_update_time timestamptz,
            CONSTRAINT accounts_email_once UNIQUE (email_key)
        )
    """)
    op.execute("CREATE INDEX accounts_pending ON accounts (try_time) WHERE activate_time IS NULL")
    op.execute("""
        CREATE TABLE sessions (
            session_id uuid PRIMARY KEY,
            user_id uuid NOT NULL REFERENCES accounts ON DELETE CASCADE,
            workspace_id uuid,
            family_hash bytea NOT NULL,
            key_hash bytea NOT NULL,
            generation integer NOT NULL DEFAULT 1,
            create_time timestamptz NOT NULL,
            expire_time timestamptz NOT NULL,
            revoke_time timestamptz,
            CONSTRAINT sessions_family_once UNIQUE (family_hash)
        )
    """)
    op.execute("CREATE INDEX sessions_by_user ON sessions (user_id)")
    op.execute("CREATE INDEX sessions_by_end ON sessions (expire_time)")
    op.execute("CREATE INDEX sessions_revoked ON sessions (revoke_time) WHERE revoke_time IS NOT NULL")
    op.execute("""
        CREATE TABLE signing_keys (
            key_id text PRIMARY KEY,
            sealed_key bytea NOT NULL,
            activate_time timestamptz NOT NULL
        )
    """)
