import asyncio
import time

import grpc.aio
import pytest
from grpc import StatusCode
from meshboard.user.v1.events_pb2 import RightsChanged, WorkspaceDeleted
from meshboard.user.v1.team_service_pb2 import AddTeamMemberRequest, CreateTeamRequest
from meshboard.user.v1.workspace_service_pb2 import (
    DeleteWorkspaceRequest,
    GetWorkspaceRequest,
    ListWorkspacesRequest,
)
from sqlalchemy import func, select

from services.chassis.db import OutboxRow
from services.user_svc.models import Invitation, Member, Team, TeamMember, Workspace
from tests.harness import reason_of, refused
from tests.user_svc.conftest import LONG, Person, UserSvc

ROUNDS = pytest.mark.parametrize("rounds", [20, LONG])


def deleting(owner: Person, etag: str = "") -> DeleteWorkspaceRequest:
    return DeleteWorkspaceRequest(workspace_id=owner.workspace_id, etag=etag)


async def test_takes_all_that_is_in_it_and_nothing_else(svc: UserSvc, owner: Person):
    viewer, neighbour = await svc.join(owner, "viewer"), await svc.person()
    team = await svc.teams.CreateTeam(
        CreateTeamRequest(workspace_id=owner.workspace_id, title="T"), metadata=owner.metadata
    )
    await svc.teams.AddTeamMember(
        AddTeamMemberRequest(
            workspace_id=owner.workspace_id, team_id=team.team.team_id, user_id=viewer.user_id
        ),
        metadata=owner.metadata,
    )
    await svc.invite(owner)
    await svc.workspaces.DeleteWorkspace(deleting(owner), metadata=owner.metadata)
    for person in (owner, viewer):
        outcome = await refused(
            svc.workspaces.GetWorkspace(
                GetWorkspaceRequest(workspace_id=owner.workspace_id), metadata=person.metadata
            )
        )
        assert outcome == (StatusCode.NOT_FOUND, "WORKSPACE_NOT_FOUND")
    async with svc.sessions() as session:
        for table in (Invitation, TeamMember, Team, Member, Workspace):
            left = select(func.count()).select_from(table).where(table.workspace_id == owner.workspace_id)
            assert await session.scalar(left) == 0, table
        rows = (await session.scalars(select(OutboxRow))).all()
    assert WorkspaceDeleted(workspace_id=owner.workspace_id) in [
        WorkspaceDeleted.FromString(row.payload)
        for row in rows
        if row.subject == WorkspaceDeleted.DESCRIPTOR.full_name
    ]
    changes = [
        RightsChanged.FromString(row.payload)
        for row in rows
        if row.subject == RightsChanged.DESCRIPTOR.full_name
    ]
    assert max(c.version for c in changes if c.workspace_id == owner.workspace_id) == 4
    listed = await svc.workspaces.ListWorkspaces(ListWorkspacesRequest(), metadata=neighbour.metadata)
    assert [w.workspace_id for w in listed.workspaces] == [neighbour.workspace_id]


async def test_is_for_owners_who_proved_lately_who_they_are(svc: UserSvc, owner: Person):
    admin, stranger = await svc.join(owner, "admin"), await svc.person()
    old = svc.identity.token(sub=owner.user_id, wid=owner.workspace_id, auth_time=int(time.time()) - 3600)
    for metadata, outcome in (
        (admin.metadata, (StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")),
        (stranger.metadata, (StatusCode.NOT_FOUND, "WORKSPACE_NOT_FOUND")),
        (
            (("authorization", f"Bearer {old}"),),
            (StatusCode.PERMISSION_DENIED, "REAUTHENTICATION_REQUIRED"),
        ),
    ):
        assert await refused(svc.workspaces.DeleteWorkspace(deleting(owner), metadata=metadata)) == outcome
    outcome = await refused(svc.workspaces.DeleteWorkspace(deleting(owner, "0"), metadata=owner.metadata))
    assert outcome == (StatusCode.ABORTED, "ETAG_MISMATCH")
    await svc.workspaces.DeleteWorkspace(deleting(owner, "1"), metadata=owner.metadata)


@ROUNDS
async def test_whatever_comes_at_once_finds_it_or_does_not(svc: UserSvc, rounds: int):
    for _ in range(rounds):
        owner = await svc.person()
        invitation = await svc.invite(owner)
        token = await svc.token_of(invitation)
        late = CreateTeamRequest(workspace_id=owner.workspace_id, title="T")
        outcomes = await asyncio.gather(
            svc.workspaces.DeleteWorkspace(deleting(owner), metadata=owner.metadata),
            svc.teams.CreateTeam(late, metadata=owner.metadata),
            svc.invite(owner),
            svc.sign_up(invitation, token),
            return_exceptions=True,
        )
        failures = [reason_of(o) for o in outcomes if isinstance(o, grpc.aio.AioRpcError)]
        assert set(failures) <= {"WORKSPACE_NOT_FOUND", "INVITATION_INVALID"}, failures
        assert not isinstance(outcomes[0], Exception)
