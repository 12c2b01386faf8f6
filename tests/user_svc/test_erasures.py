"""Deleting people: nothing is left of them, also when services are down meanwhile, and the receipt says so."""

import asyncio
import json
from base64 import urlsafe_b64decode
from collections.abc import Mapping
from datetime import UTC, timedelta

import grpc
import jwt
import pytest
from google.api.httpbody_pb2 import HttpBody
from grpc import StatusCode
from meshboard.auth.v1.account_service_pb2 import ChangeEmailRequest, RequestPasswordResetRequest
from meshboard.auth.v1.auth_service_pb2 import RefreshRequest, SignInResponse, SignUpResponse
from meshboard.auth.v1.internal_auth_service_pb2 import CheckSessionRequest, ListRevocationsRequest
from meshboard.user.v1.avatar_service_pb2 import SetAvatarRequest
from meshboard.user.v1.erasure_service_pb2 import (
    DeleteManagedUserRequest,
    DeleteManagedUserResponse,
    DeleteUserRequest,
    DeleteUserResponse,
    Erasure,
    GetErasureRequest,
    GetManagedErasureRequest,
)
from meshboard.user.v1.events_pb2 import UserErased, UserErasureRequested
from meshboard.user.v1.internal_user_service_pb2 import GetRightsRequest
from meshboard.user.v1.invitation_service_pb2 import CreateInvitationRequest, ListInvitationsRequest
from meshboard.user.v1.profile_pb2 import Profile
from meshboard.user.v1.profile_service_pb2 import UpdateProfileRequest
from meshboard.user.v1.user_service_pb2 import GetMeRequest
from meshboard.user.v1.workspace_service_pb2 import (
    AddMemberRequest,
    CreateWorkspaceRequest,
    ListMembersRequest,
    ListWorkspacesRequest,
    UpdateMemberRequest,
)
from sqlalchemy import func, select

from services.auth_svc.models import Account, AuditEntryRow, ErasedUser, Session
from services.chassis import outbox
from services.chassis.db import GrantRow, InboxRow, OutboxRow
from services.user_svc.erasures import RECEIPT_TYPE, ask_again
from services.user_svc.models import Avatar, ErasureRow, Member, ProfileRow, User, Workspace
from tests.auth_svc.conftest import bearer, claims_of, new_email
from tests.conditions import eventually
from tests.harness import new_id, refused, status_of
from tests.user_svc.conftest import LONG
from tests.user_svc.people import People, answering, from_elsewhere
from tests.user_svc.test_pictures import PNG

pytestmark = pytest.mark.xdist_group("people")

Signed = SignUpResponse | SignInResponse


async def delete(people: People, person: Signed, user_id: str = "") -> DeleteUserResponse:
    request = DeleteUserRequest(user_id=user_id or person.user.user_id)
    return await people.erasures.DeleteUser(request, metadata=bearer(person.access_token))


async def delete_managed(people: People, admin: Signed, user_id: str) -> DeleteManagedUserResponse:
    request = DeleteManagedUserRequest(workspace_id=admin.workspace.workspace_id, user_id=user_id)
    return await people.erasures.DeleteManagedUser(request, metadata=bearer(admin.access_token))


async def join(people: People, owner: Signed, person: Signed, role: str = "viewer") -> None:
    await people.services.admit(
        owner.workspace.workspace_id,
        bearer(owner.access_token),
        person.user.user_id,
        person.access_token,
        role,
    )


async def grant(people: People, service: str, user_id: str, workspace_id: str) -> None:
    async with people.others[service].begin() as session:
        session.add(
            GrantRow(
                workspace_id=workspace_id,
                grant_id=new_id(),
                resource_type="dashboard",
                resource_id=new_id(),
                subject_type="user",
                subject_id=user_id,
                role="editor",
                effect="ALLOW",
                creator_id=new_id(),
            )
        )


async def grants_of(people: People, service: str, user_id: str) -> int:
    async with people.others[service]() as session:
        found = await session.scalar(select(func.count()).where(GrantRow.subject_id == user_id))
    return found or 0


def read_receipt(people: People, receipt: str) -> Mapping[str, object]:
    """What a receipt says, verified with the public key of user_svc."""
    assert jwt.get_unverified_header(receipt) == {"alg": "ES256", "typ": RECEIPT_TYPE, "kid": "user"}
    key = (people.services.keys / "user.pub.pem").read_text()
    claims: Mapping[str, object] = jwt.decode(receipt, key, ["ES256"], issuer="user")
    return claims


