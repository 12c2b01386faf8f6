"""Marks on the axes of time of dashboards: made by hand, or found among the events."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from google.protobuf.timestamp_pb2 import Timestamp
from meshboard.analytics.v1.query_pb2 import Breakdown, Filter, Order, Query, TimeRange
from meshboard.dashboard.v1 import annotation_service_pb2 as pb
from meshboard.dashboard.v1.annotation_pb2 import Annotation
from meshboard.dashboard.v1.annotation_service_pb2_grpc import AnnotationServiceServicer
from meshboard.dashboard.v1.dashboard_pb2 import AnnotationQuery, Dashboard, WidgetData
from meshboard.dashboard.v1.events_pb2 import AnnotationCreated, AnnotationDeleted, AnnotationUpdated
from sqlalchemy import ColumnElement, func, select, true
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import auth, errors, outbox, times
from services.chassis.db import new_id
from services.chassis.masks import changed_fields
from services.chassis.paging import Page, Pages
from services.chassis.times import time_of
from services.dashboard_svc.answers import Answers
from services.dashboard_svc.boards import Boards, locked
from services.dashboard_svc.convert import annotation_to_pb
from services.dashboard_svc.models import Annotation as Row
from services.dashboard_svc.questions import question_of, range_of, settled
from services.dashboard_svc.scopes import Scope, Values, scope_of, values_of

Context = Any
Problem = pb.ListAnnotationsResponse.Problem
MUTABLE = ("time", "end_time", "text", "tags")
MAX_ANNOTATIONS = 10_000
# How many marks come from events.
MAX_MARKS = 500
_MAX_TEXT = 2000
# A place in the list: the time, and an id that tells apart what has the same.
_Placed = tuple[tuple[datetime, str], Annotation]


class Annotations:
    """Finds the annotations of dashboards that the caller may see, with or without an account."""

    def __init__(
        self, db: async_sessionmaker[AsyncSession], answers: Answers, now: Callable[[], datetime] = times.now
    ) -> None:
        self._db = db
        self._answers = answers
        self._now = now

    async def page_of(
        self, dashboard: Dashboard, scope: Scope, page: Page, tag: str = ""
    ) -> tuple[list[Annotation], str, list[Problem]]:
        """A page, the latest first, the token of the next one, and which queries have no answer."""
        found, problems = (
            await self._by_hand(dashboard, range_of(dashboard, scope), page, tag),
            list[Problem](),
        )
        if not tag:
            marks, problems = await self._of_events(dashboard, scope)
            found += [one for one in marks if page.last is None or one[0] < page.last]
        found.sort(key=lambda one: one[0], reverse=True)
        placed, next_page_token = page.close(found, lambda one: one[0])
        return [annotation for _, annotation in placed], next_page_token, problems

    async def _by_hand(
        self, dashboard: Dashboard, time_range: TimeRange | None, page: Page, tag: str
    ) -> list[_Placed]:
        async with self._db() as session:
            rows = await session.scalars(
                select(Row)
                .where(
                    Row.workspace_id == dashboard.workspace_id,
                    Row.dashboard_id == dashboard.dashboard_id,
                    self._touches(time_range),
                    Row.tags.contains([tag]) if tag else true(),
                    page.after(Row.time, Row.annotation_id, descending=True),
                )
                .order_by(Row.time.desc(), Row.annotation_id.desc())
                .limit(page.limit)
            )
        return [((row.time, row.annotation_id), annotation_to_pb(row)) for row in rows]

    def _touches(self, time_range: TimeRange | None) -> ColumnElement[bool]:
        condition: ColumnElement[bool] = true()
        if time_range is None:
            return condition
        now = self._now()
        start, end = now - timedelta(seconds=time_range.last_seconds), now
        if time_range.HasField("start_time"):
            start = time_of(time_range.start_time, "time_range.start_time")
        if time_range.HasField("end_time"):
            end = time_of(time_range.end_time, "time_range.end_time")
        if time_range.last_seconds or time_range.HasField("start_time"):
            condition &= func.coalesce(Row.end_time, Row.time) >= start
        if time_range.last_seconds or time_range.HasField("end_time"):
            condition &= Row.time < end
        return condition

    async def _of_events(self, dashboard: Dashboard, scope: Scope) -> tuple[list[_Placed], list[Problem]]:
        """The latest marks, and the queries that have no answer."""
        values, time_range = values_of(dashboard.variables, scope), range_of(dashboard, scope)
        problems, asked = [], []
        for query in dashboard.annotation_queries:
            try:
                asked.append((query, question_of(_query(query, values, scope, time_range))))
            except errors.Error as error:
                problems.append(Problem(title=query.title, error=error.status()))
        answers = await self._answers.ask(dashboard.workspace_id, [question for _, question in asked])
        marks: list[_Placed] = []
        for query, question in asked:
            answer = WidgetData.FromString(answers[question.key].data)
            if answer.HasField("error"):
                problems.append(Problem(title=query.title, error=answer.error))
            marks += _marks(dashboard.dashboard_id, query, answer)
        return sorted(marks, key=lambda one: one[0], reverse=True)[:MAX_MARKS], problems


def _query(query: AnnotationQuery, values: Values, scope: Scope, time_range: TimeRange | None) -> Query:
    asked = Query(
        source_ids=[query.source_id],
        time_range=time_range,
        granularity=Query.MINUTE,
        breakdowns=[Breakdown(property=query.text_property or "event")],
        order_by=[Order(column="time", descending=True)],
        limit=MAX_MARKS,
    )
    if query.selector.event:
        asked.filters.add(property="event").values.add(string_value=query.selector.event)
    asked.filters.extend(settled(query.selector.filters, values))
    asked.filters.extend(map(Filter.FromString, scope.filters))
    return asked


def _marks(dashboard_id: str, query: AnnotationQuery, answer: WidgetData) -> Iterable[_Placed]:
    for time, text, count in (row.values for row in answer.result.rows):
        stamp = Timestamp()
        stamp.FromJsonString(time.string_value)
        mark = Annotation(
            dashboard_id=dashboard_id,
            time=stamp,
            text=(text.string_value or query.selector.event or query.title)[:_MAX_TEXT],
            origin=Annotation.EVENTS,
            title=query.title,
            event_count=int(count.number_value),
        )
        digest = hashlib.blake2b(mark.SerializeToString(deterministic=True), digest_size=16).digest()
        yield (times.time_of(stamp, "time"), str(UUID(bytes=digest))), mark


class AnnotationServicer(AnnotationServiceServicer):
    """meshboard.dashboard.v1.AnnotationService."""

    def __init__(
        self,
        db: async_sessionmaker[AsyncSession],
        boards: Boards,
        pages: Pages,
        annotations: Annotations,
        *,
        now: Callable[[], datetime] = times.now,
    ) -> None:
        self.db = db
        self.boards = boards
        self.pages = pages
        self.annotations = annotations
        self.now = now

    async def CreateAnnotation(
        self, request: pb.CreateAnnotationRequest, context: Context
    ) -> pb.CreateAnnotationResponse:
        """Makes the annotation, under the lock of the dashboard's row, which bounds how many there are."""
        caller, now = auth.caller(), self.now()
        async with self.db.begin() as session:
            dashboard = await locked(session, caller.workspace_id, request.dashboard_id)
            row = await session.scalar(
                insert(Row)
                .values(
                    workspace_id=dashboard.workspace_id,
                    dashboard_id=dashboard.dashboard_id,
                    annotation_id=new_id(),
                    time=time_of(request.time, "time") if request.HasField("time") else now,
                    end_time=time_of(request.end_time, "end_time") if request.HasField("end_time") else None,
                    text=request.text,
                    tags=list(request.tags),
                    version=1,
                    creator_id=caller.user_id,
                    request_id=request.request_id or None,
                    create_time=now,
                    update_time=now,
                )
                .on_conflict_do_nothing(constraint="annotations_request_once")
                .returning(Row)
            )
            if row is None:
                first = await session.scalars(
                    select(Row).where(
                        Row.workspace_id == dashboard.workspace_id,
                        Row.dashboard_id == dashboard.dashboard_id,
                        Row.creator_id == caller.user_id,
                        Row.request_id == request.request_id,
                    )
                )
                return pb.CreateAnnotationResponse(annotation=annotation_to_pb(first.one()))
            _check_times(row)
            await _require_room(session, row)
            created = AnnotationCreated(workspace_id=row.workspace_id, annotation=annotation_to_pb(row))
            outbox.add(session, created, workspace_id=caller.workspace_id)
        return pb.CreateAnnotationResponse(annotation=created.annotation)

    async def GetAnnotation(
        self, request: pb.GetAnnotationRequest, context: Context
    ) -> pb.GetAnnotationResponse:
        """Finds it, on a dashboard that is there."""
        workspace_id = auth.caller().workspace_id
        dashboard = await self.boards.dashboard(workspace_id, request.dashboard_id.lower())
        async with self.db() as session:
            row = await _annotation(session, workspace_id, dashboard.dashboard_id, request.annotation_id)
        return pb.GetAnnotationResponse(annotation=annotation_to_pb(row))

    async def ListAnnotations(
        self, request: pb.ListAnnotationsRequest, context: Context
    ) -> pb.ListAnnotationsResponse:
        """Lists both kinds, by the dashboard's right."""
        workspace_id = auth.caller().workspace_id
        page = self.pages.open(request, workspace_id)
        dashboard = await self.boards.dashboard(workspace_id, request.dashboard_id.lower())
        time_range = request.time_range if request.HasField("time_range") else None
        scope = scope_of(dashboard.variables, request.choices, time_range)
        annotations, next_page_token, problems = await self.annotations.page_of(
            dashboard, scope, page, request.tag
        )
        return pb.ListAnnotationsResponse(
            annotations=annotations, next_page_token=next_page_token, problems=problems
        )

    async def UpdateAnnotation(
        self, request: pb.UpdateAnnotationRequest, context: Context
    ) -> pb.UpdateAnnotationResponse:
        """Changes what the mask names."""
        caller, wanted = auth.caller(), request.annotation
        changes = _changes(wanted, changed_fields(wanted, request.update_mask, MUTABLE))
        async with self.db.begin() as session:
            dashboard = await locked(session, caller.workspace_id, wanted.dashboard_id)
            row = await _annotation(
                session, dashboard.workspace_id, dashboard.dashboard_id, wanted.annotation_id
            )
            if wanted.etag and wanted.etag != str(row.version):
                raise errors.etag_mismatch()
            for field, value in changes.items():
                setattr(row, field, value)
            _check_times(row)
            row.version += 1
            row.update_time = self.now()
            updated = AnnotationUpdated(workspace_id=row.workspace_id, annotation=annotation_to_pb(row))
            outbox.add(session, updated, workspace_id=caller.workspace_id)
        return pb.UpdateAnnotationResponse(annotation=updated.annotation)

    async def DeleteAnnotation(
        self, request: pb.DeleteAnnotationRequest, context: Context
    ) -> pb.DeleteAnnotationResponse:
        """Removes it."""
        caller = auth.caller()
        async with self.db.begin() as session:
            dashboard = await locked(session, caller.workspace_id, request.dashboard_id)
            row = await _annotation(
                session, dashboard.workspace_id, dashboard.dashboard_id, request.annotation_id
            )
            await session.delete(row)
            gone = AnnotationDeleted(
                workspace_id=row.workspace_id, dashboard_id=row.dashboard_id, annotation_id=row.annotation_id
            )
            outbox.add(session, gone, workspace_id=caller.workspace_id)
        return pb.DeleteAnnotationResponse()


