"""Dashboards, their data, once and live, and the grants on them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, cast

from meshboard.dashboard.v1 import dashboard_pb2
from meshboard.dashboard.v1 import dashboard_service_pb2 as pb
from meshboard.dashboard.v1.dashboard_pb2 import DashboardContent
from meshboard.dashboard.v1.dashboard_service_pb2_grpc import DashboardServiceServicer
from meshboard.dashboard.v1.events_pb2 import (
    DashboardCreated,
    DashboardDeleted,
    DashboardFavourited,
    DashboardGrantCreated,
    DashboardGrantDeleted,
    DashboardUndeleted,
    DashboardUnfavourited,
    DashboardUpdated,
)
from sqlalchemy import ColumnElement, Text, and_, case, func, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import InstrumentedAttribute

from services.chassis import auth, errors, outbox, times
from services.chassis.clients import Peer
from services.chassis.db import new_id
from services.chassis.grants import Grants, grant_to_pb
from services.chassis.masks import changed_fields
from services.chassis.paging import Pages
from services.chassis.rechecks import Span
from services.chassis.resources import Resource, visible, visible_ids
from services.chassis.search import place_of
from services.dashboard_svc.answers import Answers
from services.dashboard_svc.bin import purge, take_out
from services.dashboard_svc.boards import Boards, absent, locked, shown
from services.dashboard_svc.contents import (
    FIELDS,
    content_of,
    only,
    record,
    shown_content,
    touch,
    write_content,
    write_fields,
)
from services.dashboard_svc.convert import dashboard_to_pb
from services.dashboard_svc.dashboard_search import DashboardSearch
from services.dashboard_svc.definitions import clean, questions_of, sources_of
from services.dashboard_svc.favourites import for_caller, is_favourite, mark, tell_caller, unmark
from services.dashboard_svc.feeds import Feeds
from services.dashboard_svc.folders import FOLDER
from services.dashboard_svc.library import resolved
from services.dashboard_svc.models import Dashboard
from services.dashboard_svc.moves import move
from services.dashboard_svc.new_dashboards import insert_dashboard, made_before, name_taken
from services.dashboard_svc.questions import Tiles
from services.dashboard_svc.scopes import Scope, scope_of
from services.dashboard_svc.sources import Sources
from services.dashboard_svc.streams import stream
from services.dashboard_svc.validation import cohorts_of, require_unused

Context = Any
DASHBOARD = Resource(
    "dashboard",
    Dashboard.workspace_id,
    Dashboard.dashboard_id,
    parent_id=Dashboard.folder_id,
    parent=FOLDER,
    alive="{row}.delete_time IS NULL",
)
IN_BIN = replace(DASHBOARD, alive="{row}.delete_time IS NOT NULL")
MUTABLE = (*FIELDS, "name")
CATCH_UP_SECONDS = 5.0
NEWEST_FIRST = "create_time desc"


class DashboardServicer(DashboardServiceServicer):
    """meshboard.dashboard.v1.DashboardService. `draining` says whether the process is going down."""

    def __init__(
        self,
        *,
        db: async_sessionmaker[AsyncSession],
        boards: Boards,
        sources: Sources,
        pages: Pages,
        grants: Grants,
        search: DashboardSearch,
        answers: Answers,
        feeds: Feeds,
        span: Span,
        draining: Callable[[], bool],
        bin_days: int,
        now: Callable[[], datetime] = times.now,
    ) -> None:
        self.db = db
        self.boards = boards
        self.sources = sources
        self.bin_days = bin_days
        self.pages = pages
        self.grants = grants
        self.search = search
        self.answers = answers
        self.tiles = Tiles()
        self.feeds = feeds
        self.span = span
        self.draining = draining
        self.now = now

    async def CreateDashboard(
        self, request: pb.CreateDashboardRequest, context: Context
    ) -> pb.CreateDashboardResponse:
        """Creates the dashboard and the creator's grant."""
        caller = auth.caller()
        content = _content_from(request)
        clean(content, FIELDS)
        await self.sources.validate(questions_of(content).values())
        async with self.db.begin() as session:
            dashboard = await self._insert(
                session, content, request.folder_id, request.request_id, name=request.name
            )
            if dashboard is None:
                first = await self._first(session, request.request_id, request.name)
                return pb.CreateDashboardResponse(dashboard=first)
            await record(session, dashboard, caller.user_id)
            created = dashboard_to_pb(dashboard)
            outbox.add(session, DashboardCreated(dashboard=created), workspace_id=caller.workspace_id)
        return pb.CreateDashboardResponse(dashboard=created)

    async def GetDashboard(
        self, request: pb.GetDashboardRequest, context: Context
    ) -> pb.GetDashboardResponse:
        """Reads through the cache, but for the caller's mark."""
        dashboard = await self.boards.dashboard(auth.caller().workspace_id, request.dashboard_id.lower())
        async with self.db() as session:
            return pb.GetDashboardResponse(dashboard=await for_caller(session, dashboard))

    async def ListDashboards(
        self, request: pb.ListDashboardsRequest, context: Context
    ) -> pb.ListDashboardsResponse:
        """Filters by the caller's rights in SQL."""
        caller = auth.caller()
        assert caller.rights is not None, "the access stage settles the rights"
        page = self.pages.open(request, caller.workspace_id)
        resource, now = IN_BIN if request.deleted else DASHBOARD, self.now()
        favourite = is_favourite(caller)
        order_by = request.order_by or NEWEST_FIRST
        columns, descending = _ORDERS[order_by.removesuffix(" desc")], order_by.endswith(" desc")
        filters = _filters(request, favourite)
        if filters or order_by != NEWEST_FIRST:
            after = page.after(*columns, descending=descending)
            found = and_(*filters, after, visible(resource, caller.rights, now))
        else:
            last_id = str(page.last[0]) if page.last else None
            found = and_(visible_ids(resource, caller.rights, now, last_id, page.limit))
        async with self.db() as session:
            rows = await session.execute(
                select(Dashboard, favourite, *columns)
                .where(Dashboard.workspace_id == caller.workspace_id, found)
                .order_by(*(column.desc() if descending else column for column in columns))
                .limit(page.limit)
            )
            found_rows, next_page_token = page.close(rows.all(), lambda row: tuple(row[2:]))
            dashboards = await shown(session, [row[0] for row in found_rows])
        for dashboard, row in zip(dashboards, found_rows, strict=True):
            dashboard.favourite = row[1]
        return pb.ListDashboardsResponse(dashboards=dashboards, next_page_token=next_page_token)

    async def SearchDashboards(
        self, request: pb.SearchDashboardsRequest, context: Context
    ) -> pb.SearchDashboardsResponse:
        """Filters by the caller's rights in the engine."""
        caller = auth.caller()
        assert caller.rights is not None, "the access stage settles the rights"
        page = self.pages.open(request, caller.workspace_id)
        found = await self.search.find(caller.rights, request.query, place_of(page), page.limit)
        hits, next_page_token = page.close(found, lambda hit: (hit.score, hit.id))
        async with self.db() as session:
            dashboards = await shown(session, [hit.row for hit in hits])
            await tell_caller(session, dashboards)
        return pb.SearchDashboardsResponse(dashboards=dashboards, next_page_token=next_page_token)

    async def UpdateDashboard(
        self, request: pb.UpdateDashboardRequest, context: Context
    ) -> pb.UpdateDashboardResponse:
        """Changes what the mask names."""
        caller, wanted = auth.caller(), request.dashboard
        fields = changed_fields(wanted, request.update_mask, MUTABLE)
        content = _content_from(wanted, fields)
        clean(content, fields, "dashboard.")
        known = await self._validate_new(wanted.dashboard_id, content)
        try:
            async with self.db.begin() as session:
                dashboard = await locked(session, caller.workspace_id, wanted.dashboard_id, wanted.etag)
                _require_known(known, dashboard)
                variables = DashboardContent.FromString(dashboard.content).variables
                write_fields(dashboard, content, fields)
                if "variables" in fields:
                    written = await content_of(session, dashboard)
                    require_unused(variables, await resolved(session, caller.workspace_id, written))
                if "name" in fields:
                    dashboard.name = wanted.name or None
                touch(dashboard, self.now())
                await record(session, dashboard, caller.user_id, request.reason)
                updated = dashboard_to_pb(dashboard)
                outbox.add(session, DashboardUpdated(dashboard=updated), workspace_id=caller.workspace_id)
                answer = await for_caller(session, updated)
        except IntegrityError:  # the constraint on names
            raise name_taken(wanted.name) from None
        await self.boards.changed(updated.workspace_id, updated.dashboard_id)
        return pb.UpdateDashboardResponse(dashboard=answer)

    async def MoveDashboard(
        self, request: pb.MoveDashboardRequest, context: Context
    ) -> pb.MoveDashboardResponse:
        """Puts the dashboard into the folder."""
        caller = auth.caller()
        async with self.db.begin() as session:
            dashboard = await locked(session, caller.workspace_id, request.dashboard_id, request.etag)
            moved = await move(session, dashboard, request.folder_id, self.now())
            answer = await for_caller(session, moved)
        await self.boards.changed(moved.workspace_id, moved.dashboard_id)
        return pb.MoveDashboardResponse(dashboard=answer)

    async def DuplicateDashboard(
        self, request: pb.DuplicateDashboardRequest, context: Context
    ) -> pb.DuplicateDashboardResponse:
        """Copies what viewers see."""
        caller, now = auth.caller(), self.now()
        async with self.db() as session:
            original = await session.get(Dashboard, (caller.workspace_id, request.dashboard_id.lower()))
            if original is None or original.delete_time:
                raise absent()
            content = await shown_content(session, original)
            asking = await resolved(session, caller.workspace_id, content)
        if request.title:
            content.title = request.title
            clean(content, ["title"])
        await self.sources.require(sources_of(asking), cohorts_of(asking))
        for widget in content.widgets:
            widget.widget_id = new_id()
        async with self.db.begin() as session:
            dashboard = await self._insert(session, content, request.folder_id, request.request_id)
            if dashboard is None:
                first = await self._first(session, request.request_id)
                return pb.DuplicateDashboardResponse(dashboard=first)
            outbox.add(
                session,
                DashboardCreated(dashboard=dashboard_to_pb(dashboard)),
                workspace_id=caller.workspace_id,
            )
            await write_content(session, dashboard, content, author_id=caller.user_id, now=now)
            await record(session, dashboard, caller.user_id)
        return pb.DuplicateDashboardResponse(dashboard=dashboard_to_pb(dashboard))

    async def DeleteDashboard(
        self, request: pb.DeleteDashboardRequest, context: Context
    ) -> pb.DeleteDashboardResponse:
        """Puts the dashboard into the bin."""
        caller, now = auth.caller(), self.now()
        async with self.db.begin() as session:
            dashboard = await locked(session, caller.workspace_id, request.dashboard_id, request.etag)
            dashboard.delete_time = now
            dashboard.purge_time = now + timedelta(days=self.bin_days)
            touch(dashboard, now)
            gone = DashboardDeleted(workspace_id=caller.workspace_id, dashboard_id=dashboard.dashboard_id)
            outbox.add(session, gone, workspace_id=caller.workspace_id)
        await self.boards.changed(gone.workspace_id, gone.dashboard_id)
        return pb.DeleteDashboardResponse()

    async def UndeleteDashboard(
        self, request: pb.UndeleteDashboardRequest, context: Context
    ) -> pb.UndeleteDashboardResponse:
        """Takes the dashboard out of the bin."""
        workspace_id = auth.caller().workspace_id
        async with self.db.begin() as session:
            dashboard = await locked(session, workspace_id, request.dashboard_id, request.etag, in_bin=True)
            await take_out(session, dashboard)
            touch(dashboard, self.now())
            (there,) = await shown(session, [dashboard])
            outbox.add(session, DashboardUndeleted(dashboard=there), workspace_id=workspace_id)
            answer = await for_caller(session, there)
        await self.boards.changed(workspace_id, there.dashboard_id)
        return pb.UndeleteDashboardResponse(dashboard=answer)

    async def PurgeDashboard(
        self, request: pb.PurgeDashboardRequest, context: Context
    ) -> pb.PurgeDashboardResponse:
        """Deletes the dashboard for good."""
        workspace_id = auth.caller().workspace_id
        async with self.db.begin() as session:
            dashboard = await locked(session, workspace_id, request.dashboard_id, request.etag, in_bin=True)
            await purge(session, dashboard)
        return pb.PurgeDashboardResponse()

    async def FavouriteDashboard(
        self, request: pb.FavouriteDashboardRequest, context: Context
    ) -> pb.FavouriteDashboardResponse:
        """Marks the dashboard."""
        caller = auth.caller()
        async with self.db.begin() as session:
            dashboard = await locked(session, caller.workspace_id, request.dashboard_id, share=True)
            key = {"workspace_id": dashboard.workspace_id, "dashboard_id": dashboard.dashboard_id}
            if await mark(session, caller, dashboard.dashboard_id, self.now()):
                event = DashboardFavourited(**key, user_id=caller.user_id)
                outbox.add(session, event, workspace_id=caller.workspace_id)
        return pb.FavouriteDashboardResponse()

    async def UnfavouriteDashboard(
        self, request: pb.UnfavouriteDashboardRequest, context: Context
    ) -> pb.UnfavouriteDashboardResponse:
        """Takes the mark away."""
        caller = auth.caller()
        async with self.db.begin() as session:
            dashboard = await locked(session, caller.workspace_id, request.dashboard_id, share=True)
            key = {"workspace_id": dashboard.workspace_id, "dashboard_id": dashboard.dashboard_id}
            if await unmark(session, caller, dashboard.dashboard_id):
                event = DashboardUnfavourited(**key, user_id=caller.user_id)
                outbox.add(session, event, workspace_id=caller.workspace_id)
        return pb.UnfavouriteDashboardResponse()

    async def GetDashboardData(
        self, request: pb.GetDashboardDataRequest, context: Context
    ) -> pb.GetDashboardDataResponse:
        """Asks what the widgets ask, by the dashboard's right."""
        workspace_id, dashboard_id = auth.caller().workspace_id, request.dashboard_id.lower()
        dashboard = await self.boards.dashboard(workspace_id, dashboard_id)
        widgets = await self.boards.widgets(workspace_id, dashboard_id)
        if wanted := {widget_id.lower() for widget_id in request.widget_ids}:
            widgets = [widget for widget in widgets if widget.widget_id in wanted]
        tiles = self.tiles.of(widgets, dashboard, _scope(dashboard, request))
        # The answers are kept as bytes, and together are the bytes of the response.
        return cast("pb.GetDashboardDataResponse", await self.answers.serialized(workspace_id, tiles))

    async def WatchDashboard(
        self, request: pb.WatchDashboardRequest, context: Context
    ) -> AsyncIterator[pb.WatchDashboardResponse]:
        """Streams the dashboard's feed."""
        workspace_id, dashboard_id = auth.caller().workspace_id, request.dashboard_id.lower()
        scope = _scope(await self.boards.dashboard(workspace_id, dashboard_id), request)
        with self.feeds.watch(workspace_id, dashboard_id, scope) as feed:
            has = feed.read_cursor(request.cursor) if request.cursor else None
            async with asyncio.timeout(CATCH_UP_SECONDS):
                await feed.catch_up()

            async def recheck() -> None:
                if feed.gone:  # in the bin: the grants on it are still there
                    raise absent()
                await auth.recheck()

            if feed.gone:
                raise absent()
            caller, form = auth.caller(), pb.WatchDashboardResponse.SerializeToString
            key = (caller.token, caller.service, workspace_id)
            async for response in stream(feed, has, self.span, recheck, self.draining, form=form, key=key):
                yield response

    async def CreateDashboardGrant(
        self, request: pb.CreateDashboardGrantRequest, context: Context
    ) -> pb.CreateDashboardGrantResponse:
        """Makes the grant."""
        grant = await self.grants.create(request.dashboard_id, request)
        return pb.CreateDashboardGrantResponse(grant=grant)

    async def ListDashboardGrants(
        self, request: pb.ListDashboardGrantsRequest, context: Context
    ) -> pb.ListDashboardGrantsResponse:
        """Lists all grants, expired ones too."""
        await self._require_alive(request.dashboard_id)
        grants, next_page_token = await self.grants.list(request.dashboard_id, request)
        return pb.ListDashboardGrantsResponse(grants=grants, next_page_token=next_page_token)

    async def DeleteDashboardGrant(
        self, request: pb.DeleteDashboardGrantRequest, context: Context
    ) -> pb.DeleteDashboardGrantResponse:
        """Takes the grant back."""
        await self._require_alive(request.dashboard_id)
        await self.grants.delete(request.dashboard_id, request.grant_id)
        return pb.DeleteDashboardGrantResponse()

    async def BatchUpdateDashboardGrants(
        self, request: pb.BatchUpdateDashboardGrantsRequest, context: Context
    ) -> pb.BatchUpdateDashboardGrantsResponse:
        """Changes the grants together."""
        grants = await self.grants.batch_update(request.dashboard_id, request)
        return pb.BatchUpdateDashboardGrantsResponse(grants=grants)

    async def _require_alive(self, dashboard_id: str) -> None:
        """Raises NOT_FOUND for what is in the bin."""
        await self.boards.dashboard(auth.caller().workspace_id, dashboard_id.lower())

    async def _insert(
        self,
        session: AsyncSession,
        content: DashboardContent,
        folder_id: str,
        request_id: str,
        name: str = "",
    ) -> Dashboard | None:
        """The new dashboard, without widgets; None: something like it is there."""
        return await insert_dashboard(
            session,
            self.grants,
            content,
            folder_id=folder_id,
            now=self.now(),
            request_id=request_id,
            name=name,
        )

    async def _first(self, session: AsyncSession, request_id: str, name: str = "") -> dashboard_pb2.Dashboard:
        """The dashboard that an earlier call made; without one, ALREADY_EXISTS is raised: it is the name, then."""
        first = await made_before(session, request_id)
        if first is None:
            raise name_taken(name)
        (dashboard,) = await shown(session, [first])
        return await for_caller(session, dashboard)

    async def _validate_new(self, dashboard_id: str, content: DashboardContent) -> set[bytes]:
        """Has analytics_svc judge what the content newly asks of sources; gives what was asked before already."""
        if not (asked := questions_of(content)):
            return set()
        async with self.db() as session:
            key = (auth.caller().workspace_id, dashboard_id.lower())
            row = await session.get(Dashboard, key)
        known = questions_of(DashboardContent.FromString(row.content)).keys() if row else set()
        await self.sources.validate(query for key, query in asked.items() if key not in known)
        return asked.keys() & known


