"""The keys that tokens are signed with: their change while calls are made, and calls while auth_svc is away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import grpc
import grpc.aio
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from meshboard.auth.v1.auth_service_pb2 import GetJwksRequest, SignOutRequest
from meshboard.user.v1.user_service_pb2 import GetMeRequest

from services.auth_svc import signing_keys
from services.auth_svc.settings import AuthSettings
from services.auth_svc.signing_keys import SigningKeys
from services.chassis.times import now
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
from tests.conditions import eventually
from tests.harness import make_keys, new_id, outcome, reason_of, refused
from tests.parts import Parts
from tests.parts import running as running_parts

INVALID = (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_INVALID")
UNAVAILABLE = (grpc.StatusCode.UNAVAILABLE, "DEPENDENCY_UNAVAILABLE")
NOTICE = timedelta(hours=1)


@dataclass
class Own:
    """Services whose auth_svc can be taken away."""

    services: Services
    auth: AsyncExitStack

    async def stop_auth(self) -> None:
        """Ends auth_svc."""
        await self.auth.aclose()

    async def start_auth(self) -> None:
        """Runs auth_svc again."""
        await self.auth.enter_async_context(running_auth(self.services.auth_settings))


@pytest.fixture(scope="module")
async def parts(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Parts]:
    """Servers of their own: on a NATS that is shared, another auth_svc's heartbeat would be taken for this one's."""
    async with running_parts(tmp_path_factory.mktemp("jwks")) as servers:
        yield servers


@pytest.fixture
async def own(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Own]:
    monkeypatch.setattr(signing_keys, "_RELOAD_SECONDS", 0.05)
    keys = make_keys(tmp_path / "keys")
    auth, user = await make_both(parts, keys)
    async with running(serve_user, user), AsyncExitStack() as stack, connected(auth, user, keys) as services:
        own = Own(services, stack)
        await own.start_auth()
        yield own


async def add_key(services: Services, activate_time: datetime) -> str:
    """The id of a key that is due, and signs from `activate_time` on."""
    settings = services.auth_settings.model_copy(update={"signing_key_seconds": 0})
    keys = SigningKeys(services.sessions, settings, lambda: activate_time - NOTICE)
    await keys.load()
    return list(await keys.public_keys())[-1]


async def retire_keys(services: Services) -> None:
    """What happens once no token of the earlier keys is alive."""
    settings: AuthSettings = services.auth_settings
    later = now() + timedelta(seconds=settings.access_token_seconds + 10)
    await SigningKeys(services.sessions, settings, lambda: later).load()


async def published(services: Services) -> list[str]:
    return [key.kid for key in (await services.auth.GetJwks(GetJwksRequest())).keys]


def key_id(token: str) -> str:
    return str(jwt.get_unverified_header(token)["kid"])


def stranger(token: str) -> str:
    """A token with the same claims, of a key that nobody has."""
    headers = {"typ": "at+jwt", "kid": new_id()}
    return jwt.encode(claims_of(token), ec.generate_private_key(ec.SECP256R1()), "ES256", headers=headers)


def get_me(services: Services, token: str) -> grpc.aio.UnaryUnaryCall:
    return services.users.GetMe(GetMeRequest(), metadata=bearer(token))


async def test_a_new_key_takes_over_while_calls_are_made(own: Own):
    services = own.services
    signed_up = await services.sign_up()
    old = signed_up.access_token
    tokens = [old]
    served = 0
    stopping = asyncio.Event()

    async def call_on() -> None:
        nonlocal served
        while not stopping.is_set():
            await asyncio.gather(*(get_me(services, token) for token in tokens))
            served += 1

    caller = asyncio.create_task(call_on())
    second = await add_key(services, now() + timedelta(seconds=2))

    async def told() -> bool:
        return await published(services) == [key_id(old), second]

    await eventually(told)

    async def taken_over() -> bool:
        answer = await services.sign_in(signed_up.user.email)
        tokens[1:] = [answer.access_token]
        return key_id(answer.access_token) == second

    await eventually(taken_over)
    target = served + 5
    await eventually(lambda: served > target or caller.done())
    stopping.set()
    await caller  # raises when a call was refused
    await get_me(services, old)

    await retire_keys(services)

    async def withdrawn() -> bool:
        return await published(services) == [second]

    await eventually(withdrawn)

    async def refused_everywhere() -> bool:
        # A key that nobody knows has the key set fetched anew, at most once a second.
        await refused(get_me(services, stranger(old)))
        return await outcome(get_me(services, old)) == INVALID

    await eventually(refused_everywhere)
    await get_me(services, tokens[1])


async def test_without_auth_svc_known_keys_go_on_and_unknown_ones_open_nothing(own: Own):
    services = own.services
    signed_up = await services.sign_up()
    token = signed_up.access_token
    await get_me(services, token)
    await own.stop_auth()
    # Until the silence is noticed, within two seconds. A token that has not been seen yet has a known key too.
    await get_me(services, token)
    assert await refused(get_me(services, stranger(token))) in {INVALID, UNAVAILABLE}

    async def in_doubt() -> bool:
        outcomes = await asyncio.gather(get_me(services, token), return_exceptions=True)
        failure = outcomes[0]
        if isinstance(failure, grpc.aio.AioRpcError):
            assert (failure.code(), reason_of(failure)) == UNAVAILABLE
        return isinstance(failure, grpc.aio.AioRpcError)

    await eventually(in_doubt)
    for _ in range(5):
        assert await refused(get_me(services, stranger(token))) in {INVALID, UNAVAILABLE}

    await own.start_auth()

    async def back() -> bool:
        outcomes = await asyncio.gather(get_me(services, token), return_exceptions=True)
        return not isinstance(outcomes[0], BaseException)

    await eventually(back)
    assert await refused(get_me(services, stranger(token))) == INVALID


async def test_who_starts_without_auth_svc_accepts_nothing(parts: Parts, own: Own):
    services = own.services
    signed_up = await services.sign_up()
    token = signed_up.access_token
    await own.stop_auth()
    _, settings = await make_both(parts, services.keys)
    beginner = settings.model_copy(
        update={
            "postgres_url": services.user_settings.postgres_url,
            "auth_address": services.auth_settings.listen,
        }
    )
    async with (
        running(serve_user, beginner),
        connected(services.auth_settings, beginner, services.keys) as alone,
    ):
        assert await refused(get_me(alone, token)) == UNAVAILABLE
        assert await refused(get_me(alone, stranger(token))) == UNAVAILABLE
        await own.start_auth()

        async def back() -> bool:
            outcomes = await asyncio.gather(get_me(alone, token), return_exceptions=True)
            return not isinstance(outcomes[0], BaseException)

        await eventually(back)
        assert await refused(get_me(alone, stranger(token))) == INVALID
    await services.auth.SignOut(SignOutRequest(), metadata=bearer(token))
