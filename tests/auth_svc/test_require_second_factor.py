"""The workspace rule `require_second_factor`, through both services."""

from collections.abc import Awaitable

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from grpc import StatusCode
from meshboard.auth.v1.auth_service_pb2 import CompleteSignInRequest, RefreshRequest, SignUpResponse
from meshboard.user.v1.workspace_pb2 import Workspace
from meshboard.user.v1.workspace_service_pb2 import (
    GetWorkspaceRequest,
    GetWorkspaceResponse,
    ListMembersRequest,
    UpdateWorkspaceRequest,
    UpdateWorkspaceResponse,
)

from tests.auth_svc import machines
from tests.auth_svc.conftest import Services, bearer, claims_of
from tests.auth_svc.people import Metadata, Person, code_of, new_person, outcomes_of
from tests.conditions import eventually
from tests.harness import refused

REQUIRED = (StatusCode.PERMISSION_DENIED, "SECOND_FACTOR_REQUIRED")


@pytest.fixture
async def owner(services: Services) -> Person:
    return await new_person(services)


def workspace_of(person: Person) -> str:
    """The personal workspace, for which the tokens are."""
    workspace_id: str = claims_of(person.access_token)["wid"]
    return workspace_id


def set_rule(owner: Person, required: bool) -> Awaitable[UpdateWorkspaceResponse]:
    return owner.services.workspaces.UpdateWorkspace(
        UpdateWorkspaceRequest(
            workspace=Workspace(workspace_id=workspace_of(owner), require_second_factor=required),
            update_mask=FieldMask(paths=["require_second_factor"]),
        ),
        metadata=owner.metadata,
    )


def get(services: Services, workspace_id: str, metadata: Metadata) -> Awaitable[GetWorkspaceResponse]:
    return services.workspaces.GetWorkspace(GetWorkspaceRequest(workspace_id=workspace_id), metadata=metadata)


async def join(owner: Person) -> Person:
    member = await new_person(owner.services)
    await owner.services.admit(workspace_of(owner), owner.metadata, member.user_id, member.access_token)
    return member


async def test_keeps_out_who_has_no_second_factor_until_they_add_one(services: Services, owner: Person):
    workspace_id, member = workspace_of(owner), await join(owner)
    await get(services, workspace_id, member.metadata)
    await owner.add_totp()
    await set_rule(owner, True)

    async def kept_out() -> bool:
        return await outcomes_of(get(services, workspace_id, member.metadata)) == [REQUIRED]

    await eventually(kept_out, seconds=2)
    members = services.workspaces.ListMembers(
        ListMembersRequest(workspace_id=workspace_id), metadata=member.metadata
    )
    assert await refused(members) == REQUIRED
    # Their own workspace has no such rule, and what adds a factor is about no workspace.
    await get(services, workspace_of(member), member.metadata)
    secret, confirmed = await member.add_totp()
    found = await get(services, workspace_id, member.metadata)
    assert found.workspace.require_second_factor
    refreshed = await services.auth.Refresh(RefreshRequest(refresh_token=confirmed.refresh_token))
    await get(services, workspace_id, bearer(refreshed.access_token))
    first = await member.first_step()
    again = await member.second_step(
        CompleteSignInRequest(mfa_token=first.mfa_token, totp_code=code_of(secret, 1))
    )
    await get(services, workspace_id, bearer(again.access_token))


async def test_a_passkey_alone_is_enough(services: Services, owner: Person):
    await owner.add_passkey()
    await set_rule(owner, True)
    found = await get(services, workspace_of(owner), owner.metadata)
    assert found.workspace.require_second_factor


async def test_other_sessions_of_the_owner_are_kept_out_too(services: Services, owner: Person):
    other = await services.sign_in(owner.email)
    await owner.add_totp()
    await set_rule(owner, True)

    async def kept_out() -> bool:
        call = get(services, workspace_of(owner), bearer(other.access_token))
        return await outcomes_of(call) == [REQUIRED]

    await eventually(kept_out, seconds=2)


async def test_who_has_none_cannot_require_one(services: Services, owner: Person):
    assert await refused(set_rule(owner, True)) == REQUIRED
    assert not (await get(services, workspace_of(owner), owner.metadata)).workspace.require_second_factor
    await set_rule(owner, False)


async def test_lets_service_accounts_in(services: Services, owner: Person):
    await owner.add_totp()
    workspace_id = workspace_of(owner)
    admin = machines.Person(owner.user_id, workspace_id, SignUpResponse(), owner.metadata)
    robot = await machines.machine(services, admin, "viewer")
    await set_rule(owner, True)
    token = await machines.exchange(services, robot.secret)
    assert "amr" not in claims_of(token)
    await get(services, workspace_id, bearer(token))
