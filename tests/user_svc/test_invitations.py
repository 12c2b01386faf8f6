from datetime import UTC, datetime, timedelta
from typing import Any

from grpc import StatusCode
from meshboard.user.v1.events_pb2 import InvitationCreated, InvitationResent, InvitationRevoked
from meshboard.user.v1.invitation_pb2 import Invitation
from meshboard.user.v1.invitation_service_pb2 import (
    GetInvitationRequest,
    ListInvitationsRequest,
    PreviewInvitationRequest,
    ResendInvitationRequest,
    RevokeInvitationRequest,
)
from meshboard.user.v1.workspace_pb2 import Workspace
from meshboard.user.v1.workspace_service_pb2 import UpdateWorkspaceRequest
from sqlalchemy import select, update

from services.chassis.db import OutboxRow
from services.chassis.times import timestamp_of
from services.user_svc import models
from services.user_svc.expirations import forget_invitations
from tests.harness import new_id, refused
from tests.user_svc.conftest import Person, UserSvc
from tests.user_svc.test_create_team import create

INVALID = (StatusCode.NOT_FOUND, "INVITATION_INVALID")


async def get(svc: UserSvc, person: Person, invitation_id: str) -> Invitation:
    request = GetInvitationRequest(workspace_id=person.workspace_id, invitation_id=invitation_id)
    return (await svc.invitations.GetInvitation(request, metadata=person.metadata)).invitation


async def resend(svc: UserSvc, person: Person, invitation: Invitation) -> Invitation:
    request = ResendInvitationRequest(
        workspace_id=person.workspace_id, invitation_id=invitation.invitation_id
    )
    return (await svc.invitations.ResendInvitation(request, metadata=person.metadata)).invitation


async def revoke(svc: UserSvc, person: Person, invitation: Invitation) -> None:
    request = RevokeInvitationRequest(
        workspace_id=person.workspace_id, invitation_id=invitation.invitation_id
    )
    await svc.invitations.RevokeInvitation(request, metadata=person.metadata)


async def preview(svc: UserSvc, token: str) -> Any:
    return await svc.invitations.PreviewInvitation(PreviewInvitationRequest(token=token))


async def change(svc: UserSvc, invitation: Invitation, **values: Any) -> None:
    """Changes the row behind the service's back."""
    async with svc.sessions.begin() as session:
        await session.execute(
            update(models.Invitation)
            .where(models.Invitation.invitation_id == invitation.invitation_id)
            .values(**values)
        )


async def a_minute_later(svc: UserSvc, invitation: Invitation) -> None:
    await change(svc, invitation, send_time=datetime.now(UTC) - timedelta(seconds=61))


def ahead(**more: float) -> Any:
    return timestamp_of(datetime.now(UTC) + timedelta(**more))


async def set_workspace(svc: UserSvc, owner: Person, **fields: Any) -> None:
    workspace = Workspace(workspace_id=owner.workspace_id, **fields)
    await svc.workspaces.UpdateWorkspace(UpdateWorkspaceRequest(workspace=workspace), metadata=owner.metadata)


async def test_invites_and_tells_nobody_the_link(svc: UserSvc, owner: Person):
    team = await create(svc, owner, "T")
    await set_workspace(svc, owner, default_role="editor", title="Research")
    invitation = await svc.invite(owner, team_ids=[team.team_id, team.team_id.upper()])
    assert (invitation.role, invitation.state) == ("editor", Invitation.PENDING)
    assert list(invitation.team_ids) == [team.team_id]
    assert invitation.inviter_id == owner.user_id
    lifetime = invitation.expire_time.ToDatetime() - invitation.create_time.ToDatetime()
    assert lifetime == timedelta(days=7)
    assert await get(svc, owner, invitation.invitation_id) == invitation
    token = await svc.token_of(invitation)
    shown = await preview(svc, token)
    assert (shown.email, shown.workspace_title, shown.inviter_name, shown.role) == (
        invitation.email,
        "Research",
        "Grace",
        "editor",
    )
    async with svc.sessions() as session:
        rows = (await session.scalars(select(OutboxRow))).all()
        stored = await session.get_one(models.Invitation, (invitation.workspace_id, invitation.invitation_id))
    assert InvitationCreated(invitation=invitation) in [
        InvitationCreated.FromString(row.payload)
        for row in rows
        if row.subject == InvitationCreated.DESCRIPTOR.full_name
    ]
    assert not any(token.encode() in row.payload for row in rows)
    assert token not in str(vars(stored))


