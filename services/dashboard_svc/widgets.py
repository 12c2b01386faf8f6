"""The widgets of dashboards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from meshboard.dashboard.v1 import dashboard_pb2
from meshboard.dashboard.v1 import widget_service_pb2 as pb
from meshboard.dashboard.v1.events_pb2 import WidgetCreated, WidgetDeleted, WidgetUpdated
from meshboard.dashboard.v1.widget_service_pb2_grpc import WidgetServiceServicer
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from uuid_utils.compat import uuid7

from services.chassis import auth, errors, outbox
from services.chassis.masks import changed_fields
from services.chassis.paging import Pages
from services.dashboard_svc import kinds, layouts, library, markdown
from services.dashboard_svc.boards import Boards, locked
from services.dashboard_svc.contents import MAX_WIDGETS, record, touch
from services.dashboard_svc.convert import copy_field, dashboard_to_pb, fields_of, fill_widget, widget_to_pb
from services.dashboard_svc.custom_widgets import CustomWidgets, hold
from services.dashboard_svc.library import shown_widgets
from services.dashboard_svc.models import Dashboard, Widget
from services.dashboard_svc.validation import Validation, check_variables

Context = Any
MUTABLE = (
    *kinds.OF_THE_LIBRARY,
    "library_widget_id",
    "name",
    "own_time_range",
    "time_range_variable",
    "layout",
)


class WidgetServicer(WidgetServiceServicer):
    """meshboard.dashboard.v1.WidgetService. Each change holds the lock of the dashboard's row."""

    def __init__(
        self,
        db: async_sessionmaker[AsyncSession],
        boards: Boards,
        pages: Pages,
        validation: Validation,
        custom: CustomWidgets,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        new_id: Callable[[], str] = lambda: str(uuid7()),
    ) -> None:
        self.db = db
        self.boards = boards
        self.pages = pages
        self.validation = validation
        self.custom = custom
        self.now = now
        self.new_id = new_id

    async def CreateWidget(
        self, request: pb.CreateWidgetRequest, context: Context
    ) -> pb.CreateWidgetResponse:
        """Adds the widget."""
        caller = auth.caller()
        widget = fields_of(request, MUTABLE)
        await self.custom.fill(caller.workspace_id, widget)
        kinds.check(widget)
        await self.validation.check(caller.workspace_id, [widget])
        await markdown.prepare(widget.markdown)
        async with self.db.begin() as session:
            dashboard = await locked(session, caller.workspace_id, request.dashboard_id)
            others = await _widgets(session, dashboard)
            for other in others:
                if request.request_id and (other.creator_id, other.request_id) == (
                    caller.user_id,
                    request.request_id,
                ):
                    return pb.CreateWidgetResponse(widget=await _shown(session, other))
            if len(others) >= MAX_WIDGETS:
                raise errors.failed_precondition(
                    "TOO_MANY_WIDGETS", f"A dashboard has at most {MAX_WIDGETS} widgets.", limit=MAX_WIDGETS
                )
            row = Widget(
                workspace_id=dashboard.workspace_id,
                dashboard_id=dashboard.dashboard_id,
                widget_id=self.new_id(),
                version=1,
                creator_id=caller.user_id,
                request_id=request.request_id or None,
                create_time=self.now(),
                update_time=self.now(),
            )
            await _check_variables(session, dashboard, row, widget)
            await hold(session, caller.workspace_id, widget)
            _fit_in(row, widget, others)
            session.add(row)
            await self._touch(session, dashboard)
            created = WidgetCreated(workspace_id=row.workspace_id, widget=await _shown(session, row))
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
        caller, wanted = auth.caller(), request.widget
        fields = changed_fields(wanted, request.update_mask, MUTABLE)
        changes = fields_of(wanted, fields)
        if await self.custom.fill(caller.workspace_id, changes):
            fields.add("query")
        await self.validation.check(caller.workspace_id, [changes])
        await markdown.prepare(changes.markdown)
        async with self.db.begin() as session:
            dashboard = await locked(session, caller.workspace_id, wanted.dashboard_id)
            rows = await _widgets(session, dashboard)
            row = _find(rows, wanted.widget_id)
            if wanted.etag and wanted.etag != str(row.version):
                raise errors.etag_mismatch()
            widget = await _changed(session, row, changes, fields)
            await _check_variables(session, dashboard, row, changes)
            await hold(session, caller.workspace_id, widget, [row.widget_kind_id])
            _fit_in(row, widget, [other for other in rows if other is not row])
            updated = await self._update(session, dashboard, [row])
        await self.boards.changed(dashboard.workspace_id, dashboard.dashboard_id)
        return pb.UpdateWidgetResponse(widget=updated[0])

    async def ArrangeWidgets(
        self, request: pb.ArrangeWidgetsRequest, context: Context
    ) -> pb.ArrangeWidgetsResponse:
        """Moves the widgets, then looks whether they have room."""
        caller = auth.caller()
        wanted = {placement.widget_id.lower(): placement.layout for placement in request.placements}
        if len(wanted) < len(request.placements):
            raise errors.invalid_fields([("placements", "a widget is there twice")])
        async with self.db.begin() as session:
            dashboard = await locked(session, caller.workspace_id, request.dashboard_id, request.etag)
            rows = await _widgets(session, dashboard)
            moved = [_find(rows, widget_id) for widget_id in wanted]
            for row, layout in zip(moved, map(layouts.settle, wanted.values()), strict=True):
                row.x, row.y, row.width, row.height = layout.x, layout.y, layout.width, layout.height
            places = _layouts(rows)
            for row in moved:
                layouts.check_free(row.widget_id, places[row.widget_id], places)
            updated = await self._update(session, dashboard, moved)
        await self.boards.changed(dashboard.workspace_id, dashboard.dashboard_id)
        return pb.ArrangeWidgetsResponse(widgets=updated)

    async def DeleteWidget(
        self, request: pb.DeleteWidgetRequest, context: Context
    ) -> pb.DeleteWidgetResponse:
        """Removes the widget."""
        caller = auth.caller()
        async with self.db.begin() as session:
            dashboard = await locked(session, caller.workspace_id, request.dashboard_id)
            row = _find(await _widgets(session, dashboard), request.widget_id)
            await session.delete(row)
            await self._touch(session, dashboard)
            gone = WidgetDeleted(
                workspace_id=row.workspace_id, dashboard_id=row.dashboard_id, widget_id=row.widget_id
            )
            outbox.add(session, gone, workspace_id=caller.workspace_id)
        await self.boards.changed(gone.workspace_id, gone.dashboard_id)
        return pb.DeleteWidgetResponse()

    async def _update(
        self, session: AsyncSession, dashboard: Dashboard, rows: Sequence[Widget]
    ) -> list[dashboard_pb2.Widget]:
        """Notes that the rows have changed; gives them as they are now."""
        for row in rows:
            row.version += 1
            row.update_time = self.now()
        workspace_id = dashboard.workspace_id
        updated = await shown_widgets(session, workspace_id, map(widget_to_pb, rows))
        for widget in updated:
            event = WidgetUpdated(workspace_id=workspace_id, widget=widget)
            outbox.add(session, event, workspace_id=workspace_id)
        await self._touch(session, dashboard)
        return updated

    async def _touch(self, session: AsyncSession, dashboard: Dashboard) -> None:
        touch(dashboard, self.now())
        await record(session, dashboard, auth.caller().user_id)


