"""Users, workspaces, members and teams."""

from alembic import op

from services.chassis.db import create_inbox, create_outbox

revision = "0001"
down_revision = None


def upgrade() -> None:
    create_outbox(op)
    create_inbox(op)
    op.execute("""
        CREATE TABLE users (
            user_id uuid PRIMARY KEY,
            display_name text NOT NULL,
            email text NOT NULL,
            version integer NOT NULL DEFAULT 1,
            create_time timestamptz NOT NULL,
            update_time timestamptz NOT NULL,
            sign_in_time timestamptz
        )
    """)
    op.execute("""
        CREATE TABLE workspaces (
            workspace_id uuid PRIMARY KEY,
            title text NOT NULL,
            rights_version bigint NOT NULL DEFAULT 1,
            version integer NOT NULL DEFAULT 1,
            creator_id uuid NOT NULL REFERENCES users,
            request_id text,
            create_time timestamptz NOT NULL,
            update_time timestamptz NOT NULL,
            CONSTRAINT workspaces_request_once UNIQUE (creator_id, request_id)
        )
    """)
    op.execute("""
        CREATE TABLE members (
            workspace_id uuid NOT NULL REFERENCES workspaces,
            user_id uuid NOT NULL REFERENCES users,
            role text NOT NULL,
            create_time timestamptz NOT NULL,
            PRIMARY KEY (workspace_id, user_id)
        )
    """)
    op.execute("CREATE INDEX members_by_user ON members (user_id, workspace_id)")
    op.execute("CREATE INDEX members_by_standing ON members (workspace_id, create_time, user_id)")
    op.execute("""
        CREATE TABLE teams (
            workspace_id uuid NOT NULL REFERENCES workspaces,
            team_id uuid NOT NULL,
            title text NOT NULL,
            parent_team_id uuid,
            depth integer NOT NULL,
            version integer NOT NULL DEFAULT 1,
            creator_id uuid NOT NULL,
            request_id text,
            create_time timestamptz NOT NULL,
            update_time timestamptz NOT NULL,
            PRIMARY KEY (workspace_id, team_id),
            CONSTRAINT teams_parent FOREIGN KEY (workspace_id, parent_team_id) REFERENCES teams,
            CONSTRAINT teams_title_once UNIQUE (workspace_id, title),
            CONSTRAINT teams_request_once UNIQUE (workspace_id, creator_id, request_id),
            CONSTRAINT teams_depth CHECK (depth BETWEEN 1 AND 8)
        )
    """)
    op.execute("""
        CREATE TABLE team_members (
            workspace_id uuid NOT NULL,
            team_id uuid NOT NULL,
            user_id uuid NOT NULL,
            create_time timestamptz NOT NULL,
            PRIMARY KEY (workspace_id, team_id, user_id),
            CONSTRAINT team_members_team FOREIGN KEY (workspace_id, team_id) REFERENCES teams,
            -- Who leaves the workspace leaves its teams.
            CONSTRAINT team_members_member FOREIGN KEY (workspace_id, user_id) REFERENCES members
                ON DELETE CASCADE
        )
    """)
    op.execute("CREATE INDEX team_members_by_user ON team_members (workspace_id, user_id)")