def _content_from(
    source: dashboard_pb2.Dashboard | pb.CreateDashboardRequest, fields: Collection[str] = FIELDS
) -> DashboardContent:
    """These fields of a message, as a content."""
    content = DashboardContent(
        title=source.title,
        description=source.description,
        tags=source.tags,
        variables=source.variables,
        settings=source.settings if source.HasField("settings") else None,
        annotation_queries=source.annotation_queries,
    )
    return only(content, fields)


def _require_known(asked: set[bytes], dashboard: Dashboard) -> None:
    """Raises ABORTED when somebody has taken away meanwhile what was not judged because it was there."""
    if asked and not asked <= questions_of(DashboardContent.FromString(dashboard.content)).keys():
        raise errors.etag_mismatch()


def _as_shown(
    column: InstrumentedAttribute[Any], published: InstrumentedAttribute[Any]
) -> ColumnElement[Any]:
    """What viewers see of a column, as its index has it."""
    return case((Dashboard.published_version.is_(None), column), else_=func.coalesce(published, column))


# What lists are ordered by: there is an index for each. Ids rise with the time.
_ORDERS: dict[str, tuple[ColumnElement[Any] | InstrumentedAttribute[Any], ...]] = {
    "create_time": (Dashboard.dashboard_id,),
    "title": (
        func.lower(_as_shown(Dashboard.title, Dashboard.published_title), type_=Text),
        Dashboard.dashboard_id,
    ),
    "update_time": (
        _as_shown(Dashboard.update_time, Dashboard.published_update_time),
        Dashboard.dashboard_id,
    ),
}


