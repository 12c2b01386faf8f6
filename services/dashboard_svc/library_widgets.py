"""The widgets of the library, and where they are used."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from typing import Any

from meshboard.dashboard.v1 import dashboard_pb2
from meshboard.dashboard.v1 import library_service_pb2 as pb
from meshboard.dashboard.v1.events_pb2 import (
    LibraryWidgetCreated,
    LibraryWidgetDeleted,
    LibraryWidgetUpdated,
)
from meshboard.dashboard.v1.library_service_pb2_grpc import LibraryWidgetServiceServicer
from sqlalchemy import ColumnElement, CompoundSelect, func, select
from sqlalchemy.dialects.postgresql import aggregate_order_by, insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import auth, errors, outbox, times
from services.chassis.db import lock, new_id
from services.chassis.masks import changed_fields
from services.chassis.paging import Pages
from services.chassis.resources import Resource, visible
from services.chassis.texts import clean_name
from services.dashboard_svc import kinds, markdown
from services.dashboard_svc.boards import Boards
from services.dashboard_svc.convert import (
    CONTENT,
    content_of_widget,
    copy_field,
    fields_of,
    fill_kind,
    library_widget_to_pb,
)
from services.dashboard_svc.custom_widgets import CustomWidgets, hold
from services.dashboard_svc.file_names import free_name
from services.dashboard_svc.library import absent, show
from services.dashboard_svc.models import Dashboard, LibraryWidget, Version, Widget
from services.dashboard_svc.validation import Validation

Context = Any
MUTABLE = ("title", "kind", *CONTENT, "name")
MAX_LIBRARY_WIDGETS = 1000
# Dashboards that one event names.
MAX_NAMED = 5000
# The lock under which the size of a workspace's library and the names in it change: "libr" in ASCII.
_LIBRARY_LOCK = 0x6C696272


class LibraryWidgetServicer(LibraryWidgetServiceServicer):
    """meshboard.dashboard.v1.LibraryWidgetService."""

    def __init__(
        self,
        *,
        db: async_sessionmaker[AsyncSession],
        boards: Boards,
        pages: Pages,
        validation: Validation,
        custom: CustomWidgets,
        dashboards: Resource,
        now: Callable[[], datetime] = times.now,
    ) -> None:
        self.db = db
        self.pages = pages
        self.validation = validation
        self.custom = custom
        self.dashboards = dashboards
        self.boards = boards
        self.now = now

    async def CreateLibraryWidget(
        self, request: pb.CreateLibraryWidgetRequest, context: Context
    ) -> pb.CreateLibraryWidgetResponse:
        """Adds the widget."""
        caller, now = auth.caller(), self.now()
        widget = fields_of(request, MUTABLE)
        widget.title = clean_name(request.title, "title")
        await self.custom.fill(caller.workspace_id, widget)
        kinds.check(widget)
        await self.validation.check(caller.workspace_id, [widget])
        await markdown.prepare(widget.markdown)
        async with self.db.begin() as session:
            await lock(session, _LIBRARY_LOCK, caller.workspace_id)
            await hold(session, caller.workspace_id, widget)
            widget.name = widget.name or await _free_name(session, caller.workspace_id, widget)
            row = await session.scalar(
                insert(LibraryWidget)
                .values(
                    workspace_id=caller.workspace_id,
                    library_widget_id=new_id(),
                    title=widget.title,
                    name=widget.name,
                    kind=widget.kind,
                    content=content_of_widget(widget),
                    widget_kind_id=widget.custom.widget_kind_id or None,
                    kind_number=widget.custom.version or None,
                    version=1,
                    creator_id=caller.user_id,
                    request_id=request.request_id or None,
                    create_time=now,
                    update_time=now,
                )
                .on_conflict_do_nothing()
                .returning(LibraryWidget)
            )
            if row is None:
                first = await _first(session, request.request_id)
                if first is None:
                    raise _name_taken(widget.name)
                return pb.CreateLibraryWidgetResponse(library_widget=library_widget_to_pb(first))
            await _check_room(session, caller.workspace_id)
            created = library_widget_to_pb(row)
            outbox.add(
                session, LibraryWidgetCreated(library_widget=created), workspace_id=caller.workspace_id
            )
        return pb.CreateLibraryWidgetResponse(library_widget=created)

    async def GetLibraryWidget(
        self, request: pb.GetLibraryWidgetRequest, context: Context
    ) -> pb.GetLibraryWidgetResponse:
        """Reads the row."""
        async with self.db() as session:
            row = await session.get(
                LibraryWidget, (auth.caller().workspace_id, request.library_widget_id.lower())
            )
        if row is None:
            raise absent()
        return pb.GetLibraryWidgetResponse(library_widget=library_widget_to_pb(row))

    async def ListLibraryWidgets(
        self, request: pb.ListLibraryWidgetsRequest, context: Context
    ) -> pb.ListLibraryWidgetsResponse:
        """Lists by falling ids."""
        workspace_id = auth.caller().workspace_id
        page = self.pages.open(request, workspace_id)
        async with self.db() as session:
            rows = await session.scalars(
                select(LibraryWidget)
                .where(
                    LibraryWidget.workspace_id == workspace_id,
                    page.after(LibraryWidget.library_widget_id, descending=True),
                )
                .order_by(LibraryWidget.library_widget_id.desc())
                .limit(page.limit)
            )
        found, next_page_token = page.close(rows.all(), lambda row: (row.library_widget_id,))
        return pb.ListLibraryWidgetsResponse(
            library_widgets=map(library_widget_to_pb, found), next_page_token=next_page_token
        )

    async def UpdateLibraryWidget(
        self, request: pb.UpdateLibraryWidgetRequest, context: Context
    ) -> pb.UpdateLibraryWidgetResponse:
        """Changes what the mask names; the lock keeps the list of dashboards from growing meanwhile."""
        caller, wanted = auth.caller(), request.library_widget
        fields = changed_fields(wanted, request.update_mask, MUTABLE)
        changes = fields_of(wanted, fields)
        if "title" in fields:
            changes.title = clean_name(wanted.title, "library_widget.title")
        if await self.custom.fill(caller.workspace_id, changes):
            fields.add("query")
        await self.validation.check(caller.workspace_id, [changes])
        await markdown.prepare(changes.markdown)
        async with self.db.begin() as session:
            await lock(session, _LIBRARY_LOCK, caller.workspace_id)
            row = await _locked(session, caller.workspace_id, wanted.library_widget_id, wanted.etag)
            widget = dashboard_pb2.Widget(name=row.name or "")
            show(row, widget)
            for field in fields:
                copy_field(changes, widget, field)
            kinds.keep_to_kind(widget, fields)
            kinds.check(widget, "library_widget.")
            kinds.check_made(widget, fields, "library_widget.")
            await hold(session, caller.workspace_id, widget, [row.widget_kind_id])
            await _rename(session, row, widget)
            row.title, row.kind = widget.title, widget.kind
            row.content = content_of_widget(widget, row.content)
            fill_kind(row, widget)
            dashboard_ids = await note_change(session, row, self.now())
            updated = library_widget_to_pb(row)
        await asyncio.gather(*(self.boards.changed(caller.workspace_id, each) for each in dashboard_ids))
        return pb.UpdateLibraryWidgetResponse(library_widget=updated)

    async def DeleteLibraryWidget(
        self, request: pb.DeleteLibraryWidgetRequest, context: Context
    ) -> pb.DeleteLibraryWidgetResponse:
        """Deletes the row; the lock keeps dashboards from showing it meanwhile."""
        caller = auth.caller()
        async with self.db.begin() as session:
            row = await _locked(session, caller.workspace_id, request.library_widget_id, request.etag)
            count = await session.scalar(select(func.count()).select_from(_shown_on(row).subquery()))
            if count:
                raise errors.failed_precondition(
                    "LIBRARY_WIDGET_IN_USE", f"The widget is shown on {count} dashboards.", dashboards=count
                )
            await session.delete(row)
            gone = LibraryWidgetDeleted(
                workspace_id=row.workspace_id, library_widget_id=row.library_widget_id
            )
            outbox.add(session, gone, workspace_id=caller.workspace_id)
        return pb.DeleteLibraryWidgetResponse()

    async def ListLibraryWidgetUses(
        self, request: pb.ListLibraryWidgetUsesRequest, context: Context
    ) -> pb.ListLibraryWidgetUsesResponse:
        """Filters by the caller's rights in SQL, and counts the rest."""
        caller = auth.caller()
        assert caller.rights is not None, "the access stage settles the rights"
        page = self.pages.open(request, caller.workspace_id)
        seen = visible(self.dashboards, caller.rights, self.now())
        async with self.db() as session:
            row = await session.get(LibraryWidget, (caller.workspace_id, request.library_widget_id.lower()))
            if row is None:
                raise absent()
            uses = (
                select(
                    Dashboard.dashboard_id,
                    Dashboard.title,
                    func.array_agg(aggregate_order_by(Widget.widget_id, Widget.widget_id)).label(
                        "widget_ids"
                    ),
                )
                .join(
                    Widget,
                    (Widget.workspace_id == Dashboard.workspace_id)
                    & (Widget.dashboard_id == Dashboard.dashboard_id),
                )
                .where(Dashboard.workspace_id == caller.workspace_id, _shows(row), seen)
                .group_by(Dashboard.workspace_id, Dashboard.dashboard_id)
            )
            rows = await session.execute(
                uses.where(page.after(Dashboard.dashboard_id, descending=True))
                .order_by(Dashboard.dashboard_id.desc())
                .limit(page.limit)
            )
            total = select(func.count(Widget.dashboard_id.distinct())).where(_shows(row)).scalar_subquery()
            hidden = await session.scalar(
                select(total - select(func.count()).select_from(uses.subquery()).scalar_subquery())
            )
        found, next_page_token = page.close(rows.all(), lambda use: (use.dashboard_id,))
        return pb.ListLibraryWidgetUsesResponse(
            uses=[
                pb.LibraryWidgetUse(dashboard_id=dashboard_id, title=title, widget_ids=widget_ids)
                for dashboard_id, title, widget_ids in found
            ],
            next_page_token=next_page_token,
            hidden_count=hidden or 0,
        )