async def live(people: People, person: SignUpResponse, owner: Signed) -> None:
    """Leaves traces everywhere."""
    user_id, metadata = person.user.user_id, bearer(person.access_token)
    await join(people, owner, person)
    await people.profiles.UpdateProfile(
        UpdateProfileRequest(profile=Profile(locale="de-CH")), metadata=metadata
    )
    await people.avatars.SetAvatar(SetAvatarRequest(image=HttpBody(data=PNG)), metadata=metadata)
    await people.services.sign_in(person.user.email)
    await people.services.accounts.ChangeEmail(
        ChangeEmailRequest(new_email=new_email()), metadata=(*metadata, *from_elsewhere())
    )
    for service in people.others:
        await grant(people, service, user_id, owner.workspace.workspace_id)
        await grant(people, service, user_id, new_id())


async def test_nothing_is_left_and_the_receipt_says_so(people: People):
    owner, person = await people.sign_up(), await people.sign_up()
    user_id, email = person.user.user_id, person.user.email
    await live(people, person, owner)
    begun = await delete(people, person)
    assert begun.erasure.state == Erasure.RUNNING
    async with (
        answering(people.parts, "dashboard", people.parts.postgres_url("dashboard")),
        answering(people.parts, "analytics", people.parts.postgres_url("analytics")),
    ):
        done = await people.until_done(begun.erasure, begun.erasure_token)
    counts = {each.service: dict(each.erased) for each in done.services}
    assert counts["dashboard"] == counts["analytics"] == {"grants": 2}
    assert counts["user"] == {
        "users": 1,
        "memberships": 0,
        "profiles": 1,
        "avatars": 1,
        "invitations": 1,
    }
    assert counts["auth"]["accounts"] == 1
    assert counts["auth"]["sessions"] == 2
    assert counts["auth"]["email_changes"] == 1
    assert counts["auth"]["tickets"] >= 3

    claims = read_receipt(people, done.receipt)
    assert (claims["sub"], claims["jti"]) == (user_id, begun.erasure.erasure_id)
    assert claims["services"] == {
        each.service: {
            "completed_at": each.complete_time.seconds,
            "erased": dict(each.erased),
            "kept": dict(each.kept),
        }
        for each in done.services
    }
    said = urlsafe_b64decode(done.receipt.split(".")[1] + "==").decode()
    assert email not in said
    assert "Ada" not in said

    async with people.services.user_sessions() as session:
        for row in (
            await session.get(User, user_id),
            await session.get(ProfileRow, user_id),
            await session.get(Avatar, user_id),
            await session.get(Workspace, person.workspace.workspace_id),
            await session.scalar(select(Member).where(Member.user_id == user_id)),
        ):
            assert row is None
    async with people.services.sessions() as session:
        assert await session.get(Account, user_id) is None
        assert await session.scalar(select(Session).where(Session.user_id == user_id)) is None
        entries = await session.scalars(select(AuditEntryRow).where(AuditEntryRow.subject_id == user_id))
        kinds = {entry.kind for entry in entries}
    assert {"user.erasure_requested", "member.removed"} <= kinds
    for service in people.others:
        assert await grants_of(people, service, user_id) == 0


async def test_every_right_ends_at_once(people: People):
    owner, person = await people.sign_up(), await people.sign_up()
    await join(people, owner, person)
    session_id = claims_of(person.access_token)["sid"]
    begun = await delete(people, person)
    for workspace in (owner.workspace, person.workspace):
        request = GetRightsRequest(user_id=person.user.user_id, workspace_id=workspace.workspace_id)
        outcome = await refused(
            people.internal_users.GetRights(request, metadata=people.calling_as("dashboard", "user"))
        )
        assert outcome == (StatusCode.NOT_FOUND, "WORKSPACE_NOT_FOUND")

    async def signed_out() -> bool:
        try:
            await people.services.users.GetMe(GetMeRequest(), metadata=bearer(person.access_token))
        except grpc.aio.AioRpcError as failure:
            return failure.code() is StatusCode.UNAUTHENTICATED
        return False

    await eventually(signed_out, seconds=5)
    metadata = people.calling_as("dashboard", "auth")
    listed = await people.services.internal_auth.ListRevocations(ListRevocationsRequest(), metadata=metadata)
    assert session_id in {each.session_id for each in listed.revocations}
    alive = await people.services.internal_auth.CheckSession(
        CheckSessionRequest(session_id=session_id), metadata=metadata
    )
    assert not alive.alive
    assert await refused(people.services.sign_in(person.user.email)) == (
        StatusCode.UNAUTHENTICATED,
        "CREDENTIALS_WRONG",
    )
    refresh = RefreshRequest(refresh_token=person.refresh_token, refresh_key=person.refresh_key)
    assert await refused(people.services.auth.Refresh(refresh)) == (
        StatusCode.UNAUTHENTICATED,
        "REFRESH_TOKEN_INVALID",
    )
    members = await people.services.workspaces.ListMembers(
        ListMembersRequest(workspace_id=owner.workspace.workspace_id), metadata=bearer(owner.access_token)
    )
    assert [member.user.user_id for member in members.members] == [owner.user.user_id]
    assert (await people.erasure(begun.erasure, begun.erasure_token)).receipt == ""


