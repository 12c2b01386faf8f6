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
    text,
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


class LibraryWidget(Base):
    """A widget of the library; `content` as in `Widget`."""

    __tablename__ = "library_widgets"
    __table_args__ = (
        UniqueConstraint("workspace_id", "creator_id", "request_id", name="library_widgets_request_once"),
    )

    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    library_widget_id: Mapped[Id] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(Text)
    kind: Mapped[int] = mapped_column(SmallInteger)
    content: Mapped[bytes] = mapped_column(LargeBinary)
    version: Mapped[int] = mapped_column(BigInteger)
    creator_id: Mapped[Id]
    request_id: Mapped[str | None] = mapped_column(Text)
    create_time: Mapped[Time]
    update_time: Mapped[Time]


class Widget(Base):
    """A widget. `kind` is the contract's number, `content` a serialized Widget of the contract.

    The content lacks what has a column of its own. A widget that shows one of the library has no title, kind 0, and
    nothing in its content that the library says. `query` is what the release before this one reads and writes.
    """

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
        # Looked at in the end, so that two widgets can change names.
        UniqueConstraint(
            "workspace_id",
            "dashboard_id",
            "name",
            name="widgets_name_once",
            deferrable=True,
            initially="DEFERRED",
        ),
        Index(
            "widgets_by_library",
            "workspace_id",
            "library_widget_id",
            "dashboard_id",
            postgresql_where=text("library_widget_id IS NOT NULL"),
        ),
    )

    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    dashboard_id: Mapped[Id] = mapped_column(primary_key=True)
    widget_id: Mapped[Id] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(Text)
    kind: Mapped[int] = mapped_column(SmallInteger)
    query: Mapped[bytes] = mapped_column(LargeBinary, default=b"")
    content: Mapped[bytes] = mapped_column(LargeBinary, default=b"")
    library_widget_id: Mapped[Id | None]
    name: Mapped[str | None] = mapped_column(Text)
    x: Mapped[int]
    y: Mapped[int]
    width: Mapped[int]
    height: Mapped[int]
    version: Mapped[int] = mapped_column(BigInteger)
    creator_id: Mapped[Id]
    request_id: Mapped[str | None] = mapped_column(Text)
    create_time: Mapped[Time]
    update_time: Mapped[Time]
