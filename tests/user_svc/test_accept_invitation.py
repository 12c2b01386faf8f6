import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc.aio
import pytest
from grpc import StatusCode
from meshboard.auth.v1.events_pb2 import AccountDiscarded
from meshboard.user.v1.internal_user_service_pb2 import CheckInvitationRequest, CreateUserRequest
from meshboard.user.v1.invitation_pb2 import Invitation
from meshboard.user.v1.invitation_service_pb2 import (
    AcceptInvitationRequest,
    AcceptInvitationResponse,
    DeclineInvitationRequest,
)
from meshboard.user.v1.team_service_pb2 import DeleteTeamRequest
from meshboard.user.v1.workspace_service_pb2 import (
    ListMembersRequest,
    ListWorkspacesRequest,
    RemoveMemberRequest,
    UpdateMemberRequest,
)

from services.user_svc import models
from services.user_svc.consumers import on_account_discarded
from services.user_svc.invitation_tokens import token_of
from tests.harness import new_id, reason_of, refused
from tests.user_svc.conftest import LONG, Person, UserSvc
from tests.user_svc.test_create_team import create
from tests.user_svc.test_get_rights import rights_of
from tests.user_svc.test_invitations import INVALID, change, get, preview, revoke, set_workspace

ROUNDS = pytest.mark.parametrize("rounds", [20, LONG])


async def accept(svc: UserSvc, person: Person, token: str) -> AcceptInvitationResponse:
    return await svc.invitations.AcceptInvitation(
        AcceptInvitationRequest(token=token), metadata=person.metadata
    )


async def decline(svc: UserSvc, token: str) -> None:
    await svc.invitations.DeclineInvitation(DeclineInvitationRequest(token=token))


async def invited(svc: UserSvc, owner: Person, **more: Any) -> tuple[Person, Invitation, str]:
    """Somebody with an account, and an invitation for them."""
    person = await svc.person()
    invitation = await svc.invite(owner, person.email, **more)
    return person, invitation, await svc.token_of(invitation)


async def members_of(svc: UserSvc, owner: Person, role: str = "") -> list[str]:
    request = ListMembersRequest(workspace_id=owner.workspace_id, role=role)
    answer = await svc.workspaces.ListMembers(request, metadata=owner.metadata)
    return [member.user.user_id for member in answer.members]


async def test_makes_a_member_with_role_and_teams(svc: UserSvc, owner: Person):
    team, gone = await create(svc, owner, "Team"), await create(svc, owner, "Gone")
    person, invitation, token = await invited(
        svc, owner, role="editor", team_ids=[team.team_id, gone.team_id]
    )
    await svc.teams.DeleteTeam(
        DeleteTeamRequest(workspace_id=owner.workspace_id, team_id=gone.team_id), metadata=owner.metadata
    )
    accepted = await accept(svc, person, token)
    assert accepted.workspace.workspace_id == owner.workspace_id
    assert (accepted.member.user.user_id, accepted.member.role) == (person.user_id, "editor")
    there = Person(person.user_id, owner.workspace_id, person.email, person.metadata)
    rights = await rights_of(svc, there)
    assert (rights.role, list(rights.team_ids)) == ("editor", [team.team_id])
    assert await accept(svc, person, token) == accepted, "a repeat returns the same"
    assert (await rights_of(svc, there)).version == rights.version
    found = await get(svc, owner, invitation.invitation_id)
    assert (found.state, found.acceptor_id) == (Invitation.ACCEPTED, person.user_id)
    assert await members_of(svc, owner, "editor") == [person.user_id]


async def test_is_for_the_invited_address_alone(svc: UserSvc, owner: Person):
    person, _, token = await invited(svc, owner)
    other = await svc.person()
    for_another = (StatusCode.PERMISSION_DENIED, "INVITATION_FOR_ANOTHER")
    assert await refused(accept(svc, other, token)) == for_another
    svc.accounts.unverified.add(person.email)
    outcome = await refused(accept(svc, person, token))
    assert outcome == (StatusCode.FAILED_PRECONDITION, "EMAIL_UNVERIFIED")
    svc.accounts.unverified.clear()
    await accept(svc, person, token)
    assert await refused(accept(svc, other, token)) == for_another


async def test_spelling_of_the_address_does_not_matter(svc: UserSvc, owner: Person):
    person = await svc.person()
    token = await svc.token_of(await svc.invite(owner, person.email.upper()))
    await accept(svc, person, token)


@pytest.mark.parametrize(
    "values",
    [
        {"role": "admin"},
        {"email_key": "other@example.org"},
        {"team_ids": [new_id()]},
        {"generation": 2},
        {"inviter_id": new_id()},
        {"invitation_id": new_id()},
        {"expire_time": datetime.now(UTC) + timedelta(days=20)},
        {"expire_time": datetime.now(UTC) - timedelta(seconds=1)},
        {"state": "DECLINED"},
        {"state": "REVOKED"},
        {"state": "EXPIRED"},
    ],
    ids=" ".join,
)
async def test_holds_for_what_it_was_made_for(svc: UserSvc, owner: Person, values: dict[str, Any]):
    person, invitation, token = await invited(svc, owner)
    await change(svc, invitation, **values)
    assert await refused(accept(svc, person, token)) == INVALID
    assert await refused(preview(svc, token)) == INVALID
    assert person.user_id not in await members_of(svc, owner)