async def test_a_service_that_is_down_delays_and_loses_nothing(people: People):
    person = await people.sign_up()
    await grant(people, "analytics", person.user.user_id, new_id())
    begun = await delete(people, person)
    url = people.parts.postgres_url

    async def done_by() -> set[str]:
        erasure = await people.erasure(begun.erasure, begun.erasure_token)
        return {each.service for each in erasure.services}

    async def all_but_analytics() -> bool:
        return await done_by() == {"auth", "dashboard", "user"}

    async with answering(people.parts, "dashboard", url("dashboard")):
        await eventually(all_but_analytics)
    waiting = await people.erasure(begun.erasure, begun.erasure_token)
    assert (waiting.state, waiting.receipt) == (Erasure.RUNNING, "")
    assert await grants_of(people, "analytics", person.user.user_id) == 1
    async with answering(people.parts, "analytics", url("analytics")):
        await people.until_done(begun.erasure, begun.erasure_token)
    assert await grants_of(people, "analytics", person.user.user_id) == 0


async def test_what_comes_twice_changes_nothing(people: People):
    person = await people.sign_up()
    begun = await delete(people, person)
    url = people.parts.postgres_url
    async with (
        answering(people.parts, "dashboard", url("dashboard")),
        answering(people.parts, "analytics", url("analytics")),
    ):
        done = await people.until_done(begun.erasure, begun.erasure_token)
        again = UserErasureRequested(
            erasure_id=begun.erasure.erasure_id, user_id=person.user.user_id, time=begun.erasure.create_time
        )
        async with people.services.user_sessions.begin() as session:
            event_id = outbox.add(session, again)

        async def answered() -> bool:
            heard = select(InboxRow).where(InboxRow.event_id == event_id)
            for sessions in (
                people.services.sessions,
                people.services.user_sessions,
                *people.others.values(),
            ):
                async with sessions() as each:
                    if await each.scalar(heard) is None:
                        return False
            async with people.services.user_sessions() as session:
                published = await session.scalar(
                    select(func.count()).where(
                        OutboxRow.subject == UserErased.DESCRIPTOR.full_name, OutboxRow.publish_time.is_(None)
                    )
                )
            return not published

        await eventually(answered)
    assert await people.erasure(begun.erasure, begun.erasure_token) == done


async def test_who_has_not_answered_is_asked_again_after_an_hour(people: People):
    person = await people.sign_up()
    begun = await delete(people, person)
    sessions, erasure_id = people.services.user_sessions, begun.erasure.erasure_id

    async def requests() -> int:
        subject = OutboxRow.subject == UserErasureRequested.DESCRIPTOR.full_name
        async with sessions() as session:
            payloads = await session.scalars(select(OutboxRow.payload).where(subject))
        asked = [UserErasureRequested.FromString(payload) for payload in payloads]
        return sum(event.erasure_id == erasure_id for event in asked)

    begin = begun.erasure.create_time.ToDatetime(UTC)
    await ask_again(sessions, begin + timedelta(minutes=59))
    assert await requests() == 1
    assert await ask_again(sessions, begin + timedelta(minutes=61)) >= 1
    assert await requests() == 2
    async with (
        answering(people.parts, "dashboard", people.parts.postgres_url("dashboard")),
        answering(people.parts, "analytics", people.parts.postgres_url("analytics")),
    ):
        await people.until_done(begun.erasure, begun.erasure_token)
    await ask_again(sessions, begin + timedelta(days=30))
    assert await requests() == 2


