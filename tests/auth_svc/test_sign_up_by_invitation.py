import asyncio
import re

import grpc
import pytest
from meshboard.auth.v1.account_service_pb2 import GetAccountRequest
from meshboard.auth.v1.auth_service_pb2 import SignUpRequest, SignUpResponse
from meshboard.auth.v1.events_pb2 import EmailVerified
from meshboard.auth.v1.internal_auth_service_pb2 import GetVerifiedEmailRequest
from meshboard.user.v1.invitation_service_pb2 import (
    AcceptInvitationRequest,
    CreateInvitationRequest,
    ResendInvitationRequest,
)
from meshboard.user.v1.workspace_service_pb2 import ListWorkspacesRequest, RemoveMemberRequest
from sqlalchemy import select, update

from services.auth_svc.models import Account
from services.chassis.db import OutboxRow
from services.user_svc.models import Invitation
from tests.auth_svc.conftest import PASSWORD, Services, bearer, from_elsewhere, new_email
from tests.auth_svc.machines import join, owner_of
from tests.conditions import eventually
from tests.harness import new_id, refused, service_metadata
from tests.mailbox import Mailbox

INVALID = (grpc.StatusCode.NOT_FOUND, "INVITATION_INVALID")


async def sign_up(services: Services, email: str, token: str, password: str = PASSWORD) -> SignUpResponse:
    request = SignUpRequest(email=email, password=password, display_name="Ada", invitation_token=token)
    return await services.auth.SignUp(request, metadata=from_elsewhere())


async def verified_email(services: Services, user_id: str) -> str:
    answer = await services.internal_auth.GetVerifiedEmail(
        GetVerifiedEmailRequest(user_id=user_id), metadata=service_metadata(services.keys, "user", "auth")
    )
    return answer.email


async def test_the_mailed_link_makes_a_member_with_a_verified_address(services: Services, mailbox: Mailbox):
    owner, email = await owner_of(services), new_email()
    await services.invitations.CreateInvitation(
        CreateInvitationRequest(workspace_id=owner.workspace_id, email=email, role="editor"),
        metadata=owner.metadata,
    )
    mail = await mailbox.mail(email, "You are invited to a workspace")
    assert "Ada" in mail.get_content()
    signed_up = await sign_up(services, email, await mailbox.token(email, "invitation"))
    assert signed_up.workspace.workspace_id == owner.workspace_id
    found = await services.accounts.GetAccount(GetAccountRequest(), metadata=bearer(signed_up.access_token))
    assert found.account.email_verified
    assert mailbox.of(email, "Confirm your address") == []
    listed = await services.workspaces.ListWorkspaces(
        ListWorkspacesRequest(), metadata=bearer(signed_up.access_token)
    )
    assert [each.workspace_id for each in listed.workspaces] == [owner.workspace_id]
    assert (await services.sign_in(email)).workspace.workspace_id == owner.workspace_id
    async with services.sessions() as session:
        rows = (await session.scalars(select(OutboxRow))).all()
    verified = [
        EmailVerified.FromString(row.payload).email
        for row in rows
        if row.subject == EmailVerified.DESCRIPTOR.full_name
    ]
    assert verified.count(email) == 1


async def test_a_resent_mail_has_another_link(services: Services, mailbox: Mailbox):
    owner, email = await owner_of(services), new_email()
    created = await services.invitations.CreateInvitation(
        CreateInvitationRequest(workspace_id=owner.workspace_id, email=email), metadata=owner.metadata
    )
    first = await mailbox.token(email, "invitation")
    invitation_id = created.invitation.invitation_id
    async with services.user_sessions.begin() as session:
        await session.execute(
            update(Invitation)
            .where(Invitation.invitation_id == invitation_id)
            .values(send_time=Invitation.create_time - (Invitation.expire_time - Invitation.create_time))
        )
    await services.invitations.ResendInvitation(
        ResendInvitationRequest(workspace_id=owner.workspace_id, invitation_id=invitation_id),
        metadata=owner.metadata,
    )
    second = await mailbox.token(email, "invitation", count=2)
    assert second != first
    assert await refused(sign_up(services, email, first)) == INVALID
    await sign_up(services, email, second)


