from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
from meshboard.analytics.v1.query_pb2 import Query
from meshboard.dashboard.v1 import dashboard_service_pb2, widget_service_pb2
from meshboard.dashboard.v1 import draft_service_pb2 as pb
from meshboard.dashboard.v1.dashboard_pb2 import Dashboard, Variable, Widget

from tests.dashboard_svc.boards import (
    events,
    get,
    listed,
    publish,
    start_draft,
    update,
    versions,
)
from tests.dashboard_svc.conftest import Mesh
from tests.harness import Member, new_id, reason_of, refused

NOT_FOUND, ABORTED = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ABORTED


async def seen_widgets(mesh: Mesh, member: Member, dashboard_id: str) -> list[Widget]:
    request = widget_service_pb2.ListWidgetsRequest(dashboard_id=dashboard_id)
    return list((await mesh.widgets.ListWidgets(request, metadata=member.metadata)).widgets)


async def seen_data(mesh: Mesh, member: Member, dashboard_id: str) -> list[str]:
    request = dashboard_service_pb2.GetDashboardDataRequest(dashboard_id=dashboard_id)
    answer = await mesh.dashboards.GetDashboardData(request, metadata=member.metadata)
    return [widget.widget_id for widget in answer.widgets]


async def test_nobody_sees_a_draft_before_it_is_published(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    viewer = mesh.identity.member("viewer", workspace_id=ann.workspace_id)
    dashboard = await mesh.dashboard(ann, "Oldest")
    dashboard_id = dashboard.dashboard_id
    await update(
        mesh, ann, dashboard_id, tags=["old"], variables=[Variable(name="a", text=Variable.FreeText())]
    )
    stays = await mesh.widget(ann, dashboard, title="Elephants")
    goes = await mesh.widget(ann, dashboard, title="Giraffes")
    before = await get(mesh, viewer, dashboard_id)
    widgets_before = await seen_widgets(mesh, viewer, dashboard_id)
    draft = await start_draft(mesh, ann, dashboard_id)
    assert draft.has_draft

    await update(mesh, ann, dashboard_id, title="Newest", description="Told", tags=["new"], variables=[])
    await mesh.widgets.UpdateWidget(
        widget_service_pb2.UpdateWidgetRequest(
            widget=Widget(dashboard_id=dashboard_id, widget_id=stays.widget_id, title="Zebras")
        ),
        metadata=ann.metadata,
    )
    await mesh.widgets.DeleteWidget(
        widget_service_pb2.DeleteWidgetRequest(dashboard_id=dashboard_id, widget_id=goes.widget_id),
        metadata=ann.metadata,
    )
    comes = await mesh.widget(ann, dashboard, title="Lions")

    for member in (viewer, ann):
        seen = await get(mesh, member, dashboard_id)
        assert seen.has_draft
        assert (seen.title, list(seen.tags), list(seen.variables)) == (
            before.title,
            list(before.tags),
            list(before.variables),
        )
        assert seen.description == ""
        (in_list,) = await listed(mesh, member)
        assert in_list == seen
        assert await listed(mesh, member, tags=["old"]) == [seen]
        assert await listed(mesh, member, tags=["new"]) == []
        assert [(w.widget_id, w.title, w.query) for w in await seen_widgets(mesh, member, dashboard_id)] == [
            (w.widget_id, w.title, w.query) for w in widgets_before
        ]
        got = await mesh.widgets.GetWidget(
            widget_service_pb2.GetWidgetRequest(dashboard_id=dashboard_id, widget_id=goes.widget_id),
            metadata=member.metadata,
        )
        assert (got.widget.title, got.widget.dashboard_id) == ("Giraffes", dashboard_id)
        assert await seen_data(mesh, member, dashboard_id) == [stays.widget_id, goes.widget_id]

    request = pb.GetDraftRequest(dashboard_id=dashboard_id)
    working = await mesh.drafts.GetDraft(request, metadata=ann.metadata)
    assert (working.dashboard.title, working.dashboard.description) == ("Newest", "Told")
    assert [widget.title for widget in working.widgets] == ["Zebras", "Lions"]
    data = await mesh.drafts.GetDraftData(
        pb.GetDraftDataRequest(dashboard_id=dashboard_id), metadata=ann.metadata
    )
    assert [widget.widget_id for widget in data.widgets] == [stays.widget_id, comes.widget_id]
    one = await mesh.drafts.GetDraftData(
        pb.GetDraftDataRequest(dashboard_id=dashboard_id, widget_ids=[comes.widget_id.upper()]),
        metadata=ann.metadata,
    )
    assert [widget.widget_id for widget in one.widgets] == [comes.widget_id]
    assert await refused(mesh.drafts.GetDraft(request, metadata=viewer.metadata)) == (
        grpc.StatusCode.PERMISSION_DENIED,
        "PERMISSION_MISSING",
    )

    published = await publish(mesh, ann, dashboard_id, "Animals of Africa")
    assert published == await get(mesh, viewer, dashboard_id) == (await listed(mesh, viewer))[0]
    assert (published.title, published.has_draft, list(published.tags)) == ("Newest", False, ["new"])
    assert [widget.title for widget in await seen_widgets(mesh, viewer, dashboard_id)] == ["Zebras", "Lions"]
    assert (await versions(mesh, ann, dashboard_id))[0].reason == "Animals of Africa"
    told = await events(mesh, ann)
    assert ("DraftStarted" in told, told[-1]) == (True, "DashboardPublished")


async def test_discarding_puts_back_what_viewers_see(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    dashboard_id = dashboard.dashboard_id
    kept = await mesh.widget(ann, dashboard, title="Kept")
    before = await get(mesh, ann, dashboard_id)
    await start_draft(mesh, ann, dashboard_id)
    await update(mesh, ann, dashboard_id, title="Worse")
    await mesh.widgets.DeleteWidget(
        widget_service_pb2.DeleteWidgetRequest(dashboard_id=dashboard_id, widget_id=kept.widget_id),
        metadata=ann.metadata,
    )
    await mesh.widget(ann, dashboard, title="Bad")
    answer = await mesh.drafts.DiscardDraft(
        pb.DiscardDraftRequest(dashboard_id=dashboard_id), metadata=ann.metadata
    )
    after = await get(mesh, ann, dashboard_id)
    assert after == answer.dashboard
    assert (after.title, after.has_draft) == (before.title, False)
    (widget,) = await seen_widgets(mesh, ann, dashboard_id)
    assert (widget.widget_id, widget.title, widget.query) == (kept.widget_id, "Kept", kept.query)
    # What was thrown away can be had again.
    newest, thrown_away, *_ = await versions(mesh, ann, dashboard_id)
    assert newest.restored_version_id
    assert int(thrown_away.version_id) < int(newest.version_id)
    assert (await events(mesh, ann))[-1] == "DraftDiscarded"


async def test_a_draft_ends_once(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    key: dict[str, Any] = {"dashboard_id": dashboard.dashboard_id}
    for call in (
        mesh.drafts.GetDraft(pb.GetDraftRequest(**key), metadata=ann.metadata),
        mesh.drafts.GetDraftData(pb.GetDraftDataRequest(**key), metadata=ann.metadata),
        mesh.drafts.PublishDashboard(pb.PublishDashboardRequest(**key), metadata=ann.metadata),
        mesh.drafts.DiscardDraft(pb.DiscardDraftRequest(**key), metadata=ann.metadata),
    ):
        assert await refused(call) == (NOT_FOUND, "DRAFT_NOT_FOUND")
    old = pb.StartDraftRequest(**key, etag=dashboard.etag)
    draft = (await mesh.drafts.StartDraft(old, metadata=ann.metadata)).dashboard
    assert await refused(mesh.drafts.StartDraft(old, metadata=ann.metadata)) == (ABORTED, "ETAG_MISMATCH")
    assert await refused(mesh.drafts.StartDraft(pb.StartDraftRequest(**key), metadata=ann.metadata)) == (
        grpc.StatusCode.ALREADY_EXISTS,
        "DRAFT_EXISTS",
    )
    await update(mesh, ann, dashboard.dashboard_id, title="Newer")
    stale = pb.PublishDashboardRequest(**key, etag=draft.etag)
    assert await refused(mesh.drafts.PublishDashboard(stale, metadata=ann.metadata)) == (
        ABORTED,
        "ETAG_MISMATCH",
    )
    # Who has read what viewers see, writes over no draft.
    seen = await get(mesh, ann, dashboard.dashboard_id)
    assert await refused(update(mesh, ann, dashboard.dashboard_id, title="x", etag=seen.etag)) == (
        ABORTED,
        "ETAG_MISMATCH",
    )
    outcomes = await asyncio.gather(
        *(
            mesh.drafts.PublishDashboard(pb.PublishDashboardRequest(**key), metadata=ann.metadata)
            for _ in range(5)
        ),
        return_exceptions=True,
    )
    failures = [each for each in outcomes if isinstance(each, grpc.aio.AioRpcError)]
    assert [reason_of(failure) for failure in failures] == ["DRAFT_NOT_FOUND"] * 4


async def test_watchers_hear_of_a_draft_when_it_is_published(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    first = await mesh.widget(ann, dashboard)
    await start_draft(mesh, ann, dashboard.dashboard_id)
    call = mesh.dashboards.WatchDashboard(
        dashboard_service_pb2.WatchDashboardRequest(dashboard_id=dashboard.dashboard_id),
        metadata=ann.metadata,
    )
    snapshot = await call.read()
    assert [widget.widget_id for widget in snapshot.snapshot.widgets] == [first.widget_id]
    source_id = new_id()
    second = await mesh.widget(ann, dashboard, Query(source_ids=[source_id]))
    # The next message would be that of the new widget, had its event led anybody to it.
    await mesh.tick(first.query.source_ids[0])
    mesh.analytics.count[first.query.source_ids[0]] += 1
    await mesh.tick(first.query.source_ids[0])
    news = await call.read()
    assert [widget.widget_id for widget in news.changes] == [first.widget_id]
    assert mesh.analytics.times_asked(source_id) == 0
    await publish(mesh, ann, dashboard.dashboard_id)
    news = await call.read()
    assert [widget.widget_id for widget in news.changes] == [second.widget_id]
    call.cancel()


async def test_of_two_editors_one_has_to_read_again_and_nothing_is_lost(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    bob = mesh.identity.member("editor", workspace_id=ann.workspace_id)
    dashboard = await mesh.dashboard(ann)
    dashboard_id = dashboard.dashboard_id
    refusals: list[str] = []

    async def add_tag(member: Member, tag: str) -> bool:
        seen: Dashboard = await get(mesh, member, dashboard_id)
        try:
            await update(mesh, member, dashboard_id, tags=[*seen.tags, tag], etag=seen.etag)
        except grpc.aio.AioRpcError as failure:
            refusals.append(reason_of(failure))
            return False
        return True

    async def add_tags(member: Member, prefix: str) -> None:
        for number in range(8):
            while not await add_tag(member, f"{prefix}{number}"):
                pass

    await asyncio.gather(add_tags(ann, "a"), add_tags(bob, "b"))
    wanted = {f"{prefix}{number}" for prefix in "ab" for number in range(8)}
    assert set((await get(mesh, ann, dashboard_id)).tags) == wanted
    assert set(refusals) == {"ETAG_MISMATCH"}, "the two were in each other's way"
