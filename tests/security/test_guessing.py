"""Guessing passwords: how many guesses get through, and that the owner of the account does not pay for them.

The policy is that of services/auth_svc/guesses.py: free failures by account and address (5), account (20) and address
(50), and delays that double behind them. A guess that was refused as delayed has not looked at the password.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator
from ipaddress import IPv4Address

import grpc
import grpc.aio
import pytest
from meshboard.auth.v1.auth_service_pb2 import SignInRequest, SignInResponse
from sqlalchemy import func, select

from services.auth_svc.models import AuditEntryRow
from services.user_svc.__main__ import serve as serve_user
from tests.auth_svc.conftest import (
    PASSWORD,
    Services,
    connected,
    make_both,
    new_email,
    running,
    running_auth,
)
from tests.conditions import eventually
from tests.harness import make_keys, new_id, reason_of
from tests.parts import Parts

WRONG = (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_WRONG")
DELAYED = (grpc.StatusCode.RESOURCE_EXHAUSTED, "SIGN_IN_DELAYED")
ATTEMPTS = pytest.mark.parametrize("attempts", [200, pytest.param(1000, marks=pytest.mark.long)])


@pytest.fixture(scope="module")
async def quick(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Services]:
    """auth_svc with passwords that are quick to check."""
    keys = make_keys(tmp_path_factory.mktemp("guessing-keys"))
    auth, user = await make_both(parts, keys, password_memory_kib=64, password_passes=1)
    async with running(serve_user, user), running_auth(auth), connected(auth, user, keys) as both:
        yield both


@pytest.fixture(scope="module")
async def earnest(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Services]:
    """auth_svc with passwords that take their time to check."""
    keys = make_keys(tmp_path_factory.mktemp("earnest-keys"))
    auth, user = await make_both(parts, keys)
    async with running(serve_user, user), running_auth(auth), connected(auth, user, keys) as both:
        yield both


def address(n: int) -> str:
    """One of many addresses; each test takes others."""
    return str(IPv4Address("10.0.0.0") + n)


async def guess(
    services: Services, email: str, source: str, password: str = "not the password", device_token: str = ""
) -> tuple[grpc.StatusCode, str]:
    """How a guess ends."""
    request = SignInRequest(email=email, password=password, device_token=device_token)
    try:
        await services.auth.SignIn(request, metadata=(("x-meshboard-address", source),))
    except grpc.aio.AioRpcError as failure:
        return failure.code(), reason_of(failure)
    return grpc.StatusCode.OK, ""


async def owner(services: Services, email: str, source: str, device_token: str) -> None:
    """The owner's device gets in, at the first try."""
    request = SignInRequest(email=email, password=PASSWORD, device_token=device_token)
    answer = await services.auth.SignIn(request, metadata=(("x-meshboard-address", source),))
    assert isinstance(answer, SignInResponse)
    assert answer.access_token


def most(free: int, seconds: float) -> int:
    """How many sequential guesses get through: the free ones, then one after 1, 2, 4 … seconds."""
    return free + 1 + int(math.log2(seconds + 1))


async def until_counted(services: Services, email: str, source: str) -> None:
    """Guesses until a delay has passed and another one, of two seconds at least, begins."""

    async def counted() -> bool:
        return await guess(services, email, source) == WRONG

    await eventually(counted)


async def noted(services: Services, user_id: str) -> int:
    """How many wrong passwords the audit log has."""
    wrong = select(func.count()).where(
        AuditEntryRow.kind == "session.begun",
        AuditEntryRow.subject_id == user_id,
        AuditEntryRow.reason == "CREDENTIALS_WRONG",
    )
    async with services.sessions() as session:
        return await session.scalar(wrong) or 0


@ATTEMPTS
async def test_many_addresses_at_one_account(quick: Services, attempts: int):
    email = new_email()
    signed_up = await quick.sign_up(email)
    device = signed_up.device_token
    first = attempts * 1000
    outcomes: Counter[tuple[grpc.StatusCode, str]] = Counter()
    began = time.monotonic()
    for n in range(attempts):
        source = address(first + n)
        outcomes[await guess(quick, email, source)] += 1
        if n % 20 == 0:
            await owner(quick, email, address(first - 1), device)
            await owner(quick, email, source, device)
    assert outcomes.keys() == {WRONG, DELAYED}
    assert 20 < outcomes[WRONG] <= most(20, time.monotonic() - began)
    assert await noted(quick, signed_up.user.user_id) == outcomes[WRONG]
    # The right password is no way around the delay, nor is the device of somebody else.
    await until_counted(quick, email, address(first - 4))
    assert await guess(quick, email, address(first - 2), PASSWORD) == DELAYED
    stranger = await quick.sign_up()
    assert await guess(quick, email, address(first - 3), PASSWORD, stranger.device_token) == DELAYED