async def test_the_token_is_for_its_address(services: Services):
    owner, email = await owner_of(services), new_email()
    token = await services.invite(owner.workspace_id, email, owner.metadata)
    known = owner.account.user.email
    for other in (new_email(), known):
        outcome = await refused(sign_up(services, other, token))
        assert outcome == (grpc.StatusCode.PERMISSION_DENIED, "INVITATION_FOR_ANOTHER")
    for forged in (token[:-1] + ("A" if token[-1] != "A" else "B"), "mbi_x"):
        assert await refused(sign_up(services, known, forged)) == INVALID
    async with services.sessions() as session:
        assert await session.scalar(select(Account).where(Account.email == email)) is None
    await sign_up(services, email, token)


async def test_two_at_once_make_one_account(services: Services):
    owner, email = await owner_of(services), new_email()
    token = await services.invite(owner.workspace_id, email, owner.metadata)
    answers = await asyncio.gather(
        *(sign_up(services, email, token) for _ in range(3)), return_exceptions=True
    )
    made = {answer.user.user_id for answer in answers if isinstance(answer, SignUpResponse)}
    assert len(made) == 1, answers


async def test_who_has_an_account_accepts_with_a_verified_address(services: Services, mailbox: Mailbox):
    owner, guest = await owner_of(services), await services.sign_up()
    email = guest.user.email
    token = await services.invite(owner.workspace_id, email, owner.metadata)
    taken = (grpc.StatusCode.ALREADY_EXISTS, "EMAIL_TAKEN")
    assert await refused(sign_up(services, email, token)) == taken
    accepting = AcceptInvitationRequest(token=token)
    outcome = await refused(
        services.invitations.AcceptInvitation(accepting, metadata=bearer(guest.access_token))
    )
    assert outcome == (grpc.StatusCode.FAILED_PRECONDITION, "EMAIL_UNVERIFIED")
    assert await verified_email(services, guest.user.user_id) == ""
    async with services.sessions.begin() as session:
        account = await session.get_one(Account, guest.user.user_id)
        account.verify_time = account.create_time
    assert await verified_email(services, guest.user.user_id) == email
    accepted = await services.invitations.AcceptInvitation(accepting, metadata=bearer(guest.access_token))
    assert accepted.workspace.workspace_id == owner.workspace_id
    outcome = await refused(verified_email(services, new_id()))
    assert outcome == (grpc.StatusCode.NOT_FOUND, "RESOURCE_NOT_FOUND")


async def test_the_link_stands_in_no_table(services: Services, mailbox: Mailbox):
    owner, email = await owner_of(services), new_email()
    await services.invitations.CreateInvitation(
        CreateInvitationRequest(workspace_id=owner.workspace_id, email=email), metadata=owner.metadata
    )
    token = await mailbox.token(email, "invitation")
    assert re.fullmatch(r"mbi_[\w-]{64}", token)
    for sessions in (services.sessions, services.user_sessions):
        async with sessions() as session:
            rows = (await session.scalars(select(OutboxRow))).all()
        assert not any(token.encode() in row.payload for row in rows)


async def test_a_removed_inviter_lets_nobody_in(services: Services):
    owner, email = await owner_of(services), new_email()
    admin = await join(services, owner, "admin")
    token = await services.invite(owner.workspace_id, email, admin.metadata)
    await services.workspaces.RemoveMember(
        RemoveMemberRequest(workspace_id=owner.workspace_id, user_id=admin.user_id),
        metadata=owner.metadata,
    )
    assert await refused(sign_up(services, email, token)) == INVALID


@pytest.mark.parametrize(
    "name", ["\u201cEve\u201d http://evil.example", "<a href=http://evil.example>Eve</a>"]
)
async def test_what_people_choose_cannot_break_the_mail(services: Services, mailbox: Mailbox, name: str):
    inviter = await services.auth.SignUp(
        SignUpRequest(email=new_email(), password=PASSWORD, display_name=name), metadata=from_elsewhere()
    )
    email = new_email()
    await services.invitations.CreateInvitation(
        CreateInvitationRequest(workspace_id=inviter.workspace.workspace_id, email=email),
        metadata=bearer(inviter.access_token),
    )
    mail = await mailbox.mail(email, "You are invited to a workspace")
    assert mail["subject"] == "You are invited to a workspace"

    async def one_link() -> bool:
        return len(re.findall(r"^http\S+$", mail.get_content(), flags=re.MULTILINE)) == 1

    await eventually(one_link)
