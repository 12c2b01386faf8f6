import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from meshboard.auth.v1.internal_auth_service_pb2 import CheckSessionRequest, CheckSessionResponse
from meshboard.auth.v1.service_account_service_pb2 import DeleteApiKeyRequest, ExchangeApiKeyRequest
from meshboard.auth.v1.usable_key_pb2 import UsableKey
from meshboard.user.v1.user_service_pb2 import GetMeRequest
from meshboard.user.v1.workspace_service_pb2 import (
    AddMemberRequest,
    CreateWorkspaceRequest,
    GetWorkspaceRequest,
    ListMembersRequest,
)
from sqlalchemy import select, update

from services.auth_svc import models
from services.auth_svc.api_keys import new_api_key
from services.auth_svc.origins import Origin
from services.auth_svc.usable_keys import REMEMBER_SECONDS, UsableKeys
from services.chassis.bus import Bus
from services.chassis.cache import Cache, CachedMessages
from tests.auth_svc.conftest import Services, bearer, claims_of
from tests.auth_svc.machines import (
    Machine,
    audited,
    exchange,
    machine,
    outcome_in_workspace,
    owner_of,
    set_disabled,
)
from tests.conditions import eventually
from tests.harness import new_id, refused, service_metadata
from tests.parts import Parts
from tests.statements import statements_about

INVALID = (grpc.StatusCode.UNAUTHENTICATED, "API_KEY_INVALID")
DELAYED = (grpc.StatusCode.RESOURCE_EXHAUSTED, "SIGN_IN_DELAYED")


def from_address(address: str) -> tuple[tuple[str, str], ...]:
    """Each test fails from an address of its own."""
    return (("x-meshboard-address", address),)


async def failing(services: Services, secret: str, address: str) -> tuple[grpc.StatusCode, str]:
    request = ExchangeApiKeyRequest(api_key=secret)
    return await refused(services.service_accounts.ExchangeApiKey(request, metadata=from_address(address)))


async def row_of(services: Services, made: Machine) -> models.ApiKey:
    identity = (made.account.workspace_id, made.account.service_account_id, made.key.api_key_id)
    async with services.sessions() as session:
        return await session.get_one(models.ApiKey, identity)


async def noted(services: Services, made: Machine) -> models.ApiKey:
    """The key once its use is noted."""

    async def is_noted() -> bool:
        return (await row_of(services, made)).last_use_time is not None

    await eventually(is_noted)
    return await row_of(services, made)


async def test_gives_a_token_that_is_the_accounts(services: Services):
    owner = await owner_of(services)
    made = await machine(services, owner)
    response = await services.service_accounts.ExchangeApiKey(ExchangeApiKeyRequest(api_key=made.secret))
    claims = claims_of(response.access_token)
    assert response.expires_in_seconds == claims["exp"] - claims["iat"] == 600
    assert claims["sub"] == made.account.service_account_id
    assert claims["client_id"] == made.key.api_key_id
    assert claims["wid"] == owner.workspace_id
    assert claims["sid"] == (await row_of(services, made)).session_id
    assert claims["scope"] == "meshboard"
    assert not {"amr", "act", "auth_time"} & claims.keys()
    me = await services.users.GetMe(GetMeRequest(), metadata=bearer(response.access_token))
    assert me.user.user_id == made.account.service_account_id
    alive = await services.internal_auth.CheckSession(
        CheckSessionRequest(session_id=claims["sid"]),
        metadata=service_metadata(services.keys, "user", "auth"),
    )
    assert alive.alive


async def test_may_do_what_the_role_allows_and_nothing_of_a_person(services: Services):
    owner, other = await owner_of(services), await owner_of(services)
    made = await machine(services, owner, "viewer")
    token = await exchange(services, made.secret)
    metadata = bearer(token)
    adding = AddMemberRequest(workspace_id=owner.workspace_id, user_id=other.user_id, role="viewer")
    assert (await refused(services.workspaces.AddMember(adding, metadata=metadata)))[1] in {
        "PERMISSION_MISSING",
        "PERSON_REQUIRED",
    }
    creating = services.workspaces.CreateWorkspace(CreateWorkspaceRequest(title="T"), metadata=metadata)
    assert await refused(creating) == (grpc.StatusCode.PERMISSION_DENIED, "PERSON_REQUIRED")
    assert await outcome_in_workspace(services, token, other.workspace_id) == "WORKSPACE_NOT_FOUND"
    header = (*metadata, ("x-workspace-id", other.workspace_id))
    elsewhere = services.workspaces.GetWorkspace(
        GetWorkspaceRequest(workspace_id=other.workspace_id), metadata=header
    )
    assert await refused(elsewhere) == (grpc.StatusCode.NOT_FOUND, "WORKSPACE_NOT_FOUND")


