"""The tables of user_svc."""

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    LargeBinary,
    Text,
    UniqueConstraint,
    Uuid,
    false,
    text,
    true,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from services.chassis.db import Id, Time

MAX_TEAM_DEPTH = 8
# The states of invitations that the code asks for, and the role in a team that adds and removes others.
PENDING, ACCEPTED, DECLINED, REVOKED = "PENDING", "ACCEPTED", "DECLINED", "REVOKED"
MAINTAINER = "MAINTAINER"
# Of a user; otherwise a PERSON.
SERVICE_ACCOUNT = "SERVICE_ACCOUNT"
PERSON = "PERSON"
# What the state of a user can be.
ACTIVE, DEACTIVATED, ERASING = "ACTIVE", "DEACTIVATED", "ERASING"


class Table(DeclarativeBase):
    """Tables that only user_svc reads and writes."""


class User(Table):
    """A person, or a service account. `version` is the etag.

    `sign_in_time` is when the last session began, `email_time` how new the address is. `managing_workspace_id` is set
    of an account that an admin has made, `creator_id` is that admin. `avatar_version` is the `version` that the picture
    came with.
    """

    __tablename__ = "users"
    __table_args__ = (
        UniqueConstraint("managing_workspace_id", "creator_id", "request_id", name="users_request_once"),
        CheckConstraint("state IN ('ACTIVE', 'DEACTIVATED', 'ERASING')", name="users_state"),
    )

    user_id: Mapped[Id] = mapped_column(primary_key=True)
    display_name: Mapped[str] = mapped_column(Text)
    email: Mapped[str] = mapped_column(Text)
    version: Mapped[int] = mapped_column(server_default=text("1"))
    create_time: Mapped[Time]
    update_time: Mapped[Time]
    sign_in_time: Mapped[Time | None]
    email_time: Mapped[Time | None]
    kind: Mapped[str] = mapped_column(Text, server_default=text("'PERSON'"))
    state: Mapped[str] = mapped_column(Text, server_default=text("'ACTIVE'"))
    managing_workspace_id: Mapped[Id | None] = mapped_column(
        ForeignKey("workspaces.workspace_id", ondelete="SET NULL")
    )
    avatar_version: Mapped[int | None]
    creator_id: Mapped[Id | None]
    request_id: Mapped[str | None] = mapped_column(Text)


class ProfileRow(Table):
    """How the product looks and behaves for a person; without a row as in the beginning. `version` is the etag."""

    __tablename__ = "profiles"

    user_id: Mapped[Id] = mapped_column(ForeignKey("users.user_id", ondelete="CASCADE"), primary_key=True)
    locale: Mapped[str] = mapped_column(Text, server_default="")
    time_zone: Mapped[str] = mapped_column(Text, server_default="")
    theme: Mapped[str] = mapped_column(Text, server_default=text("'SYSTEM'"))
    notify_product_news: Mapped[bool] = mapped_column(server_default=false())
    notify_reports: Mapped[bool] = mapped_column(server_default=true())
    notify_alerts: Mapped[bool] = mapped_column(server_default=true())
    version: Mapped[int] = mapped_column(server_default=text("1"))
    update_time: Mapped[Time]


class Avatar(Table):
    """The picture of a person, a WebP without metadata; apart from the user, which is read much more often."""

    __tablename__ = "avatars"

    user_id: Mapped[Id] = mapped_column(ForeignKey("users.user_id", ondelete="CASCADE"), primary_key=True)
    image: Mapped[bytes] = mapped_column(LargeBinary)


class ErasureRow(Table):
    """The erasure of a user. It outlives the user and has nothing of theirs but the id.

    `request_time` is when the services were last asked.
    """

    __tablename__ = "erasures"
    __table_args__ = (
        UniqueConstraint("user_id", name="erasures_user_once"),
        Index("erasures_running", "request_time", postgresql_where=text("complete_time IS NULL")),
    )

    erasure_id: Mapped[Id] = mapped_column(primary_key=True)
    user_id: Mapped[Id]
    managing_workspace_id: Mapped[Id | None]
    token_hash: Mapped[bytes | None] = mapped_column(LargeBinary)
    receipt: Mapped[str | None] = mapped_column(Text)
    create_time: Mapped[Time]
    request_time: Mapped[Time]
    complete_time: Mapped[Time | None]


class ServiceErasureRow(Table):
    """What one service has done for an erasure: how many things it has erased and kept, by kind."""

    __tablename__ = "service_erasures"

    erasure_id: Mapped[Id] = mapped_column(
        ForeignKey("erasures.erasure_id", ondelete="CASCADE"), primary_key=True
    )
    service: Mapped[str] = mapped_column(Text, primary_key=True)
    erased: Mapped[dict[str, int]] = mapped_column(JSONB)
    kept: Mapped[dict[str, int]] = mapped_column(JSONB)
    complete_time: Mapped[Time]


class Workspace(Table):
    """A tenant. `rights_version` grows with each change of rights in it, and its row is the lock for such changes."""

    __tablename__ = "workspaces"
    __table_args__ = (UniqueConstraint("creator_id", "request_id", name="workspaces_request_once"),)

    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(Text)
    rights_version: Mapped[int] = mapped_column(BigInteger, server_default=text("1"))
    version: Mapped[int] = mapped_column(server_default=text("1"))
    creator_id: Mapped[Id]
    request_id: Mapped[str | None] = mapped_column(Text)
    create_time: Mapped[Time]
    update_time: Mapped[Time]
    require_second_factor: Mapped[bool] = mapped_column(server_default=false())
    default_role: Mapped[str] = mapped_column(Text, server_default=text("'viewer'"))
    allowed_email_domains: Mapped[list[str]] = mapped_column(ARRAY(Text), server_default=text("'{}'"))


