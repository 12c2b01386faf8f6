from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.struct_pb2 import Value
from meshboard.analytics.v1.query_pb2 import Filter, Query, TimeRange
from meshboard.dashboard.v1 import dashboard_service_pb2 as pb
from meshboard.dashboard.v1 import draft_service_pb2 as draft_pb
from meshboard.dashboard.v1 import folder_service_pb2 as folder_pb
from meshboard.dashboard.v1 import library_service_pb2 as library_pb
from meshboard.dashboard.v1 import widget_service_pb2
from meshboard.dashboard.v1.dashboard_pb2 import Dashboard, Variable, Widget, WidgetData
from meshboard.dashboard.v1.dashboard_service_pb2_grpc import DashboardServiceStub
from meshboard.dashboard.v1.library_pb2 import LibraryWidget
from meshboard.user.v1.grant_pb2 import Grant, Subject

from services.chassis import errors, rechecks
from services.chassis.rechecks import Span
from tests.conditions import eventually
from tests.dashboard_svc.conftest import Mesh
from tests.harness import Member, new_id, reason_of

Response = pb.WatchDashboardResponse
End = Response.End


class Watcher:
    """A client of a stream: keeps what it was sent, and the state that this leads to."""

    def __init__(self, call: Any, state: dict[str, float]) -> None:
        self.call = call
        self.responses: list[Response] = []
        self.times: list[float] = []
        self.cursor = ""
        self.state = state
        self.reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for response in self.call:
            self.responses.append(response)
            self.times.append(time.monotonic())
            self.cursor = response.cursor or self.cursor
            if response.HasField("snapshot"):
                self.state = {}
            for data in (*response.snapshot.widgets, *response.changes):
                self.state[data.widget_id] = number(data)
            for widget_id in response.removed_widget_ids:
                del self.state[widget_id]

    @property
    def changes(self) -> list[Response]:
        return [response for response in self.responses if response.changes]

    @property
    def reasons(self) -> list[Any]:
        return [response.end.reason for response in self.responses if response.HasField("end")]

    async def ended(self, reason: End.Reason.ValueType, within: float) -> None:
        """The stream ends with this reason as its last message, and status OK."""
        async with asyncio.timeout(within):
            await self.reading
        assert self.reasons == [reason]
        assert self.responses[-1].HasField("end")
        assert await self.call.code() is grpc.StatusCode.OK


def number(data: WidgetData) -> float:
    """The one number of a result; -1 for an error."""
    return data.result.rows[0].values[0].number_value if data.HasField("result") else -1.0


@asynccontextmanager
async def watching(
    mesh: Mesh, member: Member, dashboard: Dashboard, after: Watcher | None = None, stub: Any = None
) -> AsyncIterator[Watcher]:
    """Watches until the block ends; `after` an earlier stream, with its cursor and its state."""
    cursor, state = (after.cursor, dict(after.state)) if after else ("", {})
    request = pb.WatchDashboardRequest(dashboard_id=dashboard.dashboard_id, cursor=cursor)
    call = (stub or mesh.dashboards).WatchDashboard(request, metadata=member.metadata)
    watcher = Watcher(call, state)
    try:
        await eventually(lambda: bool(watcher.responses) or watcher.reading.done(), 10)
        if watcher.reading.done():
            await watcher.reading
        yield watcher
    finally:
        call.cancel()
        await asyncio.gather(watcher.reading, return_exceptions=True)


async def counted(mesh: Mesh, member: Member, n: int = 2) -> tuple[Dashboard, list[str], list[Widget]]:
    """A dashboard with widgets that count a source each."""
    dashboard = await mesh.dashboard(member)
    sources = [new_id() for _ in range(n)]
    widgets = [await mesh.widget(member, dashboard, Query(source_ids=[source])) for source in sources]
    return dashboard, sources, widgets


