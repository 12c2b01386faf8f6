"""Accounts that admins make: they belong to the workspace as far as their admins are concerned, and to nobody else."""

import asyncio
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from grpc import StatusCode
from meshboard.auth.v1.auth_service_pb2 import SignInResponse, SignUpResponse
from meshboard.auth.v1.internal_account_service_pb2 import ReserveAccountRequest
from meshboard.user.v1.internal_user_service_pb2 import GetRightsRequest
from meshboard.user.v1.managed_user_service_pb2 import (
    DeactivateUserRequest,
    ReactivateUserRequest,
    UpdateManagedUserRequest,
)
from meshboard.user.v1.user_pb2 import User
from meshboard.user.v1.user_service_pb2 import GetMeRequest, GetUserRequest
from meshboard.user.v1.workspace_service_pb2 import (
    AddMemberRequest,
    CreateWorkspaceRequest,
    ListMembersRequest,
    ListWorkspacesRequest,
    RemoveMemberRequest,
    UpdateMemberRequest,
)
from sqlalchemy import select, update

from services.auth_svc.models import Account, AuditEntryRow
from services.auth_svc.reaper import reap
from tests.auth_svc.conftest import bearer, new_email
from tests.conditions import eventually
from tests.harness import new_id, refused
from tests.user_svc.conftest import LONG
from tests.user_svc.people import People

pytestmark = pytest.mark.xdist_group("people")

Signed = SignUpResponse | SignInResponse


async def rename(
    people: People, admin: Signed, user_id: str, name: str, *, etag: str = "", path: str = ""
) -> User:
    request = UpdateManagedUserRequest(
        workspace_id=admin.workspace.workspace_id,
        user=User(user_id=user_id, display_name=name, etag=etag),
        update_mask=FieldMask(paths=[path] if path else []),
    )
    return (await people.managed.UpdateManagedUser(request, metadata=bearer(admin.access_token))).user


async def deactivate(people: People, admin: Signed, user_id: str) -> User:
    request = DeactivateUserRequest(workspace_id=admin.workspace.workspace_id, user_id=user_id)
    return (await people.managed.DeactivateUser(request, metadata=bearer(admin.access_token))).user


async def reactivate(people: People, admin: Signed, user_id: str) -> User:
    request = ReactivateUserRequest(workspace_id=admin.workspace.workspace_id, user_id=user_id)
    return (await people.managed.ReactivateUser(request, metadata=bearer(admin.access_token))).user


async def until_settled(people: People, user: User) -> None:
    """Waits until auth_svc has heard of the state of the user."""

    async def settled() -> bool:
        async with people.services.sessions() as session:
            account = await session.get_one(Account, user.user_id)
        return account.state_time == user.update_time.ToDatetime(UTC)

    await eventually(settled)


async def rights_of(people: People, user_id: str, workspace_id: str) -> str:
    request = GetRightsRequest(user_id=user_id, workspace_id=workspace_id)
    answer = await people.internal_users.GetRights(request, metadata=people.calling_as("dashboard", "user"))
    return answer.rights.role


async def test_the_person_chooses_a_password_and_finds_the_workspace(people: People):
    admin, email = await people.sign_up(), new_email()
    member = await people.make(admin, "editor", email, display_name=" Grace  Hopper ")
    assert (member.role, member.user.email, member.user.display_name) == ("editor", email, "Grace Hopper")
    assert member.user.managing_workspace_id == admin.workspace.workspace_id
    assert await refused(people.services.sign_in(email)) == (
        StatusCode.UNAUTHENTICATED,
        "CREDENTIALS_WRONG",
    )
    signed_in = await people.choose_password(email)
    assert signed_in.user.user_id == member.user.user_id
    assert signed_in.workspace.workspace_id == admin.workspace.workspace_id
    mine = await people.services.workspaces.ListWorkspaces(
        ListWorkspacesRequest(), metadata=bearer(signed_in.access_token)
    )
    assert [each.workspace_id for each in mine.workspaces] == [admin.workspace.workspace_id]


async def test_the_first_link_works_for_days_and_once(people: People):
    admin, email = await people.sign_up(), new_email()
    await people.make(admin, email=email)
    mail = await people.mailbox.mail(email, "Your Meshboard account")
    assert "within 7 days" in mail.get_content()
    await people.choose_password(email)
    outcome = await refused(people.choose_password(email))
    assert outcome == (StatusCode.UNAUTHENTICATED, "LINK_INVALID")


