"""Dashboards, their data, once and live, and the grants on them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from meshboard.dashboard.v1 import dashboard_service_pb2 as pb
from meshboard.dashboard.v1.dashboard_service_pb2_grpc import DashboardServiceServicer
from meshboard.dashboard.v1.events_pb2 import (
    DashboardCreated,
    DashboardDeleted,
    DashboardGrantCreated,
    DashboardGrantDeleted,
    DashboardUpdated,
)
from meshboard.user.v1.grant_pb2 import Grant, Subject
from meshboard.user.v1.internal_user_service_pb2 import CheckSubjectsRequest
from meshboard.user.v1.internal_user_service_pb2_grpc import InternalUserServiceStub
from sqlalchemy import delete, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from uuid_utils.compat import uuid7

from services.chassis import auth, errors, outbox, rights
from services.chassis.clients import Peer
from services.chassis.db import GrantRow
from services.chassis.masks import changed_fields
from services.chassis.paging import Pages
from services.dashboard_svc.answers import Answers
from services.dashboard_svc.boards import Boards, locked
from services.dashboard_svc.convert import dashboard_to_pb, grant_to_pb, subject_of, time_of
from services.dashboard_svc.feeds import Feeds
from services.dashboard_svc.models import Dashboard
from services.dashboard_svc.streams import Span, stream

Context = Any
DASHBOARD = "dashboard"
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
        user: Peer,
        answers: Answers,
        feeds: Feeds,
        span: Span,
        draining: Callable[[], bool],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        new_id: Callable[[], str] = lambda: str(uuid7()),
    ) -> None:
        self.db = db
        self.boards = boards
        self.pages = pages
        self.subjects = user.stub(InternalUserServiceStub)
        self.answers = answers
        self.feeds = feeds
        self.span = span
        self.draining = draining
        self.now = now
        self.new_id = new_id

    async def CreateDashboard(
        self, request: pb.CreateDashboardRequest, context: Context
    ) -> pb.CreateDashboardResponse:
        """Creates the dashboard and the creator's grant."""
        caller = auth.caller()
        now = self.now()
        async with self.db.begin() as session:
            dashboard = await session.scalar(
                insert(Dashboard)
                .values(
                    workspace_id=caller.workspace_id,
                    dashboard_id=self.new_id(),
                    title=request.title,
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
            session.add(
                GrantRow(
                    workspace_id=caller.workspace_id,
                    grant_id=self.new_id(),
                    resource_type=DASHBOARD,
                    resource_id=dashboard.dashboard_id,
                    subject_type=rights.USER,
                    subject_id=caller.user_id,
                    role="owner",
                    effect=rights.ALLOW,
                    creator_id=caller.user_id,
                    create_time=now,
                )
            )
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
        async with self.db() as session:
            rows = await session.scalars(
                select(Dashboard)
                .where(
                    Dashboard.workspace_id == caller.workspace_id,
                    rights.visible(DASHBOARD, Dashboard.dashboard_id, caller.rights, self.now()),
                    page.after(Dashboard.dashboard_id, descending=True),
                )
                .order_by(Dashboard.dashboard_id.desc())
                .limit(page.limit)
            )
        dashboards, next_page_token = page.close(rows.all(), lambda row: (row.dashboard_id,))
        return pb.ListDashboardsResponse(
            dashboards=map(dashboard_to_pb, dashboards), next_page_token=next_page_token
        )

    async def UpdateDashboard(
        self, request: pb.UpdateDashboardRequest, context: Context
    ) -> pb.UpdateDashboardResponse:
        """Changes what the mask names."""
        caller = auth.caller()
        wanted = request.dashboard
        fields = changed_fields(wanted, request.update_mask, MUTABLE)
        if "title" in fields and not wanted.title:
            raise errors.invalid_fields([("dashboard.title", "is empty")])
        async with self.db.begin() as session:
            dashboard = await locked(session, caller.workspace_id, wanted.dashboard_id, wanted.etag)
            for field in fields:
                setattr(dashboard, field, getattr(wanted, field))
            dashboard.version += 1
            dashboard.update_time = self.now()
            updated = dashboard_to_pb(dashboard)
            outbox.add(session, DashboardUpdated(dashboard=updated), workspace_id=caller.workspace_id)
        await self.boards.changed(updated.workspace_id, updated.dashboard_id)
        return pb.UpdateDashboardResponse(dashboard=updated)

    async def DeleteDashboard(
        self, request: pb.DeleteDashboardRequest, context: Context
    ) -> pb.DeleteDashboardResponse:
        """Deletes the dashboard; the widgets go with its row, the grants here."""
        caller = auth.caller()
        async with self.db.begin() as session:
            dashboard = await locked(session, caller.workspace_id, request.dashboard_id, request.etag)
            await session.delete(dashboard)
            await session.execute(
                delete(GrantRow).where(
                    GrantRow.workspace_id == caller.workspace_id,
                    GrantRow.resource_type == DASHBOARD,
                    GrantRow.resource_id == dashboard.dashboard_id,
                )
            )
            gone = DashboardDeleted(workspace_id=caller.workspace_id, dashboard_id=dashboard.dashboard_id)
            outbox.add(session, gone, workspace_id=caller.workspace_id)
        await self.boards.changed(gone.workspace_id, gone.dashboard_id)
        return pb.DeleteDashboardResponse()

    async def GetDashboardData(
        self, request: pb.GetDashboardDataRequest, context: Context
    ) -> pb.GetDashboardDataResponse:
        """Asks all queries, by the dashboard's right."""
        workspace_id = auth.caller().workspace_id
        widgets = await self.boards.widgets(workspace_id, request.dashboard_id.lower())
        return pb.GetDashboardDataResponse(widgets=await self.answers.answer_all(workspace_id, widgets))

    async def WatchDashboard(
        self, request: pb.WatchDashboardRequest, context: Context
    ) -> AsyncIterator[pb.WatchDashboardResponse]:
        """Streams the dashboard's feed."""
        workspace_id = auth.caller().workspace_id
        dashboard_id = request.dashboard_id.lower()
        with self.feeds.watch(workspace_id, dashboard_id) as feed:
            has = feed.read_cursor(request.cursor) if request.cursor else None
            async with asyncio.timeout(CATCH_UP_SECONDS):
                await feed.catch_up()
            async for response in stream(feed, has, self.span, auth.recheck, self.draining):
                yield response

    async def CreateDashboardGrant(
        self, request: pb.CreateDashboardGrantRequest, context: Context
    ) -> pb.CreateDashboardGrantResponse:
        """Adds the grant, in place of an equal one that has expired."""
        caller = auth.caller()
        now = self.now()
        expire_time = self._expire_time(request.expire_time, now) if request.HasField("expire_time") else None
        if request.role not in rights.ROLES:
            raise errors.invalid_argument(
                "ROLE_UNKNOWN", "There is no such role.", field="role", known=", ".join(rights.ROLES)
            )
        await self._check_subject(caller.workspace_id, request.subject)
        subject_type, subject_id = subject_of(request.subject)
        async with self.db.begin() as session:
            dashboard = await locked(session, caller.workspace_id, request.dashboard_id, share=True)
            of_dashboard = (
                GrantRow.workspace_id == caller.workspace_id,
                GrantRow.resource_type == DASHBOARD,
                GrantRow.resource_id == dashboard.dashboard_id,
            )
            await session.execute(
                delete(GrantRow).where(
                    *of_dashboard,
                    GrantRow.subject_type == subject_type,
                    GrantRow.subject_id.is_not_distinct_from(subject_id),
                    GrantRow.role == request.role,
                    GrantRow.expire_time <= now,
                )
            )
            row = await session.scalar(
                insert(GrantRow)
                .values(
                    workspace_id=caller.workspace_id,
                    grant_id=self.new_id(),
                    resource_type=DASHBOARD,
                    resource_id=dashboard.dashboard_id,
                    subject_type=subject_type,
                    subject_id=subject_id,
                    role=request.role,
                    effect=rights.DENY if request.effect == Grant.DENY else rights.ALLOW,
                    expire_time=expire_time,
                    creator_id=caller.user_id,
                    request_id=request.request_id or None,
                    create_time=now,
                )
                .on_conflict_do_nothing()
                .returning(GrantRow)
            )
            if row is None:
                first = await session.scalar(
                    select(GrantRow).where(
                        *of_dashboard,
                        GrantRow.creator_id == caller.user_id,
                        GrantRow.request_id == request.request_id,
                    )
                )
                if first is None:
                    raise errors.already_exists("GRANT_EXISTS", "The dashboard has this grant already.")
                return pb.CreateDashboardGrantResponse(grant=grant_to_pb(first))
            created = DashboardGrantCreated(
                workspace_id=caller.workspace_id,
                dashboard_id=dashboard.dashboard_id,
                grant=grant_to_pb(row),
            )
            outbox.add(session, created, workspace_id=caller.workspace_id)
        return pb.CreateDashboardGrantResponse(grant=created.grant)

    async def ListDashboardGrants(
        self, request: pb.ListDashboardGrantsRequest, context: Context
    ) -> pb.ListDashboardGrantsResponse:
        """Lists all grants, expired ones too."""
        workspace_id = auth.caller().workspace_id
        page = self.pages.open(request, workspace_id)
        async with self.db() as session:
            rows = await session.scalars(
                select(GrantRow)
                .where(
                    GrantRow.workspace_id == workspace_id,
                    GrantRow.resource_type == DASHBOARD,
                    GrantRow.resource_id == request.dashboard_id,
                    page.after(GrantRow.grant_id),
                )
                .order_by(GrantRow.grant_id)
                .limit(page.limit)
            )
        grants, next_page_token = page.close(rows.all(), lambda row: (row.grant_id,))
        return pb.ListDashboardGrantsResponse(
            grants=map(grant_to_pb, grants), next_page_token=next_page_token
        )

    async def DeleteDashboardGrant(
        self, request: pb.DeleteDashboardGrantRequest, context: Context
    ) -> pb.DeleteDashboardGrantResponse:
        """Deletes the grant."""
        caller = auth.caller()
        async with self.db.begin() as session:
            row = await session.scalar(
                delete(GrantRow)
                .where(
                    GrantRow.workspace_id == caller.workspace_id,
                    GrantRow.grant_id == request.grant_id,
                    GrantRow.resource_type == DASHBOARD,
                    GrantRow.resource_id == request.dashboard_id,
                )
                .returning(GrantRow)
            )
            if row is None:
                raise errors.not_found("GRANT_NOT_FOUND", "The dashboard has no such grant.")
            gone = DashboardGrantDeleted(
                workspace_id=row.workspace_id, dashboard_id=row.resource_id, grant_id=row.grant_id
            )
            outbox.add(session, gone, workspace_id=caller.workspace_id)
        return pb.DeleteDashboardGrantResponse()

    def _expire_time(self, expire_time: Timestamp, now: datetime) -> datetime:
        time = time_of(expire_time, "expire_time")
        if time <= now:
            raise errors.invalid_fields([("expire_time", "is not in the future")])
        return time

    async def _check_subject(self, workspace_id: str, subject: Subject) -> None:
        subject_type, subject_id = subject_of(subject)
        if subject_id is None:
            return
        known = await self.subjects.CheckSubjects(
            CheckSubjectsRequest(
                workspace_id=workspace_id,
                user_ids=[subject_id] if subject_type == rights.USER else [],
                team_ids=[subject_id] if subject_type == rights.TEAM else [],
            )
        )
        if subject_id not in (*known.user_ids, *known.team_ids):
            raise errors.invalid_argument(
                "SUBJECT_UNKNOWN", f"The workspace has no such {subject_type}.", field="subject"
            )
