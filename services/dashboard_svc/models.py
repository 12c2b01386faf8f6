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
from sqlalchemy.dialects.postgresql import ARRAY
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
    """A dashboard; `version` grows with each change of it or of one of its widgets.

    The row and its widgets are what editors work on. While there is a draft, viewers see the version
    `published_version`, which has what the other `published_` columns say. `content` is a serialized
    meshboard.dashboard.v1.DashboardContent, of the fields that have no column. `delete_time` and `purge_time` are set
    in the bin.
    """

    __tablename__ = "dashboards"
    __table_args__ = (
        ForeignKeyConstraint(["workspace_id", "folder_id"], ["folders.workspace_id", "folders.folder_id"]),
        UniqueConstraint("workspace_id", "creator_id", "request_id", name="dashboards_request_once"),
        Index("dashboards_by_folder", "workspace_id", "folder_id", "dashboard_id"),
        Index(
            "dashboards_name_once",
            "workspace_id",
            "name",
            unique=True,
            postgresql_where=text("delete_time IS NULL"),
        ),
        Index("dashboards_to_purge", "purge_time", postgresql_where=text("purge_time IS NOT NULL")),
    )

    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    dashboard_id: Mapped[Id] = mapped_column(primary_key=True)
    folder_id: Mapped[Id | None]
    title: Mapped[str] = mapped_column(Text)
    description: Mapped[str] = mapped_column(Text)
    tags: Mapped[list[str]] = mapped_column(ARRAY(Text), server_default="{}")
    content: Mapped[bytes] = mapped_column(LargeBinary, server_default="")
    name: Mapped[str | None] = mapped_column(Text)
    published_version: Mapped[int | None] = mapped_column(BigInteger)
    published_title: Mapped[str | None] = mapped_column(Text)
    published_tags: Mapped[list[str] | None] = mapped_column(ARRAY(Text))
    published_update_time: Mapped[Time | None]
    delete_time: Mapped[Time | None]
    purge_time: Mapped[Time | None]
    version: Mapped[int] = mapped_column(BigInteger)
    creator_id: Mapped[Id]
    request_id: Mapped[str | None] = mapped_column(Text)
    create_time: Mapped[Time]
    update_time: Mapped[Time]


class Version(Base):
    """What a dashboard was when its `version` was `number`: `content`, a serialized DashboardContent.

    Of changes that were put together `begin_time` is that of the first, `create_time` that of the last. One that was
    `exported` as a file stays as it is.
    """

    __tablename__ = "versions"
    __table_args__ = (
        ForeignKeyConstraint(
            ["workspace_id", "dashboard_id"],
            ["dashboards.workspace_id", "dashboards.dashboard_id"],
            ondelete="CASCADE",
        ),
    )

    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    dashboard_id: Mapped[Id] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    author_id: Mapped[Id]
    reason: Mapped[str] = mapped_column(Text)
    restored_number: Mapped[int | None] = mapped_column(BigInteger)
    content: Mapped[bytes] = mapped_column(LargeBinary)
    exported: Mapped[bool] = mapped_column(server_default="false")
    begin_time: Mapped[Time]
    create_time: Mapped[Time]


class Favourite(Base):
    """That a user has marked a dashboard."""

    __tablename__ = "favourites"
    __table_args__ = (
        ForeignKeyConstraint(
            ["workspace_id", "dashboard_id"],
            ["dashboards.workspace_id", "dashboards.dashboard_id"],
            ondelete="CASCADE",
        ),
        Index("favourites_by_dashboard", "workspace_id", "dashboard_id"),
        Index("favourites_by_user", "user_id"),
    )

    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    user_id: Mapped[Id] = mapped_column(primary_key=True)
    dashboard_id: Mapped[Id] = mapped_column(primary_key=True)
    create_time: Mapped[Time]


class AppliedFile(Base):
    """What the file of a dashboard said when it was applied last: `content`, a serialized DashboardContent.

    `base_version` is what the file said that it was made of, `folder` the titles of the folder that it named; both are
    missing for files that were applied before they were kept.
    """

    __tablename__ = "applied_files"
    __table_args__ = (
        ForeignKeyConstraint(
            ["workspace_id", "dashboard_id"],
            ["dashboards.workspace_id", "dashboards.dashboard_id"],
            ondelete="CASCADE",
        ),
    )

    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    dashboard_id: Mapped[Id] = mapped_column(primary_key=True)
    content: Mapped[bytes] = mapped_column(LargeBinary)
    base_version: Mapped[str | None] = mapped_column(Text)
    folder: Mapped[list[str] | None] = mapped_column(ARRAY(Text))