async def note_change(session: AsyncSession, row: LibraryWidget, now: datetime) -> list[str]:
    """Gives a row that has changed a new version, and emits the events. Gives the dashboards that show it."""
    row.version += 1
    row.update_time = now
    dashboard_ids = list(await session.scalars(_shown_on(row)))
    updated = library_widget_to_pb(row)
    for at in range(0, max(1, len(dashboard_ids)), MAX_NAMED):
        event = LibraryWidgetUpdated(library_widget=updated, dashboard_ids=dashboard_ids[at : at + MAX_NAMED])
        outbox.add(session, event, workspace_id=row.workspace_id)
    return dashboard_ids


def _shows(row: LibraryWidget) -> ColumnElement[bool]:
    return (Widget.workspace_id == row.workspace_id) & (Widget.library_widget_id == row.library_widget_id)


def _shown_on(row: LibraryWidget) -> CompoundSelect[str]:
    """The dashboards that show it: to their editors, or to viewers while there is a draft."""
    published = (
        select(Version.dashboard_id)
        .join(
            Dashboard,
            (Dashboard.workspace_id == Version.workspace_id)
            & (Dashboard.dashboard_id == Version.dashboard_id)
            & (Dashboard.published_version == Version.number),
        )
        # An id stands in a message as it is spelled, and nobody chooses one.
        .where(
            Version.workspace_id == row.workspace_id,
            Version.content.op("LIKE")(f"%{row.library_widget_id}%".encode()),
        )
    )
    return select(Widget.dashboard_id).where(_shows(row)).union(published)