async def test_forged_tokens_are_refused_alike(svc: UserSvc, owner: Person):
    person, invitation, token = await invited(svc, owner)
    _, other, _ = await invited(svc, owner)
    row = models.Invitation(
        workspace_id=owner.workspace_id,
        invitation_id=invitation.invitation_id,
        email_key=person.email,
        role="viewer",
        team_ids=[],
        inviter_id=owner.user_id,
        expire_time=invitation.expire_time.ToDatetime(tzinfo=UTC),
        generation=1,
    )
    assert token_of(svc.tokens.keys[0], row) == token
    forged = [
        token_of(b"k" * 32, row),
        token[:-1] + ("A" if token[-1] != "A" else "B"),
        f"mbi_{'A' * 64}",
        "x",
        "\u00e9" * 10,
        other.invitation_id,
    ]
    for each in forged:
        for call in (accept(svc, person, each), preview(svc, each), decline(svc, each)):
            assert await refused(call) == INVALID, each
        check = CheckInvitationRequest(token=each)
        assert await refused(svc.internal.CheckInvitation(check, metadata=svc.calling_as("auth"))) == INVALID
    await accept(svc, person, token)


async def test_needs_an_inviter_who_could_still_invite(svc: UserSvc, owner: Person):
    async def with_role(admin: Person, role: str) -> None:
        await svc.workspaces.UpdateMember(
            UpdateMemberRequest(workspace_id=owner.workspace_id, user_id=admin.user_id, role=role),
            metadata=owner.metadata,
        )

    admin = await svc.join(owner, "admin")
    person, _, token = await invited(svc, admin, role="admin")
    await with_role(admin, "editor")
    assert await refused(accept(svc, person, token)) == INVALID
    await with_role(admin, "admin")
    assert (await preview(svc, token)).role == "admin"
    await svc.workspaces.RemoveMember(
        RemoveMemberRequest(workspace_id=owner.workspace_id, user_id=admin.user_id), metadata=owner.metadata
    )
    assert await refused(accept(svc, person, token)) == INVALID
    assert await refused(preview(svc, token)) == INVALID


async def test_needs_a_role_that_is_still_there(svc: UserSvc, owner: Person):
    person, invitation, _ = await invited(svc, owner)
    await change(svc, invitation, role="gone")
    token = await svc.token_of(invitation)
    outcome = (StatusCode.FAILED_PRECONDITION, "INVITATION_ROLE_GONE")
    assert await refused(accept(svc, person, token)) == outcome


async def test_domains_count_when_it_is_accepted_too(svc: UserSvc, owner: Person):
    person, _, token = await invited(svc, owner)
    await set_workspace(svc, owner, allowed_email_domains=["example.com"])
    outcome = await refused(accept(svc, person, token))
    assert outcome == (StatusCode.FAILED_PRECONDITION, "EMAIL_DOMAIN_REFUSED")
    assert await members_of(svc, owner) == [owner.user_id], "who is a member already stays"


async def test_changes_nothing_for_who_is_a_member_already(svc: UserSvc, owner: Person):
    person, _, token = await invited(svc, owner, role="admin")
    await svc.admit(person, owner)  # acquainted
    await svc.add(owner, person, "viewer")
    outcome = await refused(accept(svc, person, token))
    assert outcome == (StatusCode.ALREADY_EXISTS, "MEMBER_EXISTS")
    assert person.user_id in await members_of(svc, owner, "viewer")


async def test_does_not_bring_back_who_was_removed(svc: UserSvc, owner: Person):
    person, _, token = await invited(svc, owner)
    await accept(svc, person, token)
    await svc.workspaces.RemoveMember(
        RemoveMemberRequest(workspace_id=owner.workspace_id, user_id=person.user_id),
        metadata=owner.metadata,
    )
    assert await refused(accept(svc, person, token)) == INVALID


async def test_who_holds_the_link_can_decline(svc: UserSvc, owner: Person):
    person, invitation, token = await invited(svc, owner)
    for _ in range(2):
        await decline(svc, token)
    assert (await get(svc, owner, invitation.invitation_id)).state == Invitation.DECLINED
    assert await refused(accept(svc, person, token)) == INVALID
    person, _, token = await invited(svc, owner)
    await accept(svc, person, token)
    assert await refused(decline(svc, token)) == INVALID


def signing_up(invitation: Invitation, token: str, **more: str) -> CreateUserRequest:
    values = {
        "user_id": new_id(),
        "workspace_id": new_id(),
        "email": invitation.email,
        "display_name": "Ada",
        "invitation_token": token,
    }
    return CreateUserRequest(**{**values, **more})


