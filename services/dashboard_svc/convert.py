"""Rows as messages of the contract, and back."""

from __future__ import annotations

from meshboard.analytics.v1 import query_pb2
from meshboard.dashboard.v1 import dashboard_pb2, folder_pb2, share_link_pb2

from services.chassis.times import timestamp_of
from services.dashboard_svc.models import Dashboard, Folder, ShareLink, Widget


def dashboard_to_pb(row: Dashboard) -> dashboard_pb2.Dashboard:
    """A dashboard."""
    return dashboard_pb2.Dashboard(
        dashboard_id=row.dashboard_id,
        workspace_id=row.workspace_id,
        title=row.title,
        description=row.description,
        creator_id=row.creator_id,
        create_time=timestamp_of(row.create_time),
        update_time=timestamp_of(row.update_time),
        etag=str(row.version),
        folder_id=row.folder_id or "",
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
