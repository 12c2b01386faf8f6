from __future__ import annotations

from typing import Any

import grpc
from google.rpc import error_details_pb2
from meshboard.dashboard.v1 import dashboard_service_pb2, library_service_pb2, widget_service_pb2
from meshboard.dashboard.v1 import widget_kind_service_pb2 as pb
from meshboard.dashboard.v1.dashboard_pb2 import Dashboard, Widget
from meshboard.dashboard.v1.widget_kind_pb2 import WidgetKind
from meshboard.user.v1.grant_pb2 import Grant, Subject

from services.chassis import errors
from tests.dashboard_svc import boards
from tests.dashboard_svc.conftest import Mesh
from tests.dashboard_svc.custom import QUERY, SCHEMA, change_kind, custom, make_kind, place, struct
from tests.harness import Member, new_id, refused

# A schema in which a text is no longer as long as it likes.
STRICTER = {**SCHEMA, "properties": {**SCHEMA["properties"], "title": {"type": "string", "maxLength": 5}}}


async def widgets_of(mesh: Mesh, member: Member, dashboard: Dashboard) -> dict[str, Widget]:
    request = widget_service_pb2.ListWidgetsRequest(dashboard_id=dashboard.dashboard_id)
    widgets = (await mesh.widgets.ListWidgets(request, metadata=member.metadata)).widgets
    return {widget.widget_id: widget for widget in widgets}


async def check(
    mesh: Mesh, member: Member, kind: WidgetKind, **fields: Any
) -> tuple[list[pb.BrokenWidget], int, int]:
    """All pages: what breaks, how many others, how many were looked at."""
    request = pb.CheckWidgetKindUpgradeRequest(widget_kind_id=kind.widget_kind_id, page_size=2, **fields)
    broken: list[pb.BrokenWidget] = []
    hidden = checked = 0
    while True:
        page = await mesh.kinds.CheckWidgetKindUpgrade(request, metadata=member.metadata)
        broken += page.broken_widgets
        hidden += page.hidden_count
        checked += page.checked_count
        if not page.next_page_token:
            return broken, hidden, checked
        request.page_token = page.next_page_token


async def upgrade(
    mesh: Mesh, member: Member, kind: WidgetKind, **fields: Any
) -> tuple[int, list[pb.BrokenWidget], int]:
    """All pages: how many were moved, what was left, how many others."""
    request = pb.UpgradeWidgetsRequest(widget_kind_id=kind.widget_kind_id, page_size=2, **fields)
    left: list[pb.BrokenWidget] = []
    upgraded = hidden = 0
    while True:
        page = await mesh.kinds.UpgradeWidgets(request, metadata=member.metadata)
        upgraded += page.upgraded_count
        left += page.left_widgets
        hidden += page.hidden_count
        if not page.next_page_token:
            return upgraded, left, hidden
        request.page_token = page.next_page_token


def reasons(broken: list[pb.BrokenWidget]) -> dict[str, str]:
    found = {}
    for each in broken:
        info = error_details_pb2.ErrorInfo.FromString(each.error.details[0].value)
        found[each.widget_id or each.library_widget_id] = info.reason
    return found


async def library_widget(mesh: Mesh, member: Member, kind: WidgetKind, **options: Any) -> str:
    request = library_service_pb2.CreateLibraryWidgetRequest(
        title="Shared", kind=Widget.CUSTOM, custom=custom(kind, **options)
    )
    made = await mesh.library.CreateLibraryWidget(request, metadata=member.metadata)
    return str(made.library_widget.library_widget_id)


