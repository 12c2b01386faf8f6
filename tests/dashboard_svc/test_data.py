from __future__ import annotations

import time

import grpc
import grpc.aio
import pytest
from meshboard.analytics.v1.query_pb2 import Query
from meshboard.dashboard.v1 import dashboard_service_pb2 as pb
from meshboard.dashboard.v1.dashboard_pb2 import Layout

from services.chassis import errors
from tests.dashboard_svc.conftest import Mesh
from tests.harness import new_id, reason_of


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


async def test_asks_equal_queries_once_and_at_most_8_at_a_time(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    shared = new_id()
    for _ in range(4):
        await mesh.widget(ann, dashboard, Query(source_ids=[shared]))
    for _ in range(20):
        source_id = new_id()
        mesh.analytics.delays[source_id] = 0.05
        await mesh.widget(ann, dashboard, Query(source_ids=[source_id]))
    data = await mesh.dashboards.GetDashboardData(
        pb.GetDashboardDataRequest(dashboard_id=dashboard.dashboard_id), metadata=ann.metadata
    )
    assert len(data.widgets) == 24
    assert all(widget.HasField("result") for widget in data.widgets)
    assert mesh.analytics.times_asked(shared) == 1
    assert mesh.analytics.most_at_once == 8


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