async def _locked(
    session: AsyncSession, workspace_id: str, library_widget_id: str, etag: str
) -> LibraryWidget:
    row = await session.get(LibraryWidget, (workspace_id, library_widget_id.lower()), with_for_update=True)
    if row is None:
        raise absent()
    if etag and etag != str(row.version):
        raise errors.etag_mismatch()
    return row


async def _free_name(session: AsyncSession, workspace_id: str, widget: dashboard_pb2.Widget) -> str:
    names = await session.scalars(
        select(LibraryWidget.name).where(LibraryWidget.workspace_id == workspace_id)
    )
    return free_name(widget, {name for name in names if name})


async def _rename(session: AsyncSession, row: LibraryWidget, widget: dashboard_pb2.Widget) -> None:
    """Gives the row the name of the widget, or, without one, a free one. Raises ALREADY_EXISTS."""
    name = widget.name or await _free_name(session, row.workspace_id, widget)
    if name == row.name:
        return
    other = await session.scalar(
        select(LibraryWidget.library_widget_id).where(
            LibraryWidget.workspace_id == row.workspace_id, LibraryWidget.name == name
        )
    )
    if other is not None:
        raise _name_taken(name)
    row.name = name


def _name_taken(name: str) -> errors.Error:
    return errors.already_exists(
        "LIBRARY_WIDGET_NAME_TAKEN", "Another library widget of the workspace has this name.", name=name
    )


async def _first(session: AsyncSession, request_id: str) -> LibraryWidget | None:
    """The library widget that an earlier call of the caller made under this request id."""
    caller = auth.caller()
    found: LibraryWidget | None = await session.scalar(
        select(LibraryWidget).where(
            LibraryWidget.workspace_id == caller.workspace_id,
            LibraryWidget.creator_id == caller.user_id,
            LibraryWidget.request_id == request_id,
        )
    )
    return found


async def _check_room(session: AsyncSession, workspace_id: str) -> None:
    count = await session.scalar(select(func.count()).where(LibraryWidget.workspace_id == workspace_id))
    if count and count > MAX_LIBRARY_WIDGETS:
        raise errors.failed_precondition(
            "TOO_MANY_LIBRARY_WIDGETS",
            f"A workspace has at most {MAX_LIBRARY_WIDGETS} library widgets.",
            limit=MAX_LIBRARY_WIDGETS,
        )
