"""Making, listing and deleting the API keys of a service account."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import grpc.aio
import pytest
from meshboard.auth.v1.service_account_service_pb2 import (
    ApiKey,
    CreateApiKeyRequest,
    CreateApiKeyResponse,
    DeleteApiKeyRequest,
    ListApiKeysRequest,
)

from services.auth_svc import models
from services.auth_svc.api_keys import is_well_formed
from services.auth_svc.refresh_tokens import fingerprint
from services.auth_svc.service_accounts import MAX_KEYS
from tests.auth_svc.conftest import Services
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
)
from tests.conditions import eventually
from tests.harness import new_id, refused, status_of

ABSENT = (grpc.StatusCode.NOT_FOUND, "SERVICE_ACCOUNT_NOT_FOUND")


def creating(owner: Person, account_id: str, **fields: Any) -> CreateApiKeyRequest:
    return CreateApiKeyRequest(
        **{
            "workspace_id": owner.workspace_id,
            "service_account_id": account_id,
            "title": "key",
            **fields,
        }
    )


async def add(services: Services, owner: Person, account_id: str, **fields: Any) -> CreateApiKeyResponse:
    return await services.service_accounts.CreateApiKey(
        creating(owner, account_id, **fields), metadata=owner.metadata
    )


async def listed(services: Services, owner: Person, account_id: str, page_size: int = 0) -> list[ApiKey]:
    found: list[ApiKey] = []
    token = ""
    while True:
        page = await services.service_accounts.ListApiKeys(
            ListApiKeysRequest(
                workspace_id=owner.workspace_id,
                service_account_id=account_id,
                page_size=page_size,
                page_token=token,
            ),
            metadata=owner.metadata,
        )
        found.extend(page.api_keys)
        token = page.next_page_token
        if not token:
            return found


def deleting(owner: Person, made: Machine) -> DeleteApiKeyRequest:
    return DeleteApiKeyRequest(
        workspace_id=owner.workspace_id,
        service_account_id=made.account.service_account_id,
        api_key_id=made.key.api_key_id,
    )


async def test_shows_the_key_once_and_keeps_its_hash(services: Services):
    owner = await owner_of(services)
    account_id = (await create(services, owner)).service_account_id
    scopes = ["sources.query", "dashboards.view", "sources.query"]
    made = await add(services, owner, account_id, scopes=scopes)
    assert is_well_formed(made.secret)
    assert made.api_key.prefix == made.secret[:10]
    assert made.api_key.scopes == ["sources.query", "dashboards.view"]
    assert await listed(services, owner, account_id) == [made.api_key]
    identity = (owner.workspace_id, account_id, made.api_key.api_key_id)
    async with services.sessions() as session:
        row = await session.get_one(models.ApiKey, identity)
    assert row.key_hash == fingerprint(made.secret)
    assert made.secret not in str(vars(row))
    entries = await audited(services, account_id)
    assert [entry.kind for entry in entries] == ["service_account.created", "api_key.created"]
    assert made.secret not in str(entries[-1].details)


async def test_a_repeat_gives_the_same_key_without_the_secret(services: Services):
    owner = await owner_of(services)
    account_id = (await create(services, owner)).service_account_id
    answers = await asyncio.gather(*(add(services, owner, account_id, request_id="once") for _ in range(5)))
    assert len({answer.api_key.api_key_id for answer in answers}) == 1
    (secret,) = [answer.secret for answer in answers if answer.secret]
    await exchange(services, secret)
    assert len(await listed(services, owner, account_id)) == 1


async def test_at_most_fifty_also_when_many_are_made_at_once(services: Services):
    owner = await owner_of(services)
    account_id = (await create(services, owner)).service_account_id
    await asyncio.gather(*(add(services, owner, account_id) for _ in range(MAX_KEYS - 3)))
    repeated = await add(services, owner, account_id, request_id="once")
    outcomes = await asyncio.gather(
        *(add(services, owner, account_id) for _ in range(8)), return_exceptions=True
    )
    assert sum(isinstance(outcome, CreateApiKeyResponse) for outcome in outcomes) == 2
    outcome = await refused(add(services, owner, account_id))
    assert outcome == (grpc.StatusCode.FAILED_PRECONDITION, "API_KEY_LIMIT")
    again = await add(services, owner, account_id, request_id="once")
    assert again.api_key == repeated.api_key
    keys = await listed(services, owner, account_id, page_size=20)
    assert len(keys) == len({key.api_key_id for key in keys}) == MAX_KEYS
    assert [key.api_key_id for key in keys] == sorted(key.api_key_id for key in keys)
    # Another account has room.
    await machine(services, owner)


async def test_an_unknown_scope_is_named(services: Services):
    owner = await owner_of(services)
    account_id = (await create(services, owner)).service_account_id
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await add(services, owner, account_id, scopes=["sources.query", "sources.fly"])
    assert await refused(add(services, owner, account_id, scopes=["meshboard"])) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "SCOPE_UNKNOWN",
    )
    assert b"scopes[1]" in status_of(caught.value).SerializeToString()


async def test_an_end_in_the_past_is_refused(services: Services):
    owner = await owner_of(services)
    account_id = (await create(services, owner)).service_account_id
    past = datetime.now(UTC) - timedelta(seconds=1)
    outcome = await refused(add(services, owner, account_id, expire_time=past))
    assert outcome == (grpc.StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")


async def test_of_other_workspaces_nothing_is_to_be_found(services: Services):
    owner, other = await owner_of(services), await owner_of(services)
    made = await machine(services, other)
    account_id = made.account.service_account_id
    assert await refused(add(services, owner, account_id)) == ABSENT
    assert await refused(listed(services, owner, account_id)) == ABSENT
    outcome = await refused(
        services.service_accounts.DeleteApiKey(deleting(owner, made), metadata=owner.metadata)
    )
    assert outcome == (grpc.StatusCode.NOT_FOUND, "API_KEY_NOT_FOUND")
    await exchange(services, made.secret)


async def test_who_may_only_edit_makes_no_keys(services: Services):
    owner = await owner_of(services)
    editor = await join(services, owner, "editor")
    account_id = (await create(services, owner)).service_account_id
    outcome = await refused(add(services, editor, account_id))
    assert outcome == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")
    outcome = await refused(add(services, owner, new_id()))
    assert outcome == ABSENT


async def test_a_deleted_key_ends_everywhere_and_alone(services: Services):
    owner = await owner_of(services)
    made = await machine(services, owner)
    other = await add(services, owner, made.account.service_account_id)
    token, other_token = await exchange(services, made.secret), await exchange(services, other.secret)
    assert await outcome_in_workspace(services, token, owner.workspace_id) == "OK"
    await services.service_accounts.DeleteApiKey(deleting(owner, made), metadata=owner.metadata)
    outcome = await refused(exchange(services, made.secret))
    assert outcome == (grpc.StatusCode.UNAUTHENTICATED, "API_KEY_INVALID")

    async def ended() -> bool:
        return await outcome_in_workspace(services, token, owner.workspace_id) == "SESSION_REVOKED"

    await eventually(ended, seconds=2)
    assert await outcome_in_workspace(services, other_token, owner.workspace_id) == "OK"
    await exchange(services, other.secret)
    outcome = await refused(
        services.service_accounts.DeleteApiKey(deleting(owner, made), metadata=owner.metadata)
    )
    assert outcome == (grpc.StatusCode.NOT_FOUND, "API_KEY_NOT_FOUND")
    left = await listed(services, owner, made.account.service_account_id)
    assert [key.api_key_id for key in left] == [other.api_key.api_key_id]
