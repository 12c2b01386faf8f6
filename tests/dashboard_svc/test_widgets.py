from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.rpc import error_details_pb2
from meshboard.analytics.v1.insight_service_pb2 import FunnelQuery, FunnelStep, RetentionQuery
from meshboard.analytics.v1.query_pb2 import AnyOf, Filter, Query, TimeRange
from meshboard.dashboard.v1 import dashboard_service_pb2
from meshboard.dashboard.v1 import widget_service_pb2 as pb
from meshboard.dashboard.v1.dashboard_pb2 import Dashboard, Display, Layout, Link, Widget
from sqlalchemy import select, text

from services.chassis import errors
from services.dashboard_svc import models
from services.dashboard_svc.convert import widget_to_pb
from tests.dashboard_svc.conftest import Mesh
from tests.dashboard_svc.hostile import TEXTS
from tests.dashboard_svc.test_markdown import dangers
from tests.harness import Member, new_id, reason_of, refused, status_of


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


async def create(mesh: Mesh, member: Member, dashboard: Dashboard, **fields: Any) -> Widget:
    """A new widget with nothing but these fields."""
    request = pb.CreateWidgetRequest(dashboard_id=dashboard.dashboard_id, **fields)
    widget: Widget = (await mesh.widgets.CreateWidget(request, metadata=member.metadata)).widget
    return widget


async def stored(mesh: Mesh, dashboard: Dashboard) -> list[Widget]:
    """The widgets as the tables have them."""
    async with mesh.db() as session:
        rows = await session.scalars(
            select(models.Widget)
            .where(models.Widget.dashboard_id == dashboard.dashboard_id)
            .order_by(models.Widget.widget_id)
        )
    return [widget_to_pb(row) for row in rows]


def fields_of(failure: grpc.aio.AioRpcError) -> list[str]:
    """The fields that an error names."""
    for detail in status_of(failure).details:
        if detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            request = error_details_pb2.BadRequest.FromString(detail.value)
            return [violation.field for violation in request.field_violations]
    return []


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


async def test_stores_what_each_kind_shows(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    source_id, cohort_id = new_id(), new_id()
    funnel = FunnelQuery(source_ids=[source_id], steps=[FunnelStep(event="a"), FunnelStep(event="b")])
    funnel.steps[1].filters.add(cohort_id=cohort_id)
    retention = RetentionQuery(source_ids=[source_id], time_range=TimeRange(last_seconds=60))
    display = Display(unit=Display.MONEY, unit_text="EUR", links=[Link(title="To", url="https://a.example")])
    shown: list[dict[str, Any]] = [
        {"kind": Widget.FUNNEL, "funnel": funnel, "display": display, "description": "Words"},
        {"kind": Widget.RETENTION, "retention": retention, "own_time_range": True},
        {"kind": Widget.TEXT, "markdown": "# Words", "name": "words"},
    ]
    made = [await create(mesh, ann, dashboard, **fields) for fields in shown]
    request = pb.ListWidgetsRequest(dashboard_id=dashboard.dashboard_id)
    assert list((await mesh.widgets.ListWidgets(request, metadata=ann.metadata)).widgets) == made
    for widget, fields in zip(made, shown, strict=True):
        assert {name: getattr(widget, name) for name in fields} == fields
    assert made[2].html == "<h1>Words</h1>\n"
    assert [query for query, _ in mesh.analytics.validated] == [
        Query(source_ids=[source_id], any_of=[AnyOf(filters=[Filter(cohort_id=cohort_id)])]),
        Query(source_ids=[source_id]),
    ]
    assert [question.WhichOneof("question") for question in mesh.analytics.checked] == ["funnel", "retention"]
    mesh.analytics.problem = errors.invalid_argument("QUERY_INVALID", "No.")
    assert await refused(create(mesh, ann, dashboard, **shown[0])) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "QUERY_INVALID",
    )


