"""Searching members, with either engine."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from meshboard.auth.v1.events_pb2 import AccountDiscarded, EmailChanged
from meshboard.user.v1.internal_user_service_pb2 import (
    CreateUserRequest,
    PutServiceUserRequest,
    RemoveServiceUserRequest,
    SearchMembersRequest,
    SearchPlace,
)
from meshboard.user.v1.user_pb2 import User
from meshboard.user.v1.user_service_pb2 import SearchUsersRequest, UpdateUserRequest
from meshboard.user.v1.workspace_service_pb2 import (
    AddMemberRequest,
    CreateWorkspaceRequest,
    RemoveMemberRequest,
)

from services.chassis.search import Document
from services.user_svc.consumers import on_account_discarded, on_email_changed
from services.user_svc.member_search import CORPUS
from services.user_svc.workspaces import delete_workspace
from tests.harness import Identity, new_id, refused
from tests.parts import Parts
from tests.searching import Indexed, engine_settings
from tests.statements import statements_of_calls
from tests.user_svc.conftest import Person, UserSvc, running_svc


@pytest.fixture(scope="session")
async def found(parts: Parts, identity: Identity, search_engine: str) -> AsyncIterator[UserSvc]:
    """user_svc with one of the engines."""
    async with running_svc(parts, identity, **engine_settings(search_engine)) as svc:
        yield svc


@pytest.fixture(scope="session")
async def index(found: UserSvc) -> AsyncIterator[Indexed]:
    index = Indexed(found.url, found.sessions, found.engine, CORPUS)
    async with index.indexing():
        yield index


@pytest.fixture
async def boss(found: UserSvc) -> Person:
    return await found.person()


async def rename(svc: UserSvc, person: Person, display_name: str) -> None:
    await svc.users.UpdateUser(
        UpdateUserRequest(user=User(user_id=person.user_id, display_name=display_name)),
        metadata=person.metadata,
    )


async def member(svc: UserSvc, owner: Person, display_name: str) -> Person:
    person = await svc.join(owner, "viewer")
    await rename(svc, person, display_name)
    return person


async def names(svc: UserSvc, person: Person, query: str) -> list[str]:
    answer = await svc.users.SearchUsers(SearchUsersRequest(query=query), metadata=person.metadata)
    return [user.display_name for user in answer.users]


async def test_members_are_found_by_name_and_address(found: UserSvc, index: Indexed, boss: Person):
    ada = await member(found, boss, "Ada Lovelace")
    await member(found, boss, "Zoë Adams")
    await member(found, boss, "Blaise")
    await index.settled()
    assert await names(found, boss, "lovelace ada") == ["Ada Lovelace"]
    assert await names(found, boss, "ada") == ["Ada Lovelace", "Zoë Adams"]
    assert await names(found, boss, "ZOE") == ["Zoë Adams"]
    assert await names(found, boss, "lovelase") == ["Ada Lovelace"]
    assert await names(found, boss, ada.email) == ["Ada Lovelace"]
    assert await names(found, ada, "blai") == ["Blaise"], "any member may search"
    assert await names(found, boss, "lovelace blaise") == []


async def test_who_is_no_member_is_not_found(found: UserSvc, index: Indexed, boss: Person):
    stranger = await found.person()
    await rename(found, stranger, "Mallory Stranger")
    await index.settled()
    assert await names(found, boss, "mallory") == []
    assert await names(found, stranger, "mallory") == ["Mallory Stranger"]


async def test_another_workspace_cannot_be_searched(found: UserSvc, boss: Person):
    stranger = await found.person()
    call = found.users.SearchUsers(
        SearchUsersRequest(query="ada"), metadata=(*stranger.metadata, ("x-workspace-id", boss.workspace_id))
    )
    assert await refused(call) == (grpc.StatusCode.NOT_FOUND, "WORKSPACE_NOT_FOUND")


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("", "VALIDATION_FAILED"),
        ("a" * 201, "VALIDATION_FAILED"),
        ("%%%", "SEARCH_QUERY_INVALID"),
        (" ".join(str(number) for number in range(21)), "SEARCH_QUERY_INVALID"),
    ],
)
async def test_a_query_that_asks_nothing_is_refused(found: UserSvc, boss: Person, query: str, reason: str):
    call = found.users.SearchUsers(SearchUsersRequest(query=query), metadata=boss.metadata)
    assert await refused(call) == (grpc.StatusCode.INVALID_ARGUMENT, reason)


async def test_pages_hold_all(found: UserSvc, index: Indexed, boss: Person):
    expected = {(await member(found, boss, f"Team Member {number}")).user_id for number in range(7)}
    await index.settled()
    request, users = SearchUsersRequest(query="member", page_size=3), []
    for _ in range(3):
        answer = await found.users.SearchUsers(request, metadata=boss.metadata)
        users += [user.user_id for user in answer.users]
        request.page_token = answer.next_page_token
    assert request.page_token == ""
    assert len(users) == 7
    assert set(users) == expected


async def test_a_token_is_for_its_own_query(found: UserSvc, index: Indexed, boss: Person):
    for number in range(2):
        await member(found, boss, f"Team Member {number}")
    await index.settled()
    answer = await found.users.SearchUsers(
        SearchUsersRequest(query="member", page_size=1), metadata=boss.metadata
    )
    assert answer.next_page_token
    call = found.users.SearchUsers(
        SearchUsersRequest(query="team", page_size=1, page_token=answer.next_page_token),
        metadata=boss.metadata,
    )
    assert await refused(call) == (grpc.StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID")


async def test_who_was_removed_is_not_shown_by_an_index_that_is_behind(
    found: UserSvc, index: Indexed, boss: Person
):
    stays = await member(found, boss, "Stayer Late")
    gone = await member(found, boss, "Leaver Late")
    await found.workspaces.RemoveMember(
        RemoveMemberRequest(workspace_id=boss.workspace_id, user_id=gone.user_id), metadata=boss.metadata
    )
    await index.settled()
    late = Document(boss.workspace_id, gone.user_id, {"display_name": "Leaver Late", "email": gone.email})
    await index.write(2**40, [late])
    try:
        assert f"{boss.workspace_id}/{gone.user_id}" in await index.content()
        answer = await found.users.SearchUsers(
            SearchUsersRequest(query="late", page_size=1), metadata=boss.metadata
        )
        assert [user.user_id for user in answer.users] == [stays.user_id]
    finally:
        await index.write(2**40 + 1, [], [(boss.workspace_id, gone.user_id)])


async def test_every_write_reaches_the_index(found: UserSvc, index: Indexed, boss: Person):
    async def follows() -> None:
        assert await index.content() == await index.expected()

    ada = await member(found, boss, "Ada")
    await follows()
    await rename(found, boss, "Boss")
    await follows()
    time = Timestamp()
    time.GetCurrentTime()
    async with found.sessions.begin() as session:
        await on_email_changed(
            session, EmailChanged(user_id=ada.user_id, email=f"new.{ada.email}", time=time)
        )
    await follows()
    assert await names(found, boss, f"new {ada.email}") == ["Ada"]
    created = await found.workspaces.CreateWorkspace(
        CreateWorkspaceRequest(title="Second"), metadata=ada.metadata
    )
    await follows()
    second = created.workspace.workspace_id
    await found.workspaces.AddMember(
        AddMemberRequest(workspace_id=second, user_id=boss.user_id, role="viewer"), metadata=ada.metadata
    )
    await follows()
    await found.workspaces.RemoveMember(
        RemoveMemberRequest(workspace_id=boss.workspace_id, user_id=ada.user_id), metadata=boss.metadata
    )
    await follows()
    robot = PutServiceUserRequest(
        user_id=new_id(), workspace_id=boss.workspace_id, display_name="Robot", role="viewer"
    )
    await found.internal.PutServiceUser(robot, metadata=found.calling_as("auth"))
    await follows()
    assert await names(found, boss, "robot") == ["Robot"]
    robot.display_name = "Machine"
    await found.internal.PutServiceUser(robot, metadata=found.calling_as("auth"))
    await follows()
    await found.internal.RemoveServiceUser(
        RemoveServiceUserRequest(user_id=robot.user_id, workspace_id=boss.workspace_id),
        metadata=found.calling_as("auth"),
    )
    await follows()
    user_id, workspace_id = new_id(), new_id()
    await found.internal.CreateUser(
        CreateUserRequest(
            user_id=user_id, workspace_id=workspace_id, email=f"{user_id}@example.org", display_name="Nobody"
        ),
        metadata=found.calling_as("auth"),
    )
    await follows()
    async with found.sessions.begin() as session:
        await on_account_discarded(session, AccountDiscarded(user_id=user_id, workspace_id=workspace_id))
    await follows()
    async with found.sessions.begin() as session:
        await delete_workspace(session, second)
    await follows()
    assert not [key for key in await index.content() if key.startswith(second)]


async def test_a_search_costs_few_statements(found: UserSvc, index: Indexed, boss: Person):
    for number in range(5):
        await member(found, boss, f"Cheap {number}")
    await index.settled()
    with statements_of_calls() as ran:
        assert len(await names(found, boss, "cheap")) == 5
    asked = [statement for statement in ran if "search_documents" in statement or "FROM users" in statement]
    assert len(asked) == (1 if found.engine.name == "elasticsearch" else 2), ran


async def test_dashboard_svc_searches_from_a_place_on(found: UserSvc, index: Indexed, boss: Person):
    for number in range(3):
        await member(found, boss, f"Placed {number}")
    await index.settled()
    request = SearchMembersRequest(workspace_id=boss.workspace_id, query="placed", limit=2)
    answer = await found.internal.SearchMembers(request, metadata=found.calling_as("dashboard"))
    assert len(answer.hits) == 2
    last = answer.hits[-1]
    request.after.CopyFrom(SearchPlace(score=last.score, id=last.user.user_id))
    answer = await found.internal.SearchMembers(request, metadata=found.calling_as("dashboard"))
    assert [hit.user.display_name for hit in answer.hits] == ["Placed 0"]


@pytest.mark.parametrize("service", ["auth", "analytics", "user"])
async def test_other_services_do_not_search_members(svc: UserSvc, owner: Person, service: str):
    call = svc.internal.SearchMembers(
        SearchMembersRequest(workspace_id=owner.workspace_id, query="ada", limit=1),
        metadata=svc.calling_as(service),
    )
    assert await refused(call) == (grpc.StatusCode.PERMISSION_DENIED, "CALLER_NOT_ALLOWED")