async def test_the_last_owner_stays_until_somebody_else_is_one(people: People):
    owner, other = await people.sign_up(), await people.sign_up()
    await join(people, owner, other)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await delete(people, owner)
    (detail,) = status_of(failure.value).details
    assert owner.workspace.workspace_id.encode() in detail.value
    assert await refused(delete(people, owner)) == (StatusCode.FAILED_PRECONDITION, "LAST_OWNER")
    await people.services.users.GetMe(GetMeRequest(), metadata=bearer(owner.access_token))
    await people.services.workspaces.UpdateMember(
        UpdateMemberRequest(
            workspace_id=owner.workspace.workspace_id, user_id=other.user.user_id, role="owner"
        ),
        metadata=bearer(owner.access_token),
    )
    await delete(people, owner)
    async with people.services.user_sessions() as session:
        assert await session.get(Workspace, owner.workspace.workspace_id) is not None


async def test_a_new_user_of_the_address_inherits_nothing(people: People):
    owner, person = await people.sign_up(), await people.sign_up()
    email = person.user.email
    await live(people, person, owner)
    other = await people.sign_up()
    await people.services.invitations.CreateInvitation(
        CreateInvitationRequest(workspace_id=other.workspace.workspace_id, email=email),
        metadata=bearer(other.access_token),
    )
    for _ in range(20):
        if (await refused(people.services.sign_in(email, "something else")))[1] == "SIGN_IN_DELAYED":
            break
    else:
        raise AssertionError("nobody is slowed down")
    await delete(people, person)

    async def free() -> bool:
        async with people.services.sessions() as session:
            return await session.get(ErasedUser, person.user.user_id) is not None

    await eventually(free)
    newcomer = await people.sign_up(email)
    assert newcomer.user.user_id != person.user.user_id
    outcome = await refused(people.services.sign_in(email, "something else"))
    assert outcome == (StatusCode.UNAUTHENTICATED, "CREDENTIALS_WRONG")
    await people.services.sign_in(email)  # the first failure is free
    mine = await people.services.workspaces.ListWorkspaces(
        ListWorkspacesRequest(), metadata=bearer(newcomer.access_token)
    )
    assert [each.workspace_id for each in mine.workspaces] == [newcomer.workspace.workspace_id]
    invited = await people.services.invitations.ListInvitations(
        ListInvitationsRequest(workspace_id=other.workspace.workspace_id),
        metadata=bearer(other.access_token),
    )
    assert not invited.invitations
    me = await people.services.users.GetMe(GetMeRequest(), metadata=bearer(newcomer.access_token))
    assert (me.user.avatar_url, me.profile.etag) == ("", "0")
    for service in people.others:
        assert await grants_of(people, service, newcomer.user.user_id) == 0
    async with people.services.sessions() as session:
        entries = await session.scalars(
            select(AuditEntryRow.kind).where(AuditEntryRow.subject_id == newcomer.user.user_id)
        )
    assert "email_change.requested" not in list(entries)


async def test_mails_that_wait_are_not_sent(people: People):
    person = await people.sign_up()
    await people.mailbox.mail(person.user.email, "Confirm your address")
    people.mailbox.refuse = "451 later"
    try:
        await people.services.accounts.RequestPasswordReset(
            RequestPasswordResetRequest(email=person.user.email), metadata=from_elsewhere()
        )
        await people.services.accounts.ChangeEmail(
            ChangeEmailRequest(new_email=new_email()),
            metadata=(*bearer(person.access_token), *from_elsewhere()),
        )
        begun = await delete(people, person)

        async def erased() -> bool:
            erasure = await people.erasure(begun.erasure, begun.erasure_token)
            return any(each.service == "auth" for each in erasure.services)

        await eventually(erased)
        erasure = await people.erasure(begun.erasure, begun.erasure_token)
    finally:
        people.mailbox.refuse = ""
    (of_auth,) = [each for each in erasure.services if each.service == "auth"]
    assert of_auth.erased["mails"] >= 2


async def test_managed_users_are_deleted_by_admins(people: People):
    owner, emails = await people.sign_up(), [new_email(), new_email()]
    managed = (await people.make(owner, "viewer", emails[0])).user
    await people.make(owner, "admin", emails[1])
    other_owner = (await people.make(owner, "owner")).user
    admin = await people.choose_password(emails[1])
    viewer = await people.choose_password(emails[0])
    assert await refused(delete_managed(people, viewer, admin.user.user_id)) == (
        StatusCode.PERMISSION_DENIED,
        "PERMISSION_MISSING",
    )
    for user_id in (owner.user.user_id, new_id()):
        assert await refused(delete_managed(people, admin, user_id)) == (
            StatusCode.NOT_FOUND,
            "USER_NOT_FOUND",
        )
    assert await refused(delete_managed(people, admin, other_owner.user_id)) == (
        StatusCode.PERMISSION_DENIED,
        "OWNER_ROLE_RESERVED",
    )
    begun = await delete_managed(people, admin, managed.user_id)
    again = await delete_managed(people, admin, managed.user_id)
    assert again.erasure.erasure_id == begun.erasure.erasure_id

    request = GetManagedErasureRequest(
        workspace_id=owner.workspace.workspace_id, erasure_id=begun.erasure.erasure_id
    )
    found = await people.erasures.GetManagedErasure(request, metadata=bearer(owner.access_token))
    assert found.erasure.user_id == managed.user_id
    stranger = await people.sign_up()
    request.workspace_id = stranger.workspace.workspace_id
    outcome = await refused(
        people.erasures.GetManagedErasure(request, metadata=bearer(stranger.access_token))
    )
    assert outcome == (StatusCode.NOT_FOUND, "ERASURE_NOT_FOUND")


