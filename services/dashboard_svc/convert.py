"""Rows as messages of the contract, and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from google.protobuf.message import Message
from meshboard.dashboard.v1 import (
    annotation_pb2,
    dashboard_pb2,
    folder_pb2,
    library_pb2,
    share_link_pb2,
    version_service_pb2,
    widget_kind_pb2,
)

from services.chassis.times import timestamp_of
from services.dashboard_svc import markdown
from services.dashboard_svc.models import (
    Annotation,
    Dashboard,
    Folder,
    LibraryWidget,
    ShareLink,
    Version,
    Widget,
    WidgetKind,
    WidgetKindVersion,
)

# What a widget says of itself or a library widget of it, beside title and kind.
CONTENT = ("description", "query", "funnel", "retention", "markdown", "custom", "display")


def dashboard_to_pb(row: Dashboard, published: Version | None = None) -> dashboard_pb2.Dashboard:
    """A dashboard as its editors have it, or, while it has a draft, as viewers see it by the `published` version.

    Whether the caller has marked it is not in it.
    """
    dashboard = dashboard_pb2.Dashboard(
        dashboard_id=row.dashboard_id,
        workspace_id=row.workspace_id,
        title=row.title,
        description=row.description,
        creator_id=row.creator_id,
        create_time=timestamp_of(row.create_time),
        update_time=timestamp_of(row.update_time),
        etag=str(row.version),
        folder_id=row.folder_id or "",
        tags=row.tags,
        name=row.name or "",
        has_draft=row.published_version is not None,
        delete_time=timestamp_of(row.delete_time) if row.delete_time else None,
        purge_time=timestamp_of(row.purge_time) if row.purge_time else None,
    )
    content = dashboard_pb2.DashboardContent.FromString(published.content if published else row.content)
    if published:
        dashboard.title, dashboard.description = content.title, content.description
        dashboard.tags[:] = content.tags
        dashboard.etag = str(published.number)
        dashboard.update_time.CopyFrom(timestamp_of(published.create_time))
    dashboard.variables.extend(content.variables)
    dashboard.annotation_queries.extend(content.annotation_queries)
    if content.HasField("settings"):
        dashboard.settings.CopyFrom(content.settings)
    return dashboard


def version_to_pb(row: Version, dashboard: Dashboard) -> version_service_pb2.Version:
    """A version of the dashboard."""
    return version_service_pb2.Version(
        version_id=str(row.number),
        author_id=row.author_id,
        reason=row.reason,
        create_time=timestamp_of(row.create_time),
        restored_version_id=str(row.restored_number or ""),
        published=row.number == dashboard.published_version,
    )


def folder_to_pb(row: Folder) -> folder_pb2.Folder:
    """A folder."""
    return folder_pb2.Folder(
        folder_id=row.folder_id,
        workspace_id=row.workspace_id,
        title=row.title,
        parent_folder_id=row.parent_folder_id or "",
        creator_id=row.creator_id,
        create_time=timestamp_of(row.create_time),
        update_time=timestamp_of(row.update_time),
        etag=str(row.version),
    )


def share_link_to_pb(row: ShareLink) -> share_link_pb2.ShareLink:
    """A share link; nothing in it opens it."""
    link = share_link_pb2.ShareLink.FromString(row.content)
    link.MergeFrom(
        share_link_pb2.ShareLink(
            share_link_id=row.share_link_id,
            dashboard_id=row.dashboard_id,
            workspace_id=row.workspace_id,
            title=row.title,
            expire_time=timestamp_of(row.expire_time) if row.expire_time else None,
            has_password=row.password_hash is not None,
            paused=row.paused,
            view_count=min(row.view_count, 2**31 - 1),
            last_view_time=timestamp_of(row.last_view_time) if row.last_view_time else None,
            creator_id=row.creator_id,
            create_time=timestamp_of(row.create_time),
            update_time=timestamp_of(row.update_time),
            etag=str(row.version),
        )
    )
    return link


def widget_to_pb(row: Widget) -> dashboard_pb2.Widget:
    """A widget; what one of the library says of it is not in it."""
    widget = dashboard_pb2.Widget.FromString(row.content)
    widget.MergeFrom(
        dashboard_pb2.Widget(
            widget_id=row.widget_id,
            dashboard_id=row.dashboard_id,
            title=row.title,
            kind=dashboard_pb2.Widget.Kind.ValueType(row.kind),
            layout=dashboard_pb2.Layout(x=row.x, y=row.y, width=row.width, height=row.height),
            library_widget_id=row.library_widget_id or "",
            name=row.name or "",
            create_time=timestamp_of(row.create_time),
            update_time=timestamp_of(row.update_time),
            etag=str(row.version),
        )
    )
    return widget


def fill_widget(row: Widget, widget: dashboard_pb2.Widget) -> None:
    """Makes the row say what the widget says, but for ids, times and the version."""
    shown = dashboard_pb2.Widget() if widget.library_widget_id else widget
    row.title, row.kind = shown.title, shown.kind
    row.content = content_of_widget(
        shown,
        row.content,
        own_time_range=widget.own_time_range,
        time_range_variable=widget.time_range_variable,
    )
    row.query = shown.query.SerializeToString()
    fill_kind(row, shown)
    row.library_widget_id = widget.library_widget_id.lower() or None
    row.name = widget.name or None
    layout = widget.layout
    row.x, row.y, row.width, row.height = layout.x, layout.y, layout.width, layout.height


def fill_kind(row: Widget | LibraryWidget, widget: dashboard_pb2.Widget) -> None:
    """Makes the row say of which kind of the workspace's own the widget is."""
    row.widget_kind_id = widget.custom.widget_kind_id or None
    row.kind_number = widget.custom.version or None


