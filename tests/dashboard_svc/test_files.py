"""Dashboards as files: given out, applied, merged, refused."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.json_format import MessageToDict, ParseDict
from meshboard.analytics.v1.query_pb2 import Query
from meshboard.dashboard.v1.dashboard_pb2 import Dashboard, DashboardContent, Widget
from meshboard.dashboard.v1.dashboard_service_pb2 import (
    CreateDashboardGrantRequest,
    DeleteDashboardRequest,
    MoveDashboardRequest,
    UpdateDashboardRequest,
)
from meshboard.dashboard.v1.draft_service_pb2 import StartDraftRequest
from meshboard.dashboard.v1.file_service_pb2 import (
    ApplyDashboardRequest,
    ApplyDashboardResponse,
    DashboardFile,
    ExportDashboardRequest,
)
from meshboard.dashboard.v1.library_pb2 import LibraryWidget
from meshboard.dashboard.v1.library_service_pb2 import CreateLibraryWidgetRequest
from meshboard.dashboard.v1.version_service_pb2 import ListVersionsRequest
from meshboard.dashboard.v1.widget_service_pb2 import ListWidgetsRequest, UpdateWidgetRequest
from meshboard.user.v1.grant_pb2 import Grant, Subject
from sqlalchemy import text

from services.chassis import errors
from tests.dashboard_svc.boards import events, get
from tests.dashboard_svc.conftest import Mesh
from tests.harness import Member, new_id, outcome, reason_of, refused, status_of

SOURCE = new_id()


def a_file(name: str = "shop", **more: Any) -> DashboardFile:
    """A file of a dashboard with two widgets; `more` are fields of its content."""
    content = {
        "title": "Shop",
        "variables": [{"name": "host", "text": {}}],
        "widgets": [a_widget("orders"), a_widget("visitors")],
        **more,
    }
    return DashboardFile(name=name, content=ParseDict(content, DashboardContent()))


def a_widget(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "title": name.title(), "kind": "TABLE", "query": {"sourceIds": [SOURCE]}, **more}


async def apply(mesh: Mesh, member: Member, file: DashboardFile, **more: Any) -> ApplyDashboardResponse:
    request = ApplyDashboardRequest(file=file, **more)
    response: ApplyDashboardResponse = await mesh.files.ApplyDashboard(request, metadata=member.metadata)
    return response


async def export(mesh: Mesh, member: Member, dashboard_id: str) -> DashboardFile:
    request = ExportDashboardRequest(dashboard_id=dashboard_id)
    file: DashboardFile = (await mesh.files.ExportDashboard(request, metadata=member.metadata)).file
    return file


async def version_ids(mesh: Mesh, member: Member, dashboard_id: str) -> list[str]:
    request = ListVersionsRequest(dashboard_id=dashboard_id)
    response = await mesh.versions.ListVersions(request, metadata=member.metadata)
    return [version.version_id for version in response.versions]


async def test_creates_then_changes_then_nothing(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    created = await apply(mesh, ann, a_file())
    dashboard_id = created.dashboard.dashboard_id
    assert created.outcome == ApplyDashboardResponse.CREATED
    assert created.dashboard.name == "shop"
    before = await version_ids(mesh, ann, dashboard_id)

    again = await apply(mesh, ann, a_file())
    assert again.outcome == ApplyDashboardResponse.UNCHANGED
    assert not again.changes
    assert again.dashboard == created.dashboard
    assert await version_ids(mesh, ann, dashboard_id) == before

    changed = await apply(mesh, ann, a_file(title="Store", widgets=[a_widget("orders", title="Sales")]))
    assert changed.outcome == ApplyDashboardResponse.CHANGED
    assert [change.path for change in changed.changes] == [
        "title",
        "widgets[orders].title",
        "widgets[visitors]",
    ]
    assert (await export(mesh, ann, dashboard_id)).content.title == "Store"


async def test_a_dry_run_leaves_no_trace(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    planned = await apply(mesh, ann, a_file("plan"), dry_run=True)
    assert planned.outcome == ApplyDashboardResponse.CREATED
    assert [change.path for change in planned.changes][:2] == ["title", "variables[host]"]
    assert not planned.HasField("dashboard")

    created = await apply(mesh, ann, a_file("plan"))
    dashboard_id = created.dashboard.dashboard_id
    assert created.outcome == ApplyDashboardResponse.CREATED
    before = await everything(mesh, ann.workspace_id)
    planned = await apply(mesh, ann, a_file("plan", title="Store"), dry_run=True)
    assert planned.outcome == ApplyDashboardResponse.CHANGED
    assert [change.path for change in planned.changes] == ["title"]
    assert planned.dashboard.title == "Shop"
    assert await everything(mesh, ann.workspace_id) == before
    # What was planned is not taken for what was applied.
    assert (await apply(mesh, ann, a_file("plan", title="Store"))).outcome == ApplyDashboardResponse.CHANGED
    assert (await export(mesh, ann, dashboard_id)).content.title == "Store"


async def test_the_same_file_twice_writes_nothing(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    await apply(mesh, ann, a_file())
    before = await everything(mesh, ann.workspace_id)
    assert (await apply(mesh, ann, a_file())).outcome == ApplyDashboardResponse.UNCHANGED
    assert (await apply(mesh, ann, a_file(), force=True)).outcome == ApplyDashboardResponse.UNCHANGED
    assert await everything(mesh, ann.workspace_id) == before


async def test_moves_to_another_workspace_and_back(mesh: Mesh) -> None:
    ann, bob = mesh.identity.member("editor"), mesh.identity.member("editor")
    file = a_file(
        "round",
        description="Several\nlines",
        tags=["a", "b"],
        settings={"timeRange": {"lastSeconds": 3600}, "timeZone": "Europe/Berlin"},
        annotationQueries=[{"title": "Releases", "sourceId": SOURCE, "selector": {"event": "release"}}],
    )
    created = await apply(mesh, ann, file)
    given = await export(mesh, ann, created.dashboard.dashboard_id)
    assert not any(widget.widget_id for widget in given.content.widgets)
    moved = await apply(mesh, bob, given)
    assert moved.outcome == ApplyDashboardResponse.CREATED
    there = await export(mesh, bob, moved.dashboard.dashboard_id)
    # What it was made of is something else there.
    assert there.base_version != given.base_version
    there.base_version = given.base_version
    assert there == given
    assert (await apply(mesh, ann, given)).outcome == ApplyDashboardResponse.UNCHANGED


async def test_what_people_have_made_can_be_given_out_and_applied(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann, "Überblick (7 d)")
    first = await mesh.widget(ann, dashboard, title="Top pages")
    second = await mesh.widget(ann, dashboard, title="Top pages")
    request = ExportDashboardRequest(dashboard_id=dashboard.dashboard_id)
    exported = await mesh.files.ExportDashboard(request, metadata=ann.metadata)
    assert not exported.named
    assert exported.file.name == "uberblick-7-d"
    assert [widget.name for widget in exported.file.content.widgets] == ["top-pages", "top-pages-2"]

    await rename(mesh, ann, dashboard.dashboard_id, name=exported.file.name)
    applied = await apply(mesh, ann, exported.file)
    assert [change.path for change in applied.changes] == [
        "widgets[top-pages].name",
        "widgets[top-pages-2].name",
    ]
    assert await widget_ids(mesh, ann, dashboard.dashboard_id) == [first.widget_id, second.widget_id]
    assert (await apply(mesh, ann, exported.file)).outcome == ApplyDashboardResponse.UNCHANGED


async def test_what_people_have_changed_since_stays(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    created = await apply(mesh, ann, a_file())
    dashboard_id = created.dashboard.dashboard_id
    orders, _ = await widget_ids(mesh, ann, dashboard_id)
    await rename_widget(mesh, ann, dashboard_id, orders, "Sales")
    added = await mesh.widget(ann, created.dashboard, title="Of people")

    assert (await apply(mesh, ann, a_file())).outcome == ApplyDashboardResponse.UNCHANGED
    new = a_file(title="Store", widgets=[a_widget("orders"), a_widget("visitors"), a_widget("carts")])
    applied = await apply(mesh, ann, new)
    assert [change.path for change in applied.changes] == ["title", "widgets[carts]"]
    titles = [widget.title for widget in (await export(mesh, ann, dashboard_id)).content.widgets]
    # What the file leaves open goes below what people have added.
    assert titles == ["Sales", "Visitors", "Of people", "Carts"]
    assert added.widget_id in await widget_ids(mesh, ann, dashboard_id)


async def test_a_conflict_changes_nothing_unless_forced(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard_id = (await apply(mesh, ann, a_file())).dashboard.dashboard_id
    orders, _ = await widget_ids(mesh, ann, dashboard_id)
    await rename_widget(mesh, ann, dashboard_id, orders, "Sales")
    before = await everything(mesh, ann.workspace_id)
    new = a_file(title="Store", widgets=[a_widget("orders", title="Revenue"), a_widget("visitors")])

    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await apply(mesh, ann, new)
    assert reason_of(failure.value) == "FILE_CONFLICT"
    assert failure.value.code() == grpc.StatusCode.ABORTED
    assert "widgets[orders].title" in str(status_of(failure.value))
    planned = await apply(mesh, ann, new, dry_run=True)
    assert planned.outcome == ApplyDashboardResponse.REFUSED
    assert [MessageToDict(conflict) for conflict in planned.conflicts] == [
        {"path": "widgets[orders].title", "before": "Sales", "after": "Revenue"}
    ]
    assert await everything(mesh, ann.workspace_id) == before

    forced = await apply(mesh, ann, new, force=True)
    assert forced.outcome == ApplyDashboardResponse.CHANGED
    assert [conflict.path for conflict in forced.conflicts] == ["widgets[orders].title"]
    assert (await apply(mesh, ann, new)).outcome == ApplyDashboardResponse.UNCHANGED


async def test_a_file_that_was_given_out_is_compared_with_what_it_said_then(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann, "Shop")
    ids = [(await mesh.widget(ann, dashboard, title=title)).widget_id for title in ("Orders", "Visitors")]
    await rename(mesh, ann, dashboard.dashboard_id, name="shop")
    file = await export(mesh, ann, dashboard.dashboard_id)
    # The same author, at once: the version that was given out must not become this one.
    await rename_widget(mesh, ann, dashboard.dashboard_id, ids[0], "Sales")
    file.content.title = "Store"
    del file.content.widgets[1]

    applied = await apply(mesh, ann, file)
    assert [change.path for change in applied.changes] == [
        "title",
        "widgets[orders].name",
        f"widgets[{ids[1]}]",
    ]
    there = await export(mesh, ann, dashboard.dashboard_id)
    assert (there.content.title, [widget.title for widget in there.content.widgets]) == ("Store", ["Sales"])
    assert await widget_ids(mesh, ann, dashboard.dashboard_id) == ids[:1]
    before = await everything(mesh, ann.workspace_id)
    assert (await apply(mesh, ann, file)).outcome == ApplyDashboardResponse.UNCHANGED
    assert await everything(mesh, ann.workspace_id) == before


async def test_what_both_have_changed_since_it_was_given_out_is_a_conflict(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann, "Shop")
    await rename(mesh, ann, dashboard.dashboard_id, name="shop")
    file = await export(mesh, ann, dashboard.dashboard_id)
    await rename(mesh, ann, dashboard.dashboard_id, title="Here", description="Here")
    file.content.title = "There"
    planned = await apply(mesh, ann, file, dry_run=True)
    assert [conflict.path for conflict in planned.conflicts] == ["title"]
    assert (await refused(apply(mesh, ann, file)))[1] == "FILE_CONFLICT"
    forced = await apply(mesh, ann, file, force=True)
    assert (forced.dashboard.title, forced.dashboard.description) == ("There", "Here")


async def test_what_was_applied_later_counts_instead(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard_id = (await apply(mesh, ann, a_file())).dashboard.dashboard_id
    first = await export(mesh, ann, dashboard_id)
    first.content.title = "Second"
    await apply(mesh, ann, first)
    await rename(mesh, ann, dashboard_id, title="Of people")
    # Compared with what was given out, both would have changed the title.
    assert (await apply(mesh, ann, first)).outcome == ApplyDashboardResponse.UNCHANGED
    first.content.description = "Third"
    applied = await apply(mesh, ann, first)
    assert (applied.dashboard.title, applied.dashboard.description) == ("Of people", "Third")


async def test_an_older_file_does_not_take_back_what_a_newer_one_has_changed(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard_id = (await apply(mesh, ann, a_file())).dashboard.dashboard_id
    older = await export(mesh, ann, dashboard_id)
    await rename(mesh, ann, dashboard_id, tags=["later"])
    newer = await export(mesh, ann, dashboard_id)
    newer.content.title = "Newer"
    await apply(mesh, ann, newer)
    older.content.description = "Older"
    applied = await apply(mesh, ann, older)
    assert [change.path for change in applied.changes] == ["description"]
    # And the other way round.
    newer.content.widgets[0].title = "Of the newer"
    applied = await apply(mesh, ann, newer)
    assert [change.path for change in applied.changes] == ["widgets[orders].title"]
    assert (applied.dashboard.title, applied.dashboard.description) == ("Newer", "Older")


async def test_what_was_given_out_elsewhere_is_no_base(mesh: Mesh) -> None:
    ann, bob = mesh.identity.member("editor"), mesh.identity.member("editor")
    files = []
    for member in (ann, bob):
        dashboard = await mesh.dashboard(member, f"Of {member.user_id}")
        await rename(mesh, member, dashboard.dashboard_id, name="shop")
        files.append(await export(mesh, member, dashboard.dashboard_id))
    assert files[0].base_version.split("-")[0] == files[1].base_version.split("-")[0]
    assert (await refused(apply(mesh, bob, files[0])))[1] == "FILE_CONFLICT"
    files[0].base_version = "7"
    assert (await refused(apply(mesh, bob, files[0])))[1] == "VALIDATION_FAILED"


async def test_library_widgets_are_called_by_name(mesh: Mesh) -> None:
    ann, bob = mesh.identity.member("editor"), mesh.identity.member("editor")
    here = await library_widget(mesh, ann, "Top pages")
    file = a_file(widgets=[a_widget("orders"), {"name": "pages", "libraryWidgetName": "top-pages"}])
    created = await apply(mesh, ann, file)
    assert (await library_ids(mesh, ann, created.dashboard.dashboard_id))[1] == here.library_widget_id
    assert (await apply(mesh, ann, file)).outcome == ApplyDashboardResponse.UNCHANGED

    given = await export(mesh, ann, created.dashboard.dashboard_id)
    assert given.content.widgets[1].library_widget_name == "top-pages"
    assert here.library_widget_id not in str(given)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await apply(mesh, bob, given)
    assert reason_of(failure.value) == "LIBRARY_WIDGET_NOT_FOUND"
    assert "content.widgets[1].library_widget_name" in str(failure.value.details())

    there = await library_widget(mesh, bob, "Something else", name="top-pages")
    moved = await apply(mesh, bob, given)
    assert (await library_ids(mesh, bob, moved.dashboard.dashboard_id))[1] == there.library_widget_id
    given.content.widgets[1].library_widget_id = there.library_widget_id
    assert (await refused(apply(mesh, bob, given)))[1] == "VALIDATION_FAILED"


async def test_etag_has_to_be_the_current_one(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    mismatch = (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    assert await refused(apply(mesh, ann, a_file(), etag="1")) == mismatch
    created = await apply(mesh, ann, a_file())
    assert await refused(apply(mesh, ann, a_file(title="Store"), etag="no")) == mismatch
    changed = await apply(mesh, ann, a_file(title="Store"), etag=created.dashboard.etag)
    assert changed.dashboard.title == "Store"


async def test_of_two_at_once_one_prevails(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    outcomes = await asyncio.gather(
        *(outcome(apply(mesh, ann, a_file("race", title=f"Shop {n}"))) for n in range(4))
    )
    good = (grpc.StatusCode.OK, "")
    assert outcomes.count(good) >= 1
    refusals = {(grpc.StatusCode.ALREADY_EXISTS, "DASHBOARD_NAME_TAKEN")}
    refusals |= {(grpc.StatusCode.ABORTED, "ETAG_MISMATCH"), (grpc.StatusCode.ABORTED, "FILE_CONFLICT")}
    assert set(outcomes) - {good} <= refusals


async def test_a_draft_is_changed_out_of_sight(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard_id = (await apply(mesh, ann, a_file())).dashboard.dashboard_id
    await mesh.drafts.StartDraft(StartDraftRequest(dashboard_id=dashboard_id), metadata=ann.metadata)
    assert (await apply(mesh, ann, a_file(title="Secret"))).dashboard.title == "Secret"
    assert (await export(mesh, ann, dashboard_id)).content.title == "Shop"


async def test_what_is_in_the_bin_has_given_up_its_name(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    first = (await apply(mesh, ann, a_file())).dashboard.dashboard_id
    await mesh.dashboards.DeleteDashboard(DeleteDashboardRequest(dashboard_id=first), metadata=ann.metadata)
    assert await refused(export(mesh, ann, first)) == (grpc.StatusCode.NOT_FOUND, "DASHBOARD_NOT_FOUND")
    again = await apply(mesh, ann, a_file(title="Store"))
    assert again.outcome == ApplyDashboardResponse.CREATED
    assert again.dashboard.dashboard_id != first


# Who may


async def test_who_may_not_see_it_is_told_only_that_the_name_is_taken(mesh: Mesh) -> None:
    ann = mesh.identity.member("owner")
    bob = mesh.identity.member("editor", ann.workspace_id)
    guest = mesh.identity.member("viewer", ann.workspace_id)
    hidden = await apply(mesh, ann, a_file("hidden"))
    await deny_all(mesh, ann, hidden.dashboard.dashboard_id)
    taken = (grpc.StatusCode.ALREADY_EXISTS, "DASHBOARD_NAME_TAKEN")
    lacking = (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")
    for dry_run in (True, False):
        assert await refused(apply(mesh, bob, a_file("hidden"), dry_run=dry_run)) == taken
        # To who may not create dashboards it says the same of a name that is free.
        assert await refused(apply(mesh, guest, a_file("hidden"), dry_run=dry_run)) == lacking
        assert await refused(apply(mesh, guest, a_file("free"), dry_run=dry_run)) == lacking
    request = ExportDashboardRequest(dashboard_id=hidden.dashboard.dashboard_id)
    assert await refused(mesh.files.ExportDashboard(request, metadata=bob.metadata)) == (
        grpc.StatusCode.NOT_FOUND,
        "DASHBOARD_NOT_FOUND",
    )


async def test_who_may_see_it_needs_the_right_to_edit_it(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    guest = mesh.identity.member("viewer", ann.workspace_id)
    mesh.users.known.add(guest.user_id)
    created = await apply(mesh, ann, a_file())
    for dry_run in (True, False):
        assert await refused(apply(mesh, guest, a_file(title="Store"), dry_run=dry_run)) == (
            grpc.StatusCode.PERMISSION_DENIED,
            "PERMISSION_MISSING",
        )
    await grant(mesh, ann, created.dashboard.dashboard_id, guest, "editor")
    assert (await apply(mesh, guest, a_file(title="Store"))).outcome == ApplyDashboardResponse.CHANGED


async def test_a_token_needs_the_scope(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    await apply(mesh, ann, a_file())
    token = mesh.identity.token(sub=ann.user_id, wid=ann.workspace_id, scope="dashboards.list")
    request = ApplyDashboardRequest(file=a_file(title="Store"))
    call = mesh.files.ApplyDashboard(request, metadata=(("authorization", f"Bearer {token}"),))
    assert await refused(call) == (grpc.StatusCode.PERMISSION_DENIED, "SCOPE_MISSING")


async def test_goes_into_the_folder_of_its_path(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    web = await mesh.folder(ann, "Web", await mesh.folder(ann, "Teams"))
    file = a_file()
    file.folder.extend(["Teams", "Web"])
    created = await apply(mesh, ann, file)
    assert created.dashboard.folder_id == web.folder_id
    assert list((await export(mesh, ann, created.dashboard.dashboard_id)).folder) == ["Teams", "Web"]

    for path, reason in ((["Web"], "FOLDER_NOT_FOUND"), (["Teams", "App"], "FOLDER_NOT_FOUND")):
        other = a_file("other")
        other.folder.extend(path)
        assert (await refused(apply(mesh, ann, other)))[1] == reason
    await mesh.folder(ann, "Teams")
    other = a_file("other")
    other.folder.append("Teams")
    assert await refused(apply(mesh, ann, other)) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "FOLDER_AMBIGUOUS",
    )


async def test_moves_with_the_folder_that_the_file_names(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    folders = {title: await mesh.folder(ann, title) for title in ("Web", "App", "Ops")}
    file = a_file()
    file.folder.append("Web")
    dashboard_id = (await apply(mesh, ann, file)).dashboard.dashboard_id

    file.folder[:] = ["App"]
    planned = await apply(mesh, ann, file, dry_run=True)
    assert [MessageToDict(change) for change in planned.changes] == [
        {"path": "folder", "before": ["Web"], "after": ["App"]}
    ]
    assert planned.dashboard.folder_id == folders["Web"].folder_id
    applied = await apply(mesh, ann, file)
    assert applied.outcome == ApplyDashboardResponse.CHANGED
    assert applied.dashboard.folder_id == folders["App"].folder_id
    assert "DashboardMoved" in await events(mesh, ann)
    before = await everything(mesh, ann.workspace_id)
    assert (await apply(mesh, ann, file)).outcome == ApplyDashboardResponse.UNCHANGED
    assert await everything(mesh, ann.workspace_id) == before

    # People have moved it since: it stays, until the file says something new.
    await move(mesh, ann, dashboard_id, folders["Ops"].folder_id)
    assert (await apply(mesh, ann, file)).outcome == ApplyDashboardResponse.UNCHANGED
    file.folder[:] = ["Web"]
    planned = await apply(mesh, ann, file, dry_run=True)
    assert [conflict.path for conflict in planned.conflicts] == ["folder"]
    assert (await refused(apply(mesh, ann, file)))[1] == "FILE_CONFLICT"
    forced = await apply(mesh, ann, file, force=True)
    assert forced.dashboard.folder_id == folders["Web"].folder_id
    # A file that names none leaves it there.
    del file.folder[:]
    assert (await apply(mesh, ann, file)).dashboard.folder_id == folders["Web"].folder_id


async def test_what_was_given_out_moves_when_its_folder_is_edited(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    web, app = await mesh.folder(ann, "Web"), await mesh.folder(ann, "App")
    dashboard = await mesh.dashboard(ann, "Shop", web)
    await rename(mesh, ann, dashboard.dashboard_id, name="shop")
    file = await export(mesh, ann, dashboard.dashboard_id)
    assert (await apply(mesh, ann, file)).outcome == ApplyDashboardResponse.UNCHANGED
    file.folder[:] = ["App"]
    assert (await apply(mesh, ann, file)).dashboard.folder_id == app.folder_id


async def test_a_move_takes_what_moving_takes(mesh: Mesh) -> None:
    ann = mesh.identity.member("owner")
    bob = mesh.identity.member("viewer", ann.workspace_id)
    mesh.users.known.add(bob.user_id)
    for title in ("Web", "App"):
        await mesh.folder(ann, title)
    file = a_file()
    file.folder.append("Web")
    dashboard_id = (await apply(mesh, ann, file)).dashboard.dashboard_id
    lacking = (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")
    file.folder[:] = ["App"]
    for role in ("editor", "owner"):  # an editor may not grant; an owner of it still not create in the folder
        await grant(mesh, ann, dashboard_id, bob, role)
        for dry_run in (True, False):
            assert await refused(apply(mesh, bob, file, dry_run=dry_run)) == lacking
    before = (await get(mesh, ann, dashboard_id)).folder_id
    file.folder[:] = ["Web"]
    assert (await apply(mesh, bob, file)).dashboard.folder_id == before


async def test_what_is_newly_asked_takes_the_right_to_the_source(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    await apply(mesh, ann, a_file())
    mesh.analytics.refused = errors.not_found("SOURCE_NOT_FOUND", "There is no such source.")
    refusal = (grpc.StatusCode.NOT_FOUND, "SOURCE_NOT_FOUND")
    foreign = new_id()
    for file in (
        a_file("new", widgets=[a_widget("foreign", query={"sourceIds": [foreign]})]),
        a_file(widgets=[a_widget("orders", query={"sourceIds": [foreign]}), a_widget("visitors")]),
        a_file(annotationQueries=[{"title": "x", "sourceId": foreign, "selector": {"event": "x"}}]),
        a_file(variables=[{"name": "host", "propertyValues": {"sourceId": foreign, "property": "host"}}]),
    ):
        for dry_run in (True, False):
            assert await refused(apply(mesh, ann, file, dry_run=dry_run)) == refusal
    # What is asked already is not asked about again.
    assert (await apply(mesh, ann, a_file(title="Store"))).outcome == ApplyDashboardResponse.CHANGED


# Bad files


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no title": ({"title": ""}, "VALIDATION_FAILED"),
    "a kind without its query": ({"widgets": [{"name": "x", "kind": "FUNNEL"}]}, "VALIDATION_FAILED"),
    "no kind": ({"widgets": [{"name": "x"}]}, "VALIDATION_FAILED"),
    "a name that is none": ({"widgets": [a_widget("Not a name")]}, "VALIDATION_FAILED"),
    "no source": ({"widgets": [a_widget("x", query={})]}, "VALIDATION_FAILED"),
    "101 widgets": ({"widgets": [a_widget(f"w{n}") for n in range(101)]}, "VALIDATION_FAILED"),
    "a name twice": ({"widgets": [a_widget("x"), a_widget("x")]}, "WIDGET_NAME_TAKEN"),
    "on one place": (
        {"widgets": [a_widget("x", layout={"x": 0}), a_widget("y", layout={"x": 11})]},
        "LAYOUT_OVERLAP",
    ),
    "a query that is not for the kind": ({"widgets": [a_widget("x", kind="PIE")]}, "WIDGET_QUERY_UNFIT"),
    "a variable that is not there": (
        {
            "widgets": [
                a_widget(
                    "x",
                    query={"sourceIds": [SOURCE], "filters": [{"property": "path", "values": ["$none"]}]},
                )
            ]
        },
        "VARIABLE_UNKNOWN",
    ),
    "variables that look at each other": (
        {
            "variables": [
                {
                    "name": name,
                    "propertyValues": {
                        "sourceId": SOURCE,
                        "property": "host",
                        "filters": [{"property": "path", "values": [f"${other}"]}],
                    },
                }
                for name, other in (("a", "b"), ("b", "a"))
            ]
        },
        "VARIABLE_INVALID",
    ),
    "a variable twice": (
        {"variables": [{"name": "a", "text": {}}, {"name": "a", "text": {}}]},
        "VARIABLE_INVALID",
    ),
    "a library widget of elsewhere": (
        {"widgets": [{"name": "x", "libraryWidgetId": new_id()}]},
        "LIBRARY_WIDGET_NOT_FOUND",
    ),
    "huge": (
        {
            "widgets": [
                {"name": f"w{n}", "kind": "TEXT", "markdown": "ä" * 15_000, "layout": {"y": 8 * n}}
                for n in range(99)
            ]
        },
        "VALIDATION_FAILED",
    ),
}


@pytest.mark.parametrize("case", BAD)
async def test_a_bad_file_changes_nothing(mesh: Mesh, case: str) -> None:
    more, reason = BAD[case]
    ann = mesh.identity.member("editor")
    assert (await refused(apply(mesh, ann, a_file(**more))))[1] == reason
    await apply(mesh, ann, a_file())
    before = await everything(mesh, ann.workspace_id)
    for force in (False, True):
        assert (await refused(apply(mesh, ann, a_file(**more), force=force)))[1] == reason
    assert await everything(mesh, ann.workspace_id) == before


async def test_html_of_a_file_is_not_taken(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    text = {"name": "x", "kind": "TEXT", "markdown": "*hi*", "html": "<script>alert(1)</script>"}
    dashboard_id = (await apply(mesh, ann, a_file(widgets=[text]))).dashboard.dashboard_id
    request = ListWidgetsRequest(dashboard_id=dashboard_id)
    (shown,) = (await mesh.widgets.ListWidgets(request, metadata=ann.metadata)).widgets
    assert shown.html.strip() == "<p><em>hi</em></p>"


async def everything(mesh: Mesh, workspace_id: str) -> dict[str, list[Any]]:
    """All that the workspace has in the tables of dashboards."""
    found = {}
    async with mesh.db() as session:
        for table in ("dashboards", "widgets", "versions", "applied_files", "grants"):
            rows = await session.execute(
                text(f"SELECT t::text FROM {table} AS t WHERE workspace_id = :id ORDER BY 1"),
                {"id": workspace_id},
            )
            found[table] = list(rows.scalars())
    return found


async def library_widget(mesh: Mesh, member: Member, title: str, name: str = "") -> LibraryWidget:
    request = CreateLibraryWidgetRequest(
        title=title, name=name, kind=Widget.TABLE, query=Query(source_ids=[SOURCE])
    )
    response = await mesh.library.CreateLibraryWidget(request, metadata=member.metadata)
    made: LibraryWidget = response.library_widget
    return made


async def library_ids(mesh: Mesh, member: Member, dashboard_id: str) -> list[str]:
    request = ListWidgetsRequest(dashboard_id=dashboard_id)
    response = await mesh.widgets.ListWidgets(request, metadata=member.metadata)
    return [widget.library_widget_id for widget in response.widgets]


async def widget_ids(mesh: Mesh, member: Member, dashboard_id: str) -> list[str]:
    request = ListWidgetsRequest(dashboard_id=dashboard_id)
    response = await mesh.widgets.ListWidgets(request, metadata=member.metadata)
    return [widget.widget_id for widget in response.widgets]


async def rename(mesh: Mesh, member: Member, dashboard_id: str, **fields: Any) -> None:
    request = UpdateDashboardRequest(
        dashboard=Dashboard(dashboard_id=dashboard_id, **fields), update_mask=FieldMask(paths=list(fields))
    )
    await mesh.dashboards.UpdateDashboard(request, metadata=member.metadata)


async def rename_widget(mesh: Mesh, member: Member, dashboard_id: str, widget_id: str, title: str) -> None:
    widget = Widget(dashboard_id=dashboard_id, widget_id=widget_id, title=title)
    request = UpdateWidgetRequest(widget=widget, update_mask=FieldMask(paths=["title"]))
    await mesh.widgets.UpdateWidget(request, metadata=member.metadata)


async def move(mesh: Mesh, member: Member, dashboard_id: str, folder_id: str) -> None:
    request = MoveDashboardRequest(dashboard_id=dashboard_id, folder_id=folder_id)
    await mesh.dashboards.MoveDashboard(request, metadata=member.metadata)


async def grant(mesh: Mesh, member: Member, dashboard_id: str, to: Member, role: str) -> None:
    request = CreateDashboardGrantRequest(
        dashboard_id=dashboard_id, subject=Subject(user_id=to.user_id), role=role
    )
    await mesh.dashboards.CreateDashboardGrant(request, metadata=member.metadata)


async def deny_all(mesh: Mesh, member: Member, dashboard_id: str) -> None:
    request = CreateDashboardGrantRequest(
        dashboard_id=dashboard_id, subject=Subject(workspace=True), role="viewer", effect=Grant.DENY
    )
    await mesh.dashboards.CreateDashboardGrant(request, metadata=member.metadata)