class Member(Table):
    """A user in a workspace."""

    __tablename__ = "members"
    __table_args__ = (
        Index("members_by_user", "user_id", "workspace_id"),
        Index("members_by_standing", "workspace_id", "create_time", "user_id"),
    )

    workspace_id: Mapped[Id] = mapped_column(ForeignKey("workspaces.workspace_id"), primary_key=True)
    user_id: Mapped[Id] = mapped_column(ForeignKey("users.user_id"), primary_key=True)
    role: Mapped[str] = mapped_column(Text)
    create_time: Mapped[Time]


class Role(Table):
    """A custom role. Built-in ones are in `services.chassis.rights`."""

    __tablename__ = "roles"
    __table_args__ = (
        UniqueConstraint("workspace_id", "creator_id", "request_id", name="roles_request_once"),
        CheckConstraint("name NOT IN ('viewer', 'editor', 'admin', 'owner')", name="roles_not_builtin"),
    )

    workspace_id: Mapped[Id] = mapped_column(
        ForeignKey("workspaces.workspace_id", ondelete="CASCADE"), primary_key=True
    )
    name: Mapped[str] = mapped_column(Text, primary_key=True)
    title: Mapped[str] = mapped_column(Text)
    description: Mapped[str] = mapped_column(Text)
    permissions: Mapped[list[str]] = mapped_column(ARRAY(Text))
    version: Mapped[int] = mapped_column(server_default=text("1"))
    creator_id: Mapped[Id]
    request_id: Mapped[str | None] = mapped_column(Text)
    create_time: Mapped[Time]
    update_time: Mapped[Time]


class Team(Table):
    """A group of users in a workspace; `depth` is 1 at the top."""

    __tablename__ = "teams"
    __table_args__ = (
        ForeignKeyConstraint(
            ["workspace_id", "parent_team_id"], ["teams.workspace_id", "teams.team_id"], name="teams_parent"
        ),
        UniqueConstraint("workspace_id", "title", name="teams_title_once"),
        UniqueConstraint("workspace_id", "creator_id", "request_id", name="teams_request_once"),
        CheckConstraint(f"depth BETWEEN 1 AND {MAX_TEAM_DEPTH}", name="teams_depth"),
    )

    workspace_id: Mapped[Id] = mapped_column(ForeignKey("workspaces.workspace_id"), primary_key=True)
    team_id: Mapped[Id] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(Text)
    parent_team_id: Mapped[Id | None]
    depth: Mapped[int]
    version: Mapped[int] = mapped_column(server_default=text("1"))
    creator_id: Mapped[Id]
    request_id: Mapped[str | None] = mapped_column(Text)
    create_time: Mapped[Time]
    update_time: Mapped[Time]
    description: Mapped[str] = mapped_column(Text, server_default=text("''"))


class TeamMember(Table):
    """A user in a team, until `expire_time`. `role` is the name of a TeamMember.Role."""

    __tablename__ = "team_members"
    __table_args__ = (
        ForeignKeyConstraint(
            ["workspace_id", "team_id"], ["teams.workspace_id", "teams.team_id"], name="team_members_team"
        ),
        ForeignKeyConstraint(
            ["workspace_id", "user_id"],
            ["members.workspace_id", "members.user_id"],
            name="team_members_member",
            ondelete="CASCADE",
        ),
        Index("team_members_by_user", "workspace_id", "user_id"),
        Index("team_members_by_expiry", "expire_time", postgresql_where=text("expire_time IS NOT NULL")),
    )

    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    team_id: Mapped[Id] = mapped_column(primary_key=True)
    user_id: Mapped[Id] = mapped_column(primary_key=True)
    create_time: Mapped[Time]
    role: Mapped[str] = mapped_column(Text, server_default=text("'MEMBER'"))
    expire_time: Mapped[Time | None]


class Invitation(Table):
    """An address that may become a member; `state` is the name of an Invitation.State.

    The token of its link is kept nowhere: it is a MAC over this row, and `generation` makes it another one. A pending
    invitation after its `expire_time` has expired; EXPIRED is written where another one has taken its place.
    """

    __tablename__ = "invitations"
    __table_args__ = (
        UniqueConstraint("invitation_id", name="invitations_id_once"),
        UniqueConstraint("workspace_id", "creator_id", "request_id", name="invitations_request_once"),
        Index(
            "invitations_pending_once",
            "workspace_id",
            "email_key",
            unique=True,
            postgresql_where=text("state = 'PENDING'"),
        ),
        Index("invitations_by_email", "email_key"),
        Index("invitations_by_inviter", "inviter_id", "send_time"),
        Index("invitations_by_acceptor", "acceptor_id", postgresql_where=text("acceptor_id IS NOT NULL")),
    )

    workspace_id: Mapped[Id] = mapped_column(ForeignKey("workspaces.workspace_id"), primary_key=True)
    invitation_id: Mapped[Id] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(Text)
    email_key: Mapped[str] = mapped_column(Text)
    role: Mapped[str] = mapped_column(Text)
    team_ids: Mapped[list[str]] = mapped_column(ARRAY(Uuid(as_uuid=False)))
    state: Mapped[str] = mapped_column(Text, server_default=text("'PENDING'"))
    generation: Mapped[int] = mapped_column(server_default=text("1"))
    inviter_id: Mapped[Id]
    acceptor_id: Mapped[Id | None]
    creator_id: Mapped[Id]
    request_id: Mapped[str | None] = mapped_column(Text)
    create_time: Mapped[Time]
    send_time: Mapped[Time]
    expire_time: Mapped[Time]
    end_time: Mapped[Time | None]