async def test_snapshot_then_only_what_differs(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard, sources, widgets = await counted(mesh, ann)
    async with watching(mesh, ann, dashboard) as watcher:
        assert [data.widget_id for data in watcher.responses[0].snapshot.widgets] == [
            widget.widget_id for widget in widgets
        ]
        await mesh.tick(sources[0])  # without effect: only `watermark` differs
        await eventually(lambda: mesh.analytics.times_asked(sources[0]) == 2)
        start = time.monotonic()
        mesh.analytics.count[sources[1]] = 7
        await mesh.tick(sources[1])
        await eventually(lambda: len(watcher.responses) > 1)
        assert watcher.times[1] - start < 1
        assert [(data.widget_id, number(data)) for data in watcher.responses[1].changes] == [
            (widgets[1].widget_id, 7)
        ]
        assert watcher.responses[1].cursor not in ("", watcher.responses[0].cursor)
    assert mesh.analytics.times_asked(sources[0]) == 2


async def test_computes_once_for_all_watchers_and_at_most_four_times_a_second(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    viewer = mesh.identity.member("viewer", ann.workspace_id)
    dashboard, (source, _), (widget, _) = await counted(mesh, ann)
    async with (
        watching(mesh, ann, dashboard) as one,
        watching(mesh, viewer, dashboard) as two,
        watching(mesh, viewer, dashboard) as three,
    ):
        assert mesh.analytics.times_asked(source) == 1
        assert len(mesh.feeds) == 1
        start = time.monotonic()
        while time.monotonic() - start < 1.5:
            mesh.analytics.count[source] += 1
            await mesh.tick(source)
            await asyncio.sleep(0.02)
        last = mesh.analytics.count[source]
        for watcher in (one, two, three):
            await eventually(lambda watcher=watcher: watcher.state[widget.widget_id] == last)
            seconds = watcher.times[-1] - watcher.times[1]
            assert len(watcher.changes) <= seconds / 0.25 + 2
            assert len(watcher.changes) >= 4
        asked = mesh.analytics.times_asked(source) - 1
        assert asked <= (time.monotonic() - start) / 0.25 + 2
    await eventually(lambda: len(mesh.feeds) == 0)


async def test_many_widgets_share_the_ten_messages_a_second(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard, sources, _ = await counted(mesh, ann, 6)
    async with watching(mesh, ann, dashboard) as watcher:
        for n in range(60):
            mesh.analytics.count[sources[n % 6]] += 1
            await mesh.tick(sources[n % 6])
            await asyncio.sleep(0.02)
        await eventually(lambda: set(watcher.state.values()) == {10.0})
        seconds = watcher.times[-1] - watcher.times[0]
        assert len(watcher.changes) <= seconds / 0.1 + 1
        for source in sources:
            assert mesh.analytics.times_asked(source) <= seconds / 0.25 + 2


async def test_questions_that_are_asked_together_are_one_call(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard, source = await mesh.dashboard(ann), new_id()
    for n in range(5):
        limited = Query(source_ids=[source], limit=n + 1)
        await mesh.widget(ann, dashboard, limited)
    async with watching(mesh, ann, dashboard) as watcher:
        assert (mesh.analytics.calls, mesh.analytics.times_asked(source)) == (1, 5)
        mesh.analytics.count[source] = 3
        await mesh.tick(source)
        await eventually(lambda: set(watcher.state.values()) == {3.0})
        assert (mesh.analytics.calls, mesh.analytics.times_asked(source)) == (2, 10)
        assert len(watcher.changes) <= 2


async def test_a_slow_question_does_not_hold_back_others_of_its_call(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard, both = await mesh.dashboard(ann), new_id()
    slow, quick = (Query(source_ids=[each, both]) for each in (new_id(), new_id()))
    behind, ahead = await mesh.widget(ann, dashboard, slow), await mesh.widget(ann, dashboard, quick)
    async with watching(mesh, ann, dashboard) as watcher:
        mesh.analytics.delays[slow.source_ids[0]] = 3.0
        for each in (slow, quick):
            mesh.analytics.count[each.source_ids[0]] = 4
        await mesh.tick(both)
        await eventually(lambda: watcher.state[ahead.widget_id] == 4)
        assert watcher.state[behind.widget_id] == 0
        await eventually(lambda: watcher.state[behind.widget_id] == 4)


async def test_dashboards_that_ask_the_same_share_the_answer(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    source = new_id()
    one, two = await mesh.dashboard(ann), await mesh.dashboard(ann)
    for dashboard in (one, two):
        await mesh.widget(ann, dashboard, Query(source_ids=[source]))
    bob = mesh.identity.member("editor")  # in another workspace
    other = await mesh.dashboard(bob)
    await mesh.widget(bob, other, Query(source_ids=[source]))
    async with watching(mesh, ann, one) as first, watching(mesh, ann, two) as second:
        assert (len(mesh.feeds), len(mesh.feeds.lines), mesh.analytics.times_asked(source)) == (2, 1, 1)
        async with watching(mesh, bob, other):
            assert (len(mesh.feeds.lines), mesh.analytics.times_asked(source)) == (2, 2)
            assert {asked.workspace_id for asked in mesh.analytics.asked} == {
                ann.workspace_id,
                bob.workspace_id,
            }
        mesh.analytics.count[source] = 8
        await mesh.tick(source)
        for watcher in (first, second):
            await eventually(lambda watcher=watcher: set(watcher.state.values()) == {8.0})
        assert mesh.analytics.times_asked(source) == 3
    await eventually(lambda: len(mesh.feeds.lines) == 0)


async def test_fixed_ranges_cost_nothing_and_sliding_ones_move(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    fixed, sliding = new_id(), new_id()
    await mesh.widget(ann, dashboard, Query(source_ids=[fixed]))
    moving = Query(source_ids=[sliding], time_range=TimeRange(last_seconds=60))
    widget = await mesh.widget(ann, dashboard, moving)
    async with watching(mesh, ann, dashboard) as watcher:
        mesh.analytics.count[sliding] = 3  # no tick: time alone
        await eventually(lambda: watcher.state[widget.widget_id] == 3, 5)
        await eventually(lambda: mesh.analytics.times_asked(sliding) >= 3, 5)
        assert mesh.analytics.times_asked(fixed) == 1


async def test_follows_changes_of_widgets(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard, sources, widgets = await counted(mesh, ann)
    async with watching(mesh, ann, dashboard) as watcher:
        third = await mesh.widget(ann, dashboard)
        await eventually(lambda: third.widget_id in watcher.state)
        other = new_id()
        mesh.analytics.count[other] = 5
        await mesh.widgets.UpdateWidget(
            widget_service_pb2.UpdateWidgetRequest(
                widget=Widget(
                    dashboard_id=dashboard.dashboard_id,
                    widget_id=widgets[0].widget_id,
                    query=Query(source_ids=[other]),
                )
            ),
            metadata=ann.metadata,
        )
        await eventually(lambda: watcher.state[widgets[0].widget_id] == 5)
        mesh.analytics.count[other] = 6
        await mesh.tick(other)
        await eventually(lambda: watcher.state[widgets[0].widget_id] == 6)
        await mesh.widgets.DeleteWidget(
            widget_service_pb2.DeleteWidgetRequest(
                dashboard_id=dashboard.dashboard_id, widget_id=widgets[1].widget_id
            ),
            metadata=ann.metadata,
        )
        await eventually(lambda: widgets[1].widget_id not in watcher.state)
        assert watcher.state.keys() == {widgets[0].widget_id, third.widget_id}
        asked = mesh.analytics.times_asked(sources[0])
        await mesh.tick(sources[0])  # nobody's any more
        await asyncio.gather(*(mesh.tick(other) for _ in range(2)))
        assert mesh.analytics.times_asked(sources[0]) == asked
    await eventually(lambda: len(mesh.feeds) == 0)
    assert mesh.feeds.lines.followed_sources == set()


async def test_a_new_stream_has_what_was_just_written(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard, _, _ = await counted(mesh, ann, 1)
    async with watching(mesh, ann, dashboard):
        for n in range(2, 6):
            await mesh.widget(ann, dashboard)
            async with watching(mesh, ann, dashboard) as watcher:
                assert len(watcher.responses[0].snapshot.widgets) == n


async def test_cursor_takes_the_stream_up_at_another_replica(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard, sources, widgets = await counted(mesh, ann, 3)
    async with watching(mesh, ann, dashboard) as before:
        assert before.state == dict.fromkeys([widget.widget_id for widget in widgets], 0)
    mesh.analytics.count[sources[1]] = 9
    await mesh.widgets.DeleteWidget(
        widget_service_pb2.DeleteWidgetRequest(
            dashboard_id=dashboard.dashboard_id, widget_id=widgets[2].widget_id
        ),
        metadata=ann.metadata,
    )
    async with mesh.another() as (channel, _, _):
        stub = DashboardServiceStub(channel)
        async with watching(mesh, ann, dashboard, before, stub) as later:
            first = later.responses[0]
            assert not first.HasField("snapshot")
            assert [data.widget_id for data in first.changes] == [widgets[1].widget_id]
            assert list(first.removed_widget_ids) == [widgets[2].widget_id]
        async with watching(mesh, ann, dashboard, later, stub) as last:
            first = last.responses[0]
            assert (list(first.changes), list(first.removed_widget_ids)) == ([], [])
            assert first.cursor == later.cursor
            mesh.analytics.count[sources[0]] = 1
            await mesh.tick(sources[0])
            await eventually(lambda: last.state[widgets[0].widget_id] == 1)
        async with watching(mesh, ann, dashboard) as fresh:
            assert fresh.state == last.state == {widgets[0].widget_id: 1, widgets[1].widget_id: 9}


async def test_refuses_foreign_cursors(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard, _, _ = await counted(mesh, ann, 1)
    other, _, _ = await counted(mesh, ann, 1)
    async with watching(mesh, ann, other) as watcher:
        foreign = watcher.cursor
    async with watching(mesh, ann, dashboard) as watcher:
        own = watcher.cursor
    flipped = own[:30] + ("A" if own[30] != "A" else "B") + own[31:]
    for cursor in (foreign, flipped, own[:-4], own + "A", "nonsense", "ä", "A" * 64, "=" * 8):
        call = mesh.dashboards.WatchDashboard(
            pb.WatchDashboardRequest(dashboard_id=dashboard.dashboard_id, cursor=cursor),
            metadata=ann.metadata,
        )
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await anext(aiter(call))
        assert reason_of(failure.value) == "CURSOR_INVALID"
    await eventually(lambda: len(mesh.feeds) == 0)


async def test_a_cursor_is_good_in_its_scope_alone(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    created = await mesh.dashboards.CreateDashboard(
        pb.CreateDashboardRequest(
            title="Chosen", variables=[Variable(name="page", text=Variable.FreeText(), defaults=["/"])]
        ),
        metadata=ann.metadata,
    )
    dashboard_id, source = created.dashboard.dashboard_id, new_id()
    where = Filter(property="page", operator=Filter.EQUAL, values=[Value(string_value="$page")])
    await mesh.widget(ann, created.dashboard, Query(source_ids=[source], filters=[where]))
    scopes: list[dict[str, Any]] = [
        {},
        {"choices": ["page=/a"]},
        {"choices": ["page=/b"]},
        {"choices": ["page=/a"], "time_range": TimeRange(last_seconds=3600)},
    ]

    async def first(cursor: str, scope: dict[str, Any]) -> Response:
        call = mesh.dashboards.WatchDashboard(
            pb.WatchDashboardRequest(dashboard_id=dashboard_id, cursor=cursor, **scope), metadata=ann.metadata
        )
        try:
            response: Response = await anext(aiter(call))
        finally:
            call.cancel()
        return response

    cursors = [(await first("", scope)).cursor for scope in scopes]
    assert len(mesh.analytics.asked) == len(scopes)
    assert len(set(cursors)) == len(scopes)
    for made, cursor in zip(scopes, cursors, strict=True):
        for scope in scopes:
            if scope is made:
                assert not (await first(cursor, scope)).HasField("snapshot")
                continue
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await first(cursor, scope)
            assert reason_of(failure.value) == "CURSOR_INVALID"


async def test_drafts_reach_watchers_when_they_are_published(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard, _, (widget,) = await counted(mesh, ann, 1)
    async with watching(mesh, ann, dashboard) as watcher:
        await mesh.drafts.StartDraft(
            draft_pb.StartDraftRequest(dashboard_id=dashboard.dashboard_id), metadata=ann.metadata
        )
        hidden = await mesh.widget(ann, dashboard)
        async with watching(mesh, ann, dashboard) as later:
            assert later.state.keys() == {widget.widget_id}
        assert watcher.state.keys() == {widget.widget_id}
        await mesh.drafts.PublishDashboard(
            draft_pb.PublishDashboardRequest(dashboard_id=dashboard.dashboard_id), metadata=ann.metadata
        )
        await eventually(lambda: watcher.state.keys() == {widget.widget_id, hidden.widget_id})


async def test_follows_the_settings_of_the_dashboard(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard, (source,), (widget,) = await counted(mesh, ann, 1)
    async with watching(mesh, ann, dashboard) as watcher:
        mesh.analytics.count[source] = 2  # no tick: only another question finds it
        changed = Dashboard(dashboard_id=dashboard.dashboard_id)
        changed.settings.time_range.last_seconds = 86_400
        await mesh.dashboards.UpdateDashboard(
            pb.UpdateDashboardRequest(dashboard=changed), metadata=ann.metadata
        )
        await eventually(lambda: watcher.state[widget.widget_id] == 2)
        assert mesh.analytics.asked[-1].query.time_range.last_seconds == 86_400


async def test_follows_the_widgets_of_the_library(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard, shown, other = await mesh.dashboard(ann), new_id(), new_id()
    mesh.analytics.count.update({shown: 1, other: 2})
    created = await mesh.library.CreateLibraryWidget(
        library_pb.CreateLibraryWidgetRequest(
            title="Shared", kind=Widget.TABLE, query=Query(source_ids=[shown])
        ),
        metadata=ann.metadata,
    )
    library_widget_id = created.library_widget.library_widget_id
    response = await mesh.widgets.CreateWidget(
        widget_service_pb2.CreateWidgetRequest(
            dashboard_id=dashboard.dashboard_id, library_widget_id=library_widget_id
        ),
        metadata=ann.metadata,
    )
    async with watching(mesh, ann, dashboard) as watcher:
        assert watcher.state == {response.widget.widget_id: 1}
        changed = LibraryWidget(library_widget_id=library_widget_id, query=Query(source_ids=[other]))
        await mesh.library.UpdateLibraryWidget(
            library_pb.UpdateLibraryWidgetRequest(library_widget=changed), metadata=ann.metadata
        )
        await eventually(lambda: watcher.state == {response.widget.widget_id: 2})


async def test_a_reader_that_does_not_read_is_kept_no_states(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard, sources, widgets = await counted(mesh, ann, 6)
    mesh.analytics.padding = "x" * 50_000
    target = f"127.0.0.1:{mesh.server.port}"
    async with (
        watching(mesh, ann, dashboard) as reads,
        grpc.aio.insecure_channel(target, [("grpc.http2.bdp_probe", 0)]) as channel,
    ):
        call = DashboardServiceStub(channel).WatchDashboard(
            pb.WatchDashboardRequest(dashboard_id=dashboard.dashboard_id), metadata=ann.metadata
        )
        await call.read()
        states = 0
        while len(reads.changes) < 30:
            states += 1
            for source in sources:
                mesh.analytics.count[source] += 1
                await mesh.tick(source)
            await asyncio.sleep(0.05)
        last = float(states)
        await eventually(lambda: set(reads.state.values()) == {last})
        state: dict[str, float] = {}
        kept = 0
        while len(state) < len(widgets) or set(state.values()) != {last}:
            response: Any = await call.read()
            kept += bool(response.changes)
            state |= {data.widget_id: number(data) for data in response.changes}
        assert kept <= 8, f"{kept} messages lay in wait, of {len(reads.changes)}"
        call.cancel()


async def test_failures_are_the_widgets_own(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard, sources, widgets = await counted(mesh, ann)
    mesh.analytics.failures[sources[0]] = errors.not_found("SOURCE_NOT_FOUND", "There is no such source.")
    async with watching(mesh, ann, dashboard) as watcher:
        first = watcher.responses[0].snapshot.widgets
        assert errors.from_status(first[0].error).reason == "SOURCE_NOT_FOUND"
        assert first[1].HasField("result")
        del mesh.analytics.failures[sources[0]]
        await mesh.tick(sources[0])
        await eventually(lambda: watcher.state[widgets[0].widget_id] == 0)


async def test_a_passing_failure_keeps_the_data_and_is_tried_again(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard, (source,), (widget,) = await counted(mesh, ann, 1)
    async with watching(mesh, ann, dashboard) as watcher:
        mesh.analytics.failures[source] = errors.unavailable("Restarting.")
        await mesh.tick(source)
        await eventually(lambda: mesh.analytics.times_asked(source) == 2)
        mesh.analytics.count[source] = 4
        del mesh.analytics.failures[source]
        await eventually(lambda: watcher.state[widget.widget_id] == 4)
        assert all(data.HasField("result") for response in watcher.changes for data in response.changes)
        mesh.analytics.failures[source] = errors.unavailable("For long.")
        await mesh.tick(source)
        await eventually(lambda: watcher.state[widget.widget_id] == -1, 10)


async def test_a_gap_of_the_bus_costs_nothing_but_a_question(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard, (source,), (widget,) = await counted(mesh, ann, 1)
    async with watching(mesh, ann, dashboard) as watcher:
        mesh.analytics.count[source] = 4  # its tick is lost
        mesh.feeds.mistrust()
        await eventually(lambda: watcher.state[widget.widget_id] == 4)


class TestShortLives:
    @pytest.fixture
    def span(self) -> Span:
        return Span(heartbeat_seconds=0.2, watch_seconds=1.1)

    async def test_heartbeats_then_renewal(self, mesh: Mesh) -> None:
        ann = mesh.identity.member("editor")
        dashboard, _, _ = await counted(mesh, ann, 1)
        async with watching(mesh, ann, dashboard) as watcher:
            await watcher.ended(End.RENEW, 5)
        beats = [response for response in watcher.responses if response.HasField("heartbeat")]
        assert len(beats) in (4, 5)
        assert not any(beat.cursor for beat in beats)


# Ends


async def test_ends_when_the_grant_is_taken_back(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    guest = mesh.identity.member("viewer", admin.workspace_id)
    dashboard, _, _ = await counted(mesh, admin, 1)
    mesh.users.known.add(guest.user_id)

    async def grant(subject: Subject, effect: Grant.Effect.ValueType) -> str:
        response = await mesh.dashboards.CreateDashboardGrant(
            pb.CreateDashboardGrantRequest(
                dashboard_id=dashboard.dashboard_id, subject=subject, role="viewer", effect=effect
            ),
            metadata=admin.metadata,
        )
        grant_id: str = response.grant.grant_id
        return grant_id

    grant_id = await grant(Subject(user_id=guest.user_id), Grant.ALLOW)
    await grant(Subject(workspace=True), Grant.DENY)
    async with watching(mesh, admin, dashboard) as stays, watching(mesh, guest, dashboard) as goes:
        await mesh.dashboards.DeleteDashboardGrant(
            pb.DeleteDashboardGrantRequest(dashboard_id=dashboard.dashboard_id, grant_id=grant_id),
            metadata=admin.metadata,
        )
        await goes.ended(End.ACCESS_LOST, 2)
        assert not stays.reading.done()
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        async with watching(mesh, guest, dashboard, goes):
            pass
    assert reason_of(failure.value) == "DASHBOARD_NOT_FOUND"


async def test_ends_at_once_when_it_hears_of_a_change(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rechecks, "CHECK_SECONDS", 60.0)
    admin = mesh.identity.member("admin")
    guest = mesh.identity.member("viewer", admin.workspace_id)
    dashboard, _, _ = await counted(mesh, admin, 1)
    async with watching(mesh, guest, dashboard) as watcher:
        await mesh.dashboards.CreateDashboardGrant(
            pb.CreateDashboardGrantRequest(
                dashboard_id=dashboard.dashboard_id,
                subject=Subject(workspace=True),
                role="viewer",
                effect=Grant.DENY,
            ),
            metadata=admin.metadata,
        )
        await watcher.ended(End.ACCESS_LOST, 2)


async def test_ends_at_once_when_a_folder_around_it_is_closed(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rechecks, "CHECK_SECONDS", 60.0)
    admin = mesh.identity.member("admin")
    guest = mesh.identity.member("viewer", admin.workspace_id)
    closed, folder = await mesh.folder(admin), await mesh.folder(admin)
    dashboard, _, _ = await counted(mesh, admin, 1)
    deny = folder_pb.CreateFolderGrantRequest(
        folder_id=closed.folder_id, subject=Subject(workspace=True), role="viewer", effect=Grant.DENY
    )
    await mesh.folders.CreateFolderGrant(deny, metadata=admin.metadata)
    moves = pb.MoveDashboardRequest(dashboard_id=dashboard.dashboard_id, folder_id=closed.folder_id)
    async with watching(mesh, guest, dashboard) as watcher:
        await mesh.dashboards.MoveDashboard(moves, metadata=admin.metadata)
        await watcher.ended(End.ACCESS_LOST, 2)
    moves.folder_id = folder.folder_id
    await mesh.dashboards.MoveDashboard(moves, metadata=admin.metadata)
    async with watching(mesh, guest, dashboard) as watcher:
        around = folder_pb.MoveFolderRequest(folder_id=folder.folder_id, parent_folder_id=closed.folder_id)
        await mesh.folders.MoveFolder(around, metadata=admin.metadata)
        await watcher.ended(End.ACCESS_LOST, 2)


async def test_ends_when_the_grant_expires(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    guest = mesh.identity.member("viewer", admin.workspace_id)
    dashboard, _, _ = await counted(mesh, admin, 1)
    mesh.users.known.add(guest.user_id)
    for subject, effect, seconds in (
        (Subject(workspace=True), Grant.DENY, 3600.0),
        (Subject(user_id=guest.user_id), Grant.ALLOW, 1.5),
    ):
        request = pb.CreateDashboardGrantRequest(
            dashboard_id=dashboard.dashboard_id, subject=subject, role="viewer", effect=effect
        )
        request.expire_time.FromDatetime(datetime.now(UTC) + timedelta(seconds=seconds))
        await mesh.dashboards.CreateDashboardGrant(request, metadata=admin.metadata)
    async with watching(mesh, guest, dashboard) as watcher:
        await watcher.ended(End.ACCESS_LOST, 1.5 + 2)


async def test_ends_when_the_dashboard_is_deleted(mesh: Mesh) -> None:
    admin = mesh.identity.member("admin")
    dashboard, _, _ = await counted(mesh, admin, 1)
    async with watching(mesh, admin, dashboard) as watcher:
        await mesh.dashboards.DeleteDashboard(
            pb.DeleteDashboardRequest(dashboard_id=dashboard.dashboard_id), metadata=admin.metadata
        )
        await watcher.ended(End.ACCESS_LOST, 2)
    assert not any(response.removed_widget_ids for response in watcher.responses)


async def test_ends_when_the_member_leaves(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard, _, _ = await counted(mesh, ann, 1)
    async with watching(mesh, ann, dashboard) as watcher:
        del mesh.identity.rights[ann.user_id, ann.workspace_id]
        await watcher.ended(End.ACCESS_LOST, 2)


async def test_ends_when_the_session_is_revoked(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard, _, _ = await counted(mesh, ann, 1)
    async with watching(mesh, ann, dashboard) as watcher:
        ann.sign_out()
        await watcher.ended(End.SESSION_REVOKED, 2)


async def test_ends_when_the_token_expires(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard, _, _ = await counted(mesh, ann, 1)
    ann.token = mesh.identity.token(
        sub=ann.user_id, wid=ann.workspace_id, sid=ann.session_id, exp=int(time.time()) + 2
    )
    async with watching(mesh, ann, dashboard) as watcher:
        await watcher.ended(End.TOKEN_EXPIRED, 4)


async def test_ends_when_the_process_drains(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard, _, _ = await counted(mesh, ann, 1)
    async with watching(mesh, ann, dashboard) as watcher:
        stopping = asyncio.create_task(mesh.server.stop())
        await watcher.ended(End.DRAINING, 3)
        await stopping


async def test_fails_closed_when_rights_cannot_be_told(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard, _, _ = await counted(mesh, ann, 1)
    async with watching(mesh, ann, dashboard) as watcher:
        start = time.monotonic()
        mesh.identity.away = True
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            async with asyncio.timeout(5):
                await watcher.reading
        assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
        assert 1.0 < time.monotonic() - start < 4
