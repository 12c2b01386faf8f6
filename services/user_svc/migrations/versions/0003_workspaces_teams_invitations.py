"""Settings of workspaces, team roles and their expiry, invitations."""

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    pass