async def test_is_for_oneself_alone(people: People):
    person, other = await people.sign_up(), await people.sign_up()
    for user_id in (other.user.user_id, new_id()):
        assert await refused(delete(people, person, user_id)) == (StatusCode.NOT_FOUND, "USER_NOT_FOUND")


@pytest.mark.parametrize("rounds", [10, LONG])
async def test_who_is_made_a_member_meanwhile_is_none_in_the_end(people: People, rounds: int):
    # One owner has a token for ten minutes, and 500 invitations a day.
    for start in range(0, rounds, 100):
        await _make_members_meanwhile(people, min(100, rounds - start))


async def _make_members_meanwhile(people: People, rounds: int) -> None:
    owner = await people.sign_up()
    created = await people.services.workspaces.CreateWorkspace(
        CreateWorkspaceRequest(title="Second"), metadata=bearer(owner.access_token)
    )
    for _ in range(rounds):
        person = await people.sign_up()
        await join(people, owner, person)
        adding = AddMemberRequest(
            workspace_id=created.workspace.workspace_id, user_id=person.user.user_id, role="viewer"
        )
        deleted, added = await asyncio.gather(
            delete(people, person),
            people.services.workspaces.AddMember(adding, metadata=bearer(owner.access_token)),
            return_exceptions=True,
        )
        assert isinstance(deleted, DeleteUserResponse)
        if isinstance(added, grpc.aio.AioRpcError):
            assert added.code() is StatusCode.NOT_FOUND

        async def gone(user_id: str = person.user.user_id) -> bool:
            async with people.services.user_sessions() as session:
                return await session.get(User, user_id) is None

        await eventually(gone)
    for workspace in (owner.workspace, created.workspace):
        members = await people.services.workspaces.ListMembers(
            ListMembersRequest(workspace_id=workspace.workspace_id), metadata=bearer(owner.access_token)
        )
        assert [member.user.user_id for member in members.members] == [owner.user.user_id]


async def test_of_several_calls_one_begins_it_and_the_last_token_counts(people: People):
    person = await people.sign_up()
    answers = await asyncio.gather(*(delete(people, person) for _ in range(5)), return_exceptions=True)
    begun = [answer for answer in answers if isinstance(answer, DeleteUserResponse)]
    assert len({answer.erasure.erasure_id for answer in begun}) == 1
    tokens = {answer.erasure_token for answer in begun}
    assert len(tokens) == len(begun)
    found = await asyncio.gather(
        *(people.erasure(begun[0].erasure, token) for token in tokens), return_exceptions=True
    )
    assert sum(isinstance(each, Erasure) for each in found) == 1


async def test_the_token_is_kept_as_a_hash_and_a_wrong_one_tells_nothing(people: People):
    person = await people.sign_up()
    begun = await delete(people, person)
    async with people.services.user_sessions() as session:
        row = await session.get_one(ErasureRow, begun.erasure.erasure_id)
        assert row.token_hash
        assert begun.erasure_token.encode() not in row.token_hash
        events = await session.scalars(select(OutboxRow.payload))
        assert not any(begun.erasure_token.encode() in payload for payload in events)
    for erasure_id, token in (
        (begun.erasure.erasure_id, "mbe_" + "A" * 43),
        (new_id(), begun.erasure_token),
    ):
        request = GetErasureRequest(erasure_id=erasure_id, erasure_token=token)
        assert await refused(people.erasures.GetErasure(request)) == (
            StatusCode.NOT_FOUND,
            "ERASURE_NOT_FOUND",
        )


def test_receipts_are_no_tokens():
    assert RECEIPT_TYPE not in json.dumps(["at+jwt", "mesh+jwt"])
