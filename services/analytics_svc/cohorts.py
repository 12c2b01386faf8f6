"""Cohorts: saved descriptions of people."""

from collections.abc import Callable
from typing import Any

import grpc.aio
from meshboard.analytics.v1.cohort_service_pb2 import (
    CohortMember,
    CreateCohortRequest,
    CreateCohortResponse,
    DeleteCohortRequest,
    DeleteCohortResponse,
    GetCohortRequest,
    GetCohortResponse,
    ListCohortsRequest,
    ListCohortsResponse,
    PreviewCohortRequest,
    PreviewCohortResponse,
    UpdateCohortRequest,
    UpdateCohortResponse,
)
from meshboard.analytics.v1.cohort_service_pb2_grpc import CohortServiceServicer
from meshboard.analytics.v1.events_pb2 import CohortCreated, CohortDeleted, CohortUpdated
from sqlalchemy import delete, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from services.analytics_svc.compiler import cells_of
from services.analytics_svc.convert import cohort_to_pb
from services.analytics_svc.memberships import absent, check_definition, compile_preview
from services.analytics_svc.models import Cohort
from services.analytics_svc.queries import Queries
from services.chassis import auth, errors, outbox
from services.chassis.masks import changed_fields
from services.chassis.paging import Pages

Context = grpc.aio.ServicerContext[Any, Any]


class CohortServicer(CohortServiceServicer):
    """`new_id` gives UUIDv7s, whose order is that of creation."""

    def __init__(self, queries: Queries, pages: Pages, *, new_id: Callable[[], str]) -> None:
        self.db = queries.db
        self.now = queries.now
        self.queries = queries
        self.pages = pages
        self.new_id = new_id

    async def CreateCohort(self, request: CreateCohortRequest, context: Context) -> CreateCohortResponse:
        caller = auth.caller()
        now = self.now()
        check_definition(request.definition, now)
        async with self.db.begin() as session:
            cohort = await session.scalar(
                insert(Cohort)
                .values(
                    workspace_id=caller.workspace_id,
                    cohort_id=self.new_id(),
                    title=request.title,
                    description=request.description,
                    definition=request.definition.SerializeToString(),
                    creator_id=caller.user_id,
                    request_id=request.request_id or None,
                    create_time=now,
                    update_time=now,
                )
                .on_conflict_do_nothing(constraint="cohorts_request_once")
                .returning(Cohort)
            )
            if cohort is None:
                return CreateCohortResponse(cohort=cohort_to_pb(await _repeated(session, request.request_id)))
            event = CohortCreated(cohort=cohort_to_pb(cohort))
            outbox.add(session, event, workspace_id=caller.workspace_id)
        return CreateCohortResponse(cohort=event.cohort)

    async def GetCohort(self, request: GetCohortRequest, context: Context) -> GetCohortResponse:
        async with self.db() as session:
            cohort = await session.get(Cohort, (auth.caller().workspace_id, request.cohort_id))
        if cohort is None:
            raise absent(request.cohort_id)
        return GetCohortResponse(cohort=cohort_to_pb(cohort))

    async def ListCohorts(self, request: ListCohortsRequest, context: Context) -> ListCohortsResponse:
        workspace_id = auth.caller().workspace_id
        page = self.pages.open(request, workspace_id)
        async with self.db() as session:
            rows = await session.scalars(
                select(Cohort)
                .where(Cohort.workspace_id == workspace_id, page.after(Cohort.cohort_id, descending=True))
                .order_by(Cohort.cohort_id.desc())
                .limit(page.limit)
            )
        cohorts, next_page_token = page.close(rows.all(), lambda cohort: (cohort.cohort_id,))
        return ListCohortsResponse(cohorts=map(cohort_to_pb, cohorts), next_page_token=next_page_token)

    async def UpdateCohort(self, request: UpdateCohortRequest, context: Context) -> UpdateCohortResponse:
        wanted = request.cohort
        fields = changed_fields(wanted, request.update_mask, {"title", "description", "definition"})
        if "title" in fields and not wanted.title:
            raise errors.invalid_fields([("cohort.title", "must have at least 1 character")])
        if "definition" in fields:
            if not wanted.definition.conditions:
                raise errors.invalid_fields([("cohort.definition", "must have at least 1 condition")])
            check_definition(wanted.definition, self.now(), "cohort.definition")
        async with self.db.begin() as session:
            cohort = await session.get(
                Cohort, (auth.caller().workspace_id, wanted.cohort_id), with_for_update=True
            )
            if cohort is None:
                raise absent(wanted.cohort_id)
            if wanted.etag and wanted.etag != str(cohort.version):
                raise errors.etag_mismatch()
            if "title" in fields:
                cohort.title = wanted.title
            if "description" in fields:
                cohort.description = wanted.description
            if "definition" in fields:
                cohort.definition = wanted.definition.SerializeToString()
            cohort.version += 1
            cohort.update_time = self.now()
            event = CohortUpdated(cohort=cohort_to_pb(cohort))
            outbox.add(session, event, workspace_id=cohort.workspace_id)
        return UpdateCohortResponse(cohort=event.cohort)

    async def DeleteCohort(self, request: DeleteCohortRequest, context: Context) -> DeleteCohortResponse:
        workspace_id = auth.caller().workspace_id
        async with self.db.begin() as session:
            gone = await session.scalar(
                delete(Cohort)
                .where(Cohort.workspace_id == workspace_id, Cohort.cohort_id == request.cohort_id)
                .returning(Cohort.cohort_id)
            )
            if gone is None:
                raise absent(request.cohort_id)
            event = CohortDeleted(workspace_id=workspace_id, cohort_id=gone)
            outbox.add(session, event, workspace_id=workspace_id)
        return DeleteCohortResponse()

    async def PreviewCohort(self, request: PreviewCohortRequest, context: Context) -> PreviewCohortResponse:
        workspace_id = auth.caller().workspace_id
        compiled = compile_preview(request.definition, workspace_id, request.source_ids, self.now())
        found = await self.queries.run(compiled, workspace_id, request.source_ids)
        member_count, actor_count, members = cells_of(found.rows[0])
        response = PreviewCohortResponse(
            member_count=int(member_count),
            actor_count=int(actor_count),
            watermark=found.watermark,
            cached=found.cached,
        )
        response.members.extend(map(_member, map(cells_of, members)))
        return response


def _member(about: list[Any]) -> CohortMember:
    minus_last, actor_id, first, event_count = about
    member = CohortMember(actor_id=str(actor_id), event_count=int(event_count))
    member.first_time.FromMilliseconds(int(first))
    member.last_time.FromMilliseconds(-int(minus_last))
    return member


async def _repeated(session: AsyncSession, request_id: str) -> Cohort:
    caller = auth.caller()
    rows = await session.scalars(
        select(Cohort).where(
            Cohort.workspace_id == caller.workspace_id,
            Cohort.creator_id == caller.user_id,
            Cohort.request_id == request_id,
        )
    )
    return rows.one()
