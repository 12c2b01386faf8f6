"""Rows as messages of the contract, and back."""

from __future__ import annotations

from meshboard.analytics.v1 import query_pb2
from meshboard.dashboard.v1 import dashboard_pb2, folder_pb2, version_service_pb2

from services.chassis.times import timestamp_of
from services.dashboard_svc.models import Dashboard, Folder, Version, Widget


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


def widget_to_pb(row: Widget) -> dashboard_pb2.Widget:
    """A widget."""
    return dashboard_pb2.Widget(
        widget_id=row.widget_id,
        dashboard_id=row.dashboard_id,
        title=row.title,
        kind=dashboard_pb2.Widget.Kind.ValueType(row.kind),
        query=query_pb2.Query.FromString(row.query),
        layout=dashboard_pb2.Layout(x=row.x, y=row.y, width=row.width, height=row.height),
        create_time=timestamp_of(row.create_time),
        update_time=timestamp_of(row.update_time),
        etag=str(row.version),
    )


def fill_widget(row: Widget, widget: dashboard_pb2.Widget) -> None:
    """Gives a row the content of a widget."""
    row.title = widget.title
    row.kind = widget.kind
    row.query = widget.query.SerializeToString()
    layout = widget.layout
    row.x, row.y, row.width, row.height = layout.x, layout.y, layout.width, layout.height
