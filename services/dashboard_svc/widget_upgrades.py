"""Moving widgets to another version of their kind, and telling beforehand which it breaks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from typing import Any

import grpc
from google.rpc.status_pb2 import Status
from meshboard.analytics.v1.internal_query_service_pb2 import WidgetQuestion
from meshboard.dashboard.v1 import widget_kind_service_pb2 as pb
from meshboard.dashboard.v1.dashboard_pb2 import Variable, Widget
from meshboard.dashboard.v1.events_pb2 import WidgetUpdated
from meshboard.dashboard.v1.widget_kind_pb2 import WidgetKind
from sqlalchemy import Select, Uuid, literal, select, union_all
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import auth, errors, outbox, times
from services.chassis.paging import Page, Pages
from services.chassis.resources import Resource, visible
from services.dashboard_svc import kinds, models
from services.dashboard_svc.boards import Boards, absent, locked
from services.dashboard_svc.contents import record, touch
from services.dashboard_svc.convert import (
    content_of_widget,
    dashboard_to_pb,
    fill_kind,
    fill_widget,
    widget_to_pb,
)
from services.dashboard_svc.custom_widgets import hold, show
from services.dashboard_svc.library_widgets import note_change
from services.dashboard_svc.sources import Sources
from services.dashboard_svc.validation import check_variables, plain
from services.dashboard_svc.widget_definitions import WidgetDefinition

MAX_PAGE = 200
# Stands for the dashboard of widgets of the library, and before all others.
_LIBRARY = "00000000-0000-0000-0000-000000000000"
# What is the matter with one widget; anything else is the matter with the call.
_OF_WIDGETS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ABORTED,
}


@dataclass(slots=True)
class _Use:
    """A widget of the kind, what the version would make of it, and why it cannot be moved, if so.

    `hidden`: the caller may not see the dashboard, or it is in the bin. `newly_asks`: its query becomes another.
    """

    dashboard_id: str
    widget_id: str
    title: str
    version: int
    before: Widget
    made: Widget | None = None
    problem: Status | None = None
    hidden: bool = False

    @property
    def newly_asks(self) -> bool:
        return self.made is not None and self.made.query != self.before.query

    def told(self) -> pb.BrokenWidget:
        """The widget with its problem."""
        ids = (
            {"library_widget_id": self.widget_id}
            if self.dashboard_id == _LIBRARY
            else {"dashboard_id": self.dashboard_id, "widget_id": self.widget_id}
        )
        return pb.BrokenWidget(
            title=self.title, version=self.before.custom.version, error=self.problem, **ids
        )


class WidgetUpgrades:
    """Looks at the widgets of a kind page by page. `dashboards` says who sees which."""

    def __init__(
        self,
        *,
        db: async_sessionmaker[AsyncSession],
        boards: Boards,
        pages: Pages,
        sources: Sources,
        dashboards: Resource,
        now: Callable[[], datetime] = times.now,
    ) -> None:
        self._db = db
        self._boards = boards
        self._pages = pages
        self._sources = sources
        self._dashboards = dashboards
        self._now = now

    async def check(
        self, kind: WidgetKind, request: pb.CheckWidgetKindUpgradeRequest
    ) -> pb.CheckWidgetKindUpgradeResponse:
        """Which widgets break with schema, template and spec of `kind`, whose version is 0 when it is not there yet."""
        uses, next_page_token = await self._page(kind, request)
        asking = [use for use in uses if use.newly_asks]
        questions = [WidgetQuestion(query=plain(use.made.query)) for use in asking if use.made]
        checked = await self._sources.look_at(auth.caller().workspace_id, questions)
        for use, problem in zip(asking, checked.problems, strict=True):
            use.problem = problem if problem.code else None
        broken = [use for use in uses if use.problem]
        return pb.CheckWidgetKindUpgradeResponse(
            broken_widgets=[use.told() for use in broken if not use.hidden],
            hidden_count=sum(use.hidden for use in broken),
            checked_count=len(uses),
            next_page_token=next_page_token,
        )

    async def upgrade(self, kind: WidgetKind, request: pb.UpgradeWidgetsRequest) -> pb.UpgradeWidgetsResponse:
        """Moves the widgets to the version that `kind` has."""
        uses, next_page_token = await self._page(kind, request)
        for dashboard_id, group in groupby(uses, lambda use: use.dashboard_id):
            await self._move(dashboard_id, list(group))
        left = [use for use in uses if use.problem]
        return pb.UpgradeWidgetsResponse(
            upgraded_count=len(uses) - len(left),
            left_widgets=[use.told() for use in left if not use.hidden],
            hidden_count=sum(use.hidden for use in left),
            next_page_token=next_page_token,
        )

    async def _page(self, kind: WidgetKind, request: Any) -> tuple[list[_Use], str]:
        """The uses of a page, each with what the version makes of it."""
        caller = auth.caller()
        assert caller.rights is not None, "the access stage settles the rights"
        definition = await asyncio.to_thread(WidgetDefinition, kind)
        request.page_size = min(request.page_size, MAX_PAGE)
        page = self._pages.open(request, caller.workspace_id)
        async with self._db() as session:
            rows = (await session.execute(_uses(kind, page))).all()
            found, next_page_token = page.close(rows, lambda row: (row.dashboard_id, row.widget_id))
            on_page = (models.Dashboard.workspace_id == caller.workspace_id) & (
                models.Dashboard.dashboard_id.in_({row.dashboard_id for row in found})
            )
            seen = visible(self._dashboards, caller.rights, self._now())
            shown = set(await session.scalars(select(models.Dashboard.dashboard_id).where(on_page, seen)))
            dashboards = await session.scalars(select(models.Dashboard).where(on_page))
        uses = [
            _Use(row.dashboard_id, row.widget_id, row.title, row.version, Widget.FromString(row.content))
            for row in found
        ]
        for use in uses:
            use.hidden = use.dashboard_id not in shown | {_LIBRARY}
        variables = {row.dashboard_id: dashboard_to_pb(row).variables for row in dashboards}
        for use in uses:  # one at a time, so that a call that is given up ends
            await asyncio.to_thread(_make, use, definition, variables.get(use.dashboard_id))
        return uses, next_page_token

    async def _move(self, dashboard_id: str, uses: Sequence[_Use]) -> None:
        """Moves those of the widgets of one dashboard, or of the library, that can be."""
        try:
            await self._require(dashboard_id, uses)
            await self._validate(uses)
            movable = [use for use in uses if use.problem is None]
            if not movable:
                return
            if dashboard_id == _LIBRARY:
                changed = await self._write_library(movable)
            else:
                changed = await self._write_dashboard(dashboard_id, movable)
        except errors.Error as error:
            _leave(uses, error)
            return
        await asyncio.gather(*(self._boards.changed(auth.caller().workspace_id, each) for each in changed))

    async def _require(self, dashboard_id: str, uses: Sequence[_Use]) -> None:
        if dashboard_id == _LIBRARY:
            await auth.require("library_widgets.edit", "library_widget_id", "")
        elif uses[0].hidden:
            raise absent()
        else:
            await auth.require("dashboards.edit", "dashboard_id", dashboard_id)

    async def _validate(self, uses: Iterable[_Use]) -> None:
        """Whether the caller may ask what the widgets newly ask."""
        for use in uses:
            if use.newly_asks and use.made and use.problem is None:
                try:
                    await self._sources.validate([plain(use.made.query)])
                except errors.Error as error:
                    _leave([use], error)

    async def _write_dashboard(self, dashboard_id: str, uses: Sequence[_Use]) -> list[str]:
        caller, now = auth.caller(), self._now()
        async with self._db.begin() as session:
            dashboard = await locked(session, caller.workspace_id, dashboard_id)
            for use in uses:
                row = await session.get(models.Widget, (caller.workspace_id, dashboard_id, use.widget_id))
                if row is None or row.version != use.version or use.made is None:
                    use.problem = errors.etag_mismatch().status()
                    continue
                widget = widget_to_pb(row)
                show(widget, use.made)
                await hold(session, caller.workspace_id, widget)
                fill_widget(row, widget)
                row.version += 1
                row.update_time = now
                event = WidgetUpdated(workspace_id=caller.workspace_id, widget=widget_to_pb(row))
                outbox.add(session, event, workspace_id=caller.workspace_id)
            if all(use.problem for use in uses):
                return []
            touch(dashboard, now)
            await record(session, dashboard, caller.user_id)
        return [dashboard_id]

    async def _write_library(self, uses: Sequence[_Use]) -> list[str]:
        caller, now = auth.caller(), self._now()
        changed: list[str] = []
        async with self._db.begin() as session:
            for use in uses:
                key = (caller.workspace_id, use.widget_id)
                row = await session.get(models.LibraryWidget, key, with_for_update=True)
                if row is None or row.version != use.version or use.made is None:
                    use.problem = errors.etag_mismatch().status()
                    continue
                widget = Widget.FromString(row.content)
                show(widget, use.made)
                await hold(session, caller.workspace_id, widget)
                row.content = content_of_widget(widget, row.content)
                fill_kind(row, widget)
                changed += await note_change(session, row, now)
        return sorted(set(changed))


def _uses(kind: WidgetKind, page: Page) -> Select[Any]:
    """The widgets of the kind that have another version, those of the library first."""

    def of(table: Any, dashboard_id: Any, widget_id: Any) -> Select[Any]:
        return select(
            dashboard_id.label("dashboard_id"),
            widget_id.label("widget_id"),
            table.title,
            table.version,
            table.content,
        ).where(
            table.workspace_id == kind.workspace_id,
            table.widget_kind_id == kind.widget_kind_id,
            table.kind_number != kind.version,
        )

    uses = union_all(
        of(
            models.LibraryWidget,
            literal(_LIBRARY, Uuid(as_uuid=False)),
            models.LibraryWidget.library_widget_id,
        ),
        of(models.Widget, models.Widget.dashboard_id, models.Widget.widget_id),
    ).subquery()
    return (
        select(uses)
        .where(page.after(uses.c.dashboard_id, uses.c.widget_id))
        .order_by(uses.c.dashboard_id, uses.c.widget_id)
        .limit(page.limit)
    )


def _make(use: _Use, definition: WidgetDefinition, variables: Sequence[Variable] | None) -> None:
    try:
        made = definition.made_of(use.before.custom.options)
        kinds.check(made)
        if variables is not None:  # a widget of the library may be on dashboards that have those it needs
            check_variables(made, variables)
        use.made = made
    except errors.Error as error:
        use.problem = error.status()


def _leave(uses: Iterable[_Use], error: errors.Error) -> None:
    """Notes why widgets are left; what was the matter with one before still is."""
    if error.code not in _OF_WIDGETS:
        raise error
    for use in uses:
        use.problem = use.problem or error.status()
