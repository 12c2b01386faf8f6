"""The tables of user_svc."""

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Text,
    UniqueConstraint,
    false,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from services.chassis.db import Id, Time

MAX_TEAM_DEPTH = 8
# Of a user; otherwise a PERSON.
SERVICE_ACCOUNT = "SERVICE_ACCOUNT"


class Table(DeclarativeBase):
    """Tables that only user_svc reads and writes."""


class User(Table):
    """A person, or a service account. `version` is the etag.

    `sign_in_time` is when the last session began, `email_time` how new the address is.
    """

    __tablename__ = "users"

    user_id: Mapped[Id] = mapped_column(primary_key=True)
    display_name: Mapped[str] = mapped_column(Text)
    email: Mapped[str] = mapped_column(Text)
    version: Mapped[int] = mapped_column(server_default=text("1"))
    create_time: Mapped[Time]
    update_time: Mapped[Time]
    sign_in_time: Mapped[Time | None]
    email_time: Mapped[Time | None]
    kind: Mapped[str] = mapped_column(Text, server_default=text("'PERSON'"))


class Workspace(Table):
    """A tenant. `rights_version` grows with each change of rights in it, and its row is the lock for such changes."""

    __tablename__ = "workspaces"
    __table_args__ = (UniqueConstraint("creator_id", "request_id", name="workspaces_request_once"),)

    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(Text)
    rights_version: Mapped[int] = mapped_column(BigInteger, server_default=text("1"))
    version: Mapped[int] = mapped_column(server_default=text("1"))
    creator_id: Mapped[Id] = mapped_column(ForeignKey("users.user_id"))
    request_id: Mapped[str | None] = mapped_column(Text)
    create_time: Mapped[Time]
    update_time: Mapped[Time]
    require_second_factor: Mapped[bool] = mapped_column(server_default=false())


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


class TeamMember(Table):
    """A user in a team."""

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
    )

    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    team_id: Mapped[Id] = mapped_column(primary_key=True)
    user_id: Mapped[Id] = mapped_column(primary_key=True)
    create_time: Mapped[Time]
