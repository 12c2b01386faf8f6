from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import grpc
import grpc.aio
from google.protobuf.json_format import MessageToDict
from meshboard.analytics.v1.insight_service_pb2 import EventSelector
from meshboard.analytics.v1.query_pb2 import Filter, Query
from meshboard.dashboard.v1 import version_service_pb2 as pb
from meshboard.dashboard.v1 import widget_service_pb2
from meshboard.dashboard.v1.dashboard_pb2 import AnnotationQuery, Dashboard, Layout, Variable, Widget
from sqlalchemy import func, select
from sqlalchemy import update as sql_update

from services.chassis import errors
from services.dashboard_svc import contents
from services.dashboard_svc.models import Version
from tests.dashboard_svc.boards import events, get, publish, start_draft, update, versions
from tests.dashboard_svc.conftest import Mesh
from tests.dashboard_svc.test_library_widgets import create, place
from tests.harness import Member, new_id, reason_of, refused

NOT_FOUND = grpc.StatusCode.NOT_FOUND


async def restore(
    mesh: Mesh, member: Member, dashboard_id: str, version_id: str, **more: Any
) -> pb.RestoreVersionResponse:
    request = pb.RestoreVersionRequest(dashboard_id=dashboard_id, version_id=version_id, **more)
    answer: pb.RestoreVersionResponse = await mesh.versions.RestoreVersion(request, metadata=member.metadata)
    return answer


async def diff(mesh: Mesh, member: Member, dashboard_id: str, **more: Any) -> list[tuple[str, Any, Any]]:
    request = pb.DiffVersionsRequest(dashboard_id=dashboard_id, **more)
    answer = await mesh.versions.DiffVersions(request, metadata=member.metadata)
    changes = [MessageToDict(change) for change in answer.changes]
    return [(change["path"], change.get("before"), change.get("after")) for change in changes]


async def delete_widget(mesh: Mesh, member: Member, widget: Widget) -> None:
    request = widget_service_pb2.DeleteWidgetRequest(
        dashboard_id=widget.dashboard_id, widget_id=widget.widget_id
    )
    await mesh.widgets.DeleteWidget(request, metadata=member.metadata)


async def widgets(mesh: Mesh, member: Member, dashboard: Dashboard) -> dict[str, Widget]:
    request = widget_service_pb2.ListWidgetsRequest(dashboard_id=dashboard.dashboard_id)
    found = await mesh.widgets.ListWidgets(request, metadata=member.metadata)
    return {widget.widget_id: widget for widget in found.widgets}


