from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Value
from meshboard.analytics.v1.query_pb2 import Breakdown, Filter, Measure, Query
from meshboard.dashboard.v1 import library_service_pb2, widget_service_pb2
from meshboard.dashboard.v1.dashboard_pb2 import CustomWidget, Dashboard, Widget
from meshboard.dashboard.v1.dashboard_service_pb2 import GetDashboardDataRequest
from meshboard.dashboard.v1.library_pb2 import LibraryWidget

from services.chassis import errors
from tests.dashboard_svc.conftest import Mesh
from tests.dashboard_svc.custom import change_kind, custom, make_kind, place, struct
from tests.dashboard_svc.hostile import TEXTS
from tests.harness import Member, new_id, refused

UNFIT = (grpc.StatusCode.INVALID_ARGUMENT, "WIDGET_OPTIONS_INVALID")
WRONG = (grpc.StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")
KIND_NOT_FOUND = (grpc.StatusCode.NOT_FOUND, "WIDGET_KIND_NOT_FOUND")


async def update(mesh: Mesh, member: Member, widget: Widget, **fields: Any) -> Widget:
    wanted = Widget(widget_id=widget.widget_id, dashboard_id=widget.dashboard_id, **fields)
    request = widget_service_pb2.UpdateWidgetRequest(widget=wanted, update_mask=FieldMask(paths=fields))
    updated: Widget = (await mesh.widgets.UpdateWidget(request, metadata=member.metadata)).widget
    return updated


async def get(mesh: Mesh, member: Member, widget: Widget) -> Widget:
    request = widget_service_pb2.GetWidgetRequest(
        dashboard_id=widget.dashboard_id, widget_id=widget.widget_id
    )
    found: Widget = (await mesh.widgets.GetWidget(request, metadata=member.metadata)).widget
    return found


async def create(mesh: Mesh, member: Member, dashboard: Dashboard, **fields: Any) -> Widget:
    request = widget_service_pb2.CreateWidgetRequest(dashboard_id=dashboard.dashboard_id, **fields)
    created: Widget = (await mesh.widgets.CreateWidget(request, metadata=member.metadata)).widget
    return created


async def test_shows_what_the_kind_makes_of_the_options(mesh: Mesh) -> None:
    ann, source_id = mesh.identity.member("admin"), new_id()
    kind, dashboard = await make_kind(mesh, ann), await mesh.dashboard(ann)
    widget = await place(
        mesh, ann, dashboard, kind, source=source_id, by="properties.plan", title="Plans", plan="pro"
    )
    assert widget.query == Query(
        source_ids=[source_id],
        measures=[Measure(aggregation=Measure.COUNT)],
        breakdowns=[Breakdown(property="properties.plan")],
        filters=[Filter(property="properties.plan", values=[Value(string_value="pro")])],
        limit=10,
    )
    assert (widget.custom.widget_kind_id, widget.custom.kind_name, widget.custom.version) == (
        kind.widget_kind_id,
        "bars",
        1,
    )
    spec = MessageToDict(widget.custom.spec)
    assert (spec["title"], spec["encoding"]["y"]["field"]) == ("Plans", "properties\\.plan")
    assert await get(mesh, ann, widget) == widget

    # Whoever may see the dashboard sees its data, and the writer needed the right to the source.
    mesh.analytics.count[source_id] = 7
    request = GetDashboardDataRequest(dashboard_id=dashboard.dashboard_id)
    eve = mesh.identity.member("viewer", workspace_id=ann.workspace_id)
    (data,) = (await mesh.dashboards.GetDashboardData(request, metadata=eve.metadata)).widgets
    assert data.result.rows[0].values[0].number_value == 7
    assert mesh.analytics.validated[-1][0] == widget.query


async def test_the_writer_needs_the_right_to_the_sources(mesh: Mesh) -> None:
    ann, source_id = mesh.identity.member("admin"), new_id()
    kind, dashboard = await make_kind(mesh, ann), await mesh.dashboard(ann)
    widget = await place(mesh, ann, dashboard, kind)
    mesh.analytics.refused = errors.not_found("SOURCE_NOT_FOUND", "There is no such source.")
    mesh.analytics.hidden = {source_id}
    hidden = (grpc.StatusCode.NOT_FOUND, "SOURCE_NOT_FOUND")
    assert await refused(place(mesh, ann, dashboard, kind, source=source_id)) == hidden
    changed = custom(kind, source=source_id)
    assert await refused(update(mesh, ann, widget, custom=changed)) == hidden
    request = library_service_pb2.CreateLibraryWidgetRequest(title="Bars", kind=Widget.CUSTOM, custom=changed)
    assert await refused(mesh.library.CreateLibraryWidget(request, metadata=ann.metadata)) == hidden


@pytest.mark.parametrize(
    "options",
    [
        {"source": 5},
        {"source": "no id"},
        {"source": None},
        {"more": 1},
        {"top": 51},
        {"top": 1.5},
        {"top": {"$option": "source"}},
        {"by": ""},
        {"by": "x" * 300},
        {"plan": ["pro"]},
    ],
    ids=str,
)
async def test_refuses_options_that_do_not_fit(mesh: Mesh, options: dict[str, Any]) -> None:
    ann = mesh.identity.member("admin")
    kind, dashboard = await make_kind(mesh, ann), await mesh.dashboard(ann)
    assert await refused(place(mesh, ann, dashboard, kind, **options)) == UNFIT


async def test_refuses_what_a_custom_widget_does_not_have(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    kind, dashboard = await make_kind(mesh, ann), await mesh.dashboard(ann)
    assert await refused(create(mesh, ann, dashboard, kind=Widget.CUSTOM)) == WRONG
    assert await refused(create(mesh, ann, dashboard, kind=Widget.CUSTOM, custom=CustomWidget())) == WRONG
    query = Query(source_ids=[new_id()])
    both = {"query": query, "custom": custom(kind)}
    assert await refused(create(mesh, ann, dashboard, kind=Widget.TABLE, **both)) == WRONG
    other = CustomWidget(widget_kind_id=new_id())
    assert await refused(create(mesh, ann, dashboard, kind=Widget.CUSTOM, custom=other)) == KIND_NOT_FOUND
    assert await refused(place(mesh, ann, dashboard, kind, version=2)) == (
        grpc.StatusCode.NOT_FOUND,
        "WIDGET_KIND_VERSION_NOT_FOUND",
    )
    bob = mesh.identity.member("admin")
    theirs = await make_kind(mesh, bob, "theirs")
    assert await refused(place(mesh, ann, dashboard, theirs)) == KIND_NOT_FOUND

    # What is made of the options is not read.
    source_id = new_id()
    made = custom(kind, source=source_id)
    made.spec.update({"$schema": "evil"})
    made.kind_name = "evil"
    widget = await create(mesh, ann, dashboard, kind=Widget.CUSTOM, custom=made, query=query)
    assert list(widget.query.source_ids) == [source_id]
    assert (widget.custom.spec["$schema"], widget.custom.kind_name) == (kind.spec["$schema"], "bars")
    assert await refused(update(mesh, ann, widget, query=query)) == WRONG


async def test_keeps_its_version_until_it_is_written_with_another(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    kind, dashboard = await make_kind(mesh, ann), await mesh.dashboard(ann)
    widget = await place(mesh, ann, dashboard, kind, title="One")
    await change_kind(mesh, ann, kind, spec={})
    assert (await get(mesh, ann, widget)) == widget
    titled = await update(mesh, ann, widget, title="Two")
    assert (titled.title, titled.custom) == ("Two", widget.custom)
    same = await update(mesh, ann, widget, custom=widget.custom)
    assert (same.custom, same.query) == (widget.custom, widget.query)

    newest = CustomWidget(kind_name="bars", options=widget.custom.options)
    moved = await update(mesh, ann, widget, custom=newest)
    assert (moved.custom.version, moved.custom.HasField("spec")) == (2, False)
    assert moved.query == widget.query


async def test_takes_other_kinds_and_leaves_them(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    kind, dashboard = await make_kind(mesh, ann), await mesh.dashboard(ann)
    plain = await mesh.widget(ann, dashboard)
    source_id = new_id()
    widget = await update(mesh, ann, plain, kind=Widget.CUSTOM, custom=custom(kind, source=source_id))
    assert list(widget.query.source_ids) == [source_id]
    table = await update(mesh, ann, widget, kind=Widget.TABLE)
    assert (table.kind, table.query, table.HasField("custom")) == (Widget.TABLE, widget.query, False)


async def test_the_library_has_them_too(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    kind, dashboard = await make_kind(mesh, ann), await mesh.dashboard(ann)
    request = library_service_pb2.CreateLibraryWidgetRequest(
        title="Bars", kind=Widget.CUSTOM, custom=custom(kind, title="A")
    )
    made = (await mesh.library.CreateLibraryWidget(request, metadata=ann.metadata)).library_widget
    assert made.custom.spec["title"] == "A"
    widget = await create(mesh, ann, dashboard, library_widget_id=made.library_widget_id)
    assert (widget.kind, widget.custom, widget.query) == (Widget.CUSTOM, made.custom, made.query)
    assert (
        await refused(
            create(mesh, ann, dashboard, library_widget_id=made.library_widget_id, custom=made.custom)
        )
    ) == WRONG

    changed = library_service_pb2.UpdateLibraryWidgetRequest(
        library_widget=LibraryWidget(
            library_widget_id=made.library_widget_id, custom=custom(kind, title="B")
        ),
        update_mask=FieldMask(paths=["custom"]),
    )
    await mesh.library.UpdateLibraryWidget(changed, metadata=ann.metadata)
    shown = await get(mesh, ann, widget)
    assert shown.custom.spec["title"] == "B"
    assert shown.query != widget.query
    apart = await update(mesh, ann, widget, library_widget_id="")
    assert apart.custom == shown.custom


async def test_text_in_options_stays_text(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    kind, dashboard = await make_kind(mesh, ann), await mesh.dashboard(ann)
    assert len(TEXTS) == 100
    widget = await place(mesh, ann, dashboard, kind)
    for text in TEXTS:
        widget = await update(
            mesh, ann, widget, custom=custom(kind, title=text, by=f"properties.{text}", plan=text)
        )
        spec = MessageToDict(widget.custom.spec)
        assert spec["title"] == text
        assert spec["mark"] == {"type": "bar", "tooltip": True}
        (condition,) = widget.query.filters
        assert condition.values[0].string_value == text
        assert widget.query.breakdowns[0].property == f"properties.{text}"
        assert widget.html == ""


async def test_too_large_options_are_refused(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    kind, dashboard = await make_kind(mesh, ann), await mesh.dashboard(ann)
    assert await refused(place(mesh, ann, dashboard, kind, title="x" * 33_000)) == UNFIT
    widget = await place(mesh, ann, dashboard, kind)
    options = struct({"source": new_id(), "title": "x" * 33_000})
    large = CustomWidget(widget_kind_id=kind.widget_kind_id, options=options)
    assert await refused(update(mesh, ann, widget, custom=large)) == UNFIT