@ATTEMPTS
async def test_one_address_at_many_accounts(quick: Services, attempts: int):
    email = new_email()
    device = (await quick.sign_up(email)).device_token
    source = address(attempts * 1000 + 500_000)
    outcomes: Counter[tuple[grpc.StatusCode, str]] = Counter()
    began = time.monotonic()
    for n in range(attempts):
        outcomes[await guess(quick, new_email(), source)] += 1
        if n % 20 == 0:
            await owner(quick, email, source, device)
    assert outcomes.keys() == {WRONG, DELAYED}
    assert 50 < outcomes[WRONG] <= most(50, time.monotonic() - began)
    # An account of the attacker's own forgives nothing: behind the next failure there is a delay again.
    own = new_email()
    await quick.sign_up(own)

    async def let_in() -> bool:
        return (await guess(quick, own, source, PASSWORD))[0] is grpc.StatusCode.OK

    await eventually(let_in)
    await until_counted(quick, new_email(), source)
    assert await guess(quick, new_email(), source) == DELAYED


async def test_one_address_at_one_account(quick: Services):
    email, source = new_email(), address(100)
    device = (await quick.sign_up(email)).device_token
    began = time.monotonic()
    outcomes = Counter([await guess(quick, email, source) for _ in range(40)])
    assert 5 < outcomes[WRONG] <= most(5, time.monotonic() - began)
    await owner(quick, email, source, device)
    await owner(quick, email, address(101), "")


async def test_a_known_device_has_a_count_of_its_own(quick: Services):
    email, source = new_email(), address(200)
    device = (await quick.sign_up(email)).device_token
    began = time.monotonic()
    outcomes = Counter([await guess(quick, email, source, device_token=device) for _ in range(40)])
    assert 5 < outcomes[WRONG] <= most(5, time.monotonic() - began)
    assert await guess(quick, email, source, PASSWORD, device) == DELAYED
    # Who has got hold of the device does not keep the owner out elsewhere.
    await owner(quick, email, source, "")


@pytest.mark.parametrize("forged", ["mbd_", "mbd_" + "A" * 64, "A" * 64, ""])
async def test_a_forged_device_is_none(quick: Services, forged: str):
    email, source = new_email(), address(300 + len(forged))
    await quick.sign_up(email)
    for _ in range(6):
        assert await guess(quick, email, source, device_token=forged) == WRONG
    assert await guess(quick, email, source, PASSWORD, forged) == DELAYED


@pytest.mark.parametrize(
    ("addresses", "guesses", "through"),
    [
        # At most 16 are under way while fewer than 5 have failed. A check takes its time here, as it does in earnest.
        (1, 50, 4 + 16),
        (200, 200, 19 + 32),
    ],
)
async def test_guesses_at_once_do_not_slip_through_together(
    earnest: Services, addresses: int, guesses: int, through: int
):
    email = new_email()
    signed_up = await earnest.sign_up(email)
    first = 400 + guesses
    sources = [address(first + n % addresses) for n in range(guesses)]
    outcomes, _ = await asyncio.gather(
        asyncio.gather(*(guess(earnest, email, source) for source in sources)),
        owner(earnest, email, sources[0], signed_up.device_token),
    )
    counted = Counter(outcomes)
    assert counted[WRONG] <= through
    assert counted.keys() <= {WRONG, DELAYED}
    assert await noted(earnest, signed_up.user.user_id) == counted[WRONG]
    # Behind the free ones: one at once.
    assert await refused_or_one(earnest, email, sources[0])


async def refused_or_one(services: Services, email: str, source: str) -> bool:
    outcomes = Counter(await asyncio.gather(*(guess(services, email, source) for _ in range(20))))
    return outcomes[WRONG] <= 1 and outcomes[WRONG] + outcomes[DELAYED] == 20


async def test_whoever_waits_gets_in_on_a_new_device(quick: Services):
    email = new_email()
    await quick.sign_up(email)
    for n in range(21):
        assert await guess(quick, email, address(5000 + n)) == WRONG

    async def let_in() -> bool:
        return (await guess(quick, email, address(6000), PASSWORD))[0] is grpc.StatusCode.OK

    await eventually(let_in)


async def test_guesses_at_nobody_are_counted_alike(quick: Services):
    email, user_id = new_email(), new_id()
    outcomes = [await guess(quick, email, address(7000 + n)) for n in range(30)]
    assert outcomes[:21] == [WRONG] * 21
    assert DELAYED in outcomes
    assert await noted(quick, user_id) == 0