async def test_a_repeat_returns_the_first(people: People):
    admin, email, request_id = await people.sign_up(), new_email(), new_id()
    members = await asyncio.gather(
        *(people.make(admin, email=email, request_id=request_id) for _ in range(5))
    )
    assert len({member.user.user_id for member in members}) == 1
    listed = await people.services.workspaces.ListMembers(
        ListMembersRequest(workspace_id=admin.workspace.workspace_id), metadata=bearer(admin.access_token)
    )
    assert len(listed.members) == 2
    await people.mailbox.mail(email, "Your Meshboard account")
    await people.choose_password(email)
    assert len(people.mailbox.of(email, "Your Meshboard account")) == 1


async def test_an_address_has_one_account(people: People):
    admin, other = await people.sign_up(), await people.sign_up()
    taken = (StatusCode.ALREADY_EXISTS, "EMAIL_TAKEN")
    assert await refused(people.make(admin, email=other.user.email.upper())) == taken
    member = await people.make(admin)
    for email in (member.user.email, other.user.email):
        assert await refused(people.make(admin, email=email)) == taken
        assert await refused(people.make(other, email=email)) == taken
    assert await refused(people.sign_up(member.user.email)) == taken
    same = new_email()
    outcomes = await asyncio.gather(
        *(people.make(each, email=same) for each in (admin, other) * 3), return_exceptions=True
    )
    assert sum(not isinstance(outcome, BaseException) for outcome in outcomes) == 1


async def test_a_reservation_that_nobody_confirms_is_cleared_away(people: People):
    email = new_email()
    request = ReserveAccountRequest(
        user_id=new_id(), workspace_id=new_id(), email=email, display_name="Grace"
    )
    metadata = people.calling_as("user", "auth")
    first = await people.internal_accounts.ReserveAccount(request, metadata=metadata)
    again = ReserveAccountRequest(**{**_fields(request), "user_id": new_id()})
    assert (await people.internal_accounts.ReserveAccount(again, metadata=metadata)) == first
    other = ReserveAccountRequest(**{**_fields(request), "workspace_id": new_id()})
    outcome = await refused(people.internal_accounts.ReserveAccount(other, metadata=metadata))
    assert outcome == (StatusCode.ALREADY_EXISTS, "EMAIL_TAKEN")
    outcome = await refused(
        people.internal_accounts.ReserveAccount(request, metadata=people.calling_as("dashboard", "auth"))
    )
    assert outcome == (StatusCode.PERMISSION_DENIED, "CALLER_NOT_ALLOWED")

    services, now = people.services, datetime.now(UTC)
    async with services.sessions.begin() as session:
        await session.execute(
            update(Account).where(Account.user_id == first.user_id).values(try_time=now - timedelta(hours=2))
        )
    await reap(services.sessions, services.auth_settings, now)
    await people.sign_up(email)


def _fields(request: ReserveAccountRequest) -> dict[str, str]:
    return {field.name: value for field, value in request.ListFields()}