def _filters(request: pb.ListDashboardsRequest, favourite: ColumnElement[bool]) -> list[ColumnElement[bool]]:
    filters: list[ColumnElement[bool]] = []
    if request.folder_id:
        filters.append(Dashboard.folder_id == request.folder_id)
    if request.tags:
        tags = func.coalesce(Dashboard.published_tags, Dashboard.tags, type_=ARRAY(Text))
        filters.append(tags.contains(list(request.tags)))
    if request.favourites:
        filters.append(favourite)
    if request.name:
        filters.append(Dashboard.name == request.name)
    return filters


def _scope(
    dashboard: dashboard_pb2.Dashboard, request: pb.GetDashboardDataRequest | pb.WatchDashboardRequest
) -> Scope:
    time_range = request.time_range if request.HasField("time_range") else None
    return scope_of(dashboard.variables, request.choices, time_range)


def grants_on_dashboards(
    db: async_sessionmaker[AsyncSession],
    user: Peer,
    pages: Pages,
    now: Callable[[], datetime] = times.now,
) -> Grants:
    """The grants on dashboards."""
    return Grants(
        db,
        DASHBOARD,
        user,
        pages,
        created=lambda row: DashboardGrantCreated(
            workspace_id=row.workspace_id, dashboard_id=row.resource_id, grant=grant_to_pb(row)
        ),
        deleted=lambda row: DashboardGrantDeleted(
            workspace_id=row.workspace_id, dashboard_id=row.resource_id, grant_id=row.grant_id
        ),
        now=now,
        new_id=new_id,
    )
