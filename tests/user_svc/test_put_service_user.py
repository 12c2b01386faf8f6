"""Service accounts as users and members: making, renaming and removing them."""

import asyncio

import grpc
from meshboard.user.v1.events_pb2 import MemberAdded, MemberRemoved, UserCreated, UserUpdated
from meshboard.user.v1.internal_user_service_pb2 import (
    CheckSubjectsRequest,
    GetRightsRequest,
    PutServiceUserRequest,
    PutServiceUserResponse,
    RemoveServiceUserRequest,
)
from meshboard.user.v1.team_service_pb2 import AddTeamMemberRequest, CreateTeamRequest
from meshboard.user.v1.user_pb2 import User
from meshboard.user.v1.user_service_pb2 import GetMeRequest
from meshboard.user.v1.workspace_service_pb2 import (
    AddMemberRequest,
    RemoveMemberRequest,
    UpdateMemberRequest,
)
from sqlalchemy import select

from services.chassis.db import OutboxRow
from services.chassis.rights import ROLES
from tests.harness import new_id, refused
from tests.user_svc.conftest import Person, UserSvc


async def put(
    svc: UserSvc, owner: Person, user_id: str, name: str = "CI", role: str = "editor"
) -> PutServiceUserResponse:
    return await svc.internal.PutServiceUser(
        PutServiceUserRequest(user_id=user_id, workspace_id=owner.workspace_id, display_name=name, role=role),
        metadata=svc.calling_as("auth"),
    )


async def remove(svc: UserSvc, owner: Person, user_id: str) -> None:
    await svc.internal.RemoveServiceUser(
        RemoveServiceUserRequest(user_id=user_id, workspace_id=owner.workspace_id),
        metadata=svc.calling_as("auth"),
    )


async def rights_of(svc: UserSvc, owner: Person, user_id: str) -> list[str]:
    answer = await svc.internal.GetRights(
        GetRightsRequest(user_id=user_id, workspace_id=owner.workspace_id),
        metadata=svc.calling_as("auth"),
    )
    return list(answer.rights.permissions)


async def events_about(svc: UserSvc, user_id: str) -> list[str]:
    """The events that name the user, the oldest first."""
    async with svc.sessions() as session:
        rows = (await session.scalars(select(OutboxRow).order_by(OutboxRow.id))).all()
    kinds = {
        kind.DESCRIPTOR.full_name: kind for kind in (UserCreated, UserUpdated, MemberAdded, MemberRemoved)
    }
    return [
        row.subject.rpartition(".")[2]
        for row in rows
        if row.subject in kinds and user_id in str(kinds[row.subject].FromString(row.payload))
    ]


async def test_makes_a_member_once(svc: UserSvc, owner: Person):
    user_id = new_id()
    answers = await asyncio.gather(*(put(svc, owner, user_id) for _ in range(5)))
    assert len({answer.SerializeToString() for answer in answers}) == 1
    assert answers[0].user.kind == User.SERVICE_ACCOUNT
    assert await rights_of(svc, owner, user_id) == sorted(ROLES["editor"])
    assert await events_about(svc, user_id) == ["UserCreated", "MemberAdded"]


async def test_another_name_and_never_another_role(svc: UserSvc, owner: Person):
    user_id = new_id()
    await put(svc, owner, user_id)
    me = (("authorization", f"Bearer {svc.identity.token(sub=user_id, wid=owner.workspace_id, amr=None)}"),)
    assert (await svc.users.GetMe(GetMeRequest(), metadata=me)).user.display_name == "CI"
    answer = await put(svc, owner, user_id, name="Deploy", role="admin")
    assert (answer.user.display_name, answer.user.etag) == ("Deploy", "2")
    assert await rights_of(svc, owner, user_id) == sorted(ROLES["editor"])
    assert (await svc.users.GetMe(GetMeRequest(), metadata=me)).user.display_name == "Deploy"
    await put(svc, owner, user_id, name="Deploy", role="")
    assert await events_about(svc, user_id) == ["UserCreated", "MemberAdded", "UserUpdated"]