async def test_puts_changes_of_one_author_together(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    bob = mesh.identity.member("editor", workspace_id=ann.workspace_id)
    dashboard_id = (await mesh.dashboard(ann, "1")).dashboard_id
    await update(mesh, ann, dashboard_id, title="2")
    last = await update(mesh, ann, dashboard_id, title="3")
    (one,) = await versions(mesh, ann, dashboard_id)
    assert (one.version_id, one.author_id, one.reason) == (last.etag, ann.user_id, "")
    assert one.create_time == last.update_time
    told = await update(mesh, ann, dashboard_id, title="4", reason="The boss wants it")
    await update(mesh, ann, dashboard_id, title="5")
    await update(mesh, bob, dashboard_id, title="6")
    await update(mesh, ann, dashboard_id, title="7")
    found = await versions(mesh, ann, dashboard_id)
    assert [(each.author_id, each.reason) for each in found] == [
        (ann.user_id, ""),
        (bob.user_id, ""),
        (ann.user_id, ""),
        (ann.user_id, "The boss wants it"),
        (ann.user_id, ""),
    ]
    assert found[3].version_id == told.etag
    titles = []
    for each in found:
        request = pb.GetVersionRequest(dashboard_id=dashboard_id, version_id=each.version_id)
        got = await mesh.versions.GetVersion(request, metadata=ann.metadata)
        assert got.version == each
        titles.append(got.content.title)
    assert titles == ["7", "6", "5", "4", "3"]


async def test_a_reason_is_given_to_what_was_changed_before(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard_id = (await mesh.dashboard(ann, "Old")).dashboard_id
    await start_draft(mesh, ann, dashboard_id)
    await update(mesh, ann, dashboard_id, title="New")
    published = await publish(mesh, ann, dashboard_id, "It is new")
    newest, oldest = await versions(mesh, ann, dashboard_id)
    assert (newest.version_id, newest.reason, oldest.reason) == (published.etag, "It is new", "")


async def test_what_changes_nothing_is_no_version(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    bob = mesh.identity.member("editor", workspace_id=ann.workspace_id)
    dashboard_id = (await mesh.dashboard(ann, "Old")).dashboard_id
    named = await update(mesh, ann, dashboard_id, title="New", reason="new")
    await update(mesh, bob, dashboard_id, title="New")
    await start_draft(mesh, bob, dashboard_id)
    await publish(mesh, bob, dashboard_id)
    newest, _ = await versions(mesh, ann, dashboard_id)
    assert (newest.version_id, newest.author_id) == (named.etag, ann.user_id)
    assert await diff(mesh, ann, dashboard_id) == [("title", "Old", "New")]


async def test_ten_minutes_after_the_first_change_a_version_is_full(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard_id = (await mesh.dashboard(ann)).dashboard_id
    for minutes, count in ((9, 1), (11, 2)):
        async with mesh.db.begin() as session:
            await session.execute(
                sql_update(Version)
                .where(Version.dashboard_id == dashboard_id)
                .values(begin_time=func.now() - timedelta(minutes=minutes))
            )
        await update(mesh, ann, dashboard_id, title=f"{minutes}")
        assert len(await versions(mesh, ann, dashboard_id)) == count


async def test_keeps_the_newest_and_what_viewers_see(mesh: Mesh, monkeypatch: Any) -> None:
    monkeypatch.setattr(contents, "MAX_VERSIONS", 3)
    ann = mesh.identity.member("editor")
    dashboard_id = (await mesh.dashboard(ann)).dashboard_id
    await start_draft(mesh, ann, dashboard_id)
    for number in range(6):
        await update(mesh, ann, dashboard_id, title=f"{number}", reason=f"{number}")
    found = await versions(mesh, ann, dashboard_id)
    assert [each.reason for each in found] == ["5", "4", "3", ""]
    assert [each.published for each in found] == [False, False, False, True]
    assert found[-1].version_id == (await get(mesh, ann, dashboard_id)).etag


async def test_changes_of_widgets_make_versions(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    await update(mesh, ann, dashboard.dashboard_id, title="Shop", reason="begin")
    widget = await mesh.widget(ann, dashboard, title="Orders")
    (newest, *_) = await versions(mesh, ann, dashboard.dashboard_id)
    request = pb.GetVersionRequest(dashboard_id=dashboard.dashboard_id, version_id=newest.version_id)
    content = (await mesh.versions.GetVersion(request, metadata=ann.metadata)).content
    assert newest.version_id == (await get(mesh, ann, dashboard.dashboard_id)).etag
    (kept,) = content.widgets
    assert kept == Widget(
        widget_id=widget.widget_id,
        title="Orders",
        kind=widget.kind,
        query=widget.query,
        layout=widget.layout,
    )


async def test_says_what_differs(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann, "Shop")
    dashboard_id = dashboard.dashboard_id
    source_id = new_id()
    stays = await mesh.widget(ann, dashboard, Query(source_ids=[source_id]), title="A")
    goes = await mesh.widget(ann, dashboard, title="B")
    first = await update(mesh, ann, dashboard_id, tags=["x"], reason="first")
    await mesh.widgets.UpdateWidget(
        widget_service_pb2.UpdateWidgetRequest(
            widget=Widget(
                dashboard_id=dashboard_id,
                widget_id=stays.widget_id,
                query=Query(source_ids=[source_id], limit=7),
            )
        ),
        metadata=ann.metadata,
    )
    await delete_widget(mesh, ann, goes)
    comes = await mesh.widget(ann, dashboard, title="C", layout=Layout(x=12, y=0, width=4, height=4))
    second = await update(mesh, ann, dashboard_id, title="Shop 2", tags=["x", "y"], reason="second")
    expected = [
        ("title", "Shop", "Shop 2"),
        ("tags", ["x"], ["x", "y"]),
        (f"widgets[{comes.widget_id}]", None, MessageToDict(_content(comes))),
        (f"widgets[{stays.widget_id}].query.limit", None, 7),
        (f"widgets[{goes.widget_id}]", MessageToDict(_content(goes)), None),
    ]
    ends = {"from_version_id": first.etag, "to_version_id": second.etag}
    changes = await diff(mesh, ann, dashboard_id, **ends)
    # Where they stand on the grid says in which order they come.
    assert sorted(changes) == sorted(expected, key=lambda change: change[0])
    assert changes == await diff(mesh, ann, dashboard_id, **ends)
    back = await diff(mesh, ann, dashboard_id, from_version_id=second.etag, to_version_id=first.etag)
    assert sorted((path, after, before) for path, before, after in back) == sorted(changes)
    assert await diff(mesh, ann, dashboard_id, from_version_id=first.etag) == changes
    assert await diff(mesh, ann, dashboard_id, from_version_id=second.etag) == []
    assert ("title", "Shop", "Shop 2") in await diff(mesh, ann, dashboard_id)
    assert await diff(mesh, ann, dashboard_id, to_version_id=first.etag) == [("tags", None, ["x"])]
    oldest = (await versions(mesh, ann, dashboard_id))[-1]
    all_of_it = await diff(mesh, ann, dashboard_id, to_version_id=oldest.version_id)
    assert all_of_it[0] == ("title", None, "Shop")


def _content(widget: Widget) -> Widget:
    return Widget(
        widget_id=widget.widget_id,
        title=widget.title,
        kind=widget.kind,
        query=widget.query,
        layout=widget.layout,
    )


async def test_restores_all_of_it(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann, "Shop")
    dashboard_id = dashboard.dashboard_id
    kept, gone = await mesh.widget(ann, dashboard), await mesh.widget(ann, dashboard, title="Gone")
    old = await update(mesh, ann, dashboard_id, tags=["x"], description="Told", reason="good")
    await delete_widget(mesh, ann, gone)
    added = await mesh.widget(ann, dashboard)
    new = await update(mesh, ann, dashboard_id, title="Worse", tags=[], description="")
    assert await refused(restore(mesh, ann, dashboard_id, old.etag, etag=old.etag)) == (
        grpc.StatusCode.ABORTED,
        "ETAG_MISMATCH",
    )
    answer = await restore(mesh, ann, dashboard_id, old.etag, etag=new.etag, reason="It was better")
    restored = answer.dashboard
    assert restored == await get(mesh, ann, dashboard_id)
    assert (restored.title, list(restored.tags), restored.description) == ("Shop", ["x"], "Told")
    there = await widgets(mesh, ann, dashboard)
    assert there.keys() == {kept.widget_id, gone.widget_id}
    assert (there[gone.widget_id].title, there[gone.widget_id].query) == ("Gone", gone.query)
    assert there[kept.widget_id].etag == kept.etag
    assert added.widget_id not in there
    newest, *_ = await versions(mesh, ann, dashboard_id)
    assert (newest.version_id, newest.reason, newest.restored_version_id) == (
        restored.etag,
        "It was better",
        old.etag,
    )
    assert (await events(mesh, ann))[-4:] == [
        "DashboardUpdated",
        "WidgetDeleted",
        "WidgetCreated",
        "VersionRestored",
    ]
    # What is there already is not made again.
    again = await restore(mesh, ann, dashboard_id, newest.version_id)
    assert again.dashboard.etag == restored.etag


async def test_restores_into_the_draft(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard_id = (await mesh.dashboard(ann, "Old")).dashboard_id
    old = await update(mesh, ann, dashboard_id, description="Old", reason="old")
    await update(mesh, ann, dashboard_id, title="New", description="New")
    await start_draft(mesh, ann, dashboard_id)
    answer = await restore(mesh, ann, dashboard_id, old.etag)
    assert (answer.dashboard.title, answer.dashboard.has_draft) == ("Old", True)
    assert (await get(mesh, ann, dashboard_id)).title == "New"


async def test_a_widget_whose_source_is_gone_comes_back_with_its_error(mesh: Mesh) -> None:
    ann, source_id = mesh.identity.member("editor"), new_id()
    dashboard = await mesh.dashboard(ann)
    lost = await mesh.widget(ann, dashboard, Query(source_ids=[source_id]))
    sound = await mesh.widget(ann, dashboard)
    old = await update(mesh, ann, dashboard.dashboard_id, title="Both", reason="both")
    await delete_widget(mesh, ann, lost)
    await delete_widget(mesh, ann, sound)
    mesh.analytics.absent.add(source_id)
    mesh.analytics.hidden.add(source_id)
    mesh.analytics.refused = errors.not_found("SOURCE_NOT_FOUND", "There is no such source.")
    answer = await restore(mesh, ann, dashboard.dashboard_id, old.etag)
    (problem,) = answer.problems
    assert problem.widget_id == lost.widget_id
    assert errors.from_status(problem.error).reason == "SOURCE_NOT_FOUND"
    assert (await widgets(mesh, ann, dashboard)).keys() == {lost.widget_id, sound.widget_id}


async def test_variables_and_annotation_queries_whose_source_is_gone_are_told_too(mesh: Mesh) -> None:
    ann, source_id = mesh.identity.member("editor"), new_id()
    dashboard = await mesh.dashboard(ann)
    values = Variable.PropertyValues(source_id=source_id, property="host")
    marks = AnnotationQuery(title="Releases", source_id=source_id, selector=EventSelector(event="release"))
    await update(
        mesh,
        ann,
        dashboard.dashboard_id,
        variables=[
            Variable(name="host", property_values=values),
            Variable(name="free", text=Variable.FreeText()),
        ],
        annotation_queries=[marks],
    )
    old = await update(mesh, ann, dashboard.dashboard_id, title="Both", reason="both")
    await update(mesh, ann, dashboard.dashboard_id, variables=[], annotation_queries=[])
    mesh.analytics.absent.add(source_id)
    mesh.analytics.hidden.add(source_id)
    mesh.analytics.refused = errors.not_found("SOURCE_NOT_FOUND", "There is no such source.")
    answer = await restore(mesh, ann, dashboard.dashboard_id, old.etag)
    told = [(each.widget_id, each.variable, each.annotation_query) for each in answer.problems]
    assert told == [("", "host", ""), ("", "", "Releases")]
    assert {errors.from_status(each.error).reason for each in answer.problems} == {"SOURCE_NOT_FOUND"}
    assert [variable.name for variable in answer.dashboard.variables] == ["host", "free"]


async def test_a_cohort_that_the_caller_may_not_see_does_not_come_back(mesh: Mesh) -> None:
    ann, cohort_id = mesh.identity.member("editor"), new_id()
    dashboard = await mesh.dashboard(ann)
    query = Query(source_ids=[new_id()], filters=[Filter(cohort_id=cohort_id)])
    widget = await mesh.widget(ann, dashboard, query)
    old = await update(mesh, ann, dashboard.dashboard_id, title="Old", reason="old")
    mesh.analytics.hidden.add(cohort_id)
    mesh.analytics.refused = errors.not_found("COHORT_NOT_FOUND", "There is no such cohort.")
    await restore(mesh, ann, dashboard.dashboard_id, old.etag)  # it is there
    await delete_widget(mesh, ann, widget)
    call = restore(mesh, ann, dashboard.dashboard_id, old.etag)
    assert await refused(call) == (grpc.StatusCode.NOT_FOUND, "COHORT_NOT_FOUND")
    assert not await widgets(mesh, ann, dashboard)
    # One that is gone is the widget's problem.
    mesh.analytics.problem = mesh.analytics.refused
    answer = await restore(mesh, ann, dashboard.dashboard_id, old.etag)
    assert [problem.widget_id for problem in answer.problems] == [widget.widget_id]


async def test_a_problem_with_one_says_nothing_of_its_namesake(mesh: Mesh) -> None:
    ann, gone, cohort_id = mesh.identity.member("editor"), new_id(), new_id()
    dashboard = await mesh.dashboard(ann)
    selector = EventSelector(event="release", filters=[Filter(cohort_id=cohort_id)])
    marks = [
        AnnotationQuery(title="Releases", source_id=gone, selector=EventSelector(event="release")),
        AnnotationQuery(title="Releases", source_id=new_id(), selector=selector),
    ]
    await update(mesh, ann, dashboard.dashboard_id, annotation_queries=marks)
    old = await update(mesh, ann, dashboard.dashboard_id, title="Both", reason="both")
    await update(mesh, ann, dashboard.dashboard_id, annotation_queries=[])
    mesh.analytics.absent.add(gone)
    mesh.analytics.hidden.add(cohort_id)
    mesh.analytics.refused = errors.not_found("COHORT_NOT_FOUND", "There is no such cohort.")
    call = restore(mesh, ann, dashboard.dashboard_id, old.etag)
    assert await refused(call) == (grpc.StatusCode.NOT_FOUND, "COHORT_NOT_FOUND")


async def test_a_source_that_the_caller_may_not_query_does_not_come_back(mesh: Mesh) -> None:
    ann, source_id = mesh.identity.member("editor"), new_id()
    dashboard = await mesh.dashboard(ann, "Old")
    hidden = await mesh.widget(ann, dashboard, Query(source_ids=[source_id]))
    old = await update(mesh, ann, dashboard.dashboard_id, description="x", reason="old")
    await update(mesh, ann, dashboard.dashboard_id, title="New")
    mesh.analytics.hidden.add(source_id)
    mesh.analytics.refused = errors.permission_denied("PERMISSION_MISSING", "No.")
    # It is there now too, and asks the same: nobody sees more than before.
    answer = await restore(mesh, ann, dashboard.dashboard_id, old.etag)
    assert (answer.dashboard.title, list(answer.problems)) == ("Old", [])
    await delete_widget(mesh, ann, hidden)
    before = await get(mesh, ann, dashboard.dashboard_id)
    assert await refused(restore(mesh, ann, dashboard.dashboard_id, old.etag)) == (
        grpc.StatusCode.PERMISSION_DENIED,
        "PERMISSION_MISSING",
    )
    assert await get(mesh, ann, dashboard.dashboard_id) == before


async def test_a_library_widget_does_not_come_back_with_a_source_that_the_caller_may_not_query(
    mesh: Mesh,
) -> None:
    ann, source_id = mesh.identity.member("editor"), new_id()
    dashboard = await mesh.dashboard(ann, "Old")
    shared = await create(mesh, ann, query=Query(source_ids=[source_id]))
    placed = await place(mesh, ann, dashboard, shared.library_widget_id)
    old = await update(mesh, ann, dashboard.dashboard_id, description="x", reason="old")
    await delete_widget(mesh, ann, placed)
    mesh.analytics.hidden.add(source_id)
    mesh.analytics.refused = errors.permission_denied("PERMISSION_MISSING", "No.")
    call = restore(mesh, ann, dashboard.dashboard_id, old.etag)
    assert await refused(call) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")
    assert await widgets(mesh, ann, dashboard) == {}


async def test_what_was_changed_meanwhile_is_not_restored_over(mesh: Mesh) -> None:
    ann, source_id = mesh.identity.member("editor"), new_id()
    dashboard = await mesh.dashboard(ann, "Old")
    widget = await mesh.widget(ann, dashboard, Query(source_ids=[source_id]))
    old = await update(mesh, ann, dashboard.dashboard_id, description="x", reason="old")
    await delete_widget(mesh, ann, widget)

    async def change() -> None:
        mesh.analytics.meanwhile = None
        await update(mesh, ann, dashboard.dashboard_id, title="New")

    mesh.analytics.meanwhile = change
    call = restore(mesh, ann, dashboard.dashboard_id, old.etag)
    assert await refused(call) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    assert (await get(mesh, ann, dashboard.dashboard_id)).title == "New"


async def test_of_concurrent_restores_with_one_etag_one_wins(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard_id = (await mesh.dashboard(ann, "Old")).dashboard_id
    old = await update(mesh, ann, dashboard_id, description="x", reason="old")
    new = await update(mesh, ann, dashboard_id, title="New")
    outcomes = await asyncio.gather(
        *(restore(mesh, ann, dashboard_id, old.etag, etag=new.etag) for _ in range(4)),
        return_exceptions=True,
    )
    failures = [each for each in outcomes if isinstance(each, grpc.aio.AioRpcError)]
    assert [reason_of(failure) for failure in failures] == ["ETAG_MISMATCH"] * 3


async def test_a_version_is_its_dashboards(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    one, two = await mesh.dashboard(ann), await mesh.dashboard(ann)
    there = await update(mesh, ann, one.dashboard_id, title="x", reason="x")
    for call in (
        restore(mesh, ann, two.dashboard_id, there.etag),
        mesh.versions.GetVersion(
            pb.GetVersionRequest(dashboard_id=two.dashboard_id, version_id=there.etag), metadata=ann.metadata
        ),
        diff(mesh, ann, two.dashboard_id, from_version_id=there.etag),
        diff(mesh, ann, two.dashboard_id, to_version_id="999999999999999999"),
    ):
        assert await refused(call) == (NOT_FOUND, "VERSION_NOT_FOUND")
    for version_id in ("0", "-1", "x", "1" * 19):
        assert await refused(restore(mesh, ann, two.dashboard_id, version_id)) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "VALIDATION_FAILED",
        )


async def test_a_dashboard_holds_so_much(mesh: Mesh, monkeypatch: Any) -> None:
    monkeypatch.setattr(contents, "MAX_CONTENT_BYTES", 1000)
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    assert await refused(update(mesh, ann, dashboard.dashboard_id, description="x" * 1000)) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "DASHBOARD_TOO_LARGE",
    )
    assert (await get(mesh, ann, dashboard.dashboard_id)).etag == dashboard.etag
    async with mesh.db() as session:
        kept = select(func.count()).where(Version.dashboard_id == dashboard.dashboard_id)
        assert await session.scalar(kept) == 1