def widget_kind_to_pb(
    row: WidgetKind, version: WidgetKindVersion | None = None
) -> widget_kind_pb2.WidgetKind:
    """A kind of widgets; without a `version` it lacks schema, template and spec."""
    kind = widget_kind_pb2.WidgetKind(
        widget_kind_id=row.widget_kind_id,
        workspace_id=row.workspace_id,
        name=row.name,
        title=row.title,
        description=row.description,
        version=version.number if version else row.number,
        creator_id=row.creator_id,
        create_time=timestamp_of(row.create_time),
        update_time=timestamp_of(row.update_time),
        etag=str(row.version),
    )
    kind.MergeFromString(version.content if version else b"")
    return kind


def library_widget_to_pb(row: LibraryWidget) -> library_pb2.LibraryWidget:
    """A widget of the library."""
    shown = dashboard_pb2.Widget.FromString(row.content)
    widget = library_pb2.LibraryWidget(
        library_widget_id=row.library_widget_id,
        workspace_id=row.workspace_id,
        title=row.title,
        name=row.name or "",
        kind=dashboard_pb2.Widget.Kind.ValueType(row.kind),
        creator_id=row.creator_id,
        create_time=timestamp_of(row.create_time),
        update_time=timestamp_of(row.update_time),
        etag=str(row.version),
    )
    for field in (*CONTENT, "html"):
        copy_field(shown, widget, field)
    return widget


def copy_field(from_: Message, to: Message, field: str) -> None:
    """Makes a field of one message what the field of this name is in another, also when that is not set."""
    to.ClearField(field)
    value = getattr(from_, field)
    if not isinstance(value, Message):
        setattr(to, field, value)
    elif from_.HasField(field):
        getattr(to, field).CopyFrom(value)


def fields_of(message: Message, fields: Iterable[str]) -> dashboard_pb2.Widget:
    """The fields of a message that has them under the names that a widget has."""
    widget = dashboard_pb2.Widget()
    for field in fields:
        copy_field(message, widget, field)
    return widget


def content_of_widget(widget: dashboard_pb2.Widget, before: bytes | None = None, **more: Any) -> bytes:
    """What the column `content` holds of a widget: its content, and `more` fields; `before` is what it held."""
    content = dashboard_pb2.Widget(**more)
    for field in CONTENT:
        copy_field(widget, content, field)
    # Made here, where all that is stored passes, so that nobody can bring HTML of their own.
    known = dashboard_pb2.Widget.FromString(before or b"")
    content.html = known.html if known.markdown == widget.markdown else markdown.to_html(widget.markdown)
    return content.SerializeToString(deterministic=True)


def annotation_to_pb(row: Annotation) -> annotation_pb2.Annotation:
    """An annotation."""
    return annotation_pb2.Annotation(
        annotation_id=row.annotation_id,
        dashboard_id=row.dashboard_id,
        time=timestamp_of(row.time),
        end_time=timestamp_of(row.end_time) if row.end_time else None,
        text=row.text,
        tags=row.tags,
        origin=annotation_pb2.Annotation.BY_HAND,
        creator_id=row.creator_id,
        create_time=timestamp_of(row.create_time),
        update_time=timestamp_of(row.update_time),
        etag=str(row.version),
    )
