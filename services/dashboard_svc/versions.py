"""What dashboards were, and how to have that again."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from itertools import islice
from typing import Any

from meshboard.dashboard.v1 import version_service_pb2 as pb
from meshboard.dashboard.v1.dashboard_pb2 import DashboardContent
from meshboard.dashboard.v1.events_pb2 import VersionRestored
from meshboard.dashboard.v1.version_service_pb2_grpc import VersionServiceServicer
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import load_only

from services.chassis import auth, errors, outbox, times
from services.chassis.paging import Pages
from services.dashboard_svc.boards import Boards, absent, locked
from services.dashboard_svc.contents import content_of, record, versions_of, write_content
from services.dashboard_svc.convert import dashboard_to_pb, version_to_pb
from services.dashboard_svc.definitions import questions_of, sources_of
from services.dashboard_svc.diffs import changes
from services.dashboard_svc.favourites import for_caller
from services.dashboard_svc.library import resolved
from services.dashboard_svc.models import Dashboard, Version
from services.dashboard_svc.sources import Problem, Sources, question_of
from services.dashboard_svc.validation import cohorts_of

Context = Any
MAX_CHANGES = 1000


class VersionServicer(VersionServiceServicer):
    """meshboard.dashboard.v1.VersionService."""

    def __init__(
        self,
        db: async_sessionmaker[AsyncSession],
        boards: Boards,
        sources: Sources,
        pages: Pages,
        *,
        now: Callable[[], datetime] = times.now,
    ) -> None:
        self.db = db
        self.boards = boards
        self.sources = sources
        self.pages = pages
        self.now = now

    async def ListVersions(
        self, request: pb.ListVersionsRequest, context: Context
    ) -> pb.ListVersionsResponse:
        """Lists without the contents."""
        page = self.pages.open(request, auth.caller().workspace_id)
        async with self.db() as session:
            dashboard = await _dashboard(session, request.dashboard_id)
            rows = await session.scalars(
                select(Version)
                .options(
                    load_only(Version.author_id, Version.reason, Version.restored_number, Version.create_time)
                )
                .where(*versions_of(dashboard), page.after(Version.number, descending=True))
                .order_by(Version.number.desc())
                .limit(page.limit)
            )
        versions, next_page_token = page.close(rows.all(), lambda row: (row.number,))
        return pb.ListVersionsResponse(
            versions=[version_to_pb(row, dashboard) for row in versions], next_page_token=next_page_token
        )

    async def GetVersion(self, request: pb.GetVersionRequest, context: Context) -> pb.GetVersionResponse:
        """Reads the row."""
        async with self.db() as session:
            dashboard = await _dashboard(session, request.dashboard_id)
            version = await _version(session, dashboard, request.version_id)
        return pb.GetVersionResponse(
            version=version_to_pb(version, dashboard), content=DashboardContent.FromString(version.content)
        )

    async def DiffVersions(
        self, request: pb.DiffVersionsRequest, context: Context
    ) -> pb.DiffVersionsResponse:
        """Compares contents."""
        async with self.db() as session:
            dashboard = await _dashboard(session, request.dashboard_id)
            if request.to_version_id:
                after = await _content(session, dashboard, request.to_version_id)
            else:
                after = await content_of(session, dashboard)
            if request.from_version_id:
                before = await _content(session, dashboard, request.from_version_id)
            else:
                before = await _content_before(session, dashboard, request.to_version_id, after)
        found = list(islice(changes(before, after), MAX_CHANGES + 1))
        return pb.DiffVersionsResponse(changes=found[:MAX_CHANGES], truncated=len(found) > MAX_CHANGES)

    async def RestoreVersion(
        self, request: pb.RestoreVersionRequest, context: Context
    ) -> pb.RestoreVersionResponse:
        """Writes the content of the version, once the caller may ask what it asks."""
        caller, now = auth.caller(), self.now()
        async with self.db() as session:
            dashboard = await _dashboard(session, request.dashboard_id)
            content = await _content(session, dashboard, request.version_id)
            present = await resolved(session, caller.workspace_id, await content_of(session, dashboard))
            asking = await resolved(session, caller.workspace_id, content)
        problems = await self._judge(asking, present)
        async with self.db.begin() as session:
            # What was judged is what is there, or nothing is done.
            etag = request.etag or str(dashboard.version)
            dashboard = await locked(session, caller.workspace_id, request.dashboard_id, etag)
            if await write_content(session, dashboard, content, author_id=caller.user_id, now=now):
                number = int(request.version_id)
                await record(session, dashboard, caller.user_id, request.reason, restored_number=number)
                event = VersionRestored(
                    workspace_id=dashboard.workspace_id,
                    dashboard_id=dashboard.dashboard_id,
                    version_id=request.version_id,
                )
                outbox.add(session, event, workspace_id=caller.workspace_id)
            answer = await for_caller(session, dashboard_to_pb(dashboard))
        await self.boards.changed(answer.workspace_id, answer.dashboard_id)
        return pb.RestoreVersionResponse(dashboard=answer, problems=problems)

    async def _judge(self, content: DashboardContent, present: DashboardContent) -> list[Problem]:
        """What cannot be asked.

        Raises NOT_FOUND or PERMISSION_DENIED when the caller may not query a source that is there, or see a cohort of
        what can be asked, and nothing on the dashboard asks the same now.
        """
        found = await self.sources.look_through(auth.caller().workspace_id, content)
        # A cohort that is gone is the problem of what filters by it.
        await self.sources.require(
            sources_of(_new_in(content, present)) - found.absent_source_ids,
            cohorts_of(_new_in(found.askable, present)),
        )
        return found.problems


def _new_in(content: DashboardContent, present: DashboardContent) -> DashboardContent:
    """What of the content asks something that the present one does not ask."""
    known = [question_of(widget) for widget in present.widgets]
    asked = questions_of(present).keys()
    return DashboardContent(
        variables=[
            each
            for each in content.variables
            if questions_of(DashboardContent(variables=[each])).keys() - asked
        ],
        annotation_queries=[
            each
            for each in content.annotation_queries
            if questions_of(DashboardContent(annotation_queries=[each])).keys() - asked
        ],
        widgets=[widget for widget in content.widgets if question_of(widget) not in known],
    )


async def _dashboard(session: AsyncSession, dashboard_id: str) -> Dashboard:
    dashboard = await session.get(Dashboard, (auth.caller().workspace_id, dashboard_id.lower()))
    if dashboard is None or dashboard.delete_time:
        raise absent()
    return dashboard


async def _version(session: AsyncSession, dashboard: Dashboard, version_id: str) -> Version:
    version = await session.get(Version, (dashboard.workspace_id, dashboard.dashboard_id, int(version_id)))
    if version is None:
        raise errors.not_found("VERSION_NOT_FOUND", "The dashboard has no such version.")
    return version


async def _content(session: AsyncSession, dashboard: Dashboard, version_id: str) -> DashboardContent:
    return DashboardContent.FromString((await _version(session, dashboard, version_id)).content)


async def _content_before(
    session: AsyncSession, dashboard: Dashboard, version_id: str, content: DashboardContent
) -> DashboardContent:
    """What was before a version, or, without one, before the present content; nothing before the first."""
    present = content.SerializeToString(deterministic=True)
    earlier = Version.number < int(version_id) if version_id else Version.content != present
    before = await session.scalar(
        select(Version.content)
        .where(*versions_of(dashboard), earlier)
        .order_by(Version.number.desc())
        .limit(1)
    )
    return DashboardContent.FromString(before or b"")
