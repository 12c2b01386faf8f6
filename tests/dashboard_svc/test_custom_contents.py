"""Widgets of a workspace's own kinds in versions, copies, files and links."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import ListValue, Value
from meshboard.analytics.v1.query_pb2 import Column, Result
from meshboard.dashboard.v1 import share_service_pb2
from meshboard.dashboard.v1 import widget_kind_service_pb2 as pb
from meshboard.dashboard.v1.dashboard_pb2 import Dashboard, Widget
from meshboard.dashboard.v1.file_service_pb2 import ApplyDashboardResponse, DashboardFile
from meshboard.dashboard.v1.widget_kind_pb2 import WidgetKind

from services.chassis import errors
from tests.dashboard_svc import boards
from tests.dashboard_svc.conftest import Mesh
from tests.dashboard_svc.custom import change_kind, custom, make_kind, place
from tests.dashboard_svc.links import share
from tests.dashboard_svc.test_custom_widgets import update
from tests.dashboard_svc.test_duplicate import duplicate
from tests.dashboard_svc.test_files import a_file, a_widget, apply, export
from tests.dashboard_svc.test_versions import delete_widget, restore, widgets
from tests.harness import Member, new_id, refused

Outcome = ApplyDashboardResponse


def bars(title: str = "A", source: str = "", **more: Any) -> DashboardFile:
    """A file with a custom widget."""
    said = {"kindName": "bars", "options": {"source": source or SOURCE, "title": title}, **more}
    return a_file(widgets=[{"name": "plans", "title": "Plans", "kind": "CUSTOM", "custom": said}])


SOURCE = new_id()


async def delete_kind(mesh: Mesh, member: Member, kind: WidgetKind) -> None:
    request = pb.DeleteWidgetKindRequest(widget_kind_id=kind.widget_kind_id)
    await mesh.kinds.DeleteWidgetKind(request, metadata=member.metadata)


async def only_widget(mesh: Mesh, member: Member, dashboard: Dashboard) -> Widget:
    (widget,) = (await widgets(mesh, member, dashboard)).values()
    return widget


async def test_a_restored_version_shows_what_it_did(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    kind, dashboard = await make_kind(mesh, ann), await mesh.dashboard(ann)
    widget = await place(mesh, ann, dashboard, kind, title="A")
    told = await boards.update(mesh, ann, dashboard.dashboard_id, title="Told", reason="to come back to")
    await delete_widget(mesh, ann, widget)
    await change_kind(mesh, ann, kind, spec={})

    answer = await restore(mesh, ann, dashboard.dashboard_id, told.etag)
    assert not answer.problems
    restored = await only_widget(mesh, ann, dashboard)
    assert (restored.custom, restored.query) == (widget.custom, widget.query)
    # It counts as a widget of the kind again.
    request = pb.DeleteWidgetKindRequest(widget_kind_id=kind.widget_kind_id)
    assert await refused(mesh.kinds.DeleteWidgetKind(request, metadata=ann.metadata)) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "WIDGET_KIND_IN_USE",
    )


async def test_a_restored_version_of_a_deleted_kind_shows_what_it_did(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    kind, dashboard = await make_kind(mesh, ann), await mesh.dashboard(ann)
    widget = await place(mesh, ann, dashboard, kind, title="A")
    told = await boards.update(mesh, ann, dashboard.dashboard_id, title="Told", reason="to come back to")
    await delete_widget(mesh, ann, widget)
    await delete_kind(mesh, ann, kind)

    await restore(mesh, ann, dashboard.dashboard_id, told.etag)
    restored = await only_widget(mesh, ann, dashboard)
    assert restored.custom == widget.custom
    assert (await update(mesh, ann, restored, title="New")).custom == widget.custom
    gone = (grpc.StatusCode.NOT_FOUND, "WIDGET_KIND_NOT_FOUND")
    assert await refused(update(mesh, ann, restored, custom=custom(kind))) == gone
    table = await update(mesh, ann, restored, kind=Widget.TABLE)
    assert table.query == widget.query


async def test_a_restored_version_takes_the_right_to_its_sources(mesh: Mesh) -> None:
    ann, source_id = mesh.identity.member("admin"), new_id()
    kind, dashboard = await make_kind(mesh, ann), await mesh.dashboard(ann)
    widget = await place(mesh, ann, dashboard, kind, source=source_id)
    told = await boards.update(mesh, ann, dashboard.dashboard_id, title="Told", reason="to come back to")
    await delete_widget(mesh, ann, widget)
    mesh.analytics.refused = errors.not_found("SOURCE_NOT_FOUND", "There is no such source.")
    mesh.analytics.hidden = {source_id}
    hidden = (grpc.StatusCode.NOT_FOUND, "SOURCE_NOT_FOUND")
    assert await refused(restore(mesh, ann, dashboard.dashboard_id, told.etag)) == hidden


async def test_a_copy_has_them_too(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    kind, dashboard = await make_kind(mesh, ann), await mesh.dashboard(ann)
    widget = await place(mesh, ann, dashboard, kind, title="A")
    copy = await only_widget(mesh, ann, await duplicate(mesh, ann, dashboard.dashboard_id))
    assert (copy.custom, copy.query) == (widget.custom, widget.query)
    assert copy.widget_id != widget.widget_id


async def test_a_file_says_kind_and_options_alone(mesh: Mesh) -> None:
    ann, bob = mesh.identity.member("admin"), mesh.identity.member("admin")
    kind, dashboard = await make_kind(mesh, ann), await mesh.dashboard(ann, "Shop")
    widget = await place(mesh, ann, dashboard, kind, source=SOURCE, title="A")
    file = await export(mesh, ann, dashboard.dashboard_id)
    (said,) = file.content.widgets
    assert MessageToDict(said)["custom"] == {
        "kindName": "bars",
        "options": {"source": SOURCE, "title": "A"},
    }
    assert not said.HasField("query")

    # Elsewhere the kind of this name makes of them what it makes.
    gone = (grpc.StatusCode.NOT_FOUND, "WIDGET_KIND_NOT_FOUND")
    assert await refused(apply(mesh, bob, file)) == gone
    theirs = await make_kind(mesh, bob)
    applied = await apply(mesh, bob, file)
    assert applied.outcome == Outcome.CREATED
    shown = await only_widget(mesh, bob, applied.dashboard)
    assert (shown.query, shown.custom.spec) == (widget.query, widget.custom.spec)
    assert shown.custom.widget_kind_id == theirs.widget_kind_id
    assert (await apply(mesh, bob, file)).outcome == Outcome.UNCHANGED


async def test_a_file_of_what_does_not_fit_is_refused(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    kind = await make_kind(mesh, ann)
    unfit = (grpc.StatusCode.INVALID_ARGUMENT, "WIDGET_OPTIONS_INVALID")
    assert await refused(apply(mesh, ann, bars(source="none"))) == unfit
    assert await refused(apply(mesh, ann, bars(source="none"), dry_run=True)) == unfit
    by_id = bars(widgetKindId=kind.widget_kind_id)
    by_id.content.widgets[0].custom.kind_name = ""
    wrong = (grpc.StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")
    assert await refused(apply(mesh, ann, by_id)) == wrong
    assert await refused(apply(mesh, ann, bars(version=7))) == (
        grpc.StatusCode.NOT_FOUND,
        "WIDGET_KIND_VERSION_NOT_FOUND",
    )
    mesh.analytics.refused = errors.not_found("SOURCE_NOT_FOUND", "There is no such source.")
    mesh.analytics.hidden = {SOURCE}
    hidden = (grpc.StatusCode.NOT_FOUND, "SOURCE_NOT_FOUND")
    assert await refused(apply(mesh, ann, bars())) == hidden


async def test_a_file_leaves_the_version_that_stands_there(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    kind = await make_kind(mesh, ann)
    dashboard = (await apply(mesh, ann, bars())).dashboard
    await change_kind(mesh, ann, kind, spec={})
    assert (await apply(mesh, ann, bars())).outcome == Outcome.UNCHANGED
    assert (await apply(mesh, ann, bars(title="B"))).outcome == Outcome.CHANGED
    widget = await only_widget(mesh, ann, dashboard)
    assert (widget.custom.version, widget.custom.spec["title"]) == (1, "B")

    # Moved here: the file is not in the way.
    request = pb.UpgradeWidgetsRequest(widget_kind_id=kind.widget_kind_id)
    assert (await mesh.kinds.UpgradeWidgets(request, metadata=ann.metadata)).upgraded_count == 1
    assert (await apply(mesh, ann, bars(title="B"))).outcome == Outcome.UNCHANGED
    assert (await apply(mesh, ann, bars(title="C"))).outcome == Outcome.CHANGED
    assert (await only_widget(mesh, ann, dashboard)).custom.version == 2

    # Unless the file says which.
    pinned = await apply(mesh, ann, bars(title="C", version=1))
    assert pinned.outcome == Outcome.CHANGED
    assert (await only_widget(mesh, ann, dashboard)).custom.version == 1
    assert (await apply(mesh, ann, bars(title="C", version=1))).outcome == Outcome.UNCHANGED
    assert (await apply(mesh, ann, bars(title="C"))).outcome == Outcome.UNCHANGED


async def test_a_file_and_people_can_disagree_about_options(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    kind = await make_kind(mesh, ann)
    dashboard = (await apply(mesh, ann, bars())).dashboard
    widget = await only_widget(mesh, ann, dashboard)
    await update(mesh, ann, widget, custom=custom(kind, source=SOURCE, title="By hand"))
    assert (await apply(mesh, ann, bars())).outcome == Outcome.UNCHANGED
    conflict = (grpc.StatusCode.ABORTED, "FILE_CONFLICT")
    assert await refused(apply(mesh, ann, bars(title="B"))) == conflict
    told = await apply(mesh, ann, bars(title="B"), dry_run=True)
    assert [change.path for change in told.conflicts] == ["widgets[plans].custom.options"]
    assert (await apply(mesh, ann, bars(title="B"), force=True)).outcome == Outcome.CHANGED
    assert (await only_widget(mesh, ann, dashboard)).custom.spec["title"] == "B"


async def test_a_file_may_leave_a_widget_of_a_kind_that_is_gone(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    kind = await make_kind(mesh, ann)
    dashboard = (await apply(mesh, ann, bars())).dashboard
    there = await boards.update(mesh, ann, dashboard.dashboard_id, title="Shop", reason="to come back to")
    await delete_widget(mesh, ann, await only_widget(mesh, ann, dashboard))
    await delete_kind(mesh, ann, kind)
    await restore(mesh, ann, dashboard.dashboard_id, there.etag)
    file = bars()
    file.content.title = "Store"
    assert (await apply(mesh, ann, file)).outcome == Outcome.CHANGED
    gone = (grpc.StatusCode.NOT_FOUND, "WIDGET_KIND_NOT_FOUND")
    assert await refused(apply(mesh, ann, bars(title="B"))) == gone


async def test_a_file_takes_the_kind_of_a_widget(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    await make_kind(mesh, ann)
    dashboard = (await apply(mesh, ann, bars())).dashboard
    assert (await apply(mesh, ann, a_file(widgets=[a_widget("plans")]))).outcome == Outcome.CHANGED
    widget = await only_widget(mesh, ann, dashboard)
    assert (widget.kind, widget.HasField("custom")) == (Widget.TABLE, False)
    assert (await apply(mesh, ann, bars())).outcome == Outcome.CHANGED
    assert (await only_widget(mesh, ann, dashboard)).kind == Widget.CUSTOM


async def test_a_link_shows_spec_and_rows_and_no_kind(mesh: Mesh) -> None:
    ann, source_id = mesh.identity.member("admin"), new_id()
    kind, dashboard = await make_kind(mesh, ann), await mesh.dashboard(ann)
    await place(mesh, ann, dashboard, kind, source=source_id, title="</script><script>alert(1)</script>")
    mesh.analytics.results[source_id] = Result(
        columns=[Column(name="browser", type=Column.STRING)],
        rows=[ListValue(values=[Value(string_value="<b>")])],
    )
    _, token = await share(mesh, ann, dashboard)
    request = share_service_pb2.GetSharedDashboardRequest(token=token)
    shown = await mesh.shares.GetSharedDashboard(request)
    (widget,) = shown.dashboard.widgets
    assert widget.kind == Widget.CUSTOM
    assert widget.spec["title"] == "</script><script>alert(1)</script>"
    data = await mesh.shares.GetSharedDashboardData(
        share_service_pb2.GetSharedDashboardDataRequest(token=token)
    )
    assert data.widgets[0].result.rows[0].values[0].string_value == "<b>"
    for secret in (kind.widget_kind_id, source_id, "bars"):
        assert secret not in str(shown) + str(data)