async def test_says_which_field_is_wrong(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    for fields, named, reason in (
        (
            {"kind": Widget.NUMBER, "query": Query(source_ids=[new_id()], granularity=Query.DAY)},
            ["query"],
            "WIDGET_QUERY_UNFIT",
        ),
        ({"kind": Widget.TEXT}, ["query", "markdown"], "VALIDATION_FAILED"),
        ({"kind": Widget.CUSTOM}, ["custom"], "VALIDATION_FAILED"),
        ({"kind": Widget.KIND_UNSPECIFIED}, ["kind"], "VALIDATION_FAILED"),
        (
            {"display": Display(links=[Link(title="To", url="javascript:alert(1)")])},
            ["display.links[0].url"],
            "VALIDATION_FAILED",
        ),
        ({"name": "Not A Name"}, ["name"], "VALIDATION_FAILED"),
        ({"time_range_variable": "when"}, ["time_range_variable"], "VARIABLE_UNKNOWN"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await mesh.widget(ann, dashboard, **fields)
        assert (reason_of(failure.value), fields_of(failure.value)) == (reason, named)
    assert await list_ids(mesh, ann, dashboard.dashboard_id) == []


async def test_a_query_names_variables_of_the_dashboard(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    query = Query(source_ids=[new_id()], filters=[Filter(property="path")])
    query.filters[0].values.add(string_value="$path")
    assert await refused(mesh.widget(ann, dashboard, query)) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "VARIABLE_UNKNOWN",
    )
    query.filters[0].values[0].string_value = "$$path"
    assert (await mesh.widget(ann, dashboard, query)).query == query


async def test_hostile_texts_stay_text(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    texts = {f"n{number}": hostile for number, hostile in enumerate(TEXTS[:100])}

    def of(name: str, hostile: str) -> dict[str, Any]:
        display = Display(links=[Link(title=hostile[:100], url="https://a.example")])
        shown = {"kind": Widget.TEXT, "markdown": hostile, "display": display}
        return {**shown, "name": name, "title": hostile, "description": hostile}

    for named in texts.items():
        await create(mesh, ann, dashboard, **of(*named))
    request = pb.ListWidgetsRequest(dashboard_id=dashboard.dashboard_id, page_size=100)
    widgets = (await mesh.widgets.ListWidgets(request, metadata=ann.metadata)).widgets
    assert {widget.name for widget in widgets} == texts.keys()
    for widget in widgets:
        hostile = texts[widget.name]
        assert (widget.title, widget.description, widget.markdown) == (hostile, hostile, hostile)
        assert widget.display.links[0].title == hostile[:100]
        assert dangers(widget.html) == []


async def test_two_widgets_never_stand_on_one_cell(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    place = Layout(x=4, y=4, width=4, height=4)
    made = await asyncio.gather(
        *(mesh.widget(ann, dashboard, layout=place) for _ in range(3)), return_exceptions=True
    )
    (first,) = [widget for widget in made if isinstance(widget, Widget)]
    for refusal in made:
        if refusal is not first:
            assert isinstance(refusal, grpc.aio.AioRpcError)
            assert (refusal.code(), reason_of(refusal)) == (
                grpc.StatusCode.FAILED_PRECONDITION,
                "LAYOUT_OVERLAP",
            )
            assert first.widget_id in (refusal.details() or "")
    beside = await mesh.widget(ann, dashboard, layout=Layout(x=8, y=4, width=4, height=4))
    request = pb.UpdateWidgetRequest(
        widget=Widget(dashboard_id=beside.dashboard_id, widget_id=beside.widget_id, layout=Layout(x=7, y=7))
    )
    assert (await refused(mesh.widgets.UpdateWidget(request, metadata=ann.metadata)))[1] == "LAYOUT_OVERLAP"
    await mesh.widget(ann, dashboard, layout=Layout(x=0, y=9_999, width=1, height=3))
    assert await refused(mesh.widget(ann, dashboard)) == (grpc.StatusCode.FAILED_PRECONDITION, "LAYOUT_FULL")


async def test_arranges_all_or_none(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    one, two, three = [await mesh.widget(ann, dashboard) for _ in range(3)]

    async def arrange(*places: tuple[str, Layout], etag: str = "") -> list[Widget]:
        request = pb.ArrangeWidgetsRequest(dashboard_id=dashboard.dashboard_id, etag=etag)
        for widget_id, layout in places:
            request.placements.add(widget_id=widget_id, layout=layout)
        response = await mesh.widgets.ArrangeWidgets(request, metadata=ann.metadata)
        return list(response.widgets)

    swapped = await arrange((one.widget_id, two.layout), (two.widget_id.upper(), one.layout))
    assert [widget.widget_id for widget in swapped] == [one.widget_id, two.widget_id]
    assert [widget.layout for widget in swapped] == [two.layout, one.layout]
    order = [two.widget_id, one.widget_id, three.widget_id]
    assert await list_ids(mesh, ann, dashboard.dashboard_id) == order
    free = Layout(x=12, y=0, width=4, height=4)
    for reason, places, etag in (
        ("LAYOUT_OVERLAP", [(one.widget_id, free), (two.widget_id, three.layout)], ""),
        ("LAYOUT_OVERLAP", [(one.widget_id, free), (two.widget_id, free)], ""),
        ("WIDGET_NOT_FOUND", [(one.widget_id, free), (new_id(), three.layout)], ""),
        ("VALIDATION_FAILED", [(one.widget_id, free), (one.widget_id.upper(), free)], ""),
        ("VALIDATION_FAILED", [(one.widget_id, Layout(x=20, width=5))], ""),
        ("VALIDATION_FAILED", [], ""),
        ("ETAG_MISMATCH", [(one.widget_id, free)], dashboard.etag),
    ):
        assert (await refused(arrange(*places, etag=etag)))[1] == reason
    assert await list_ids(mesh, ann, dashboard.dashboard_id) == order


async def test_a_name_is_one_widgets(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard, other = await mesh.dashboard(ann), await mesh.dashboard(ann)
    await mesh.widget(ann, dashboard, name="revenue")
    await mesh.widget(ann, other, name="revenue")
    orders = await mesh.widget(ann, dashboard, name="orders")
    request = pb.UpdateWidgetRequest(
        widget=Widget(dashboard_id=orders.dashboard_id, widget_id=orders.widget_id, name="revenue")
    )
    for call in (
        mesh.widget(ann, dashboard, name="revenue"),
        mesh.widgets.UpdateWidget(request, metadata=ann.metadata),
    ):
        assert await refused(call) == (grpc.StatusCode.ALREADY_EXISTS, "WIDGET_NAME_TAKEN")
    request.widget.name = "orders"
    assert (await mesh.widgets.UpdateWidget(request, metadata=ann.metadata)).widget.name == "orders"


async def test_another_kind_drops_what_the_old_one_had(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    widget = await mesh.widget(ann, dashboard, title="Words", display=Display(decimals=1))
    ids: dict[str, Any] = {"dashboard_id": widget.dashboard_id, "widget_id": widget.widget_id}
    request = pb.UpdateWidgetRequest(widget=Widget(**ids, kind=Widget.TEXT, markdown="*a*"))
    words = (await mesh.widgets.UpdateWidget(request, metadata=ann.metadata)).widget
    assert (words.html, words.HasField("query"), words.display.decimals) == ("<p><em>a</em></p>\n", False, 1)
    request.widget.query.CopyFrom(widget.query)
    assert (await refused(mesh.widgets.UpdateWidget(request, metadata=ann.metadata)))[
        1
    ] == "VALIDATION_FAILED"


async def test_the_release_before_and_this_one_read_each_other(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    new = await mesh.widget(ann, dashboard)
    for size in (1, 100, 200, 20_000):  # a length of 1, 2 and 3 bytes
        old = Query(source_ids=[new_id()], filters=[Filter(property="path")])
        old.filters[0].values.add(string_value="x" * size)
        where = {"widget_id": new.widget_id, "query": old.SerializeToString(), "new_id": new_id()}
        async with mesh.db.begin() as session:
            read = await session.scalar(text("SELECT query FROM widgets WHERE widget_id = :widget_id"), where)
            assert read == new.query.SerializeToString()
            await session.execute(
                text("UPDATE widgets SET query = :query WHERE widget_id = :widget_id"), where
            )
            await session.execute(
                text(
                    "INSERT INTO widgets (workspace_id, dashboard_id, widget_id, title, kind, query, x, y, width,"
                    " height, version, creator_id, create_time, update_time)"
                    " SELECT workspace_id, dashboard_id, :new_id, title, kind, query, x, y, width, height, 1,"
                    " creator_id, create_time, update_time FROM widgets"
                    " WHERE widget_id = :widget_id"
                ),
                where,
            )
        assert [widget.query for widget in await stored(mesh, dashboard)] == [old] * 2
        async with mesh.db.begin() as session:
            await session.execute(text("DELETE FROM widgets WHERE widget_id = :new_id"), where)
        request = pb.UpdateWidgetRequest(
            widget=Widget(dashboard_id=new.dashboard_id, widget_id=new.widget_id, query=new.query)
        )
        await mesh.widgets.UpdateWidget(request, metadata=ann.metadata)
        assert [widget.query for widget in await stored(mesh, dashboard)] == [new.query]


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
