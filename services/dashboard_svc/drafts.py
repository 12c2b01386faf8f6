"""Changing dashboards out of sight."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from meshboard.dashboard.v1 import draft_service_pb2 as pb
from meshboard.dashboard.v1.dashboard_pb2 import DashboardContent, Widget
from meshboard.dashboard.v1.draft_service_pb2_grpc import DraftServiceServicer
from meshboard.dashboard.v1.events_pb2 import DashboardPublished, DraftDiscarded, DraftStarted
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import auth, errors, outbox, times
from services.dashboard_svc.answers import Answers
from services.dashboard_svc.boards import Boards, absent, locked, shown, widgets_of
from services.dashboard_svc.contents import record, shown_content, touch, write_content
from services.dashboard_svc.convert import dashboard_to_pb
from services.dashboard_svc.favourites import for_caller
from services.dashboard_svc.models import Dashboard
from services.dashboard_svc.questions import resolve
from services.dashboard_svc.scopes import scope_of

Context = Any


class DraftServicer(DraftServiceServicer):
    """meshboard.dashboard.v1.DraftService. The working copy is the draft; what viewers see is a version."""

    def __init__(
        self,
        db: async_sessionmaker[AsyncSession],
        boards: Boards,
        answers: Answers,
        *,
        now: Callable[[], datetime] = times.now,
    ) -> None:
        self.db = db
        self.boards = boards
        self.answers = answers
        self.now = now

    async def StartDraft(self, request: pb.StartDraftRequest, context: Context) -> pb.StartDraftResponse:
        """Keeps the present version as what viewers see."""
        caller = auth.caller()
        async with self.db.begin() as session:
            dashboard = await locked(session, caller.workspace_id, request.dashboard_id, request.etag)
            if dashboard.published_version is not None:
                raise errors.already_exists("DRAFT_EXISTS", "The dashboard has a draft already.")
            touch(dashboard, self.now())
            dashboard.published_version = await record(session, dashboard, caller.user_id)
            (published,) = await shown(session, [dashboard])
            dashboard.published_title, dashboard.published_tags = published.title, list(published.tags)
            dashboard.published_update_time = published.update_time.ToDatetime(UTC)
            event = DraftStarted(workspace_id=caller.workspace_id, dashboard_id=dashboard.dashboard_id)
            outbox.add(session, event, workspace_id=caller.workspace_id)
            answer = await for_caller(session, dashboard_to_pb(dashboard))
        await self.boards.changed(answer.workspace_id, answer.dashboard_id)
        return pb.StartDraftResponse(dashboard=answer)

    async def GetDraft(self, request: pb.GetDraftRequest, context: Context) -> pb.GetDraftResponse:
        """Reads the working copy."""
        async with self.db() as session:
            dashboard = await _draft(session, request.dashboard_id)
            answer = await for_caller(session, dashboard_to_pb(dashboard))
            return pb.GetDraftResponse(dashboard=answer, widgets=await widgets_of(session, dashboard))

    async def GetDraftData(
        self, request: pb.GetDraftDataRequest, context: Context
    ) -> pb.GetDraftDataResponse:
        """Asks the queries of the working copy, by the dashboard's right."""
        async with self.db() as session:
            dashboard = await _draft(session, request.dashboard_id)
            widgets = _chosen(await widgets_of(session, dashboard), request.widget_ids)
        draft = dashboard_to_pb(dashboard)
        time_range = request.time_range if request.HasField("time_range") else None
        tiles = resolve(widgets, draft, scope_of(draft.variables, request.choices, time_range))
        return pb.GetDraftDataResponse(widgets=await self.answers.data_of(dashboard.workspace_id, tiles))

    async def PublishDashboard(
        self, request: pb.PublishDashboardRequest, context: Context
    ) -> pb.PublishDashboardResponse:
        """Lets viewers see the working copy."""
        caller = auth.caller()
        async with self.db.begin() as session:
            dashboard = await _locked_draft(session, request.dashboard_id, request.etag)
            _end(dashboard, self.now())
            await record(session, dashboard, caller.user_id, request.reason)
            published = dashboard_to_pb(dashboard)
            outbox.add(session, DashboardPublished(dashboard=published), workspace_id=caller.workspace_id)
            answer = await for_caller(session, published)
        await self.boards.changed(answer.workspace_id, answer.dashboard_id)
        return pb.PublishDashboardResponse(dashboard=answer)

    async def DiscardDraft(
        self, request: pb.DiscardDraftRequest, context: Context
    ) -> pb.DiscardDraftResponse:
        """Makes the working copy what viewers see."""
        caller, now = auth.caller(), self.now()
        async with self.db.begin() as session:
            dashboard = await _locked_draft(session, request.dashboard_id, request.etag)
            number = dashboard.published_version
            content: DashboardContent = await shown_content(session, dashboard)
            _end(dashboard, now)
            if await write_content(session, dashboard, content, author_id=caller.user_id, now=now):
                await record(session, dashboard, caller.user_id, restored_number=number)
            event = DraftDiscarded(workspace_id=caller.workspace_id, dashboard_id=dashboard.dashboard_id)
            outbox.add(session, event, workspace_id=caller.workspace_id)
            answer = await for_caller(session, dashboard_to_pb(dashboard))
        await self.boards.changed(answer.workspace_id, answer.dashboard_id)
        return pb.DiscardDraftResponse(dashboard=answer)


async def _draft(session: AsyncSession, dashboard_id: str) -> Dashboard:
    """The row of a dashboard that has a draft. Raises NOT_FOUND."""
    dashboard = await session.get(Dashboard, (auth.caller().workspace_id, dashboard_id.lower()))
    if dashboard is None or dashboard.delete_time:
        raise absent()
    _require_draft(dashboard)
    return dashboard


async def _locked_draft(session: AsyncSession, dashboard_id: str, etag: str) -> Dashboard:
    dashboard = await locked(session, auth.caller().workspace_id, dashboard_id, etag)
    _require_draft(dashboard)
    return dashboard


def _require_draft(dashboard: Dashboard) -> None:
    if dashboard.published_version is None:
        raise errors.not_found("DRAFT_NOT_FOUND", "The dashboard has no draft.")


def _end(dashboard: Dashboard, now: datetime) -> None:
    dashboard.published_version = dashboard.published_tags = None
    dashboard.published_title = dashboard.published_update_time = None
    touch(dashboard, now)


def _chosen(widgets: list[Widget], widget_ids: Any) -> list[Widget]:
    wanted = {widget_id.lower() for widget_id in widget_ids}
    return [widget for widget in widgets if not wanted or widget.widget_id in wanted]