async def test_what_is_refused(svc: UserSvc, owner: Person):
    stranger = await svc.person()
    elsewhere = new_id()
    await put(svc, stranger, elsewhere)
    for user_id, role, outcome in (
        (new_id(), "king", (grpc.StatusCode.INVALID_ARGUMENT, "ROLE_UNKNOWN")),
        (new_id(), "", (grpc.StatusCode.INVALID_ARGUMENT, "ROLE_UNKNOWN")),
        (new_id(), "owner", (grpc.StatusCode.PERMISSION_DENIED, "OWNER_ROLE_RESERVED")),
        (owner.user_id, "editor", (grpc.StatusCode.ALREADY_EXISTS, "USER_ID_TAKEN")),
        (elsewhere, "editor", (grpc.StatusCode.NOT_FOUND, "MEMBER_NOT_FOUND")),
    ):
        assert await refused(put(svc, owner, user_id, role=role)) == outcome
    request = PutServiceUserRequest(
        user_id=new_id(), workspace_id=owner.workspace_id, display_name="CI", role="viewer"
    )
    for metadata in (svc.calling_as("dashboard"), owner.metadata):
        outcome = await refused(svc.internal.PutServiceUser(request, metadata=metadata))
        assert outcome == (grpc.StatusCode.PERMISSION_DENIED, "CALLER_NOT_ALLOWED")


async def test_removing_takes_rights_and_teams_and_is_final(svc: UserSvc, owner: Person):
    user_id = new_id()
    await put(svc, owner, user_id)
    await remove(svc, owner, user_id)
    await remove(svc, owner, user_id)
    absent = (grpc.StatusCode.NOT_FOUND, "WORKSPACE_NOT_FOUND")
    assert await refused(rights_of(svc, owner, user_id)) == absent
    assert await events_about(svc, user_id) == ["UserCreated", "MemberAdded", "MemberRemoved"]
    outcome = await refused(put(svc, owner, user_id))
    assert outcome == (grpc.StatusCode.NOT_FOUND, "MEMBER_NOT_FOUND")
    await remove(svc, owner, new_id())


async def test_removes_no_person(svc: UserSvc, owner: Person):
    viewer = await svc.join(owner, "viewer")
    await remove(svc, owner, viewer.user_id)
    assert await rights_of(svc, owner, viewer.user_id) == sorted(ROLES["viewer"])


async def test_belongs_to_one_workspace(svc: UserSvc, owner: Person):
    other, user_id = await svc.person(), new_id()
    await put(svc, owner, user_id)
    adding = AddMemberRequest(workspace_id=other.workspace_id, user_id=user_id, role="viewer")
    outcome = await refused(svc.workspaces.AddMember(adding, metadata=other.metadata))
    assert outcome == (grpc.StatusCode.NOT_FOUND, "USER_NOT_FOUND")
    again = AddMemberRequest(workspace_id=owner.workspace_id, user_id=user_id, role="viewer")
    outcome = await refused(svc.workspaces.AddMember(again, metadata=owner.metadata))
    assert outcome == (grpc.StatusCode.ALREADY_EXISTS, "MEMBER_EXISTS")
    await svc.workspaces.RemoveMember(
        RemoveMemberRequest(workspace_id=owner.workspace_id, user_id=user_id), metadata=owner.metadata
    )
    outcome = await refused(svc.workspaces.AddMember(again, metadata=owner.metadata))
    assert outcome == (grpc.StatusCode.NOT_FOUND, "USER_NOT_FOUND")


async def test_gets_other_roles_but_never_that_of_an_owner(svc: UserSvc, owner: Person):
    user_id = new_id()
    await put(svc, owner, user_id)
    for role in ("admin", "viewer"):
        await svc.workspaces.UpdateMember(
            UpdateMemberRequest(workspace_id=owner.workspace_id, user_id=user_id, role=role),
            metadata=owner.metadata,
        )
        assert await rights_of(svc, owner, user_id) == sorted(ROLES[role])
    request = UpdateMemberRequest(workspace_id=owner.workspace_id, user_id=user_id, role="owner")
    outcome = await refused(svc.workspaces.UpdateMember(request, metadata=owner.metadata))
    assert outcome == (grpc.StatusCode.PERMISSION_DENIED, "OWNER_ROLE_RESERVED")


async def test_joins_teams_and_may_be_granted_to(svc: UserSvc, owner: Person):
    user_id = new_id()
    await put(svc, owner, user_id)
    team = await svc.teams.CreateTeam(
        CreateTeamRequest(workspace_id=owner.workspace_id, title="T"), metadata=owner.metadata
    )
    await svc.teams.AddTeamMember(
        AddTeamMemberRequest(workspace_id=owner.workspace_id, team_id=team.team.team_id, user_id=user_id),
        metadata=owner.metadata,
    )
    answer = await svc.internal.GetRights(
        GetRightsRequest(user_id=user_id, workspace_id=owner.workspace_id),
        metadata=svc.calling_as("dashboard"),
    )
    assert list(answer.rights.team_ids) == [team.team.team_id]
    subjects = await svc.internal.CheckSubjects(
        CheckSubjectsRequest(workspace_id=owner.workspace_id, user_ids=[user_id]),
        metadata=svc.calling_as("dashboard"),
    )
    assert list(subjects.user_ids) == [user_id]
