"""Searching dashboards, and all at once, with either engine."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import grpc
import pytest
from meshboard.dashboard.v1 import dashboard_service_pb2 as pb
from meshboard.dashboard.v1 import widget_service_pb2 as widget_pb
from meshboard.dashboard.v1.dashboard_pb2 import Dashboard, Widget
from meshboard.dashboard.v1.library_service_pb2 import CreateLibraryWidgetRequest, UpdateLibraryWidgetRequest
from meshboard.dashboard.v1.search_service_pb2 import SearchHit, SearchRequest
from meshboard.user.v1.grant_pb2 import Grant, Subject
from meshboard.user.v1.internal_user_service_pb2 import MemberHit
from meshboard.user.v1.user_pb2 import User
from sqlalchemy import update

from services.chassis import db as chassis_db
from services.chassis import errors
from services.chassis.db import GrantRow
from services.chassis.search import Document
from services.chassis.times import now
from services.dashboard_svc.dashboard_search import CORPUS
from tests.dashboard_svc import boards
from tests.dashboard_svc.conftest import Mesh
from tests.dashboard_svc.test_favourites import favourite
from tests.dashboard_svc.test_folders import folder_grant, move_dashboard
from tests.dashboard_svc.test_grants import grant
from tests.harness import Member, new_id, refused
from tests.parts import Parts
from tests.searching import Indexed, engine_settings
from tests.statements import statements_of_calls


@pytest.fixture(scope="session")
async def database_url(parts: Parts, search_engine: str) -> str:
    url = await parts.fresh_database("dashboard")
    await chassis_db.migrate(url, "services.dashboard_svc")
    return url


@pytest.fixture(scope="session")
def engine_of_searches(search_engine: str) -> dict[str, Any]:
    return engine_settings(search_engine)


@pytest.fixture
async def index(mesh: Mesh, database_url: str) -> AsyncIterator[Indexed]:
    index = Indexed(database_url, mesh.db, mesh.engine, CORPUS)
    async with index.indexing():
        yield index


async def titles(mesh: Mesh, member: Member, query: str) -> list[str]:
    answer = await mesh.dashboards.SearchDashboards(
        pb.SearchDashboardsRequest(query=query), metadata=member.metadata
    )
    return [dashboard.title for dashboard in answer.dashboards]


async def search(mesh: Mesh, member: Member, query: str) -> list[SearchHit]:
    answer = await mesh.searches.Search(SearchRequest(query=query), metadata=member.metadata)
    return list(answer.hits)


async def test_dashboards_are_found_by_title_description_and_widgets(mesh: Mesh, index: Indexed) -> None:
    editor = mesh.identity.member("editor")
    await mesh.dashboard(editor, "Weekly revenue")
    described = await mesh.dashboards.CreateDashboard(
        pb.CreateDashboardRequest(title="Board", description="What revenue is made of"),
        metadata=editor.metadata,
    )
    tiled = await mesh.dashboard(editor, "Overview")
    await mesh.widget(editor, tiled, title="Signups")
    await mesh.widget(editor, tiled, title="Revenue by plan")
    await index.settled()
    assert await titles(mesh, editor, "revenue") == ["Weekly revenue", "Overview", "Board"]
    assert await titles(mesh, editor, "revenu") == ["Weekly revenue", "Overview", "Board"]
    assert await titles(mesh, editor, "overview signups plan") == ["Overview"]
    assert await titles(mesh, editor, "revenue of board") == [described.dashboard.title]


async def test_what_texts_and_library_widgets_say_is_found(mesh: Mesh, index: Indexed) -> None:
    editor = mesh.identity.member("editor")
    dashboard, other = await mesh.dashboard(editor, "Shown"), await mesh.dashboard(editor, "Other")
    words = widget_pb.CreateWidgetRequest(dashboard_id=dashboard.dashboard_id, kind=Widget.TEXT)
    words.markdown = "# Runbook\n\nAsk the **captain** & <crew>"
    await mesh.widgets.CreateWidget(words, metadata=editor.metadata)
    library = CreateLibraryWidgetRequest(title="Vessels", kind=Widget.TEXT, markdown="of the *harbour*")
    made = (await mesh.library.CreateLibraryWidget(library, metadata=editor.metadata)).library_widget
    for each in (dashboard, other):
        placed = widget_pb.CreateWidgetRequest(
            dashboard_id=each.dashboard_id, library_widget_id=made.library_widget_id
        )
        await mesh.widgets.CreateWidget(placed, metadata=editor.metadata)
    await index.settled()
    assert await titles(mesh, editor, "captain") == ["Shown"]
    assert sorted(await titles(mesh, editor, "harbour vessels")) == ["Other", "Shown"]
    (hit,) = await search(mesh, editor, "crew runbook")
    assert [h.field for h in hit.highlights] == ["widget.text"]
    assert "captain & <crew>" in "".join(fragment.text for fragment in hit.highlights[0].fragments)
    made.title = "Ships"
    await mesh.library.UpdateLibraryWidget(
        UpdateLibraryWidgetRequest(library_widget=made), metadata=editor.metadata
    )
    await index.settled()
    assert await titles(mesh, editor, "vessels") == []
    assert sorted(await titles(mesh, editor, "ships")) == ["Other", "Shown"]


async def test_who_may_not_see_a_dashboard_does_not_find_it(mesh: Mesh, index: Indexed) -> None:
    admin = mesh.identity.member("admin")
    guest = mesh.identity.member("viewer", admin.workspace_id)
    shown, hidden = await mesh.dashboard(admin, "Plan A"), await mesh.dashboard(admin, "Plan B")
    await grant(mesh, admin, hidden, Subject(user_id=guest.user_id), "viewer", Grant.DENY)
    await index.settled()
    assert await titles(mesh, admin, "plan") == ["Plan B", "Plan A"]
    assert await titles(mesh, guest, "plan") == ["Plan A"]
    assert [hit.dashboard.dashboard_id for hit in await search(mesh, guest, "plan")] == [shown.dashboard_id]
    assert await titles(mesh, mesh.identity.member("admin"), "plan") == [], "nor does another workspace"


async def test_a_move_into_a_closed_folder_hides_a_dashboard(mesh: Mesh, index: Indexed) -> None:
    admin = mesh.identity.member("admin")
    guest = mesh.identity.member("viewer", admin.workspace_id)
    closed = await mesh.folder(admin, "Closed")
    await folder_grant(mesh, admin, closed, Subject(workspace=True), "viewer", Grant.DENY)
    await folder_grant(mesh, admin, closed, Subject(user_id=admin.user_id), "admin")
    dashboard = await mesh.dashboard(admin, "Wanderer")
    await index.settled()
    assert await titles(mesh, guest, "wanderer") == ["Wanderer"]
    await move_dashboard(mesh, admin, dashboard, closed)
    assert await titles(mesh, guest, "wanderer") == [], "at once"
    await index.settled()
    assert await titles(mesh, guest, "wanderer") == []
    assert await titles(mesh, admin, "wanderer") == ["Wanderer"]
    await move_dashboard(mesh, admin, dashboard, None)
    await index.settled()
    assert await titles(mesh, guest, "wanderer") == ["Wanderer"]


async def test_a_grant_that_has_expired_shows_nothing(mesh: Mesh, index: Indexed) -> None:
    admin = mesh.identity.member("admin")
    guest = mesh.identity.member("viewer", admin.workspace_id)
    dashboard = await mesh.dashboard(admin, "Passing")
    await grant(mesh, admin, dashboard, Subject(workspace=True), "viewer", Grant.DENY)
    await grant(mesh, admin, dashboard, Subject(user_id=guest.user_id))
    await index.settled()
    assert await titles(mesh, guest, "passing") == ["Passing"]
    async with mesh.db.begin() as session:
        await session.execute(
            update(GrantRow)
            .where(GrantRow.resource_id == dashboard.dashboard_id, GrantRow.subject_id == guest.user_id)
            .values(expire_time=now() - timedelta(seconds=1))
        )
    assert await titles(mesh, guest, "passing") == []


@pytest.mark.parametrize("seed", range(3))
async def test_the_pages_together_are_what_the_list_has(mesh: Mesh, index: Indexed, seed: int) -> None:
    chance = random.Random(seed)
    admin = mesh.identity.member("admin")
    team_id = new_id()
    guests = [
        mesh.identity.member("viewer", admin.workspace_id, [team_id]),
        mesh.identity.member("editor", admin.workspace_id),
    ]
    for guest in guests:
        key = (guest.user_id, guest.workspace_id)
        if chance.random() < 0.5:  # somebody who sees nothing but by grants
            rights = mesh.identity.rights[key]
            mesh.identity.rights[key] = replace(rights, permissions=rights.permissions - {"dashboards.view"})
    subjects = [Subject(workspace=True), Subject(team_id=team_id)]
    subjects += [Subject(user_id=guest.user_id) for guest in guests]
    outer = await mesh.folder(admin, "Outer")
    folders = [None, outer, await mesh.folder(admin, "Inner", outer), await mesh.folder(admin, "Apart")]
    for folder in filter(None, folders):
        for subject in chance.sample(subjects, chance.randint(0, 2)):
            await folder_grant(
                mesh, admin, folder, subject, "viewer", chance.choice([Grant.ALLOW, Grant.DENY])
            )
    for number in range(24):
        title = f"{chance.choice(['North', 'South'])} {number}"
        dashboard = await mesh.dashboard(admin, title, chance.choice(folders))
        for subject in chance.sample(subjects, chance.randint(0, 2)):
            effect = chance.choice([Grant.ALLOW, Grant.DENY])
            await grant(mesh, admin, dashboard, subject, "viewer", effect)
    await index.settled()
    for guest in guests:
        listed = await mesh.dashboards.ListDashboards(pb.ListDashboardsRequest(), metadata=guest.metadata)
        allowed = [d.dashboard_id for d in listed.dashboards if d.title.startswith("North")]
        request, found = pb.SearchDashboardsRequest(query="north", page_size=chance.randint(1, 5)), []
        while True:
            answer = await mesh.dashboards.SearchDashboards(request, metadata=guest.metadata)
            found += [dashboard.dashboard_id for dashboard in answer.dashboards]
            request.page_token = answer.next_page_token
            if not answer.next_page_token:
                break
            assert len(answer.dashboards) == request.page_size
        assert found == allowed, "equal hits stand as in the list"


async def test_a_dashboard_that_is_gone_is_not_shown_by_an_index_that_is_behind(
    mesh: Mesh, index: Indexed
) -> None:
    admin = mesh.identity.member("admin")
    stays, gone = await mesh.dashboard(admin, "Late one"), await mesh.dashboard(admin, "Late two")
    await mesh.dashboards.DeleteDashboard(
        pb.DeleteDashboardRequest(dashboard_id=gone.dashboard_id), metadata=admin.metadata
    )
    await index.settled()
    texts = {"title": "Late two", "widgets": "", "description": ""}
    await index.write(2**40, [Document(admin.workspace_id, gone.dashboard_id, texts)])
    try:
        assert f"{admin.workspace_id}/{gone.dashboard_id}" in await index.content()
        answer = await mesh.dashboards.SearchDashboards(
            pb.SearchDashboardsRequest(query="late", page_size=1), metadata=admin.metadata
        )
        assert [d.dashboard_id for d in answer.dashboards] == [stays.dashboard_id]
        assert not answer.next_page_token
    finally:
        await index.write(2**40 + 1, [], [(admin.workspace_id, gone.dashboard_id)])


async def test_every_write_reaches_the_index(mesh: Mesh, index: Indexed) -> None:
    async def follows() -> None:
        assert await index.content() == await index.expected()

    editor = mesh.identity.member("admin")
    dashboard = await mesh.dashboard(editor, "First title")
    await follows()
    await mesh.dashboards.UpdateDashboard(
        pb.UpdateDashboardRequest(
            dashboard=Dashboard(dashboard_id=dashboard.dashboard_id, title="Second", description="Words")
        ),
        metadata=editor.metadata,
    )
    await follows()
    widget = await mesh.widget(editor, dashboard, title="Tile")
    await follows()
    assert await titles(mesh, editor, "tile") == ["Second"]
    await mesh.widgets.UpdateWidget(
        widget_pb.UpdateWidgetRequest(
            widget=Widget(dashboard_id=dashboard.dashboard_id, widget_id=widget.widget_id, title="Other tile")
        ),
        metadata=editor.metadata,
    )
    await follows()
    await mesh.widgets.DeleteWidget(
        widget_pb.DeleteWidgetRequest(dashboard_id=dashboard.dashboard_id, widget_id=widget.widget_id),
        metadata=editor.metadata,
    )
    await follows()
    assert await titles(mesh, editor, "tile") == []
    await mesh.dashboards.DeleteDashboard(
        pb.DeleteDashboardRequest(dashboard_id=dashboard.dashboard_id), metadata=editor.metadata
    )
    await follows()
    assert f"{editor.workspace_id}/{dashboard.dashboard_id}" not in await index.content()


@pytest.mark.parametrize("method", ["SearchDashboards", "Search"])
@pytest.mark.parametrize(
    ("query", "reason"),
    [("", "VALIDATION_FAILED"), ("x" * 201, "VALIDATION_FAILED"), ("%*?", "SEARCH_QUERY_INVALID")],
)
async def test_a_query_that_asks_nothing_is_refused(mesh: Mesh, method: str, query: str, reason: str) -> None:
    viewer = mesh.identity.member("viewer")
    call = (
        mesh.searches.Search(SearchRequest(query=query), metadata=viewer.metadata)
        if method == "Search"
        else mesh.dashboards.SearchDashboards(
            pb.SearchDashboardsRequest(query=query), metadata=viewer.metadata
        )
    )
    assert await refused(call) == (grpc.StatusCode.INVALID_ARGUMENT, reason)


async def test_a_search_costs_as_many_statements_for_one_hit_as_for_many(mesh: Mesh, index: Indexed) -> None:
    editor = mesh.identity.member("editor")
    counts = []
    for number in (1, 8):
        for _ in range(number):
            await mesh.widget(editor, await mesh.dashboard(editor, f"Costly {number}"), title="Tile")
        await index.settled()
        with statements_of_calls() as ran:
            assert len(await search(mesh, editor, f"costly {number}")) == number
        counts.append(len(ran))
    assert 0 < counts[0] == counts[1] <= 7


# --- all at once ------------------------------------------------------------------------------------------


def user(name: str, score: int, **more: Any) -> MemberHit:
    return MemberHit(score=score, user=User(user_id=new_id(), display_name=name, **more))


def name_of(hit: SearchHit) -> str:
    return hit.dashboard.title if hit.HasField("dashboard") else hit.user.display_name


async def test_dashboards_and_users_stand_in_one_order(mesh: Mesh, index: Indexed) -> None:
    editor = mesh.identity.member("editor")
    await mesh.dashboard(editor, "Ada's numbers")
    mesh.users.found = [user("Ada", 12), user("Adam", 9)]
    await mesh.dashboard(editor, "Adafruit")
    await index.settled()
    hits = await search(mesh, editor, "ada")
    assert [name_of(hit) for hit in hits] == ["Ada's numbers", "Adafruit", "Ada", "Adam"]
    (asked,) = mesh.users.searches
    assert (asked.workspace_id, asked.query) == (editor.workspace_id, "ada")


async def test_the_pages_of_both_together_hold_all(mesh: Mesh, index: Indexed) -> None:
    editor = mesh.identity.member("editor")
    for number in range(9):
        await mesh.dashboard(editor, f"Joint {number}")
    mesh.users.found = [
        user(f"Joint person {number}", score) for number, score in enumerate([16, 12, 16, 9, 20])
    ]
    await index.settled()
    whole = [name_of(hit) for hit in await search(mesh, editor, "joint")]
    assert len(whole) == len(set(whole)) == 14
    for size in (1, 4, 7):
        request, found = SearchRequest(query="joint", page_size=size), []
        while True:
            answer = await mesh.searches.Search(request, metadata=editor.metadata)
            found += [name_of(hit) for hit in answer.hits]
            request.page_token = answer.next_page_token
            if not answer.next_page_token:
                break
            assert len(answer.hits) == size
        assert found == whole


async def test_what_was_found_is_marked_in_plain_text(mesh: Mesh, index: Indexed) -> None:
    editor = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(editor, '<b>Marked</b> & "more"')
    await mesh.widget(editor, dashboard, title="About <script>marked</script>")
    mesh.users.found = [user("Markéta", 1, email="marked@example.org")]
    await index.settled()
    board, person = await search(mesh, editor, "marked")
    shown = [
        (h.field, [(fragment.text, fragment.matched) for fragment in h.fragments]) for h in board.highlights
    ]
    assert shown == [
        ("title", [("<b>", False), ("Marked", True), ('</b> & "more"', False)]),
        ("widget.title", [("About <script>", False), ("marked", True), ("</script>", False)]),
    ]
    assert [h.field for h in person.highlights] == ["display_name", "email"]


async def test_who_lacks_a_permission_gets_none_of_that_kind(mesh: Mesh, index: Indexed) -> None:
    editor = mesh.identity.member("editor")
    await mesh.dashboard(editor, "Kind")
    mesh.users.found = [user("Kind person", 12)]
    await index.settled()
    rights = mesh.identity.rights[editor.user_id, editor.workspace_id]
    for missing, left in (("members.view", ["Kind"]), ("dashboards.list", ["Kind person"])):
        mesh.identity.rights[editor.user_id, editor.workspace_id] = replace(
            rights, permissions=rights.permissions - {missing}
        )
        assert [name_of(hit) for hit in await search(mesh, editor, "kind")] == left
    mesh.identity.rights[editor.user_id, editor.workspace_id] = rights
    scope = "workspaces.view dashboards.list"
    token = mesh.identity.token(sub=editor.user_id, wid=editor.workspace_id, scope=scope)
    answer = await mesh.searches.Search(
        SearchRequest(query="kind"), metadata=(("authorization", f"Bearer {token}"),)
    )
    assert [name_of(hit) for hit in answer.hits] == ["Kind"], "nor does a token whose scope lacks it"


async def test_without_user_svc_there_is_no_half_an_answer(mesh: Mesh, index: Indexed) -> None:
    editor = mesh.identity.member("editor")
    await mesh.dashboard(editor, "Half")
    await index.settled()
    mesh.users.failure = errors.unavailable("user_svc rests.")
    call = mesh.searches.Search(SearchRequest(query="half"), metadata=editor.metadata)
    assert await refused(call) == (grpc.StatusCode.UNAVAILABLE, "DEPENDENCY_UNAVAILABLE")
    assert await titles(mesh, editor, "half") == ["Half"]


async def test_a_token_is_for_its_own_query(mesh: Mesh, index: Indexed) -> None:
    editor = mesh.identity.member("editor")
    for title in ("Token one", "Token two"):
        await mesh.dashboard(editor, title)
    await index.settled()
    answer = await mesh.searches.Search(SearchRequest(query="token", page_size=1), metadata=editor.metadata)
    call = mesh.searches.Search(
        SearchRequest(query="two", page_size=1, page_token=answer.next_page_token), metadata=editor.metadata
    )
    assert await refused(call) == (grpc.StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID")


async def test_a_draft_is_not_found_before_it_is_published(mesh: Mesh, index: Indexed) -> None:
    editor = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(editor, "Quarterly")
    await mesh.widget(editor, dashboard, title="Armadillos")
    await boards.start_draft(mesh, editor, dashboard.dashboard_id)
    await boards.update(mesh, editor, dashboard.dashboard_id, title="Hourly")
    await mesh.widget(editor, dashboard, title="Pangolins")
    await index.settled()
    (hit,) = await search(mesh, editor, "armadillos")
    assert hit.dashboard.title == "Quarterly"
    assert [highlight.field for highlight in hit.highlights] == ["widget.title"]
    assert await titles(mesh, editor, "quarterly") == ["Quarterly"]
    assert await titles(mesh, editor, "hourly") == await titles(mesh, editor, "pangolins") == []
    await boards.publish(mesh, editor, dashboard.dashboard_id)
    await index.settled()
    assert await titles(mesh, editor, "pangolins") == ["Hourly"]
    assert await titles(mesh, editor, "quarterly") == []


async def test_what_is_in_the_bin_is_not_found(mesh: Mesh, index: Indexed) -> None:
    admin = mesh.identity.member("admin")
    dashboard = await mesh.dashboard(admin, "Ephemeral")
    await index.settled()
    assert await titles(mesh, admin, "ephemeral") == ["Ephemeral"]
    (hit,) = await search(mesh, admin, "ephemeral")
    assert not hit.dashboard.favourite
    await favourite(mesh, admin, dashboard.dashboard_id)
    (hit,) = await search(mesh, admin, "ephemeral")
    assert hit.dashboard.favourite
    await boards.delete(mesh, admin, dashboard.dashboard_id)
    assert await titles(mesh, admin, "ephemeral") == [], "at once"
    assert await search(mesh, admin, "ephemeral") == []
    await index.settled()
    assert await titles(mesh, admin, "ephemeral") == []
    request = pb.UndeleteDashboardRequest(dashboard_id=dashboard.dashboard_id)
    await mesh.dashboards.UndeleteDashboard(request, metadata=admin.metadata)
    await index.settled()
    assert await titles(mesh, admin, "ephemeral") == ["Ephemeral"]