async def test_scopes_hold(services: Services):
    owner = await owner_of(services)
    made = await machine(services, owner, "admin", scopes=["workspaces.view", "dashboards.view"])
    token = await exchange(services, made.secret)
    assert claims_of(token)["scope"] == "workspaces.view dashboards.view"
    assert await outcome_in_workspace(services, token, owner.workspace_id) == "OK"
    listing = services.workspaces.ListMembers(
        ListMembersRequest(workspace_id=owner.workspace_id), metadata=bearer(token)
    )
    assert await refused(listing) == (grpc.StatusCode.PERMISSION_DENIED, "SCOPE_MISSING")


async def test_a_scope_gives_nothing_that_the_role_has_not(services: Services):
    owner = await owner_of(services)
    made = await machine(services, owner, "viewer", scopes=["members.edit"])
    adding = services.workspaces.AddMember(
        AddMemberRequest(workspace_id=owner.workspace_id, user_id=new_id(), role="viewer"),
        metadata=bearer(await exchange(services, made.secret)),
    )
    assert (await refused(adding))[0] == grpc.StatusCode.PERMISSION_DENIED


async def test_a_token_does_not_outlive_its_key(services: Services):
    owner = await owner_of(services)
    end = datetime.now(UTC) + timedelta(seconds=90)
    made = await machine(services, owner, expire_time=end)
    response = await services.service_accounts.ExchangeApiKey(ExchangeApiKeyRequest(api_key=made.secret))
    assert response.expires_in_seconds <= 90
    claims = claims_of(response.access_token)
    assert end.timestamp() - 3 < claims["exp"] <= end.timestamp()


async def test_an_expired_key_is_refused_and_noted(services: Services):
    owner = await owner_of(services)
    made = await machine(services, owner, expire_time=datetime.now(UTC) + timedelta(hours=1))
    async with services.sessions.begin() as session:
        await session.execute(
            update(models.ApiKey)
            .where(models.ApiKey.api_key_id == made.key.api_key_id)
            .values(expire_time=datetime.now(UTC))
        )
    assert await failing(services, made.secret, "203.0.113.1") == INVALID
    entry = (await audited(services, made.account.service_account_id))[-1]
    assert (entry.kind, entry.outcome, entry.reason) == ("api_key.exchanged", "REFUSED", "API_KEY_INVALID")
    assert (entry.workspace_id, entry.address, entry.actor_id) == (owner.workspace_id, "203.0.113.1", "")
    assert entry.details == {"api_key_id": made.key.api_key_id, "prefix": made.key.prefix}


async def test_a_key_that_expires_while_it_is_remembered_is_refused(services: Services, parts: Parts):
    owner = await owner_of(services)
    end = datetime.now(UTC) + timedelta(seconds=90)
    made = await machine(services, owner, expire_time=end)
    async with another_process(services, parts, parts.redis_url) as keys:
        with statements_about("api_keys") as found:
            assert await keys.find(made.secret, end - timedelta(seconds=1)) is not None
            assert await keys.find(made.secret, end) is None
        assert len(found) == 1


async def test_a_typo_costs_no_statement(services: Services):
    owner = await owner_of(services)
    made = await machine(services, owner)
    with statements_about("api_keys") as found:
        for wrong in (made.secret[:-1], made.secret.swapcase(), "mba_", "x" * 128):
            assert await failing(services, wrong, "203.0.113.2") == INVALID
    assert found == []
    assert await failing(services, new_api_key(), "203.0.113.2") == INVALID


async def test_who_goes_on_failing_is_delayed_and_others_at_the_address_are_not(services: Services):
    owner = await owner_of(services)
    made = await machine(services, owner)
    address = "203.0.113.3"
    free = services.auth_settings.guess_free_failures_of_address
    outcomes = [await failing(services, new_api_key(), address) for _ in range(free + 2)]
    assert outcomes[: free + 1] == [INVALID] * (free + 1)
    assert outcomes[-1] == DELAYED
    assert await failing(services, "mba_typo", address) == DELAYED
    assert await failing(services, new_api_key(), "203.0.113.4") == INVALID
    await services.service_accounts.ExchangeApiKey(
        ExchangeApiKeyRequest(api_key=made.secret), metadata=from_address(address)
    )


