"""Dashboards, their data, once and live, and the grants on them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from typing import Any, cast

from meshboard.dashboard.v1 import dashboard_pb2
from meshboard.dashboard.v1 import dashboard_service_pb2 as pb
from meshboard.dashboard.v1.dashboard_service_pb2_grpc import DashboardServiceServicer
from meshboard.dashboard.v1.events_pb2 import (
    DashboardCreated,
    DashboardDeleted,
    DashboardGrantCreated,
    DashboardGrantDeleted,
    DashboardMoved,
    DashboardUpdated,
)
from sqlalchemy import and_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import auth, outbox, times
from services.chassis.clients import Peer
from services.chassis.db import new_id
from services.chassis.grants import Grants, grant_to_pb
from services.chassis.masks import changed_fields
from services.chassis.paging import Pages
from services.chassis.rechecks import Span
from services.chassis.resources import Resource, visible, visible_ids
from services.chassis.search import place_of
from services.chassis.texts import clean_name
from services.dashboard_svc.answers import Answers
from services.dashboard_svc.boards import Boards, locked
from services.dashboard_svc.convert import dashboard_to_pb
from services.dashboard_svc.dashboard_search import DashboardSearch
from services.dashboard_svc.feeds import Feeds
from services.dashboard_svc.folders import FOLDER, held_folder
from services.dashboard_svc.models import Dashboard
from services.dashboard_svc.questions import Tiles
from services.dashboard_svc.scopes import Scope, scope_of
from services.dashboard_svc.streams import stream

Context = Any
DASHBOARD = Resource(
    "dashboard",
    Dashboard.workspace_id,
    Dashboard.dashboard_id,
    parent_id=Dashboard.folder_id,
    parent=FOLDER,
)
MUTABLE = ("title", "description")
CATCH_UP_SECONDS = 5.0


class DashboardServicer(DashboardServiceServicer):
    """meshboard.dashboard.v1.DashboardService. `draining` says whether the process is going down."""

    def __init__(
        self,
        *,
        db: async_sessionmaker[AsyncSession],
        boards: Boards,
        pages: Pages,
        grants: Grants,
        search: DashboardSearch,
        answers: Answers,
        feeds: Feeds,
        span: Span,
        draining: Callable[[], bool],
        now: Callable[[], datetime] = times.now,
    ) -> None:
        self.db = db
        self.boards = boards
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
        title, now = clean_name(request.title, "title"), self.now()
        async with self.db.begin() as session:
            dashboard = await session.scalar(
                insert(Dashboard)
                .values(
                    workspace_id=caller.workspace_id,
                    dashboard_id=new_id(),
                    folder_id=await held_folder(session, caller.workspace_id, request.folder_id),
                    title=title,
                    description=request.description,
                    version=1,
                    creator_id=caller.user_id,
                    request_id=request.request_id or None,
                    create_time=now,
                    update_time=now,
                )
                .on_conflict_do_nothing(constraint="dashboards_request_once")
                .returning(Dashboard)
            )
            if dashboard is None:
                first = await session.scalars(
                    select(Dashboard).where(
                        Dashboard.workspace_id == caller.workspace_id,
                        Dashboard.creator_id == caller.user_id,
                        Dashboard.request_id == request.request_id,
                    )
                )
                return pb.CreateDashboardResponse(dashboard=dashboard_to_pb(first.one()))
            self.grants.own(session, dashboard.dashboard_id)
            created = dashboard_to_pb(dashboard)
            outbox.add(session, DashboardCreated(dashboard=created), workspace_id=caller.workspace_id)
        return pb.CreateDashboardResponse(dashboard=created)

    async def GetDashboard(
        self, request: pb.GetDashboardRequest, context: Context
    ) -> pb.GetDashboardResponse:
        """Reads through the cache."""
        dashboard = await self.boards.dashboard(auth.caller().workspace_id, request.dashboard_id.lower())
        return pb.GetDashboardResponse(dashboard=dashboard)

    async def ListDashboards(
        self, request: pb.ListDashboardsRequest, context: Context
    ) -> pb.ListDashboardsResponse:
        """Filters by the caller's rights in SQL."""
        caller = auth.caller()
        assert caller.rights is not None, "the access stage settles the rights"
        page = self.pages.open(request, caller.workspace_id)
        now = self.now()
        if request.folder_id:
            found = and_(
                Dashboard.folder_id == request.folder_id,
                page.after(Dashboard.dashboard_id, descending=True),
                visible(DASHBOARD, caller.rights, now),
            )
        else:
            found = and_(
                visible_ids(
                    DASHBOARD, caller.rights, now, str(page.last[0]) if page.last else None, page.limit
                )
            )
        async with self.db() as session:
            rows = await session.scalars(
                select(Dashboard)
                .where(Dashboard.workspace_id == caller.workspace_id, found)
                .order_by(Dashboard.dashboard_id.desc())
                .limit(page.limit)
            )
        dashboards, next_page_token = page.close(rows.all(), lambda row: (row.dashboard_id,))
        return pb.ListDashboardsResponse(
            dashboards=map(dashboard_to_pb, dashboards), next_page_token=next_page_token
        )

    async def SearchDashboards(
        self, request: pb.SearchDashboardsRequest, context: Context
    ) -> pb.SearchDashboardsResponse:
        """Filters by the caller's rights in the engine."""
        caller = auth.caller()
        assert caller.rights is not None, "the access stage settles the rights"
        page = self.pages.open(request, caller.workspace_id)
        found = await self.search.find(caller.rights, request.query, place_of(page), page.limit)
        hits, next_page_token = page.close(found, lambda hit: (hit.score, hit.id))
        return pb.SearchDashboardsResponse(
            dashboards=[dashboard_to_pb(hit.row) for hit in hits], next_page_token=next_page_token
        )

    async def UpdateDashboard(
        self, request: pb.UpdateDashboardRequest, context: Context
    ) -> pb.UpdateDashboardResponse:
        """Changes what the mask names."""
        caller = auth.caller()
        wanted = request.dashboard
        fields = changed_fields(wanted, request.update_mask, MUTABLE)
        changes = {field: getattr(wanted, field) for field in fields}
        if "title" in fields:
            changes["title"] = clean_name(wanted.title, "dashboard.title")
        async with self.db.begin() as session:
            dashboard = await locked(session, caller.workspace_id, wanted.dashboard_id, wanted.etag)
            for field, value in changes.items():
                setattr(dashboard, field, value)
            dashboard.version += 1
            dashboard.update_time = self.now()
            updated = dashboard_to_pb(dashboard)
            outbox.add(session, DashboardUpdated(dashboard=updated), workspace_id=caller.workspace_id)
        await self.boards.changed(updated.workspace_id, updated.dashboard_id)
        return pb.UpdateDashboardResponse(dashboard=updated)

    async def MoveDashboard(
        self, request: pb.MoveDashboardRequest, context: Context
    ) -> pb.MoveDashboardResponse:
        """Puts the dashboard into the folder."""
        caller = auth.caller()
        async with self.db.begin() as session:
            dashboard = await locked(session, caller.workspace_id, request.dashboard_id, request.etag)
            before = dashboard.folder_id
            dashboard.folder_id = await held_folder(session, caller.workspace_id, request.folder_id)
            dashboard.version += 1
            dashboard.update_time = self.now()
            moved = dashboard_to_pb(dashboard)
            event = DashboardMoved(dashboard=moved, from_folder_id=before or "")
            outbox.add(session, event, workspace_id=caller.workspace_id)
        await self.boards.changed(moved.workspace_id, moved.dashboard_id)
        return pb.MoveDashboardResponse(dashboard=moved)

    async def DeleteDashboard(
        self, request: pb.DeleteDashboardRequest, context: Context
    ) -> pb.DeleteDashboardResponse:
        """Deletes the dashboard; the widgets go with its row, the grants here."""
        caller = auth.caller()
        async with self.db.begin() as session:
            dashboard = await locked(session, caller.workspace_id, request.dashboard_id, request.etag)
            await session.delete(dashboard)
            await self.grants.forget(session, dashboard.dashboard_id)
            gone = DashboardDeleted(workspace_id=caller.workspace_id, dashboard_id=dashboard.dashboard_id)
            outbox.add(session, gone, workspace_id=caller.workspace_id)
        await self.boards.changed(gone.workspace_id, gone.dashboard_id)
        return pb.DeleteDashboardResponse()

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
            async for response in stream(feed, has, self.span, auth.recheck, self.draining):
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
        grants, next_page_token = await self.grants.list(request.dashboard_id, request)
        return pb.ListDashboardGrantsResponse(grants=grants, next_page_token=next_page_token)

    async def DeleteDashboardGrant(
        self, request: pb.DeleteDashboardGrantRequest, context: Context
    ) -> pb.DeleteDashboardGrantResponse:
        """Takes the grant back."""
        await self.grants.delete(request.dashboard_id, request.grant_id)
        return pb.DeleteDashboardGrantResponse()

    async def BatchUpdateDashboardGrants(
        self, request: pb.BatchUpdateDashboardGrantsRequest, context: Context
    ) -> pb.BatchUpdateDashboardGrantsResponse:
        """Changes the grants together."""
        grants = await self.grants.batch_update(request.dashboard_id, request)
        return pb.BatchUpdateDashboardGrantsResponse(grants=grants)


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
