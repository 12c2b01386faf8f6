from __future__ import annotations

import asyncio
import time

import grpc
import grpc.aio
import pytest
from meshboard.analytics.v1.insight_service_pb2 import FunnelQuery, FunnelStep, RetentionQuery
from meshboard.analytics.v1.query_pb2 import Query, TimeRange
from meshboard.dashboard.v1 import dashboard_service_pb2 as pb
from meshboard.dashboard.v1.dashboard_pb2 import Dashboard, Display, Layout, Widget

from services.chassis import auth, errors
from services.chassis.clients import Peer
from services.dashboard_svc.answers import Answers
from services.dashboard_svc.questions import question_of, resolve
from services.dashboard_svc.scopes import Scope
from tests.conditions import eventually
from tests.dashboard_svc.conftest import Mesh
from tests.harness import new_id, reason_of, refused


async def test_gives_each_widget_its_data_in_the_order_of_the_layout(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    viewer = mesh.identity.member("viewer", ann.workspace_id)
    dashboard = await mesh.dashboard(ann)
    request = pb.GetDashboardDataRequest(dashboard_id=dashboard.dashboard_id)
    assert (await mesh.dashboards.GetDashboardData(request, metadata=viewer.metadata)).widgets == []
    sources = [new_id() for _ in range(3)]
    mesh.analytics.count.update({source_id: n for n, source_id in enumerate(sources)})
    made = [
        await mesh.widget(ann, dashboard, Query(source_ids=[source_id]), layout=Layout(y=10 - n, height=1))
        for n, source_id in enumerate(sources)
    ]
    data = await mesh.dashboards.GetDashboardData(request, metadata=viewer.metadata)
    assert [widget.widget_id for widget in data.widgets] == [widget.widget_id for widget in made[::-1]]
    assert [widget.result.rows[0].values[0].number_value for widget in data.widgets] == [2, 1, 0]
    assert {asked.workspace_id for asked in mesh.analytics.asked} == {ann.workspace_id}


async def test_asks_equal_queries_once_and_all_in_one_call(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    shared = new_id()
    for _ in range(4):
        await mesh.widget(ann, dashboard, Query(source_ids=[shared]))
    for _ in range(20):
        source_id = new_id()
        await mesh.widget(ann, dashboard, Query(source_ids=[source_id]))
    data = await mesh.dashboards.GetDashboardData(
        pb.GetDashboardDataRequest(dashboard_id=dashboard.dashboard_id), metadata=ann.metadata
    )
    assert len(data.widgets) == 24
    assert all(widget.HasField("result") for widget in data.widgets)
    assert mesh.analytics.times_asked(shared) == 1
    assert mesh.analytics.calls == 1


async def test_who_asks_again_asks_for_what_has_changed(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    still, moving = new_id(), new_id()
    for source_id in (still, moving):
        await mesh.widget(ann, dashboard, Query(source_ids=[source_id]))

    async def ask() -> list[list[float]]:
        request = pb.GetDashboardDataRequest(dashboard_id=dashboard.dashboard_id)
        data = await mesh.dashboards.GetDashboardData(request, metadata=ann.metadata)
        return [[number for row in widget.result.rows for number in row] for widget in data.widgets]

    first = await ask()
    assert mesh.analytics.calls == 1
    assert await ask() == first
    assert mesh.analytics.calls == 2
    mesh.analytics.count[moving] += 1
    asked = mesh.analytics.times_asked(still)
    second = await ask()
    assert (second[0], second[1] == first[1]) == (first[0], False)
    # One call to recall both, one for the one that has changed.
    assert mesh.analytics.calls == 4
    assert mesh.analytics.times_asked(still) == asked + 1


async def test_a_failing_query_takes_only_its_widget(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    good, costly, broken, slow = (new_id() for _ in range(4))
    for source_id in (good, costly, broken, slow):
        await mesh.widget(ann, dashboard, Query(source_ids=[source_id]))
    mesh.analytics.failures[costly] = errors.resource_exhausted("QUERY_TOO_EXPENSIVE", "Narrow it.")
    mesh.analytics.failures[broken] = errors.internal()
    mesh.analytics.delays[slow] = 30
    start = time.monotonic()
    data = await mesh.dashboards.GetDashboardData(
        pb.GetDashboardDataRequest(dashboard_id=dashboard.dashboard_id), metadata=ann.metadata, timeout=2
    )
    assert time.monotonic() - start < 2
    outcomes = [widget.WhichOneof("outcome") for widget in data.widgets]
    assert outcomes == ["result", "error", "error", "error"]
    told = [errors.from_status(widget.error) for widget in data.widgets[1:]]
    assert [(error.code, error.reason) for error in told] == [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUERY_TOO_EXPENSIVE"),
        (grpc.StatusCode.UNAVAILABLE, "DEPENDENCY_UNAVAILABLE"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_PASSED"),
    ]


async def test_is_absent_for_another_workspace(mesh: Mesh) -> None:
    ann, stranger = mesh.identity.member("editor"), mesh.identity.member("owner")
    dashboard = await mesh.dashboard(ann)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await mesh.dashboards.GetDashboardData(
            pb.GetDashboardDataRequest(dashboard_id=dashboard.dashboard_id), metadata=stranger.metadata
        )
    assert reason_of(failure.value) == "DASHBOARD_NOT_FOUND"


async def test_an_answer_that_is_the_present_one_is_not_sent_again(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard, source_id = await mesh.dashboard(ann), new_id()
    await mesh.widget(ann, dashboard, Query(source_ids=[source_id]))
    request = pb.GetDashboardDataRequest(dashboard_id=dashboard.dashboard_id)

    async def ask() -> tuple[float, bool]:
        (data,) = (await mesh.dashboards.GetDashboardData(request, metadata=ann.metadata)).widgets
        return data.result.rows[0].values[0].number_value, data.result.cached

    assert [await ask(), await ask(), await ask()] == [(0, False), (0, True), (0, True)]
    versions = [asked.known_version for asked in mesh.analytics.asked]
    assert versions[0] == b""
    assert versions[1] == versions[2] != b""
    mesh.analytics.count[source_id] = 1
    assert [await ask(), await ask()] == [(1, False), (1, True)]


async def test_each_kind_of_widget_has_its_kind_of_answer(mesh: Mesh) -> None:
    source_id = new_id()
    mesh.analytics.count[source_id] = 3
    funnel = FunnelQuery(source_ids=[source_id], steps=[FunnelStep(event="a"), FunnelStep(event="b")])
    retention = RetentionQuery(source_ids=[source_id], time_range=TimeRange(last_seconds=60))
    widgets = [
        Widget(widget_id=new_id(), kind=Widget.FUNNEL, funnel=funnel),
        Widget(widget_id=new_id(), kind=Widget.RETENTION, retention=retention),
        Widget(widget_id=new_id(), kind=Widget.TEXT, markdown="# Hello"),
        Widget(
            widget_id=new_id(),
            kind=Widget.NUMBER,
            query=Query(source_ids=[source_id]),
            display=Display(sparkline=True),
        ),
    ]
    workspace_id, tiles = new_id(), resolve(widgets, Dashboard(), Scope())
    for _ in range(2):
        data = await mesh.answers.data_of(workspace_id, tiles)
        assert [one.widget_id for one in data] == [widget.widget_id for widget in widgets]
        assert [one.WhichOneof("outcome") for one in data] == ["funnel", "retention", "none", "result"]
        assert data[0].funnel.total.steps[0].count == data[1].retention.rows[0].size == 3
        assert [one.HasField("sparkline") for one in data] == [False, False, False, True]
        assert data[3].sparkline.rows[0].values[0].number_value == 3
        # The gateway reads each field once: it does not merge.
        raw = await mesh.answers.serialized(workspace_id, tiles)
        assert pb.GetDashboardDataResponse.FromString(raw).SerializeToString() == raw


async def test_gives_some_of_the_widgets(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    widgets = [await mesh.widget(ann, dashboard) for _ in range(3)]
    request = pb.GetDashboardDataRequest(
        dashboard_id=dashboard.dashboard_id, widget_ids=[widgets[2].widget_id.upper(), new_id()]
    )
    data = await mesh.dashboards.GetDashboardData(request, metadata=ann.metadata)
    assert [one.widget_id for one in data.widgets] == [widgets[2].widget_id]
    assert len(mesh.analytics.asked) == 1


async def test_looks_at_the_time_that_is_asked_for(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    await mesh.widget(ann, dashboard)
    request = pb.GetDashboardDataRequest(
        dashboard_id=dashboard.dashboard_id, time_range=TimeRange(last_seconds=60)
    )
    await mesh.dashboards.GetDashboardData(request, metadata=ann.metadata)
    assert mesh.analytics.asked[0].query.time_range.last_seconds == 60
    request.choices.append("country=de")
    call = mesh.dashboards.GetDashboardData(request, metadata=ann.metadata)
    assert await refused(call) == (grpc.StatusCode.INVALID_ARGUMENT, "CHOICE_INVALID")


async def test_calls_of_a_workspace_are_bounded_and_what_is_kept_too(mesh: Mesh) -> None:
    peer = Peer("analytics", mesh.analytics_address, auth.ServiceTokens("dashboard", mesh.identity.keys))
    answers = Answers(peer, per_workspace=2, cached_bytes=2_000)
    slow, busy = new_id(), new_id()
    mesh.analytics.delays[slow] = 30
    waiting = [
        asyncio.create_task(answers.ask(busy, [question_of(Query(source_ids=[slow], limit=n + 1))]))
        for n in range(3)
    ]
    await eventually(lambda: mesh.analytics.calls == 2)
    quick = [question_of(Query(source_ids=[new_id()])) for _ in range(50)]
    for _ in range(2):
        await answers.ask(new_id(), quick)
    assert mesh.analytics.calls == 4
    assert len({asked.known_version for asked in mesh.analytics.asked}) == 1
    waiting[0].cancel()
    await eventually(lambda: mesh.analytics.calls == 5)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await peer.close()
