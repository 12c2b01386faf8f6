from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from google.protobuf.timestamp_pb2 import Timestamp
from meshboard.analytics.v1.query_pb2 import Query, Result, TimeRange
from meshboard.dashboard.v1 import annotation_service_pb2 as pb
from meshboard.dashboard.v1 import dashboard_service_pb2
from meshboard.dashboard.v1.annotation_pb2 import Annotation
from meshboard.dashboard.v1.dashboard_pb2 import Dashboard
from meshboard.dashboard.v1.events_pb2 import AnnotationCreated, AnnotationDeleted, AnnotationUpdated
from sqlalchemy import insert, select

from services.chassis import errors
from services.chassis.db import OutboxRow
from services.chassis.paging import Pages
from services.dashboard_svc import annotations as module
from services.dashboard_svc import models
from services.dashboard_svc.annotations import Annotations, Problem
from services.dashboard_svc.scopes import Scope, scope_of
from tests.conditions import eventually
from tests.dashboard_svc.conftest import Mesh
from tests.dashboard_svc.links import share
from tests.dashboard_svc.links import watching as watching_by_link
from tests.dashboard_svc.test_watch import watching
from tests.harness import Member, new_id, refused


def day(number: int) -> Timestamp:
    """A day of January 2026."""
    return Timestamp(seconds=int(datetime(2026, 1, number, tzinfo=UTC).timestamp()))


async def create(mesh: Mesh, member: Member, dashboard: Dashboard, **more: Any) -> Annotation:
    request = pb.CreateAnnotationRequest(
        **{"dashboard_id": dashboard.dashboard_id, "text": "Release", "time": day(5), **more}
    )
    made: Annotation = (await mesh.annotations.CreateAnnotation(request, metadata=member.metadata)).annotation
    return made


async def listed(mesh: Mesh, member: Member, dashboard: Dashboard, **more: Any) -> list[str]:
    request = pb.ListAnnotationsRequest(dashboard_id=dashboard.dashboard_id, **more)
    found = await mesh.annotations.ListAnnotations(request, metadata=member.metadata)
    return [annotation.text for annotation in found.annotations]


async def told(mesh: Mesh, workspace_id: str) -> list[Any]:
    """The domain events about annotations, in their order."""
    kinds = {
        kind.DESCRIPTOR.full_name: kind for kind in (AnnotationCreated, AnnotationUpdated, AnnotationDeleted)
    }
    async with mesh.db() as session:
        rows = await session.execute(
            select(OutboxRow.subject, OutboxRow.payload)
            .where(OutboxRow.subject.in_(kinds))
            .order_by(OutboxRow.id)
        )
    events = [kinds[subject].FromString(payload) for subject, payload in rows]
    return [event for event in events if event.workspace_id == workspace_id]