async def _changed(
    session: AsyncSession, row: Widget, changes: dashboard_pb2.Widget, fields: set[str]
) -> dashboard_pb2.Widget:
    """What the widget is to be. Raises INVALID_ARGUMENT."""
    widget = widget_to_pb(row)
    if changes.library_widget_id:
        for field in kinds.OF_THE_LIBRARY:
            copy_field(dashboard_pb2.Widget(), widget, field)
    elif "library_widget_id" in fields:
        widget = await _shown(session, row)
    for field in fields:
        copy_field(changes, widget, field)
    if not widget.library_widget_id:
        kinds.keep_to_kind(widget, fields)
    kinds.check(widget, "widget.")
    kinds.check_made(widget, fields, "widget.")
    return widget


async def _check_variables(
    session: AsyncSession, dashboard: Dashboard, row: Widget, changes: dashboard_pb2.Widget
) -> None:
    """Raises INVALID_ARGUMENT when what has changed names variables that are not there; NOT_FOUND for library widgets.

    What has not changed may be at odds with a dashboard that has.
    """
    asking = dashboard_pb2.Widget()
    asking.CopyFrom(changes)
    if changes.library_widget_id.lower() not in {"", row.library_widget_id}:
        library.show(await library.held(session, dashboard.workspace_id, changes.library_widget_id), asking)
    check_variables(asking, dashboard_to_pb(dashboard).variables)


def _fit_in(row: Widget, widget: dashboard_pb2.Widget, others: Sequence[Widget]) -> None:
    """Writes the widget to the row, if it gets on with the other widgets."""
    if widget.name and widget.name in {other.name for other in others}:
        raise errors.already_exists(
            "WIDGET_NAME_TAKEN", "Another widget of the dashboard has this name.", name=widget.name
        )
    places = _layouts(others)
    layout = layouts.settle(widget.layout) if widget.HasField("layout") else layouts.below(places.values())
    if (layout.x, layout.y, layout.width, layout.height) != (row.x, row.y, row.width, row.height):
        layouts.check_free(row.widget_id, layout, places)
    widget.layout.CopyFrom(layout)
    fill_widget(row, widget)


async def _shown(session: AsyncSession, row: Widget) -> dashboard_pb2.Widget:
    (widget,) = await shown_widgets(session, row.workspace_id, [widget_to_pb(row)])
    return widget


async def _widgets(session: AsyncSession, dashboard: Dashboard) -> list[Widget]:
    rows = await session.scalars(
        select(Widget).where(
            Widget.workspace_id == dashboard.workspace_id, Widget.dashboard_id == dashboard.dashboard_id
        )
    )
    return list(rows)


def _find(rows: Iterable[Widget], widget_id: str) -> Widget:
    for row in rows:
        if row.widget_id == widget_id.lower():
            return row
    raise _absent()


def _layouts(rows: Iterable[Widget]) -> dict[str, dashboard_pb2.Layout]:
    return {
        row.widget_id: dashboard_pb2.Layout(x=row.x, y=row.y, width=row.width, height=row.height)
        for row in rows
    }


def _absent() -> errors.Error:
    return errors.not_found("WIDGET_NOT_FOUND", "The dashboard has no such widget.")
