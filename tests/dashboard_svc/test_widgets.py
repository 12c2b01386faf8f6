from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from meshboard.analytics.v1.query_pb2 import Breakdown, Filter, Query
from meshboard.dashboard.v1 import dashboard_service_pb2
from meshboard.dashboard.v1 import widget_service_pb2 as pb
from meshboard.dashboard.v1.dashboard_pb2 import Layout, Widget

from services.chassis import errors
from tests.dashboard_svc.conftest import Mesh
from tests.harness import Member, new_id, reason_of


async def list_ids(mesh: Mesh, member: Member, dashboard_id: str, page_size: int = 0) -> list[str]:
    """All widgets, page by page."""
    request = pb.ListWidgetsRequest(dashboard_id=dashboard_id, page_size=page_size)
    ids: list[str] = []
    while True:
        page = await mesh.widgets.ListWidgets(request, metadata=member.metadata)
        ids += [widget.widget_id for widget in page.widgets]
        if not page.next_page_token:
            return ids
        request.page_token = page.next_page_token


async def test_creates_below_all_others(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    first = await mesh.widget(ann, dashboard, layout=Layout(x=20, y=3, height=4))
    assert first.layout == Layout(x=20, y=3, width=4, height=4)
    second = await mesh.widget(ann, dashboard, title="Second")
    assert second.layout == Layout(x=0, y=7, width=12, height=8)
    left = await mesh.widget(ann, dashboard, layout=Layout(x=0, y=3, width=2, height=2))
    assert await list_ids(mesh, ann, dashboard.dashboard_id, page_size=2) == [
        left.widget_id,
        first.widget_id,
        second.widget_id,
    ]
    got = await mesh.widgets.GetWidget(
        pb.GetWidgetRequest(dashboard_id=dashboard.dashboard_id, widget_id=second.widget_id),
        metadata=ann.metadata,
    )
    assert got.widget == second
    changed = await mesh.dashboards.GetDashboard(
        dashboard_service_pb2.GetDashboardRequest(dashboard_id=dashboard.dashboard_id), metadata=ann.metadata
    )
    assert changed.dashboard.etag != dashboard.etag


async def test_asks_analytics_as_the_caller(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    query = Query(source_ids=[new_id()])
    await mesh.widget(ann, dashboard, query)
    validated, metadata = mesh.analytics.validated[-1]
    assert validated == query
    assert metadata["authorization"] == f"Bearer {ann.token}"
    assert metadata["x-workspace-id"] == ann.workspace_id
    mesh.analytics.refused = errors.permission_denied("PERMISSION_MISSING", "Not yours.")
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await mesh.widget(ann, dashboard)
    assert reason_of(failure.value) == "PERMISSION_MISSING"
    assert len(await list_ids(mesh, ann, dashboard.dashboard_id)) == 1


@pytest.mark.parametrize(
    ("kind", "query", "fits"),
    [
        (Widget.TIMESERIES, Query(granularity=Query.HOUR), True),
        (Widget.TIMESERIES, Query(), False),
        (Widget.NUMBER, Query(), True),
        (Widget.NUMBER, Query(granularity=Query.DAY), False),
        (Widget.NUMBER, Query(breakdowns=[Breakdown(property="path")]), False),
        (Widget.PIE, Query(breakdowns=[Breakdown(property="path")]), True),
        (Widget.PIE, Query(), False),
        (Widget.PIE, Query(breakdowns=[Breakdown(property="path")], granularity=Query.DAY), False),
        (Widget.BAR, Query(breakdowns=[Breakdown(property="path")], granularity=Query.DAY), True),
        (Widget.TABLE, Query(granularity=Query.DAY), True),
    ],
)
async def test_query_fits_the_kind(mesh: Mesh, kind: Widget.Kind.ValueType, query: Query, fits: bool) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    query.source_ids[:] = [new_id()]
    if fits:
        assert (await mesh.widget(ann, dashboard, query, kind=kind)).query == query
        return
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await mesh.widget(ann, dashboard, query, kind=kind)
    assert reason_of(failure.value) == "WIDGET_QUERY_UNFIT"


async def test_refuses_a_query_without_bounds(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    query = Query(source_ids=[new_id()], filters=[Filter(property="path")])
    query.filters[0].values.add(string_value="x" * 70_000)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await mesh.widget(ann, dashboard, query)
    assert reason_of(failure.value) == "VALIDATION_FAILED"


async def test_a_dashboard_has_at_most_100(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    for _ in range(10):
        outcomes = await asyncio.gather(
            *(mesh.widget(ann, dashboard) for _ in range(11)), return_exceptions=True
        )
    refused = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
    assert {reason_of(refusal) for refusal in refused} == {"TOO_MANY_WIDGETS"}
    assert len(await list_ids(mesh, ann, dashboard.dashboard_id)) == 100


async def test_repeat_of_a_create_returns_the_first(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    query = Query(source_ids=[new_id()])
    made = await asyncio.gather(*(mesh.widget(ann, dashboard, query, request_id="once") for _ in range(5)))
    assert len({widget.widget_id for widget in made}) == 1


async def test_updates_what_the_mask_names(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    await mesh.widget(ann, dashboard, title="Above")
    widget = await mesh.widget(ann, dashboard, title="Old")

    async def update(*paths: str, **fields: object) -> Widget:
        ids = {"dashboard_id": widget.dashboard_id, "widget_id": widget.widget_id}
        request = pb.UpdateWidgetRequest(
            widget=Widget(**{**ids, **fields}),  # type: ignore[arg-type]  # given by name
            update_mask=FieldMask(paths=paths),
        )
        response = await mesh.widgets.UpdateWidget(request, metadata=ann.metadata)
        updated: Widget = response.widget
        return updated

    renamed = await update(title="New")
    assert (renamed.title, renamed.query, renamed.layout) == ("New", widget.query, widget.layout)
    moved = await update("layout", layout=Layout(x=13, y=2, width=3, height=4), title="not this")
    assert (moved.title, moved.layout) == ("New", Layout(x=13, y=2, width=3, height=4))
    validations = len(mesh.analytics.validated)
    query = Query(source_ids=[new_id()], granularity=Query.HOUR)
    lines = await update(kind=Widget.TIMESERIES, query=query, etag=moved.etag)
    assert (lines.kind, lines.query) == (Widget.TIMESERIES, query)
    assert len(mesh.analytics.validated) == validations + 1
    for reason, paths, fields in (
        ("WIDGET_QUERY_UNFIT", (), {"kind": Widget.NUMBER}),
        ("WIDGET_QUERY_UNFIT", (), {"query": Query(source_ids=[new_id()])}),
        ("ETAG_MISMATCH", (), {"title": "Late", "etag": moved.etag}),
        ("UPDATE_MASK_INVALID", ("query.limit",), {}),
        ("VALIDATION_FAILED", ("query",), {}),
        ("VALIDATION_FAILED", ("kind",), {}),
        ("WIDGET_NOT_FOUND", ("title",), {"widget_id": new_id()}),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await update(*paths, **fields)
        assert reason_of(failure.value) == reason
    unchanged = await mesh.widgets.GetWidget(
        pb.GetWidgetRequest(dashboard_id=dashboard.dashboard_id, widget_id=widget.widget_id),
        metadata=ann.metadata,
    )
    assert unchanged.widget == lines


async def test_deletes(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    widget = await mesh.widget(ann, dashboard)
    request = pb.DeleteWidgetRequest(dashboard_id=dashboard.dashboard_id, widget_id=widget.widget_id)
    await mesh.widgets.DeleteWidget(request, metadata=ann.metadata)
    assert await list_ids(mesh, ann, dashboard.dashboard_id) == []
    for call, again in (
        (mesh.widgets.DeleteWidget, request),
        (
            mesh.widgets.GetWidget,
            pb.GetWidgetRequest(dashboard_id=dashboard.dashboard_id, widget_id=widget.widget_id),
        ),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call(again, metadata=ann.metadata)
        assert reason_of(failure.value) == "WIDGET_NOT_FOUND"


async def test_widget_of_another_dashboard_is_absent(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    one, two = await mesh.dashboard(ann), await mesh.dashboard(ann)
    widget = await mesh.widget(ann, one)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await mesh.widgets.GetWidget(
            pb.GetWidgetRequest(dashboard_id=two.dashboard_id, widget_id=widget.widget_id),
            metadata=ann.metadata,
        )
    assert reason_of(failure.value) == "WIDGET_NOT_FOUND"


async def test_viewer_may_look_but_not_touch(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    viewer = mesh.identity.member("viewer", ann.workspace_id)
    dashboard = await mesh.dashboard(ann)
    widget = await mesh.widget(ann, dashboard)
    assert await list_ids(mesh, viewer, dashboard.dashboard_id) == [widget.widget_id]
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await mesh.widget(viewer, dashboard)
    assert failure.value.code() is grpc.StatusCode.PERMISSION_DENIED