async def test_only_admins_make_them_and_only_owners_owners(people: People):
    owner = await people.sign_up()
    emails = {role: new_email() for role in ("viewer", "editor", "admin")}
    signed = {}
    for role, email in emails.items():
        await people.make(owner, role, email)
        signed[role] = await people.choose_password(email)
    for role in ("viewer", "editor"):
        assert await refused(people.make(signed[role])) == (
            StatusCode.PERMISSION_DENIED,
            "PERMISSION_MISSING",
        )
    assert await refused(people.make(signed["admin"], "owner")) == (
        StatusCode.PERMISSION_DENIED,
        "OWNER_ROLE_RESERVED",
    )
    assert (await people.make(signed["admin"], "admin")).role == "admin"
    assert (await people.make(owner, "owner")).role == "owner"
    assert await refused(people.make(owner, "emperor")) == (StatusCode.INVALID_ARGUMENT, "ROLE_UNKNOWN")
    stranger = await people.sign_up()
    assert await refused(people.make(stranger, workspace_id=owner.workspace.workspace_id)) == (
        StatusCode.NOT_FOUND,
        "WORKSPACE_NOT_FOUND",
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"display_name": "a\u202eb"},
        {"display_name": "аdmin"},
        {"display_name": " "},
        {"display_name": "x" * 65536},
        {"email": "x" * 65536 + "@example.org"},
        {"email": "grаce@example.org"},
        {"email": "grace@exa\u200bmple.org"},
        {"email": "grace@example.org\n"},
    ],
)
async def test_rejects_what_deceives(people: People, fields: dict[str, str]):
    admin = await people.sign_up()
    assert await refused(people.make(admin, **fields)) == (StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")


async def test_markup_in_a_name_is_text(people: People):
    admin, email, name = await people.sign_up(), new_email(), "<img src=x onerror=alert(1)>"
    member = await people.make(admin, email=email, display_name=name)
    assert member.user.display_name == name
    mail = await people.mailbox.mail(email, "Your Meshboard account")
    assert mail.get_content_type() == "text/plain"


async def test_renames_and_refuses_other_fields(people: People):
    admin = await people.sign_up()
    user = (await people.make(admin)).user
    renamed = await rename(people, admin, user.user_id, "Ada", etag=user.etag)
    assert (renamed.display_name, renamed.email) == ("Ada", user.email)
    outcome = await refused(rename(people, admin, user.user_id, "Eve", etag=user.etag))
    assert outcome == (StatusCode.ABORTED, "ETAG_MISMATCH")
    for path in ("email", "state", "managing_workspace_id", "avatar_url"):
        outcome = await refused(rename(people, admin, user.user_id, "Eve", path=path))
        assert outcome == (StatusCode.INVALID_ARGUMENT, "UPDATE_MASK_INVALID")


async def admit(people: People, owner: SignUpResponse, person: SignUpResponse | SignInResponse) -> None:
    """Makes somebody a member of the owner's workspace, by an invitation."""
    await people.services.admit(
        owner.workspace.workspace_id, bearer(owner.access_token), person.user.user_id, person.access_token
    )


async def test_who_signed_up_is_managed_by_nobody(people: People):
    admin, other, person = await people.sign_up(), await people.sign_up(), await people.sign_up()
    await admit(people, admin, person)
    elsewhere = (await people.make(other)).user
    for user_id in (person.user.user_id, elsewhere.user_id, new_id()):
        for call in (
            deactivate(people, admin, user_id),
            reactivate(people, admin, user_id),
            rename(people, admin, user_id, "Mallory"),
        ):
            assert await refused(call) == (StatusCode.NOT_FOUND, "USER_NOT_FOUND")


async def test_another_workspace_does_not_learn_who_manages(people: People):
    admin, other = await people.sign_up(), await people.sign_up()
    user = (await people.make(admin)).user
    await admit(people, admin, other)
    added = await people.services.workspaces.AddMember(
        AddMemberRequest(workspace_id=other.workspace.workspace_id, user_id=user.user_id, role="viewer"),
        metadata=bearer(other.access_token),
    )
    assert added.member.user.managing_workspace_id == ""
    for signed, seen in ((admin, admin.workspace.workspace_id), (other, "")):
        found = await people.services.users.GetUser(
            GetUserRequest(user_id=user.user_id), metadata=bearer(signed.access_token)
        )
        assert found.user.managing_workspace_id == seen


async def ended(people: People, token: str) -> bool:
    try:
        await people.services.users.GetMe(GetMeRequest(), metadata=bearer(token))
    except grpc.aio.AioRpcError as failure:
        return failure.code() is StatusCode.UNAUTHENTICATED
    return False


async def test_deactivating_takes_everything_and_reactivating_gives_it_back(people: People):
    admin, other, email = await people.sign_up(), await people.sign_up(), new_email()
    user = (await people.make(admin, "editor", email)).user
    signed_in = await people.choose_password(email)
    await admit(people, other, signed_in)
    workspaces = (admin.workspace.workspace_id, other.workspace.workspace_id)
    deactivated = await deactivate(people, admin, user.user_id)
    assert deactivated.state == User.DEACTIVATED
    assert await deactivate(people, admin, user.user_id) == deactivated
    for workspace_id in workspaces:
        assert await refused(rights_of(people, user.user_id, workspace_id)) == (
            StatusCode.NOT_FOUND,
            "WORKSPACE_NOT_FOUND",
        )
    await eventually(lambda: ended(people, signed_in.access_token), seconds=5)
    assert await refused(people.services.sign_in(email)) == (
        StatusCode.PERMISSION_DENIED,
        "ACCOUNT_DISABLED",
    )
    listed = await people.services.workspaces.ListMembers(
        ListMembersRequest(workspace_id=workspaces[0]), metadata=bearer(admin.access_token)
    )
    assert {member.user.state for member in listed.members} == {User.ACTIVE, User.DEACTIVATED}

    reactivated = await reactivate(people, admin, user.user_id)
    assert reactivated.state == User.ACTIVE
    assert await rights_of(people, user.user_id, workspaces[0]) == "editor"
    assert await rights_of(people, user.user_id, workspaces[1]) == "viewer"

    await until_settled(people, reactivated)
    await people.services.sign_in(email)
    assert await ended(people, signed_in.access_token)
    async with people.services.sessions() as session:
        kinds = await session.scalars(
            select(AuditEntryRow.kind)
            .where(AuditEntryRow.subject_id == user.user_id, AuditEntryRow.kind == "user.state_changed")
            .order_by(AuditEntryRow.time)
        )
    assert list(kinds) == ["user.state_changed"] * 2


async def test_the_last_state_counts_however_fast_it_changes(people: People):
    admin, email = await people.sign_up(), new_email()
    user = (await people.make(admin, email=email)).user
    await people.choose_password(email)
    for _ in range(5):
        await deactivate(people, admin, user.user_id)
        last = await reactivate(people, admin, user.user_id)

    await until_settled(people, last)
    await people.services.sign_in(email)


async def test_owners_are_deactivated_by_owners_and_never_the_last(people: People):
    owner, emails = await people.sign_up(), [new_email(), new_email()]
    managed_owner = (await people.make(owner, "owner", emails[0])).user
    await people.make(owner, "admin", emails[1])
    signed_owner = await people.choose_password(emails[0])
    signed_admin = await people.choose_password(emails[1])
    for call in (
        deactivate(people, signed_admin, managed_owner.user_id),
        rename(people, signed_admin, managed_owner.user_id, "Mallory"),
    ):
        assert await refused(call) == (StatusCode.PERMISSION_DENIED, "OWNER_ROLE_RESERVED")
    await people.services.workspaces.RemoveMember(
        RemoveMemberRequest(workspace_id=owner.workspace.workspace_id, user_id=owner.user.user_id),
        metadata=bearer(signed_owner.access_token),
    )
    assert await refused(deactivate(people, signed_owner, managed_owner.user_id)) == (
        StatusCode.FAILED_PRECONDITION,
        "LAST_OWNER",
    )


async def test_a_deactivated_owner_does_not_count(people: People):
    owner = await people.sign_up()
    managed = (await people.make(owner, "owner")).user
    await deactivate(people, owner, managed.user_id)
    workspace_id, metadata = owner.workspace.workspace_id, bearer(owner.access_token)
    for call in (
        people.services.workspaces.RemoveMember(
            RemoveMemberRequest(workspace_id=workspace_id, user_id=owner.user.user_id), metadata=metadata
        ),
        people.services.workspaces.UpdateMember(
            UpdateMemberRequest(workspace_id=workspace_id, user_id=owner.user.user_id, role="viewer"),
            metadata=metadata,
        ),
    ):
        assert await refused(call) == (StatusCode.FAILED_PRECONDITION, "LAST_OWNER")


async def test_a_workspace_of_ones_own_hinders_nobody(people: People):
    admin, email = await people.sign_up(), new_email()
    user = (await people.make(admin, email=email)).user
    signed_in = await people.choose_password(email)
    await people.services.workspaces.CreateWorkspace(
        CreateWorkspaceRequest(title="Mine"), metadata=bearer(signed_in.access_token)
    )
    assert (await deactivate(people, admin, user.user_id)).state == User.DEACTIVATED


@pytest.mark.parametrize("rounds", [10, LONG])
async def test_two_owners_do_not_deactivate_each_other(people: People, rounds: int):
    owner, email = await people.sign_up(), new_email()
    first = (await people.make(owner, "owner", email)).user
    second_email = new_email()
    second = (await people.make(owner, "owner", second_email)).user
    signed = [await people.choose_password(email), await people.choose_password(second_email)]
    await people.services.workspaces.RemoveMember(
        RemoveMemberRequest(workspace_id=owner.workspace.workspace_id, user_id=owner.user.user_id),
        metadata=bearer(signed[0].access_token),
    )
    for _ in range(rounds):
        outcomes = await asyncio.gather(
            deactivate(people, signed[0], second.user_id),
            deactivate(people, signed[1], first.user_id),
            return_exceptions=True,
        )
        done = [outcome for outcome in outcomes if isinstance(outcome, User)]
        assert len(done) == 1
        # The one who is left gives the other one back.
        left = 0 if done[0].user_id == second.user_id else 1
        await until_settled(people, await reactivate(people, signed[left], done[0].user_id))
        signed[1 - left] = await people.services.sign_in((email, second_email)[1 - left])