async def test_signs_up_once_without_a_workspace_of_ones_own(svc: UserSvc, owner: Person):
    invitation = await svc.invite(owner, role="editor")
    token = await svc.token_of(invitation)
    request = signing_up(invitation, token)
    created = await svc.internal.CreateUser(request, metadata=svc.calling_as("auth"))
    assert created.workspace.workspace_id == owner.workspace_id
    assert await svc.internal.CreateUser(request, metadata=svc.calling_as("auth")) == created
    bearer = svc.identity.token(sub=request.user_id, wid=owner.workspace_id)
    listed = await svc.workspaces.ListWorkspaces(
        ListWorkspacesRequest(), metadata=(("authorization", f"Bearer {bearer}"),)
    )
    assert [workspace.workspace_id for workspace in listed.workspaces] == [owner.workspace_id]
    outcome = await refused(
        svc.internal.CreateUser(signing_up(invitation, token), metadata=svc.calling_as("auth"))
    )
    assert outcome == INVALID
    assert len(await members_of(svc, owner)) == 2


async def test_signs_up_nobody_else(svc: UserSvc, owner: Person):
    invitation = await svc.invite(owner)
    token = await svc.token_of(invitation)
    request = signing_up(invitation, token, email="other@example.org")
    outcome = await refused(svc.internal.CreateUser(request, metadata=svc.calling_as("auth")))
    assert outcome == (StatusCode.PERMISSION_DENIED, "INVITATION_FOR_ANOTHER")
    async with svc.sessions() as session:
        assert await session.get(models.User, request.user_id) is None, "all or nothing"


async def test_a_sign_up_can_be_finished_the_other_way(svc: UserSvc, owner: Person):
    invitation = await svc.invite(owner)
    request = signing_up(invitation, await svc.token_of(invitation))
    await svc.internal.CreateUser(request, metadata=svc.calling_as("auth"))
    plain = CreateUserRequest()
    plain.CopyFrom(request)
    plain.invitation_token = ""
    created = await svc.internal.CreateUser(plain, metadata=svc.calling_as("auth"))
    assert created.workspace.workspace_id == request.workspace_id
    assert await svc.internal.CreateUser(plain, metadata=svc.calling_as("auth")) == created


async def test_an_unfinished_sign_up_leaves_the_invitation_open(svc: UserSvc, owner: Person):
    invitation = await svc.invite(owner)
    token = await svc.token_of(invitation)
    person = await svc.sign_up(invitation, token)
    version = (await rights_of(svc, owner)).version
    async with svc.sessions.begin() as session:
        await on_account_discarded(session, AccountDiscarded(user_id=person.user_id, workspace_id=new_id()))
    assert await members_of(svc, owner) == [owner.user_id]
    assert (await rights_of(svc, owner)).version == version + 1
    again = await svc.sign_up(invitation, token)
    assert again.user_id in await members_of(svc, owner)


@ROUNDS
async def test_accepted_or_revoked_but_not_both(svc: UserSvc, rounds: int):
    for _ in range(rounds):
        owner = await svc.person()  # one person sends 500 invitations in a day
        person, invitation, token = await invited(svc, owner)
        outcomes = await asyncio.gather(
            accept(svc, person, token), revoke(svc, owner, invitation), return_exceptions=True
        )
        failures = [reason_of(o) for o in outcomes if isinstance(o, grpc.aio.AioRpcError)]
        state = (await get(svc, owner, invitation.invitation_id)).state
        if failures == ["INVITATION_CLOSED"]:
            assert state == Invitation.ACCEPTED
            await accept(svc, person, token)
        else:
            assert (failures, state) == (["INVITATION_INVALID"], Invitation.REVOKED)
            assert await refused(accept(svc, person, token)) == INVALID


@ROUNDS
async def test_accepted_twice_at_once_makes_one_member(svc: UserSvc, rounds: int):
    for _ in range(rounds):
        owner = await svc.person()
        person, _, token = await invited(svc, owner)
        answers = await asyncio.gather(*(accept(svc, person, token) for _ in range(3)))
        assert answers[0] == answers[1] == answers[2]
        assert await members_of(svc, owner) == [owner.user_id, person.user_id]


@ROUNDS
async def test_two_sign_ups_at_once_use_it_once(svc: UserSvc, rounds: int):
    for _ in range(rounds):
        owner = await svc.person()
        invitation = await svc.invite(owner)
        token = await svc.token_of(invitation)
        outcomes = await asyncio.gather(
            *(svc.sign_up(invitation, token) for _ in range(2)), return_exceptions=True
        )
        failures = [reason_of(o) for o in outcomes if isinstance(o, grpc.aio.AioRpcError)]
        assert failures == ["INVITATION_INVALID"]
        assert len(await members_of(svc, owner)) == 2