class WidgetKind(Base):
    """A kind of widgets; `number` is that of its newest version."""

    __tablename__ = "widget_kinds"
    __table_args__ = (
        UniqueConstraint("workspace_id", "name", name="widget_kinds_name_once"),
        UniqueConstraint("workspace_id", "creator_id", "request_id", name="widget_kinds_request_once"),
    )

    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    widget_kind_id: Mapped[Id] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(Text)
    title: Mapped[str] = mapped_column(Text)
    description: Mapped[str] = mapped_column(Text)
    number: Mapped[int]
    version: Mapped[int] = mapped_column(BigInteger)
    creator_id: Mapped[Id]
    request_id: Mapped[str | None] = mapped_column(Text)
    create_time: Mapped[Time]
    update_time: Mapped[Time]


class WidgetKindVersion(Base):
    """What a kind makes of options: `content`, a serialized WidgetKind of the contract with nothing else."""

    __tablename__ = "widget_kind_versions"
    __table_args__ = (
        ForeignKeyConstraint(
            ["workspace_id", "widget_kind_id"],
            ["widget_kinds.workspace_id", "widget_kinds.widget_kind_id"],
            ondelete="CASCADE",
        ),
    )

    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    widget_kind_id: Mapped[Id] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    content: Mapped[bytes] = mapped_column(LargeBinary)
    creator_id: Mapped[Id]
    create_time: Mapped[Time]


class LibraryWidget(Base):
    """A widget of the library; `content` as in `Widget`. One that the release before this has made has no name."""

    __tablename__ = "library_widgets"
    __table_args__ = (
        UniqueConstraint("workspace_id", "creator_id", "request_id", name="library_widgets_request_once"),
        Index("library_widgets_name_once", "workspace_id", "name", unique=True),
        Index(
            "library_widgets_by_kind",
            "workspace_id",
            "widget_kind_id",
            "kind_number",
            postgresql_where=text("widget_kind_id IS NOT NULL"),
        ),
    )

    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    library_widget_id: Mapped[Id] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(Text)
    name: Mapped[str | None] = mapped_column(Text)
    kind: Mapped[int] = mapped_column(SmallInteger)
    content: Mapped[bytes] = mapped_column(LargeBinary)
    widget_kind_id: Mapped[Id | None]
    kind_number: Mapped[int | None]
    version: Mapped[int] = mapped_column(BigInteger)
    creator_id: Mapped[Id]
    request_id: Mapped[str | None] = mapped_column(Text)
    create_time: Mapped[Time]
    update_time: Mapped[Time]


class Widget(Base):
    """A widget. `kind` is the contract's number, `content` a serialized Widget of the contract.

    The content lacks what has a column of its own. A widget that shows one of the library has no title, kind 0, and
    nothing in its content that the library says. One of a kind that the workspace has made has its id and version as
    `widget_kind_id` and `kind_number` too. `query` is what the release before this one reads and writes.
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
        Index(
            "widgets_by_kind",
            "workspace_id",
            "widget_kind_id",
            "kind_number",
            postgresql_where=text("widget_kind_id IS NOT NULL"),
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
    widget_kind_id: Mapped[Id | None]
    kind_number: Mapped[int | None]
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


class Annotation(Base):
    """A mark on the axes of time, made by hand. `end_time` is absent for a moment."""

    __tablename__ = "annotations"
    __table_args__ = (
        ForeignKeyConstraint(
            ["workspace_id", "dashboard_id"],
            ["dashboards.workspace_id", "dashboards.dashboard_id"],
            ondelete="CASCADE",
        ),
        UniqueConstraint(
            "workspace_id", "dashboard_id", "creator_id", "request_id", name="annotations_request_once"
        ),
        Index("annotations_by_time", "workspace_id", "dashboard_id", "time", "annotation_id"),
    )

    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    dashboard_id: Mapped[Id] = mapped_column(primary_key=True)
    annotation_id: Mapped[Id] = mapped_column(primary_key=True)
    time: Mapped[Time]
    end_time: Mapped[Time | None]
    text: Mapped[str] = mapped_column(Text)
    tags: Mapped[list[str]] = mapped_column(ARRAY(Text))
    version: Mapped[int] = mapped_column(BigInteger)
    creator_id: Mapped[Id]
    request_id: Mapped[str | None] = mapped_column(Text)
    create_time: Mapped[Time]
    update_time: Mapped[Time]