async def test_a_repeat_gives_the_first_and_an_address_is_invited_once(svc: UserSvc, owner: Person):
    email = f"{new_id()}@example.org"
    first = await svc.invite(owner, email, request_id="once")
    assert await svc.invite(owner, email, request_id="once") == first
    for again in (email, email.upper()):
        outcome = await refused(svc.invite(owner, again))
        assert outcome == (StatusCode.ALREADY_EXISTS, "INVITATION_EXISTS")
    other = await svc.person()
    assert (await svc.invite(other, email)).invitation_id != first.invitation_id
    await revoke(svc, owner, first)
    assert (await svc.invite(owner, email)).invitation_id != first.invitation_id


async def test_gives_no_more_than_who_sends_it_has(svc: UserSvc, owner: Person):
    admin, editor = await svc.join(owner, "admin"), await svc.join(owner, "editor")
    foreign = await create(svc, await svc.person(), "T")
    for person, more, outcome in (
        (editor, {}, (StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")),
        (admin, {"role": "owner"}, (StatusCode.PERMISSION_DENIED, "OWNER_ROLE_RESERVED")),
        (admin, {"role": "king"}, (StatusCode.INVALID_ARGUMENT, "ROLE_UNKNOWN")),
        (admin, {"team_ids": [foreign.team_id]}, (StatusCode.NOT_FOUND, "TEAM_NOT_FOUND")),
        (admin, {"expire_time": ahead(days=31)}, (StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")),
        (admin, {"expire_time": ahead(days=-1)}, (StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")),
        (admin, {"email": owner.email}, (StatusCode.ALREADY_EXISTS, "MEMBER_EXISTS")),
        (admin, {"email": "nobody"}, (StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")),
    ):
        assert await refused(svc.invite(person, **more)) == outcome
    assert (await svc.invite(admin, role="admin")).role == "admin"
    assert (await svc.invite(owner, role="owner")).role == "owner"


async def test_says_the_same_of_addresses_with_an_account_and_without(svc: UserSvc, owner: Person):
    known, unknown = await svc.person(), f"{new_id()}@example.org"
    answers = [await svc.invite(owner, email, role="viewer") for email in (known.email, unknown)]
    for answer in answers:
        for name in ("invitation_id", "email", "create_time", "send_time", "expire_time"):
            answer.ClearField(name)
    assert answers[0] == answers[1]


async def test_only_allowed_domains_are_invited(svc: UserSvc, owner: Person):
    await set_workspace(svc, owner, allowed_email_domains=["example.org"])
    await svc.invite(owner, f"{new_id()}@EXAMPLE.org")
    for email in ("a@example.com", "a@sub.example.org", "a@example.org.evil.example"):
        outcome = await refused(svc.invite(owner, email))
        assert outcome == (StatusCode.FAILED_PRECONDITION, "EMAIL_DOMAIN_REFUSED")


async def test_lists_the_newest_first_by_state(svc: UserSvc, owner: Person):
    sent = [await svc.invite(owner) for _ in range(4)]
    await revoke(svc, owner, sent[1])
    await change(svc, sent[2], expire_time=datetime.now(UTC) - timedelta(seconds=1))

    async def listed(state: Any, token: str = "") -> list[str]:
        request = ListInvitationsRequest(
            workspace_id=owner.workspace_id, state=state, page_size=2, page_token=token
        )
        page = await svc.invitations.ListInvitations(request, metadata=owner.metadata)
        ids = [each.invitation_id for each in page.invitations]
        return ids + (await listed(state, page.next_page_token) if page.next_page_token else [])

    ids = [each.invitation_id for each in sent]
    assert await listed(Invitation.STATE_UNSPECIFIED) == ids[::-1]
    assert await listed(Invitation.PENDING) == [ids[3], ids[0]]
    assert await listed(Invitation.EXPIRED) == [ids[2]]
    assert await listed(Invitation.REVOKED) == [ids[1]]
    assert await listed(Invitation.ACCEPTED) == []
    stranger = await svc.person()
    outcome = await refused(get(svc, stranger, ids[0]))
    assert outcome == (StatusCode.NOT_FOUND, "INVITATION_NOT_FOUND")
    editor = await svc.join(owner, "editor")
    outcome = await refused(get(svc, editor, ids[0]))
    assert outcome == (StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")


async def test_a_new_link_ends_the_old_one(svc: UserSvc, owner: Person):
    admin = await svc.join(owner, "admin")
    invitation = await svc.invite(owner, expire_time=ahead(days=1))
    old = await svc.token_of(invitation)
    outcome = await refused(resend(svc, admin, invitation))
    assert outcome == (StatusCode.RESOURCE_EXHAUSTED, "INVITATION_DELAYED")
    await a_minute_later(svc, invitation)
    resent = await resend(svc, admin, invitation)
    assert resent.inviter_id == admin.user_id
    assert resent.expire_time.ToDatetime() - resent.send_time.ToDatetime() == timedelta(days=7)
    assert await refused(preview(svc, old)) == INVALID
    new = await svc.token_of(resent)
    assert (await preview(svc, new)).email == invitation.email
    async with svc.sessions() as session:
        rows = await session.scalars(
            select(OutboxRow.payload).where(OutboxRow.subject == InvitationResent.DESCRIPTOR.full_name)
        )
    about = InvitationResent(workspace_id=owner.workspace_id, invitation_id=invitation.invitation_id)
    assert [InvitationResent.FromString(row) for row in rows].count(about) == 1


async def test_an_expired_one_can_be_resent_or_replaced(svc: UserSvc, owner: Person):
    past = datetime.now(UTC) - timedelta(seconds=1)
    invitation = await svc.invite(owner)
    await change(svc, invitation, expire_time=past)
    assert (await get(svc, owner, invitation.invitation_id)).state == Invitation.EXPIRED
    assert await refused(svc.token_of(invitation)) == INVALID
    await a_minute_later(svc, invitation)
    assert (await resend(svc, owner, invitation)).state == Invitation.PENDING
    await change(svc, invitation, expire_time=past)
    replaced = await svc.invite(owner, invitation.email)
    assert (await get(svc, owner, invitation.invitation_id)).state == Invitation.EXPIRED
    assert replaced.state == Invitation.PENDING
    outcome = await refused(resend(svc, owner, invitation))
    assert outcome == (StatusCode.FAILED_PRECONDITION, "INVITATION_CLOSED")


async def test_what_is_revoked_holds_no_more(svc: UserSvc, owner: Person):
    invitation = await svc.invite(owner)
    token = await svc.token_of(invitation)
    for _ in range(2):
        await revoke(svc, owner, invitation)
    assert await refused(preview(svc, token)) == INVALID
    await a_minute_later(svc, invitation)
    outcome = await refused(resend(svc, owner, invitation))
    assert outcome == (StatusCode.FAILED_PRECONDITION, "INVITATION_CLOSED")
    accepted = await svc.invite(owner)
    await svc.sign_up(accepted, await svc.token_of(accepted))
    outcome = await refused(revoke(svc, owner, accepted))
    assert outcome == (StatusCode.FAILED_PRECONDITION, "INVITATION_CLOSED")
    async with svc.sessions() as session:
        rows = await session.scalars(
            select(OutboxRow.payload).where(OutboxRow.subject == InvitationRevoked.DESCRIPTOR.full_name)
        )
    about = InvitationRevoked(workspace_id=owner.workspace_id, invitation_id=invitation.invitation_id)
    assert [InvitationRevoked.FromString(row) for row in rows].count(about) == 1


async def test_one_person_does_not_mail_to_the_world(svc: UserSvc, owner: Person):
    now, admin = datetime.now(UTC), await svc.join(owner, "admin")
    async with svc.sessions.begin() as session:
        for _ in range(500):
            email = f"{new_id()}@example.org"
            session.add(
                models.Invitation(
                    workspace_id=owner.workspace_id,
                    invitation_id=new_id(),
                    email=email,
                    email_key=email,
                    role="viewer",
                    team_ids=[],
                    inviter_id=owner.user_id,
                    creator_id=owner.user_id,
                    create_time=now,
                    send_time=now,
                    expire_time=now + timedelta(days=7),
                )
            )
    outcome = await refused(svc.invite(owner))
    assert outcome == (StatusCode.RESOURCE_EXHAUSTED, "INVITATION_LIMIT")
    await svc.invite(admin)


async def test_addresses_are_forgotten_long_after_the_end(svc: UserSvc, owner: Person):
    old, fresh = await svc.invite(owner), await svc.invite(owner)
    await revoke(svc, owner, old)
    now = datetime.now(UTC)
    await change(svc, old, end_time=now - timedelta(days=31))
    await forget_invitations(svc.sessions, now)
    outcome = await refused(get(svc, owner, old.invitation_id))
    assert outcome == (StatusCode.NOT_FOUND, "INVITATION_NOT_FOUND")
    await get(svc, owner, fresh.invitation_id)
