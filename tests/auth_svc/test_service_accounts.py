"""Making, reading, changing and deleting service accounts."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from meshboard.auth.v1.service_account_service_pb2 import (
    CreateServiceAccountRequest,
    DeleteServiceAccountRequest,
    GetServiceAccountRequest,
    ListServiceAccountsRequest,
    ServiceAccount,
    UpdateServiceAccountRequest,
)
from meshboard.user.v1.internal_user_service_pb2 import GetRightsRequest
from meshboard.user.v1.internal_user_service_pb2_grpc import InternalUserServiceStub
from meshboard.user.v1.user_pb2 import User
from meshboard.user.v1.user_service_pb2 import GetMeRequest, GetUserRequest
from meshboard.user.v1.workspace_pb2 import Member
from meshboard.user.v1.workspace_service_pb2 import ListMembersRequest, RemoveMemberRequest
from sqlalchemy import select

from services.auth_svc import models
from services.auth_svc.reaper import reap_service_accounts
from services.auth_svc.service_accounts import retire
from services.chassis import auth, errors
from services.chassis.clients import Peer
from services.user_svc import models as user_models
from services.user_svc.__main__ import serve as serve_user
from tests.auth_svc.conftest import (
    Services,
    bearer,
    claims_of,
    connected,
    make_both,
    running,
    running_auth,
)
from tests.auth_svc.machines import (
    Machine,
    Person,
    audited,
    create,
    exchange,
    join,
    machine,
    outcome_in_workspace,
    owner_of,
    set_disabled,
)
from tests.conditions import eventually
from tests.harness import make_keys, new_id, refused, service_metadata
from tests.parts import Parts

ABSENT = (grpc.StatusCode.NOT_FOUND, "SERVICE_ACCOUNT_NOT_FOUND")
KEY_INVALID = (grpc.StatusCode.UNAUTHENTICATED, "API_KEY_INVALID")


def updating(
    owner: Person, account: ServiceAccount, *paths: str, **fields: Any
) -> UpdateServiceAccountRequest:
    wanted = ServiceAccount(service_account_id=account.service_account_id, **fields)
    request = UpdateServiceAccountRequest(workspace_id=owner.workspace_id, service_account=wanted)
    request.update_mask.paths.extend(paths)
    return request


async def members(services: Services, owner: Person) -> dict[str, Member]:
    response = await services.workspaces.ListMembers(
        ListMembersRequest(workspace_id=owner.workspace_id), metadata=owner.metadata
    )
    return {member.user.user_id: member for member in response.members}


async def row_of(services: Services, account: ServiceAccount) -> models.ServiceAccount | None:
    async with services.sessions() as session:
        return await session.get(models.ServiceAccount, (account.workspace_id, account.service_account_id))


async def delete(services: Services, owner: Person, account: ServiceAccount) -> None:
    await services.service_accounts.DeleteServiceAccount(
        DeleteServiceAccountRequest(
            workspace_id=owner.workspace_id, service_account_id=account.service_account_id
        ),
        metadata=owner.metadata,
    )


async def ended_everywhere(services: Services, made: Machine, token: str) -> None:
    """Fails unless the token is refused by user_svc and auth_svc, and the key is exchanged no more, within 2 s."""

    async def ended() -> bool:
        outcome = await outcome_in_workspace(services, token, made.account.workspace_id)
        return outcome == "SESSION_REVOKED"

    await eventually(ended, seconds=2)
    assert await refused(exchange(services, made.secret)) == KEY_INVALID


async def test_creates_a_member_that_is_a_program(services: Services):
    owner = await owner_of(services)
    account = await create(services, owner, "viewer", title="Nightly")
    assert (account.title, account.workspace_id, account.disabled) == ("Nightly", owner.workspace_id, False)
    member = (await members(services, owner))[account.service_account_id]
    assert (member.role, member.user.display_name) == ("viewer", "Nightly")
    assert member.user.kind == User.SERVICE_ACCOUNT
    (entry,) = await audited(services, account.service_account_id)
    assert (entry.kind, entry.outcome, entry.actor_id) == ("service_account.created", "DONE", owner.user_id)
    assert entry.details == {"title": "Nightly", "role": "viewer"}


async def test_no_role_beyond_the_callers(services: Services):
    owner = await owner_of(services)
    admin, editor = await join(services, owner, "admin"), await join(services, owner, "editor")
    for caller, role, outcome in (
        (admin, "owner", (grpc.StatusCode.PERMISSION_DENIED, "ROLE_TOO_HIGH")),
        (owner, "owner", (grpc.StatusCode.INVALID_ARGUMENT, "ROLE_UNKNOWN")),
        (owner, "king", (grpc.StatusCode.INVALID_ARGUMENT, "ROLE_UNKNOWN")),
        (editor, "viewer", (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")),
    ):
        metadata = (*caller.metadata, ("x-workspace-id", owner.workspace_id))
        request = CreateServiceAccountRequest(workspace_id=owner.workspace_id, title="T", role=role)
        assert (
            await refused(services.service_accounts.CreateServiceAccount(request, metadata=metadata))
            == outcome
        )
    await create(services, admin, "admin")
    async with services.sessions() as session:
        entries = (
            await session.scalars(
                select(models.AuditEntryRow).where(models.AuditEntryRow.actor_id == admin.user_id)
            )
        ).all()
    refusals = [(e.kind, e.reason, e.workspace_id) for e in entries if e.outcome == "REFUSED"]
    assert refusals == [("service_account.created", "ROLE_TOO_HIGH", owner.workspace_id)]


async def test_a_repeat_gives_the_same_account(services: Services):
    owner, other = await owner_of(services), await owner_of(services)
    accounts = await asyncio.gather(*(create(services, owner, request_id="once") for _ in range(5)))
    assert len({account.service_account_id for account in accounts}) == 1
    assert (await create(services, owner, request_id="twice")) not in accounts
    assert (await create(services, other, request_id="once")) not in accounts
    entries = await audited(services, accounts[0].service_account_id)
    assert [entry.kind for entry in entries] == ["service_account.created"]


async def pending(
    services: Services, owner: Person, request_id: str | None, update_time: datetime
) -> ServiceAccount:
    """What a crash leaves between the row here and the member in user_svc."""
    row = models.ServiceAccount(
        workspace_id=owner.workspace_id,
        service_account_id=new_id(),
        title="CI",
        creator_id=owner.user_id,
        request_id=request_id,
        create_time=update_time,
        update_time=update_time,
    )
    async with services.sessions.begin() as session:
        session.add(row)
    return ServiceAccount(workspace_id=row.workspace_id, service_account_id=row.service_account_id)


async def test_a_creation_that_was_cut_off_is_resumed(services: Services):
    owner = await owner_of(services)
    half = await pending(services, owner, "once", datetime.now(UTC))
    request = GetServiceAccountRequest(
        workspace_id=owner.workspace_id, service_account_id=half.service_account_id
    )
    outcome = await refused(services.service_accounts.GetServiceAccount(request, metadata=owner.metadata))
    assert outcome == ABSENT
    account = await create(services, owner, request_id="once")
    assert account.service_account_id == half.service_account_id
    assert account.service_account_id in await members(services, owner)
    await services.service_accounts.GetServiceAccount(request, metadata=owner.metadata)


async def test_what_nobody_resumes_is_cleared_away_with_its_membership(services: Services):
    owner, now = await owner_of(services), datetime.now(UTC)
    stale = now - timedelta(seconds=services.auth_settings.pending_account_seconds + 60)
    left, kept = await pending(services, owner, "a", stale), await pending(services, owner, None, now)
    whole = await create(services, owner)
    peer = Peer("user", services.user_settings.listen, auth.ServiceTokens("auth", services.keys))
    users = peer.stub(InternalUserServiceStub)
    # The crash was after user_svc had done its part: a try with the same id does it again.
    async with services.sessions.begin() as session:
        row = await session.get_one(models.ServiceAccount, (left.workspace_id, left.service_account_id))
        row.update_time = now
    finished = await create(services, owner, request_id="a")
    async with services.sessions.begin() as session:
        row = await session.get_one(models.ServiceAccount, (left.workspace_id, left.service_account_id))
        row.activate_time, row.update_time = None, stale
    assert finished.service_account_id in await members(services, owner)

    await reap_service_accounts(services.sessions, services.auth_settings, users, now)
    await peer.close()
    assert await row_of(services, left) is None
    assert await row_of(services, kept) is not None
    assert await row_of(services, whole) is not None
    assert set(await members(services, owner)) == {owner.user_id, whole.service_account_id}
    anew = await create(services, owner, request_id="a")
    assert anew.service_account_id != left.service_account_id


async def test_while_user_svc_is_away(parts: Parts, tmp_path: Path):
    keys = make_keys(tmp_path / "keys")
    auth_settings, user_settings = await make_both(parts, keys)
    async with running_auth(auth_settings), connected(auth_settings, user_settings, keys) as services:
        async with running(serve_user, user_settings):
            owner = await owner_of(services)
            made = await machine(services, owner)
            token = await exchange(services, made.secret)
        # Rights cannot be told, so that nothing is begun; what was begun is finished by user_svc's return.
        outcome = await refused(create(services, owner, request_id="once"))
        assert outcome == (grpc.StatusCode.UNAVAILABLE, "DEPENDENCY_UNAVAILABLE")
        async with services.sessions.begin() as session:
            row = await session.get_one(
                models.ServiceAccount, (owner.workspace_id, made.account.service_account_id)
            )
            ended = await retire(session, row, datetime.now(UTC))
        assert [key.session_id for key in ended] == [claims_of(token)["sid"]]
        peer = Peer("user", user_settings.listen, auth.ServiceTokens("auth", keys))
        users = peer.stub(InternalUserServiceStub)
        with pytest.raises(errors.Error):
            await reap_service_accounts(services.sessions, auth_settings, users, datetime.now(UTC))
        assert await row_of(services, made.account) is not None

        async with running(serve_user, user_settings):

            async def cleared() -> bool:
                try:
                    await reap_service_accounts(services.sessions, auth_settings, users, datetime.now(UTC))
                except errors.Error:
                    return False
                return await row_of(services, made.account) is None

            await eventually(cleared)

            async def only_the_owner() -> bool:
                try:
                    return set(await members(services, owner)) == {owner.user_id}
                except grpc.aio.AioRpcError:
                    return False

            await eventually(only_the_owner)
        await peer.close()


async def test_gets_and_lists_those_of_the_workspace(services: Services):
    owner, other = await owner_of(services), await owner_of(services)
    created = [await create(services, owner, title=f"T{number}") for number in range(3)]
    foreign = await create(services, other)
    listed: list[ServiceAccount] = []
    token = ""
    while True:
        page = await services.service_accounts.ListServiceAccounts(
            ListServiceAccountsRequest(workspace_id=owner.workspace_id, page_size=2, page_token=token),
            metadata=owner.metadata,
        )
        listed.extend(page.service_accounts)
        token = page.next_page_token
        if not token:
            break
    assert listed == created
    for account_id in (foreign.service_account_id, new_id()):
        request = GetServiceAccountRequest(workspace_id=owner.workspace_id, service_account_id=account_id)
        outcome = await refused(services.service_accounts.GetServiceAccount(request, metadata=owner.metadata))
        assert outcome == ABSENT


async def test_a_new_title_is_the_members_name_too(services: Services):
    owner = await owner_of(services)
    made = await machine(services, owner)
    me = bearer(await exchange(services, made.secret))
    assert (await services.users.GetMe(GetMeRequest(), metadata=me)).user.display_name == "CI"
    updated = await services.service_accounts.UpdateServiceAccount(
        updating(owner, made.account, title="Deploy"), metadata=owner.metadata
    )
    assert updated.service_account.title == "Deploy"
    assert updated.service_account.etag != made.account.etag
    assert (await services.users.GetMe(GetMeRequest(), metadata=me)).user.display_name == "Deploy"


async def test_of_many_new_titles_the_same_one_stays_in_both_places(services: Services):
    owner = await owner_of(services)
    account = await create(services, owner)
    await asyncio.gather(
        *(
            services.service_accounts.UpdateServiceAccount(
                updating(owner, account, title=f"T{number}"), metadata=owner.metadata
            )
            for number in range(10)
        )
    )
    row = await row_of(services, account)
    assert row is not None
    user = await services.users.GetUser(
        GetUserRequest(user_id=account.service_account_id), metadata=owner.metadata
    )
    assert user.user.display_name == row.title


@pytest.mark.parametrize(
    ("paths", "fields", "outcome"),
    [
        ((), {"title": "T", "etag": "9"}, (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")),
        (("role",), {}, (grpc.StatusCode.INVALID_ARGUMENT, "UPDATE_MASK_INVALID")),
        (("title",), {}, (grpc.StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")),
        ((), {"service_account_id": new_id(), "title": "T"}, ABSENT),
    ],
)
async def test_updates_that_are_refused(
    services: Services, paths: tuple[str, ...], fields: dict[str, Any], outcome: tuple[grpc.StatusCode, str]
):
    owner = await owner_of(services)
    account = await create(services, owner)
    request = updating(owner, account, *paths)
    request.service_account.MergeFrom(ServiceAccount(**fields))
    assert (
        await refused(services.service_accounts.UpdateServiceAccount(request, metadata=owner.metadata))
        == outcome
    )


async def test_disabling_ends_keys_and_tokens_and_enabling_gives_new_ones(services: Services):
    owner = await owner_of(services)
    made = await machine(services, owner)
    token = await exchange(services, made.secret)
    assert await outcome_in_workspace(services, token, owner.workspace_id) == "OK"
    await set_disabled(services, owner, made.account, True)
    await ended_everywhere(services, made, token)
    async with services.sessions() as session:
        assert await session.get(models.EndedKey, claims_of(token)["sid"]) is not None

    await set_disabled(services, owner, made.account, False)
    renewed = await exchange(services, made.secret)
    assert await outcome_in_workspace(services, renewed, owner.workspace_id) == "OK"
    assert await outcome_in_workspace(services, token, owner.workspace_id) == "SESSION_REVOKED"
    kinds = [entry.kind for entry in await audited(services, made.account.service_account_id)]
    assert [kind for kind in kinds if kind.startswith("service_account")] == [
        "service_account.created",
        "service_account.disabled",
        "service_account.enabled",
    ]


async def test_deleting_ends_everything(services: Services):
    owner = await owner_of(services)
    made = await machine(services, owner)
    token = await exchange(services, made.secret)
    await delete(services, owner, made.account)
    assert await row_of(services, made.account) is None
    assert made.account.service_account_id not in await members(services, owner)
    await ended_everywhere(services, made, token)
    outcome = await refused(delete(services, owner, made.account))
    assert outcome == ABSENT
    kinds = [entry.kind for entry in await audited(services, made.account.service_account_id)]
    assert kinds.count("service_account.deleted") == 1
    async with services.user_sessions() as session:
        user = await session.get_one(user_models.User, made.account.service_account_id)
    assert user.kind == "SERVICE_ACCOUNT"


async def test_a_service_account_goes_with_its_membership(services: Services):
    owner = await owner_of(services)
    made = await machine(services, owner)
    token = await exchange(services, made.secret)
    await services.workspaces.RemoveMember(
        RemoveMemberRequest(workspace_id=owner.workspace_id, user_id=made.account.service_account_id),
        metadata=owner.metadata,
    )
    await ended_everywhere(services, made, token)
    assert await row_of(services, made.account) is None
    entries = await audited(services, made.account.service_account_id)
    deleted = [entry.actor_id for entry in entries if entry.kind == "service_account.deleted"]
    assert deleted == [owner.user_id]
    metadata = service_metadata(services.keys, "auth", "user")
    async with grpc.aio.insecure_channel(services.user_settings.listen) as channel:
        rights = InternalUserServiceStub(channel).GetRights(
            GetRightsRequest(user_id=made.account.service_account_id, workspace_id=owner.workspace_id),
            metadata=metadata,
        )
        assert await refused(rights) == (grpc.StatusCode.NOT_FOUND, "WORKSPACE_NOT_FOUND")


async def test_machines_manage_no_machines(services: Services):
    owner = await owner_of(services)
    made = await machine(services, owner, "admin")
    metadata = bearer(await exchange(services, made.secret))
    listed = await services.service_accounts.ListServiceAccounts(
        ListServiceAccountsRequest(workspace_id=owner.workspace_id), metadata=metadata
    )
    assert [account.service_account_id for account in listed.service_accounts] == [
        made.account.service_account_id
    ]
    outcome = await refused(
        services.service_accounts.CreateServiceAccount(
            CreateServiceAccountRequest(workspace_id=owner.workspace_id, title="T", role="viewer"),
            metadata=metadata,
        )
    )
    assert outcome == (grpc.StatusCode.PERMISSION_DENIED, "PERSON_REQUIRED")
