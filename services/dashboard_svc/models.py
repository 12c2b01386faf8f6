"""The tables of dashboard_svc."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    ForeignKeyConstraint,
    Index,
    LargeBinary,
    SmallInteger,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from services.chassis.db import Id, Time


class Base(DeclarativeBase):
    """The tables of this service, beside those of the chassis."""


class Folder(Base):
    """A place for dashboards and folders."""

    __tablename__ = "folders"
    __table_args__ = (
        ForeignKeyConstraint(
            ["workspace_id", "parent_folder_id"], ["folders.workspace_id", "folders.folder_id"]
        ),
        UniqueConstraint("workspace_id", "creator_id", "request_id", name="folders_request_once"),
        Index("folders_by_parent", "workspace_id", "parent_folder_id", "folder_id"),
    )

    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    folder_id: Mapped[Id] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(Text)
    parent_folder_id: Mapped[Id | None]
    version: Mapped[int] = mapped_column(BigInteger)
    creator_id: Mapped[Id]
    request_id: Mapped[str | None] = mapped_column(Text)
    create_time: Mapped[Time]
    update_time: Mapped[Time]


class ShareLink(Base):
    """A link to a dashboard. `content` is a serialized ShareLink with what SQL need not know."""

    __tablename__ = "share_links"
    __table_args__ = (
        ForeignKeyConstraint(
            ["workspace_id", "dashboard_id"],
            ["dashboards.workspace_id", "dashboards.dashboard_id"],
            ondelete="CASCADE",
        ),
        UniqueConstraint("token_hash", name="share_links_token_once"),
        UniqueConstraint(
            "workspace_id", "dashboard_id", "creator_id", "request_id", name="share_links_request_once"
        ),
    )

    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    dashboard_id: Mapped[Id] = mapped_column(primary_key=True)
    share_link_id: Mapped[Id] = mapped_column(primary_key=True)
    token_hash: Mapped[bytes] = mapped_column(LargeBinary)
    title: Mapped[str] = mapped_column(Text)
    expire_time: Mapped[Time | None]
    password_hash: Mapped[str | None] = mapped_column(Text)
    paused: Mapped[bool]
    content: Mapped[bytes] = mapped_column(LargeBinary)
    view_count: Mapped[int] = mapped_column(BigInteger)
    last_view_time: Mapped[Time | None]
    version: Mapped[int] = mapped_column(BigInteger)
    creator_id: Mapped[Id]
    request_id: Mapped[str | None] = mapped_column(Text)
    create_time: Mapped[Time]
    update_time: Mapped[Time]


class Snapshot(Base):
    """What a link to data of one moment shows: `content` is a serialized SnapshotContent."""

    __tablename__ = "snapshots"
    __table_args__ = (
        ForeignKeyConstraint(
            ["workspace_id", "dashboard_id", "share_link_id"],
            ["share_links.workspace_id", "share_links.dashboard_id", "share_links.share_link_id"],
            ondelete="CASCADE",
        ),
    )

    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    dashboard_id: Mapped[Id] = mapped_column(primary_key=True)
    share_link_id: Mapped[Id] = mapped_column(primary_key=True)
    content: Mapped[bytes] = mapped_column(LargeBinary)


class Dashboard(Base):
    """A dashboard; `version` grows with each change of it or of one of its widgets."""

    __tablename__ = "dashboards"
    __table_args__ = (
        ForeignKeyConstraint(["workspace_id", "folder_id"], ["folders.workspace_id", "folders.folder_id"]),
        UniqueConstraint("workspace_id", "creator_id", "request_id", name="dashboards_request_once"),
        Index("dashboards_by_folder", "workspace_id", "folder_id", "dashboard_id"),
    )

    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    dashboard_id: Mapped[Id] = mapped_column(primary_key=True)
    folder_id: Mapped[Id | None]
    title: Mapped[str] = mapped_column(Text)
    description: Mapped[str] = mapped_column(Text)
    version: Mapped[int] = mapped_column(BigInteger)
    creator_id: Mapped[Id]
    request_id: Mapped[str | None] = mapped_column(Text)
    create_time: Mapped[Time]
    update_time: Mapped[Time]


class Widget(Base):
    """A widget. `kind` is the contract's number, `query` a serialized meshboard.analytics.v1.Query."""

    __tablename__ = "widgets"
    __table_args__ = (
        ForeignKeyConstraint(
            ["workspace_id", "dashboard_id"],
            ["dashboards.workspace_id", "dashboards.dashboard_id"],
            ondelete="CASCADE",
        ),
        UniqueConstraint(
            "workspace_id", "dashboard_id", "creator_id", "request_id", name="widgets_request_once"
        ),
    )

    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    dashboard_id: Mapped[Id] = mapped_column(primary_key=True)
    widget_id: Mapped[Id] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(Text)
    kind: Mapped[int] = mapped_column(SmallInteger)
    query: Mapped[bytes] = mapped_column(LargeBinary)
    x: Mapped[int]
    y: Mapped[int]
    width: Mapped[int]
    height: Mapped[int]
    version: Mapped[int] = mapped_column(BigInteger)
    creator_id: Mapped[Id]
    request_id: Mapped[str | None] = mapped_column(Text)
    create_time: Mapped[Time]
    update_time: Mapped[Time]