async def test_tells_what_a_version_breaks_and_moves_the_rest(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    kind, dashboard, other = await make_kind(mesh, ann), await mesh.dashboard(ann), await mesh.dashboard(ann)
    short = await place(mesh, ann, dashboard, kind, title="Short")
    long = await place(mesh, ann, dashboard, kind, title="Too long")
    elsewhere = await place(mesh, ann, other, kind, title="Even longer")
    shared = await library_widget(mesh, ann, kind, title="Long too")

    # Before there is the version, and afterwards.
    asked = await check(mesh, ann, kind, options_schema=struct(STRICTER))
    await change_kind(mesh, ann, kind, options_schema=STRICTER, spec={})
    broken, hidden, checked = await check(mesh, ann, kind)
    assert (broken, hidden, checked) == asked
    assert reasons(broken) == dict.fromkeys(
        (shared, long.widget_id, elsewhere.widget_id), "WIDGET_OPTIONS_INVALID"
    )
    assert "options.title" in broken[0].error.message
    assert (hidden, checked) == (0, 4)
    assert {each.dashboard_id for each in broken} == {"", dashboard.dashboard_id, other.dashboard_id}
    assert {each.version for each in broken} == {1}

    upgraded, left, hidden = await upgrade(mesh, ann, kind)
    assert (upgraded, reasons(left), hidden) == (1, reasons(broken), 0)
    now = await widgets_of(mesh, ann, dashboard)
    assert now[short.widget_id].custom.version == 2
    assert not now[short.widget_id].custom.HasField("spec")
    assert now[short.widget_id].query == short.query
    assert now[long.widget_id] == long
    assert (await boards.events(mesh, ann))[-1] == "WidgetUpdated"
    listed = pb.ListWidgetKindVersionsRequest(widget_kind_id=kind.widget_kind_id)
    versions = (await mesh.kinds.ListWidgetKindVersions(listed, metadata=ann.metadata)).versions
    assert [(each.version, each.widgets) for each in versions] == [(2, 1), (1, 3)]

    # Back again, and all that is left is looked at.
    assert await upgrade(mesh, ann, kind, version=1) == (1, [], 0)
    assert (await widgets_of(mesh, ann, dashboard))[short.widget_id].custom == short.custom
    missing = pb.UpgradeWidgetsRequest(widget_kind_id=kind.widget_kind_id, version=3)
    assert await refused(mesh.kinds.UpgradeWidgets(missing, metadata=ann.metadata)) == (
        grpc.StatusCode.NOT_FOUND,
        "WIDGET_KIND_VERSION_NOT_FOUND",
    )


async def test_a_version_of_the_dashboard_has_what_was_before(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    kind, dashboard = await make_kind(mesh, ann), await mesh.dashboard(ann)
    widget = await place(mesh, ann, dashboard, kind)
    before = await boards.get(mesh, ann, dashboard.dashboard_id)
    await change_kind(mesh, ann, kind, spec={})
    assert await upgrade(mesh, ann, kind) == (1, [], 0)
    after = await boards.get(mesh, ann, dashboard.dashboard_id)
    assert after.etag != before.etag
    assert (await widgets_of(mesh, ann, dashboard))[widget.widget_id].etag != widget.etag


async def test_moves_widgets_of_the_library(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    kind, dashboard = await make_kind(mesh, ann), await mesh.dashboard(ann)
    shared = await library_widget(mesh, ann, kind, title="Long too")
    request = widget_service_pb2.CreateWidgetRequest(
        dashboard_id=dashboard.dashboard_id, library_widget_id=shared
    )
    await mesh.widgets.CreateWidget(request, metadata=ann.metadata)
    await change_kind(mesh, ann, kind, spec={})
    assert await upgrade(mesh, ann, kind) == (1, [], 0)
    (widget,) = (await widgets_of(mesh, ann, dashboard)).values()
    assert (widget.custom.version, widget.custom.HasField("spec")) == (2, False)
    assert (await boards.events(mesh, ann))[-1] == "LibraryWidgetUpdated"


async def test_a_version_may_ask_what_nobody_or_the_caller_cannot(mesh: Mesh) -> None:
    ann, secret, gone = mesh.identity.member("admin"), new_id(), new_id()
    kind, dashboard = await make_kind(mesh, ann), await mesh.dashboard(ann)
    widget = await place(mesh, ann, dashboard, kind)
    mesh.analytics.absent = {gone}
    template = {**QUERY, "sourceIds": [{"$option": "source"}, gone]}
    broken, *_ = await check(mesh, ann, kind, query_template=struct(template))
    assert reasons(broken) == {widget.widget_id: "SOURCE_NOT_FOUND"}

    await change_kind(mesh, ann, kind, query_template={**QUERY, "sourceIds": [{"$option": "source"}, secret]})
    mesh.analytics.refused = errors.not_found("SOURCE_NOT_FOUND", "There is no such source.")
    mesh.analytics.hidden = {secret}
    upgraded, left, hidden = await upgrade(mesh, ann, kind)
    assert (upgraded, reasons(left), hidden) == (0, {widget.widget_id: "SOURCE_NOT_FOUND"}, 0)
    assert (await widgets_of(mesh, ann, dashboard))[widget.widget_id] == widget

    # What is wrong with the service is not what is wrong with a widget.
    mesh.analytics.refused = errors.unavailable("The store does not answer.")
    request = pb.UpgradeWidgetsRequest(widget_kind_id=kind.widget_kind_id)
    code, _ = await refused(mesh.kinds.UpgradeWidgets(request, metadata=ann.metadata))
    assert code == grpc.StatusCode.UNAVAILABLE


async def test_a_version_may_need_a_variable(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    kind, dashboard = await make_kind(mesh, ann), await mesh.dashboard(ann)
    widget = await place(mesh, ann, dashboard, kind)
    filters = [{"property": "country", "values": ["$country"]}]
    template = {**QUERY, "filters": filters}
    broken, *_ = await check(mesh, ann, kind, query_template=struct(template))
    assert reasons(broken) == {widget.widget_id: "VARIABLE_UNKNOWN"}


async def test_counts_what_the_caller_may_not_see_and_leaves_what_it_may_not_edit(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    bob = mesh.identity.member("admin", workspace_id=ann.workspace_id)
    kind = await make_kind(mesh, ann)
    secret, seen, binned = [await mesh.dashboard(bob) for _ in range(3)]
    for dashboard in (secret, seen, binned):
        await place(mesh, bob, dashboard, kind, title="Too long")
    await boards.delete(mesh, bob, binned.dashboard_id)
    for dashboard, role in ((secret, "viewer"), (seen, "editor")):
        grant = Grant(subject=Subject(user_id=ann.user_id), role=role, effect=Grant.DENY)
        mesh.users.known.add(ann.user_id)
        request = dashboard_service_pb2.CreateDashboardGrantRequest(
            dashboard_id=dashboard.dashboard_id, subject=grant.subject, role=role, effect=Grant.DENY
        )
        await mesh.dashboards.CreateDashboardGrant(request, metadata=bob.metadata)

    broken, hidden, checked = await check(mesh, ann, kind, options_schema=struct(STRICTER))
    assert [each.dashboard_id for each in broken] == [seen.dashboard_id]
    assert (hidden, checked) == (2, 3)
    await change_kind(mesh, ann, kind, spec={})
    upgraded, left, hidden = await upgrade(mesh, ann, kind)
    assert (upgraded, [each.dashboard_id for each in left], hidden) == (0, [seen.dashboard_id], 2)
    assert set(reasons(left).values()) == {"PERMISSION_MISSING"}
    assert (await upgrade(mesh, bob, kind))[0] == 2
