"""Whether an address has an account cannot be told by the time of an answer.

Known and unknown addresses take turns, so that a change of the machine's speed hits both alike. What is compared is the
area under the ROC curve: the chance that an answer for a known address takes longer than one for an unknown one, 0.5
where time tells nothing. Of 1,000 answers each, chance alone strays by 0.013 (one standard deviation).
"""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime

import grpc.aio
import pytest
from argon2 import PasswordHasher
from meshboard.auth.v1.account_service_pb2 import RequestPasswordResetRequest
from meshboard.auth.v1.account_service_pb2_grpc import AccountServiceStub
from meshboard.auth.v1.auth_service_pb2 import SignInRequest, SignUpRequest

from services.auth_svc.models import Account
from services.user_svc.__main__ import serve as serve_user
from tests.auth_svc.conftest import Services, connected, make_both, new_email, running, running_auth
from tests.harness import make_keys, new_id
from tests.parts import Parts

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

TRIES = 2_000


@pytest.fixture(scope="module")
async def quick(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Services]:
    """Services with a cheap hash, which hides less than the real one, and without delays."""
    keys = make_keys(tmp_path_factory.mktemp("timing-keys"))
    auth, user = await make_both(
        parts,
        keys,
        password_memory_kib=64,
        password_passes=1,
        guess_free_failures=10**6,
        guess_free_failures_of_account=10**6,
        guess_free_failures_of_address=10**6,
        require_verified_email=True,
        smtp_url="smtp://127.0.0.1:9",
    )
    async with running(serve_user, user), running_auth(auth), connected(auth, user, keys) as both:
        yield both


def auc(known: list[float], unknown: list[float]) -> float:
    """The chance that one of `known` is larger than one of `unknown` (Mann and Whitney)."""
    ordered = sorted(unknown)
    larger = sum((bisect_left(ordered, t) + bisect_right(ordered, t)) / 2 for t in known)
    return larger / (len(known) * len(unknown))


async def separation(call: Callable[[str], Awaitable[object]], known: str) -> float:
    """How far the area under the curve is from telling nothing."""
    times: dict[bool, list[float]] = {True: [], False: []}
    for number in range(TRIES + 100):
        is_known = number % 2 == 0
        address = known if is_known else new_email()
        began = time.perf_counter()
        with suppress(grpc.aio.AioRpcError):
            await call(address)
        if number >= 100:  # caches and pools are warm
            times[is_known].append(time.perf_counter() - began)
    return abs(auc(times[True], times[False]) - 0.5)


async def known_address(services: Services) -> str:
    """An address with an account, made past the mail that it would take."""
    email, now = new_email(), datetime.now(UTC)
    hasher = PasswordHasher(time_cost=1, memory_cost=64, parallelism=1)
    async with services.sessions.begin() as session:
        session.add(
            Account(
                user_id=new_id(),
                email=email,
                email_key=email,
                password_hash=hasher.hash("the right one"),
                display_name="Ada",
                workspace_id=new_id(),
                create_time=now,
                try_time=now,
                activate_time=now,
            )
        )
    return email


async def test_sign_in(quick: Services):
    known = await known_address(quick)
    away = await separation(
        lambda address: quick.auth.SignIn(SignInRequest(email=address, password="wrong")), known
    )
    assert away < 0.05


async def test_reset(quick: Services):
    known = await known_address(quick)
    async with grpc.aio.insecure_channel(quick.auth_settings.listen) as channel:
        accounts = AccountServiceStub(channel)
        away = await separation(
            lambda address: accounts.RequestPasswordReset(RequestPasswordResetRequest(email=address)), known
        )
    assert away < 0.05


async def test_sign_up_where_addresses_are_verified(quick: Services):
    known = await known_address(quick)
    away = await separation(
        lambda address: quick.auth.SignUp(
            SignUpRequest(email=address, password="a long passphrase", display_name="Ada")
        ),
        known,
    )
    assert away < 0.05


def test_the_measure_tells_a_difference():
    assert auc([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 0.5
    assert auc([2.0, 3.0], [1.0]) == 1.0
    assert auc([1.0], [2.0, 3.0]) == 0.0