async def _annotation(session: AsyncSession, workspace_id: str, dashboard_id: str, annotation_id: str) -> Row:
    row = await session.get(Row, (workspace_id, dashboard_id, annotation_id.lower()))
    if row is None:
        raise errors.not_found("ANNOTATION_NOT_FOUND", "The dashboard has no such annotation.")
    return row


async def _require_room(session: AsyncSession, row: Row) -> None:
    count = await session.scalar(
        select(func.count()).where(Row.workspace_id == row.workspace_id, Row.dashboard_id == row.dashboard_id)
    )
    if count is not None and count > MAX_ANNOTATIONS:
        raise errors.failed_precondition(
            "TOO_MANY_ANNOTATIONS",
            f"A dashboard has at most {MAX_ANNOTATIONS} annotations.",
            limit=MAX_ANNOTATIONS,
        )


def _changes(wanted: Annotation, fields: Sequence[str] | set[str]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if "time" in fields:
        if not wanted.HasField("time"):
            raise errors.invalid_fields([("annotation.time", "is not set")])
        changes["time"] = time_of(wanted.time, "annotation.time")
    if "end_time" in fields:
        has_end = wanted.HasField("end_time")
        changes["end_time"] = time_of(wanted.end_time, "annotation.end_time") if has_end else None
    if "text" in fields:
        if not wanted.text:
            raise errors.invalid_fields([("annotation.text", "is not set")])
        changes["text"] = wanted.text
    if "tags" in fields:
        changes["tags"] = list(wanted.tags)
    return changes


def _check_times(row: Row) -> None:
    if row.end_time is not None and row.end_time < row.time:
        raise errors.invalid_fields([("end_time", "is before time")])
