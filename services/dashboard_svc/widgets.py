"""The widgets of dashboards."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from meshboard.analytics.v1.query_pb2 import Query
from meshboard.analytics.v1.query_service_pb2 import ValidateQueryRequest
from meshboard.analytics.v1.query_service_pb2_grpc import QueryServiceStub
from meshboard.dashboard.v1 import dashboard_pb2
from meshboard.dashboard.v1 import widget_service_pb2 as pb
from meshboard.dashboard.v1.events_pb2 import WidgetCreated, WidgetDeleted, WidgetUpdated
from meshboard.dashboard.v1.widget_service_pb2_grpc import WidgetServiceServicer
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from uuid_utils.compat import uuid7

from services.chassis import auth, errors, outbox
from services.chassis.clients import Peer
from services.chassis.masks import changed_fields
from services.chassis.paging import Pages
from services.dashboard_svc import layouts
from services.dashboard_svc.boards import Boards, locked
from services.dashboard_svc.contents import record, touch
from services.dashboard_svc.convert import widget_to_pb
from services.dashboard_svc.kinds import check_fit
from services.dashboard_svc.models import Dashboard, Widget

Context = Any
MUTABLE = ("title", "kind", "query", "layout")
MAX_WIDGETS = 100


class WidgetServicer(WidgetServiceServicer):
    """meshboard.dashboard.v1.WidgetService. Each change holds the lock of the dashboard's row."""

    def __init__(
        self,
        db: async_sessionmaker[AsyncSession],
        boards: Boards,
        pages: Pages,
        analytics: Peer,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        new_id: Callable[[], str] = lambda: str(uuid7()),
    ) -> None:
        self.db = db
        self.boards = boards
        self.pages = pages
        self.queries = analytics.stub(QueryServiceStub)
        self.now = now
        self.new_id = new_id

    async def CreateWidget(
        self, request: pb.CreateWidgetRequest, context: Context
    ) -> pb.CreateWidgetResponse:
        """Adds the widget."""
        caller = auth.caller()
        check_fit(request.kind, request.query)
        await self._validate(request.query)
        async with self.db.begin() as session:
            dashboard = await locked(session, caller.workspace_id, request.dashboard_id)
            others = await _widgets(session, dashboard)
            for other in others:
                if request.request_id and (other.creator_id, other.request_id) == (
                    caller.user_id,
                    request.request_id,
                ):
                    return pb.CreateWidgetResponse(widget=widget_to_pb(other))
            if len(others) >= MAX_WIDGETS:
                raise errors.failed_precondition(
                    "TOO_MANY_WIDGETS", f"A dashboard has at most {MAX_WIDGETS} widgets.", limit=MAX_WIDGETS
                )
            wanted = request.layout if request.HasField("layout") else None
            layout = layouts.settle(wanted) if wanted else _below(others)
            now = self.now()
            row = Widget(
                workspace_id=dashboard.workspace_id,
                dashboard_id=dashboard.dashboard_id,
                widget_id=self.new_id(),
                title=request.title,
                kind=request.kind,
                query=request.query.SerializeToString(),
                x=layout.x,
                y=layout.y,
                width=layout.width,
                height=layout.height,
                version=1,
                creator_id=caller.user_id,
                request_id=request.request_id or None,
                create_time=now,
                update_time=now,
            )
            session.add(row)
            await self._touch(session, dashboard, now)
            created = WidgetCreated(workspace_id=row.workspace_id, widget=widget_to_pb(row))
            outbox.add(session, created, workspace_id=caller.workspace_id)
        await self.boards.changed(dashboard.workspace_id, dashboard.dashboard_id)
        return pb.CreateWidgetResponse(widget=created.widget)

    async def GetWidget(self, request: pb.GetWidgetRequest, context: Context) -> pb.GetWidgetResponse:
        """Finds the widget among those of the dashboard, which are cached."""
        widgets = await self.boards.widgets(auth.caller().workspace_id, request.dashboard_id.lower())
        for widget in widgets:
            if widget.widget_id == request.widget_id.lower():
                return pb.GetWidgetResponse(widget=widget)
        raise _absent()

    async def ListWidgets(self, request: pb.ListWidgetsRequest, context: Context) -> pb.ListWidgetsResponse:
        """Lists in the order of the layout."""
        workspace_id = auth.caller().workspace_id
        page = self.pages.open(request, workspace_id)
        widgets = await self.boards.widgets(workspace_id, request.dashboard_id.lower())

        def key(widget: dashboard_pb2.Widget) -> tuple[int, int, str]:
            return widget.layout.y, widget.layout.x, widget.widget_id

        shown, next_page_token = page.close(page.rest(widgets, key), key)
        return pb.ListWidgetsResponse(widgets=shown, next_page_token=next_page_token)

    async def UpdateWidget(
        self, request: pb.UpdateWidgetRequest, context: Context
    ) -> pb.UpdateWidgetResponse:
        """Changes what the mask names."""
        caller = auth.caller()
        wanted = request.widget
        fields = changed_fields(wanted, request.update_mask, MUTABLE)
        if "kind" in fields and not wanted.kind:
            raise errors.invalid_fields([("widget.kind", "is not set")])
        if "query" in fields:
            if not wanted.HasField("query"):
                raise errors.invalid_fields([("widget.query", "is not set")])
            await self._validate(wanted.query)
        async with self.db.begin() as session:
            dashboard = await locked(session, caller.workspace_id, wanted.dashboard_id)
            row = await _widget(session, dashboard, wanted.widget_id)
            if wanted.etag and wanted.etag != str(row.version):
                raise errors.etag_mismatch()
            if "title" in fields:
                row.title = wanted.title
            if "kind" in fields:
                row.kind = wanted.kind
            if "query" in fields:
                row.query = wanted.query.SerializeToString()
            if "layout" in fields:
                others = [other for other in await _widgets(session, dashboard) if other is not row]
                _place(row, layouts.settle(wanted.layout) if wanted.HasField("layout") else _below(others))
            now = self.now()
            row.version += 1
            row.update_time = now
            await self._touch(session, dashboard, now)
            updated = WidgetUpdated(workspace_id=row.workspace_id, widget=widget_to_pb(row))
            check_fit(updated.widget.kind, updated.widget.query)
            outbox.add(session, updated, workspace_id=caller.workspace_id)
        await self.boards.changed(dashboard.workspace_id, dashboard.dashboard_id)
        return pb.UpdateWidgetResponse(widget=updated.widget)

    async def DeleteWidget(
        self, request: pb.DeleteWidgetRequest, context: Context
    ) -> pb.DeleteWidgetResponse:
        """Removes the widget."""
        caller = auth.caller()
        async with self.db.begin() as session:
            dashboard = await locked(session, caller.workspace_id, request.dashboard_id)
            row = await _widget(session, dashboard, request.widget_id)
            await session.delete(row)
            await self._touch(session, dashboard, self.now())
            gone = WidgetDeleted(
                workspace_id=row.workspace_id, dashboard_id=row.dashboard_id, widget_id=row.widget_id
            )
            outbox.add(session, gone, workspace_id=caller.workspace_id)
        await self.boards.changed(gone.workspace_id, gone.dashboard_id)
        return pb.DeleteWidgetResponse()

    async def _touch(self, session: AsyncSession, dashboard: Dashboard, now: datetime) -> None:
        touch(dashboard, now)
        await record(session, dashboard, auth.caller().user_id)

    async def _validate(self, query: Query) -> None:
        """Fails as analytics_svc does: when the caller may not ask this, or nobody can."""
        await self.queries.ValidateQuery(ValidateQueryRequest(query=query))


async def _widgets(session: AsyncSession, dashboard: Dashboard) -> list[Widget]:
    rows = await session.scalars(
        select(Widget).where(
            Widget.workspace_id == dashboard.workspace_id, Widget.dashboard_id == dashboard.dashboard_id
        )
    )
    return list(rows)


async def _widget(session: AsyncSession, dashboard: Dashboard, widget_id: str) -> Widget:
    row = await session.get(Widget, (dashboard.workspace_id, dashboard.dashboard_id, widget_id.lower()))
    if row is None:
        raise _absent()
    return row


def _below(rows: list[Widget]) -> dashboard_pb2.Layout:
    return layouts.below((row.y, row.height) for row in rows)


def _place(row: Widget, layout: dashboard_pb2.Layout) -> None:
    row.x, row.y, row.width, row.height = layout.x, layout.y, layout.width, layout.height


def _absent() -> errors.Error:
    return errors.not_found("WIDGET_NOT_FOUND", "The dashboard has no such widget.")
