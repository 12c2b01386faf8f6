"""Settings of workspaces, team roles and their expiry, invitations."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.execute("""
        ALTER TABLE workspaces
            ADD COLUMN default_role text NOT NULL DEFAULT 'viewer',
            ADD COLUMN allowed_email_domains text[] NOT NULL DEFAULT '{}'
    """)
    op.execute("ALTER TABLE teams ADD COLUMN description text NOT NULL DEFAULT ''")
    op.execute("""
        ALTER TABLE team_members
            ADD COLUMN role text NOT NULL DEFAULT 'MEMBER',
            ADD COLUMN expire_time timestamptz
    """)
    op.execute("""
        CREATE INDEX team_members_by_expiry ON team_members (expire_time) WHERE expire_time IS NOT NULL
    """)
    op.execute("""
        CREATE TABLE invitations (
            workspace_id uuid NOT NULL REFERENCES workspaces,
            invitation_id uuid NOT NULL,
            email text NOT NULL,
            email_key text NOT NULL,
            role text NOT NULL,
            team_ids uuid[] NOT NULL,
            state text NOT NULL DEFAULT 'PENDING',
            generation integer NOT NULL DEFAULT 1,
            inviter_id uuid NOT NULL,
            acceptor_id uuid,
            creator_id uuid NOT NULL,
            request_id text,
            create_time timestamptz NOT NULL,
            send_time timestamptz NOT NULL,
            expire_time timestamptz NOT NULL,
            end_time timestamptz,
            PRIMARY KEY (workspace_id, invitation_id),
            CONSTRAINT invitations_id_once UNIQUE (invitation_id),
            CONSTRAINT invitations_request_once UNIQUE (workspace_id, creator_id, request_id)
        )
    """)
    op.execute("""
        CREATE UNIQUE INDEX invitations_pending_once ON invitations (workspace_id, email_key)
            WHERE state = 'PENDING'
    """)
    op.execute("CREATE INDEX invitations_by_email ON invitations (email_key)")
    op.execute("CREATE INDEX invitations_by_inviter ON invitations (inviter_id, send_time)")
    op.execute("""
        CREATE INDEX invitations_by_acceptor ON invitations (acceptor_id) WHERE acceptor_id IS NOT NULL
    """)