async def test_is_made_changed_and_deleted(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    viewer = mesh.identity.member("viewer", ann.workspace_id)
    dashboard = await mesh.dashboard(ann)
    made = await create(mesh, ann, dashboard, end_time=day(6), tags=["deploy"])
    assert (made.text, made.time, made.end_time, list(made.tags)) == ("Release", day(5), day(6), ["deploy"])
    assert (made.origin, made.creator_id, made.etag) == (Annotation.BY_HAND, ann.user_id, "1")
    place: Any = {"dashboard_id": dashboard.dashboard_id, "annotation_id": made.annotation_id}
    found = await mesh.annotations.GetAnnotation(pb.GetAnnotationRequest(**place), metadata=viewer.metadata)
    assert found.annotation == made
    wanted = Annotation(**place, text="Rollback", etag="1")
    request = pb.UpdateAnnotationRequest(annotation=wanted)
    request.update_mask.paths.extend(["text", "end_time"])
    changed = (await mesh.annotations.UpdateAnnotation(request, metadata=ann.metadata)).annotation
    assert (changed.text, changed.HasField("end_time"), changed.etag) == ("Rollback", False, "2")
    assert list(changed.tags) == ["deploy"]
    stale = mesh.annotations.UpdateAnnotation(request, metadata=ann.metadata)
    assert await refused(stale) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    await mesh.annotations.DeleteAnnotation(pb.DeleteAnnotationRequest(**place), metadata=ann.metadata)
    again = mesh.annotations.DeleteAnnotation(pb.DeleteAnnotationRequest(**place), metadata=ann.metadata)
    assert await refused(again) == (grpc.StatusCode.NOT_FOUND, "ANNOTATION_NOT_FOUND")
    events = await told(mesh, ann.workspace_id)
    assert [type(event) for event in events] == [AnnotationCreated, AnnotationUpdated, AnnotationDeleted]
    assert (events[0].annotation, events[1].annotation) == (made, changed)
    assert events[2].annotation_id == made.annotation_id


async def test_a_repeated_call_returns_the_first(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    first = await create(mesh, ann, dashboard, request_id="once")
    assert await create(mesh, ann, dashboard, request_id="once", text="Other") == first
    assert len(await told(mesh, ann.workspace_id)) == 1


async def test_times_are_in_order(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    invalid = (grpc.StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")
    assert await refused(create(mesh, ann, dashboard, end_time=day(4))) == invalid
    assert await refused(create(mesh, ann, dashboard, time=None, end_time=day(4))) == invalid
    made = await create(mesh, ann, dashboard)
    wanted = Annotation(
        dashboard_id=dashboard.dashboard_id, annotation_id=made.annotation_id, end_time=day(4)
    )
    update = pb.UpdateAnnotationRequest(annotation=wanted)
    assert await refused(mesh.annotations.UpdateAnnotation(update, metadata=ann.metadata)) == invalid
    assert await listed(mesh, ann, dashboard) == ["Release"]
    assert len(await told(mesh, ann.workspace_id)) == 1


async def test_viewers_do_not_write_and_strangers_see_nothing(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    viewer = mesh.identity.member("viewer", ann.workspace_id)
    stranger = mesh.identity.member("owner")
    dashboard, other = await mesh.dashboard(ann), await mesh.dashboard(ann)
    made = await create(mesh, ann, dashboard)
    denied = (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")
    assert await refused(create(mesh, viewer, dashboard)) == denied
    absent = (grpc.StatusCode.NOT_FOUND, "DASHBOARD_NOT_FOUND")
    assert await refused(create(mesh, stranger, dashboard)) == absent
    assert await refused(listed(mesh, stranger, dashboard)) == absent
    elsewhere = {"dashboard_id": other.dashboard_id, "annotation_id": made.annotation_id}
    for call in (
        mesh.annotations.GetAnnotation(pb.GetAnnotationRequest(**elsewhere), metadata=ann.metadata),
        mesh.annotations.DeleteAnnotation(pb.DeleteAnnotationRequest(**elsewhere), metadata=ann.metadata),
    ):
        assert await refused(call) == (grpc.StatusCode.NOT_FOUND, "ANNOTATION_NOT_FOUND")
    gone = dashboard_service_pb2.DeleteDashboardRequest(dashboard_id=dashboard.dashboard_id)
    await mesh.dashboards.DeleteDashboard(gone, metadata=ann.metadata)
    for refusal in (listed(mesh, ann, dashboard), create(mesh, ann, dashboard)):
        assert await refused(refusal) == absent


async def test_lists_what_touches_a_range_the_latest_first(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    await create(mesh, ann, dashboard, text="span", time=day(1), end_time=day(10))
    await create(mesh, ann, dashboard, text="moment", time=day(5), tags=["x"])
    await create(mesh, ann, dashboard, text="late", time=day(20))
    await create(mesh, ann, dashboard, text="now", time=None)

    async def within(start: int, end: int) -> list[str]:
        time_range = TimeRange(start_time=day(start), end_time=day(end))
        return await listed(mesh, ann, dashboard, time_range=time_range)

    assert await listed(mesh, ann, dashboard) == ["now", "late", "moment", "span"]
    assert await within(6, 20) == ["span"]
    assert await within(5, 21) == ["late", "moment", "span"]
    assert await within(11, 20) == []
    assert await within(2, 5) == ["span"]
    assert await listed(mesh, ann, dashboard, time_range=TimeRange(start_time=day(10))) == [
        "now",
        "late",
        "span",
    ]
    assert await listed(mesh, ann, dashboard, time_range=TimeRange(end_time=day(5))) == ["span"]
    assert await listed(mesh, ann, dashboard, time_range=TimeRange(last_seconds=60)) == ["now"]
    assert await listed(mesh, ann, dashboard, tag="x") == ["moment"]


async def test_has_pages_and_a_bound(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    for number in range(5):
        await create(mesh, ann, dashboard, text=str(number), time=day(3))
    texts: list[str] = []
    request = pb.ListAnnotationsRequest(dashboard_id=dashboard.dashboard_id, page_size=2)
    for _ in range(3):
        found = await mesh.annotations.ListAnnotations(request, metadata=ann.metadata)
        texts += [annotation.text for annotation in found.annotations]
        request.page_token = found.next_page_token
    assert texts == ["4", "3", "2", "1", "0"]
    assert not request.page_token
    monkeypatch.setattr(module, "MAX_ANNOTATIONS", 5)
    full = (grpc.StatusCode.FAILED_PRECONDITION, "TOO_MANY_ANNOTATIONS")
    assert await refused(create(mesh, ann, dashboard)) == full
    assert len(await listed(mesh, ann, dashboard)) == 5


def minutes(source_id: str, count: int) -> Result:
    """The answer of a store with an event in each of the first minutes of 10 January, the latest first."""
    rows = [[f"2026-01-10T{n // 60:02}:{n % 60:02}:00Z", f"v{n}", n + 1] for n in range(count)]
    columns = [{"name": name} for name in ("time", "properties.version", "count")]
    return ParseDict({"columns": columns, "rows": rows[::-1]}, Result())


def with_queries(workspace_id: str, *source_ids: str) -> Dashboard:
    """A dashboard with an annotation query on each of the sources."""
    queries = [
        {
            "title": f"Releases {n}",
            "sourceId": source_id,
            "selector": {
                "event": "release",
                "filters": [{"property": "properties.stage", "operator": "EQUAL", "values": ["$stage"]}],
            },
            "textProperty": "properties.version",
        }
        for n, source_id in enumerate(source_ids)
    ]
    dashboard = {
        "workspaceId": workspace_id,
        "dashboardId": new_id(),
        "variables": [{"name": "stage", "text": {}}],
        "annotationQueries": queries,
    }
    return ParseDict(dashboard, Dashboard())


async def pages_of(
    mesh: Mesh, dashboard: Dashboard, scope: Scope, size: int, **more: Any
) -> tuple[list[Annotation], list[Problem], int]:
    """All annotations, page by page, what was said of queries on the first, and how many pages there were."""
    pages, annotations = Pages(bytes(32)), Annotations(mesh.db, mesh.answers)
    request = pb.ListAnnotationsRequest(dashboard_id=dashboard.dashboard_id, page_size=size)
    found: list[Annotation] = []
    problems: list[Problem] = []
    for number in range(1, 1000):
        page = pages.open(request, dashboard.workspace_id)
        part, request.page_token, said = await annotations.page_of(dashboard, scope, page, **more)
        found += part
        problems = problems or said
        if not request.page_token:
            return found, problems, number
    raise AssertionError("the pages do not end")


async def test_events_are_marks_among_those_made_by_hand(mesh: Mesh) -> None:
    dashboard, source_id = with_queries(new_id(), new_id()), ""
    source_id = dashboard.annotation_queries[0].source_id
    mesh.analytics.results[source_id] = minutes(source_id, 4)
    now = datetime(2026, 1, 10, 0, 1, 30, tzinfo=UTC)
    async with mesh.db.begin() as session:
        await session.execute(
            insert(models.Dashboard).values(
                workspace_id=dashboard.workspace_id,
                dashboard_id=dashboard.dashboard_id,
                title="",
                description="",
                version=1,
                creator_id=new_id(),
                create_time=now,
                update_time=now,
            )
        )
        await session.execute(
            insert(models.Annotation).values(
                workspace_id=dashboard.workspace_id,
                dashboard_id=dashboard.dashboard_id,
                annotation_id=new_id(),
                time=now,
                text="by hand",
                tags=["x"],
                version=1,
                creator_id=new_id(),
                create_time=now,
                update_time=now,
            )
        )
    time_range = TimeRange(start_time=day(10), end_time=day(11))
    scope = scope_of(dashboard.variables, ["stage=live"], time_range)
    for size in (1, 2, 50):
        found, problems, count = await pages_of(mesh, dashboard, scope, size)
        assert [one.text for one in found] == ["v3", "v2", "by hand", "v1", "v0"]
        assert (problems, count) == ([], -(-5 // size))
    mark = found[0]
    assert (mark.origin, mark.title, mark.event_count) == (Annotation.EVENTS, "Releases 0", 4)
    assert (mark.annotation_id, mark.time.ToJsonString()) == ("", "2026-01-10T00:03:00Z")
    query = mesh.analytics.asked[-1].query
    assert (query.granularity, query.time_range) == (Query.MINUTE, time_range)
    assert [(one.property, one.values[0].string_value) for one in query.filters] == [
        ("event", "release"),
        ("properties.stage", "live"),
    ]
    tagged, _, _ = await pages_of(mesh, dashboard, scope, 50, tag="x")
    assert [one.text for one in tagged] == ["by hand"]


async def test_marks_are_bounded_and_a_failing_query_takes_no_other_with_it(mesh: Mesh) -> None:
    dashboard = with_queries(new_id(), new_id(), new_id(), new_id(), new_id())
    one, two, gone, wrong = dashboard.annotation_queries
    wrong.selector.filters[0].values[0].string_value = "$nothing"
    for query in (one, two):
        mesh.analytics.results[query.source_id] = minutes(query.source_id, 400)
    mesh.analytics.failures[gone.source_id] = errors.not_found("SOURCE_NOT_FOUND", "There is no such source.")
    found, problems, _ = await pages_of(mesh, dashboard, Scope(), 100)
    assert len(found) == 500
    assert (found[0].text, found[-1].text) == ("v399", "v150")
    assert [(problem.title, errors.from_status(problem.error).reason) for problem in problems] == [
        (wrong.title, "VARIABLE_UNKNOWN"),
        (gone.title, "SOURCE_NOT_FOUND"),
    ]


async def test_watchers_are_told_of_changes(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    dashboard, other = await mesh.dashboard(ann), await mesh.dashboard(ann)
    await mesh.widget(ann, dashboard)
    _, with_them = await share(mesh, ann, dashboard, show_annotations=True)
    _, without = await share(mesh, ann, dashboard)
    async with (
        watching(mesh, ann, dashboard) as watcher,
        watching(mesh, ann, other) as elsewhere,
        watching_by_link(mesh, with_them) as holder,
        watching_by_link(mesh, without) as stranger,
    ):

        def times(told: Any) -> int:
            return sum(response.annotations_changed for response in told.responses)

        made = await create(mesh, ann, dashboard)
        for number in (1, 2, 3):
            await eventually(lambda number=number: times(watcher) == times(holder) == number)
            assert not watcher.responses[-1].changes
            if number == 1:
                made.text = "Another"
                await mesh.annotations.UpdateAnnotation(
                    pb.UpdateAnnotationRequest(annotation=made), metadata=ann.metadata
                )
            if number == 2:
                ids = {"dashboard_id": made.dashboard_id, "annotation_id": made.annotation_id}
                await mesh.annotations.DeleteAnnotation(
                    pb.DeleteAnnotationRequest(**ids), metadata=ann.metadata
                )
        assert (times(elsewhere), times(stranger)) == (0, 0)
        # Who takes the stream up where it was told is told nothing, who missed one is told.
        async with watching(mesh, ann, dashboard, watcher) as again:
            assert not again.responses[0].annotations_changed
        await create(mesh, ann, dashboard)
        await eventually(lambda: times(watcher) == 4)
        async with watching(mesh, ann, dashboard, again) as late:
            assert late.responses[0].annotations_changed
            assert not late.responses[0].removed_widget_ids
