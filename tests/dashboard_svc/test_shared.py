"""Dashboards as those see them who have a link."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.struct_pb2 import ListValue, Value
from google.protobuf.timestamp_pb2 import Timestamp
from meshboard.analytics.v1.query_pb2 import Column, Filter, Query, Result, TimeRange
from meshboard.dashboard.v1 import annotation_service_pb2, dashboard_service_pb2
from meshboard.dashboard.v1 import share_service_pb2 as pb
from meshboard.dashboard.v1.dashboard_pb2 import Dashboard, Variable
from meshboard.dashboard.v1.dashboard_service_pb2 import WatchDashboardResponse
from meshboard.dashboard.v1.share_link_pb2 import LockedVariable, SharedVariable, ShareLink
from meshboard.dashboard.v1.share_service_pb2_grpc import ShareServiceStub
from meshboard.dashboard.v1.widget_service_pb2 import DeleteWidgetRequest

from services.chassis import errors
from services.chassis.origins import ADDRESS_HEADER
from services.dashboard_svc import shared_page, shared_views
from tests.conditions import eventually
from tests.dashboard_svc.conftest import Mesh
from tests.dashboard_svc.links import NO_LINK, change, counted, data_of, delete, share, watching
from tests.harness import ISSUER, Member, new_id, outcome, refused

End = WatchDashboardResponse.End
SHOP = Filter(property="properties.shop", operator=Filter.EQUAL)
SHOP.values.add(string_value="north")


def calls(mesh: Mesh, token: str, **more: Any) -> list[Any]:
    """One call of each method that a link opens, streams excepted."""
    return [
        mesh.shares.GetSharedDashboard(pb.GetSharedDashboardRequest(token=token, **more)),
        mesh.shares.GetSharedDashboardData(pb.GetSharedDashboardDataRequest(token=token, **more)),
    ]


async def refusals(mesh: Mesh, token: str, **more: Any) -> set[tuple[grpc.StatusCode, str]]:
    """How all methods refuse the token."""
    found = {await refused(call) for call in calls(mesh, token, **more)}
    stream = mesh.shares.WatchSharedDashboard(pb.WatchSharedDashboardRequest(token=token, **more))
    return found | {await refused(stream.read())}


async def ticket(mesh: Mesh, token: str, password: str, address: str = "") -> str:
    request = pb.UnlockSharedDashboardRequest(token=token, password=password)
    metadata = ((ADDRESS_HEADER, address),) if address else ()
    return str((await mesh.shares.UnlockSharedDashboard(request, metadata=metadata)).ticket)


async def test_shows_one_dashboard_and_no_id_but_those_of_widgets(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    folder = await mesh.folder(ann)
    dashboard, source_id = await mesh.dashboard(ann, "Traffic", folder), new_id()
    mesh.analytics.count[source_id] = 7
    broken = new_id()
    mesh.analytics.failures[broken] = errors.not_found("SOURCE_NOT_FOUND", f"No {broken}.", source_id=broken)
    widgets = [
        await mesh.widget(ann, dashboard, Query(source_ids=[one]), title=title)
        for one, title in ((source_id, "Views"), (broken, "Gone"))
    ]
    link, token = await share(mesh, ann, dashboard, filters=[SHOP], title="For Bob")
    shown = await mesh.shares.GetSharedDashboard(pb.GetSharedDashboardRequest(token=token))
    assert shown.dashboard.title == "Traffic"
    assert [(widget.widget_id, widget.title, widget.kind) for widget in shown.dashboard.widgets] == [
        (widget.widget_id, widget.title, widget.kind) for widget in widgets
    ]
    data = await mesh.shares.GetSharedDashboardData(pb.GetSharedDashboardDataRequest(token=token))
    assert data.widgets[0].result.rows[0].values[0].number_value == 7
    assert data.widgets[1].error.code == grpc.StatusCode.NOT_FOUND.value[0]
    async with watching(mesh, token) as watcher:
        assert set(watcher.state.values()) == {7, -1}
    everything = str(shown) + str(data) + str(watcher.responses)
    for secret in (source_id, broken, ann.user_id, ann.workspace_id, folder.folder_id, link.share_link_id):
        assert secret not in everything
    for word in ("watermark", "For Bob", "north"):
        assert word not in everything


async def test_what_shows_nothing_is_refused_alike(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    dashboard, _, _ = await counted(mesh, ann)
    past = Timestamp()
    past.FromDatetime(datetime.now(UTC) - timedelta(seconds=1))
    _, expired = await share(mesh, ann, dashboard, expire_time=past)
    _, paused = await share(mesh, ann, dashboard, paused=True)
    link, deleted = await share(mesh, ann, dashboard)
    assert await data_of(mesh, deleted) == [7]
    await delete(mesh, ann, link)
    gone, _, _ = await counted(mesh, ann)
    _, orphan = await share(mesh, ann, gone)
    assert await data_of(mesh, orphan) == [7]
    await mesh.dashboards.DeleteDashboard(
        dashboard_service_pb2.DeleteDashboardRequest(dashboard_id=gone.dashboard_id), metadata=ann.metadata
    )
    _, good = await share(mesh, ann, dashboard)
    for token in (
        "",
        "none",
        expired,
        paused,
        deleted,
        orphan,
        link.share_link_id,
        dashboard.dashboard_id,
        good + "A",
        good[:-1],
        good.upper(),
        f"{good}/../{paused}",
        "../dashboards",
        good + "\x00",
    ):
        assert await refusals(mesh, token) == {(grpc.StatusCode.NOT_FOUND, NO_LINK)}, token
    assert await data_of(mesh, good) == [7]


async def test_filters_hold_whatever_viewers_say(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    dashboard, source_id, _ = await counted(mesh, ann)
    _, token = await share(mesh, ann, dashboard, filters=[SHOP])
    await data_of(mesh, token, metadata=(("x-filters", "none"), ("filters", "")))
    async with watching(mesh, token, choices=[]):
        pass
    asked = [asked.query for asked in mesh.analytics.asked if source_id in asked.query.source_ids]
    assert asked
    assert all(list(query.filters) == [SHOP] for query in asked)
    # Who has an account sees all of it, through the same process.
    mesh.analytics.asked.clear()
    request = dashboard_service_pb2.GetDashboardDataRequest(dashboard_id=dashboard.dashboard_id)
    await mesh.dashboards.GetDashboardData(request, metadata=ann.metadata)
    assert [list(asked.query.filters) for asked in mesh.analytics.asked] == [[]]


async def test_only_what_the_link_leaves_can_be_chosen(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    dashboard, _, _ = await counted(mesh, ann)
    link, token = await share(mesh, ann, dashboard)
    hour = TimeRange(last_seconds=3600)
    for choice in ({"choices": ["land=de"]}, {"choices": ["land"]}, {"time_range": hour}):
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await data_of(mesh, token, **choice)
        assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        stream = mesh.shares.WatchSharedDashboard(pb.WatchSharedDashboardRequest(token=token, **choice))
        assert await refused(stream.read()) == (grpc.StatusCode.INVALID_ARGUMENT, "CHOICE_INVALID")
    await change(mesh, ann, link, allow_time_range=True)
    assert await data_of(mesh, token, time_range=hour) == [7]
    assert mesh.analytics.asked[-1].query.time_range == hour


async def test_a_password_is_asked_for_and_a_ticket_stands_for_it(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    dashboard, _, _ = await counted(mesh, ann)
    link, token = await share(mesh, ann, dashboard, password="open sesame")
    needed = {(grpc.StatusCode.UNAUTHENTICATED, "SHARE_PASSWORD_REQUIRED")}
    assert await refusals(mesh, token) == needed
    assert await refused(ticket(mesh, token, "close sesame")) == (
        grpc.StatusCode.UNAUTHENTICATED,
        "SHARE_PASSWORD_WRONG",
    )
    good = await ticket(mesh, token, "open sesame")
    assert await data_of(mesh, token, ticket=good) == [7]
    assert await data_of(mesh, token, metadata=(("x-share-ticket", good),)) == [7]
    # Forged, altered, of another link, of an earlier password.
    _, other = await share(mesh, ann, dashboard, password="open sesame")
    raw = base64.urlsafe_b64decode(good.removeprefix("mbu_") + "==")
    later = raw[:16] + (int.from_bytes(raw[16:24]) + 3600).to_bytes(8) + raw[24:]
    forged = "mbu_" + base64.urlsafe_b64encode(later).decode().rstrip("=")
    for bad in ("", "mbu_", "open sesame", good[:-4], forged, await ticket(mesh, other, "open sesame")):
        assert await refusals(mesh, token, ticket=bad) == needed, bad
    await change(mesh, ann, link, password="another one")
    assert await refusals(mesh, token, ticket=good) == needed
    await change(mesh, ann, link, password="")
    assert await data_of(mesh, token) == [7]


async def test_a_ticket_expires(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    dashboard, _, _ = await counted(mesh, ann)
    _, token = await share(mesh, ann, dashboard, password="open sesame")
    good = await ticket(mesh, token, "open sesame")
    mesh.links.tickets._now = lambda: datetime.now(UTC) + timedelta(hours=13)
    assert (await refused(data_of(mesh, token, ticket=good)))[1] == "SHARE_PASSWORD_REQUIRED"


async def test_wrong_passwords_cost_time(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    dashboard, _, _ = await counted(mesh, ann)
    _, token = await share(mesh, ann, dashboard, password="open sesame")
    for _ in range(6):
        assert (await refused(ticket(mesh, token, "wrong one", "192.0.2.7")))[1] == "SHARE_PASSWORD_WRONG"
    for password in ("wrong one", "open sesame"):
        assert await refused(ticket(mesh, token, password, "192.0.2.7")) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "SHARE_PASSWORD_DELAYED",
        )
    # From elsewhere it goes on.
    assert await data_of(mesh, token, ticket=await ticket(mesh, token, "open sesame", "192.0.2.8")) == [7]


async def test_pages_of_other_origins_are_refused(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    dashboard, _, _ = await counted(mesh, ann)
    _, token = await share(
        mesh, ann, dashboard, allowed_origins=["https://shop.example", "https://*.sub.example"]
    )
    for origin in (ISSUER, "https://shop.example", "https://a.sub.example"):
        assert await data_of(mesh, token, metadata=(("origin", origin),)) == [7]
    same = (("origin", "https://board.example"), ("sec-fetch-site", "same-origin"))
    assert await data_of(mesh, token, metadata=same) == [7]
    for origin in (
        "https://evil.example",
        "https://shop.example.evil.example",
        "null",
        "http://shop.example",
    ):
        assert await refused(data_of(mesh, token, metadata=(("origin", origin),))) == (
            grpc.StatusCode.PERMISSION_DENIED,
            "ORIGIN_NOT_ALLOWED",
        )


async def test_the_page_says_who_may_frame_it(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    dashboard, _, _ = await counted(mesh, ann)
    link, token = await share(
        mesh, ann, dashboard, allowed_origins=["https://shop.example"], password="open sesame"
    )
    _, closed = await share(mesh, ann, dashboard)

    async def page(token: str) -> tuple[bytes, str]:
        call = mesh.shares.GetSharedPage(pb.GetSharedPageRequest(token=token))
        headers = dict(await call.initial_metadata())
        assert headers["referrer-policy"] == "no-referrer"
        response = await call
        assert response.page.content_type == "text/html; charset=utf-8"
        *_, ancestors = str(headers["content-security-policy"]).split("; ")
        return response.page.data, ancestors

    assert await page(token) == (shared_page.PAGE, "frame-ancestors 'self' https://shop.example")
    await change(mesh, ann, link, paused=True)
    for other in (closed, token, "none", ""):
        assert await page(other) == (shared_page.PAGE, "frame-ancestors 'none'")


async def test_watchers_get_what_changes(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    dashboard, source_id, widget = await counted(mesh, ann)
    _, token = await share(mesh, ann, dashboard)
    async with watching(mesh, token) as watcher:
        assert watcher.state == {widget.widget_id: 7}
        mesh.analytics.count[source_id] = 8
        await mesh.tick(source_id)
        await eventually(lambda: watcher.state == {widget.widget_id: 8})
    async with watching(mesh, token, cursor=watcher.cursor) as again:
        assert not again.responses[0].HasField("snapshot")
        assert list(again.responses[0].changes) == []
    stream = mesh.shares.WatchSharedDashboard(pb.WatchSharedDashboardRequest(token=token, cursor="x" * 80))
    assert await refused(stream.read()) == (grpc.StatusCode.INVALID_ARGUMENT, "CURSOR_INVALID")


async def test_a_cursor_lifts_no_filter(mesh: Mesh) -> None:
    """That of a viewer who sees everything is none of what the link shows."""
    ann = mesh.identity.member("admin")
    dashboard, source_id, widget = await counted(mesh, ann)
    _, open_token = await share(mesh, ann, dashboard)
    _, token = await share(mesh, ann, dashboard, filters=[SHOP])
    async with watching(mesh, open_token) as everything:
        pass
    mesh.analytics.asked.clear()
    mesh.analytics.count[source_id] = 3
    request = pb.WatchSharedDashboardRequest(token=token, cursor=everything.cursor)
    refusal = await refused(mesh.shares.WatchSharedDashboard(request).read())
    assert refusal == (grpc.StatusCode.INVALID_ARGUMENT, "CURSOR_INVALID")
    async with watching(mesh, token) as watcher:
        assert watcher.state == {widget.widget_id: 3}
    assert [list(asked.query.filters) for asked in mesh.analytics.asked] == [[SHOP]]


@pytest.mark.parametrize("how", ["deleted", "paused", "expired", "password", "filtered", "dashboard"])
async def test_a_link_that_ends_ends_its_streams(mesh: Mesh, how: str) -> None:
    ann = mesh.identity.member("admin")
    dashboard, _, _ = await counted(mesh, ann)
    link, token = await share(mesh, ann, dashboard, password="open sesame")
    good = await ticket(mesh, token, "open sesame")
    async with (
        mesh.another() as (channel, _, _),
        watching(mesh, token, ShareServiceStub(channel), ticket=good) as there,
        watching(mesh, token, ticket=good) as here,
    ):
        await end(mesh, ann, link, how)
        await here.ended(End.LINK_ENDED, within=4)
        await there.ended(End.LINK_ENDED, within=4)


async def end(mesh: Mesh, member: Member, link: ShareLink, how: str) -> None:
    now = Timestamp()
    now.GetCurrentTime()
    match how:
        case "deleted":
            await delete(mesh, member, link)
        case "paused":
            await change(mesh, member, link, paused=True)
        case "expired":
            await change(mesh, member, link, expire_time=now)
        case "password":
            await change(mesh, member, link, password="another one")
        case "filtered":
            await change(mesh, member, link, filters=[SHOP])
        case "dashboard":
            await mesh.dashboards.DeleteDashboard(
                dashboard_service_pb2.DeleteDashboardRequest(dashboard_id=link.dashboard_id),
                metadata=member.metadata,
            )


async def test_data_that_need_not_be_live_is_asked_once(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    dashboard, source_id, _ = await counted(mesh, ann)
    link, token = await share(mesh, ann, dashboard, refresh_seconds=3600)
    assert await data_of(mesh, token) == [7]
    mesh.analytics.count[source_id] = 8
    assert await data_of(mesh, token) == [7]
    assert mesh.analytics.times_asked(source_id) == 1
    await change(mesh, ann, link, refresh_seconds=0)
    assert await data_of(mesh, token) == [8]


async def test_views_are_counted(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    dashboard, _, _ = await counted(mesh, ann)
    link, token = await share(mesh, ann, dashboard, password="open sesame")
    await refusals(mesh, token)
    good = await ticket(mesh, token, "open sesame")
    for _ in range(3):
        await data_of(mesh, token, ticket=good)
    await mesh.shares.GetSharedDashboard(pb.GetSharedDashboardRequest(token=token, ticket=good))
    await mesh.links.note_views()
    request = pb.GetShareLinkRequest(dashboard_id=link.dashboard_id, share_link_id=link.share_link_id)
    found = (await mesh.shares.GetShareLink(request, metadata=ann.metadata)).share_link
    assert (found.view_count, found.HasField("last_view_time"), found.etag) == (4, True, link.etag)
    async with watching(mesh, token, ticket=good):
        await mesh.links.note_views()
    again = (await mesh.shares.GetShareLink(request, metadata=ann.metadata)).share_link
    assert again.view_count == 4
    assert again.last_view_time.ToNanoseconds() > found.last_view_time.ToNanoseconds()


async def with_variables(mesh: Mesh, member: Member) -> tuple[Dashboard, str]:
    """A dashboard of which a widget asks for a country and a shop, and its source."""
    dashboard, source_id = await mesh.dashboard(member), new_id()
    variables = [
        Variable(
            name="land",
            title="Country",
            list=Variable.OptionList(options=[Variable.Option(value=one) for one in ("de", "fr")]),
        ),
        Variable(
            name="shop",
            property_values=Variable.PropertyValues(source_id=source_id, property="properties.shop"),
        ),
    ]
    wanted = Dashboard(
        dashboard_id=dashboard.dashboard_id, title="${land}, ${shop}: $${land} $$", variables=variables
    )
    await mesh.dashboards.UpdateDashboard(
        dashboard_service_pb2.UpdateDashboardRequest(dashboard=wanted), metadata=member.metadata
    )
    query = Query(source_ids=[source_id])
    for name, property_name in (("land", "country"), ("shop", "properties.shop")):
        query.filters.add(property=property_name, operator=Filter.EQUAL).values.add(string_value=f"${name}")
    await mesh.widget(member, dashboard, query)
    mesh.analytics.asked.clear()
    return dashboard, source_id


def countries(mesh: Mesh) -> set[str]:
    """Which countries were asked for; "" where all were."""
    return {
        next((f.values[0].string_value for f in asked.query.filters if f.property == "country"), "")
        for asked in mesh.analytics.asked
    }


LOCKED = [LockedVariable(name="land", values=["de"])]


async def test_a_locked_variable_is_out_of_reach(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    dashboard, _ = await with_variables(mesh, ann)
    _, open_token = await share(mesh, ann, dashboard)
    _, token = await share(mesh, ann, dashboard, locked_variables=LOCKED)
    shown = (await mesh.shares.GetSharedDashboard(pb.GetSharedDashboardRequest(token=token))).dashboard
    assert [(one.name, one.kind) for one in shown.variables] == [("shop", SharedVariable.VALUES)]
    assert shown.title == "de, ${shop}: $${land} $$"
    assert "de" not in {value for one in shown.variables for value in one.defaults}
    for choices in (
        ["land=fr"],
        ["land=de"],
        ["land="],
        ["land=fr", "land=de"],
        ["shop=a", "land=fr"],
        ["land"],
    ):
        assert await refused(data_of(mesh, token, choices=choices)) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "CHOICE_INVALID",
        )
        stream = mesh.shares.WatchSharedDashboard(
            pb.WatchSharedDashboardRequest(token=token, choices=choices)
        )
        assert (await refused(stream.read()))[1] == "CHOICE_INVALID"
    assert mesh.analytics.asked == []
    # In a header, and by the cursor of who could choose.
    await data_of(mesh, token, metadata=(("choices", "land=fr"), ("x-choices", "land=fr")))
    async with watching(mesh, open_token, choices=["land=fr"]) as free:
        pass
    assert countries(mesh) == {"de", "fr"}
    mesh.analytics.asked.clear()
    stream = mesh.shares.WatchSharedDashboard(pb.WatchSharedDashboardRequest(token=token, cursor=free.cursor))
    assert (await refused(stream.read()))[1] == "CURSOR_INVALID"
    await data_of(mesh, token, choices=["shop=a"])
    assert countries(mesh) == {"de"}


async def test_a_snapshot_is_of_the_values_that_it_was_made_with(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    dashboard, _ = await with_variables(mesh, ann)
    request = pb.CreateSnapshotRequest(dashboard_id=dashboard.dashboard_id, locked_variables=LOCKED)
    made = await mesh.shares.CreateSnapshot(request, metadata=ann.metadata)
    shown = await mesh.shares.GetSharedDashboard(pb.GetSharedDashboardRequest(token=made.token))
    assert (shown.dashboard.title, list(shown.dashboard.variables)) == ("de, : $${land} $$", [])
    assert countries(mesh) == {"de"}


async def test_a_lock_on_what_is_gone_shows_nothing(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    dashboard, _ = await with_variables(mesh, ann)
    _, token = await share(mesh, ann, dashboard, locked_variables=LOCKED)
    _, open_token = await share(mesh, ann, dashboard)
    (widget,) = (
        await mesh.shares.GetSharedDashboard(pb.GetSharedDashboardRequest(token=token))
    ).dashboard.widgets
    # While a widget names it, it does not go.
    ids = {"dashboard_id": dashboard.dashboard_id, "widget_id": widget.widget_id}
    await mesh.widgets.DeleteWidget(DeleteWidgetRequest(**ids), metadata=ann.metadata)
    async with watching(mesh, token) as watcher:
        renamed = Variable(name="country", text=Variable.FreeText())
        await mesh.dashboards.UpdateDashboard(
            dashboard_service_pb2.UpdateDashboardRequest(
                dashboard=Dashboard(dashboard_id=dashboard.dashboard_id, variables=[renamed])
            ),
            metadata=ann.metadata,
        )
        await watcher.ended(End.LINK_ENDED, within=4)
    assert await refusals(mesh, token) == {(grpc.StatusCode.NOT_FOUND, NO_LINK)}
    assert await data_of(mesh, open_token) == []


async def test_values_to_choose_are_within_the_filter(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    dashboard, source_id = await with_variables(mesh, ann)
    mesh.analytics.results[source_id] = Result(
        columns=[
            Column(name="properties.shop", type=Column.STRING),
            Column(name="count", type=Column.NUMBER),
        ],
        rows=[
            ListValue(values=[Value(string_value=shop), Value(number_value=count)])
            for shop, count in (("north", 5), ("south", 9))
        ],
    )
    _, token = await share(mesh, ann, dashboard, locked_variables=LOCKED, filters=[SHOP])

    async def values(name: str, **more: Any) -> list[str]:
        request = pb.ListSharedVariableValuesRequest(token=token, name=name, **more)
        response = await mesh.shares.ListSharedVariableValues(request)
        found = [one.value for one in response.values]
        if response.next_page_token:
            found += await values(name, **{**more, "page_token": response.next_page_token})
        return found

    assert await values("shop") == ["south", "north"]
    assert await values("shop", page_size=1) == ["south", "north"]
    assert all(SHOP in asked.query.filters for asked in mesh.analytics.asked)
    for name in ("land", "never"):
        assert (await refused(values(name)))[1] == "CHOICE_INVALID"
    mesh.analytics.failures[source_id] = errors.not_found("SOURCE_NOT_FOUND", source_id, source_id=source_id)
    assert await values("shop") == []


async def test_annotations_show_where_the_link_says_so(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    dashboard, _, _ = await counted(mesh, ann)
    made = await mesh.annotations.CreateAnnotation(
        annotation_service_pb2.CreateAnnotationRequest(
            dashboard_id=dashboard.dashboard_id, text="Release 7", tags=["release"]
        ),
        metadata=ann.metadata,
    )
    link, token = await share(mesh, ann, dashboard)
    request = pb.ListSharedAnnotationsRequest(token=token)
    assert not (await mesh.shares.ListSharedAnnotations(request)).annotations
    await change(mesh, ann, link, show_annotations=True)
    shown = await mesh.shares.ListSharedAnnotations(request)
    assert [(one.time, one.text, list(one.tags)) for one in shown.annotations] == [
        (made.annotation.time, "Release 7", ["release"])
    ]
    kept = await mesh.shares.CreateSnapshot(
        pb.CreateSnapshotRequest(dashboard_id=dashboard.dashboard_id, show_annotations=True),
        metadata=ann.metadata,
    )
    frozen = await mesh.shares.ListSharedAnnotations(pb.ListSharedAnnotationsRequest(token=kept.token))
    assert frozen == shown
    for secret in (ann.user_id, dashboard.dashboard_id, made.annotation.annotation_id):
        assert secret not in str(shown)


async def test_a_link_is_watched_in_a_bounded_number_of_ways(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = mesh.identity.member("admin")
    dashboard, _ = await with_variables(mesh, ann)
    _, token = await share(mesh, ann, dashboard)
    monkeypatch.setattr(shared_views, "MAX_SCOPES", 1)
    other = pb.WatchSharedDashboardRequest(token=token, choices=["land=fr"])
    async with watching(mesh, token, choices=["land=de"]), watching(mesh, token, choices=["land=de"]):
        assert await refused(mesh.shares.WatchSharedDashboard(other).read()) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "SHARE_LINK_BUSY",
        )

    async def has_room() -> bool:
        return (await outcome(mesh.shares.WatchSharedDashboard(other).read()))[1] == ""

    await eventually(has_room)


async def test_links_of_one_dashboard_end_by_themselves(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    dashboard, source_id, widget = await counted(mesh, ann)
    ended, token = await share(mesh, ann, dashboard)
    _, other = await share(mesh, ann, dashboard)
    _, secret = await share(mesh, ann, dashboard, password="open sesame")
    tickets = [await ticket(mesh, secret, "open sesame") for _ in range(2)]
    async with (
        watching(mesh, token) as first,
        watching(mesh, token) as second,
        watching(mesh, other) as third,
        watching(mesh, secret, ticket=tickets[0]) as fourth,
        watching(mesh, secret, ticket=tickets[1]) as fifth,
    ):
        assert len(mesh.feeds) == 1
        await delete(mesh, ann, ended)
        for watcher in (first, second):
            await eventually(lambda watcher=watcher: watcher.reading.done())
            assert watcher.responses[-1].end.reason == End.LINK_ENDED
        mesh.analytics.count[source_id] = 8
        await mesh.tick(source_id)
        for watcher in (third, fourth, fifth):
            await eventually(lambda watcher=watcher: watcher.state == {widget.widget_id: 8})
            assert not watcher.reading.done()