async def test_a_warm_exchange_makes_no_statement(services: Services):
    owner = await owner_of(services)
    made = await machine(services, owner)
    await exchange(services, made.secret)
    await noted(services, made)
    begun = time.monotonic()
    with statements_about("api_keys") as found:
        tokens = {await exchange(services, made.secret) for _ in range(40)}
    assert len(tokens) == 40
    # A key is read anew from time to time; a use is noted once a minute, by an UPDATE and an INSERT.
    reads = 1 + (time.monotonic() - begun) / (0.9 * REMEMBER_SECONDS)
    assert len(found) <= reads + 2


async def test_uses_are_noted_once_a_minute(services: Services):
    owner = await owner_of(services)
    made = await machine(services, owner)
    assert (await row_of(services, made)).last_use_time is None
    for _ in range(5):
        await exchange(services, made.secret)
    used = (await noted(services, made)).last_use_time
    assert used is not None
    assert (used.second, used.microsecond) == (0, 0)
    assert datetime.now(UTC) - used < timedelta(minutes=2)
    entries = await audited(services, made.account.service_account_id)
    uses = [entry for entry in entries if entry.kind == "api_key.exchanged"]
    assert len(uses) == len({entry.time.replace(second=0, microsecond=0) for entry in uses})
    assert (uses[0].actor_id, uses[0].workspace_id) == (
        made.account.service_account_id,
        owner.workspace_id,
    )
    assert made.secret not in str([entry.details for entry in entries])


async def test_of_two_processes_one_notes_a_use(services: Services, parts: Parts):
    owner = await owner_of(services)
    made = await machine(services, owner)
    now = datetime(2031, 5, 5, 5, 5, 5, tzinfo=UTC)
    async with (
        another_process(services, parts, parts.redis_url, "one") as one,
        another_process(services, parts, parts.redis_url, "two") as two,
    ):
        for keys in (one, two, one):
            key = await keys.find(made.secret, now)
            assert key is not None
            if keys.is_due(key, now):
                keys.note(key, Origin(), now)
            assert not keys.is_due(key, now + timedelta(seconds=50))
            assert keys.is_due(key, now + timedelta(seconds=60))
            keys.is_due(key, now)
    async with services.sessions() as session:
        entries = await session.scalars(
            select(models.AuditEntryRow).where(
                models.AuditEntryRow.subject_id == made.account.service_account_id,
                models.AuditEntryRow.kind == "api_key.exchanged",
            )
        )
    assert len(entries.all()) == 1


@asynccontextmanager
async def another_process(
    services: Services, parts: Parts, redis_url: str, name: str = "deaf"
) -> AsyncIterator[UsableKeys]:
    """The keys as a process has them that hears nothing of auth_svc's other processes."""
    bus = await Bus.connect(parts.nats_url, name)
    cache = await Cache.connect(redis_url, bus, name)
    keys = UsableKeys(
        services.sessions,
        CachedMessages(cache, "keys", UsableKey, ttl_seconds=REMEMBER_SECONDS),
        CachedMessages(cache, "alive", CheckSessionResponse),
    )
    yield keys
    await keys.close()
    await cache.close()
    await bus.close()


@pytest.mark.parametrize("redis", ["there", "away"])
@pytest.mark.parametrize("act", ["disable", "delete"])
async def test_a_process_that_hears_nothing_stops_within_two_seconds(
    services: Services, parts: Parts, redis: str, act: str
):
    owner = await owner_of(services)
    made = await machine(services, owner)
    url = parts.redis_url if redis == "there" else "redis://127.0.0.1:1"
    async with another_process(services, parts, url, f"deaf-{redis}") as keys:
        assert await keys.find(made.secret, datetime.now(UTC)) is not None
        if act == "disable":
            await set_disabled(services, owner, made.account, True)
        else:
            await services.service_accounts.DeleteApiKey(
                DeleteApiKeyRequest(
                    workspace_id=owner.workspace_id,
                    service_account_id=made.account.service_account_id,
                    api_key_id=made.key.api_key_id,
                ),
                metadata=owner.metadata,
            )

        async def stopped() -> bool:
            return await keys.find(made.secret, datetime.now(UTC)) is None

        await eventually(stopped, seconds=2)
