"""Sign-ins against what argon2 alone allows; others' calls meanwhile; refreshes against the same SQL by asyncpg alone;
API keys, and sign-ins, beside Keycloak where that is present.

Subjects and baselines take turns. The load comes from processes of its own, on the same cores.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import multiprocessing
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import asyncpg
import grpc.aio
import uvloop
from argon2 import PasswordHasher
from meshboard.auth.v1.auth_service_pb2 import RefreshRequest, RefreshResponse, SignInRequest
from meshboard.auth.v1.service_account_service_pb2 import ExchangeApiKeyRequest
from meshboard.auth.v1.session_service_pb2 import ListSessionsRequest

from bench import keycloak
from bench.figures import Figure, percentile, ratios
from bench.load import CONNECTIONS, LIMIT_SECONDS, Generator, Load, LoadFailedError, Sent
from bench.mesh import Account, Mesh
from bench.processes import Meter

SIGN_IN = "/meshboard.auth.v1.AuthService/SignIn"
REFRESH = "/meshboard.auth.v1.AuthService/Refresh"
EXCHANGE = "/meshboard.auth.v1.ServiceAccountService/ExchangeApiKey"
OTHER = "/meshboard.auth.v1.SessionService/ListSessions"
CONCURRENCY = 12
THREADS = max(1, (os.cpu_count() or 1) // 2)  # the default of the setting `password_threads`
OTHERS_PER_SECOND = 50.0


def measure(
    mesh: Mesh, account: Account, *, rounds: int, seconds: float, say: Callable[[str], None]
) -> list[Figure]:
    """Rates, their ratios to the baselines, CPU per call, and the latency of others during a storm."""
    rates: dict[str, list[float]] = defaultdict(list)
    cpu: dict[str, list[float]] = defaultdict(list)
    others: dict[str, list[float]] = defaultdict(list)
    url = mesh.environment("auth_svc")["MESHBOARD_POSTGRES_URL"]
    chains, rows = ([account.sign_in() for _ in range(16)] for _ in range(2))
    api_key = account.create_api_key()
    hashed = PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1).hash(account.password)
    _send(_others(mesh, account, 0.2))  # what is called for the first time is loaded, compiled and planned
    for number in range(rounds):
        rates["argon2"].append(_alone(_hash, hashed, account.password, seconds).per_second)
        sign_ins = int(rates["argon2"][-1] * seconds)
        sent, spent = _metered(mesh, partial(_send, _sign_ins(mesh, account, sign_ins)))
        rates["sign_in"].append(sent.per_second)
        cpu["sign_in"].append(spent / sent.requests * 1e3)

        others["calm"] += _send(_others(mesh, account, seconds)).latencies
        with Generator(_sign_ins(mesh, account, int(sign_ins * 1.5))) as storm:
            storm.start()
            others["storm"] += _send(_others(mesh, account, seconds)).latencies
            storm.wait()

        rates["sql"].append(_alone(_update, url, [_family_hash(token) for token in rows], seconds).per_second)
        count = int(rates["sql"][-1] * seconds * 0.4 / len(chains))
        (sent, chains), spent = _metered(mesh, partial(_chain, mesh.address("auth"), chains, count))
        rates["refresh"].append(sent.per_second)
        cpu["refresh"].append(spent / sent.requests * 1e3)
        exchanges = max(500, int(_send(_exchanges(mesh, api_key, 500)).per_second * seconds))
        sent, spent = _metered(mesh, partial(_send, _exchanges(mesh, api_key, exchanges)))
        rates["exchange"].append(sent.per_second)
        cpu["exchange"].append(spent / sent.requests * 1e3)
        say(
            f"round {number + 1}: {rates['sign_in'][-1]:.0f} sign-ins/s (argon2 {rates['argon2'][-1]:.0f}), "
            f"{rates['refresh'][-1]:.0f} refreshes/s (SQL {rates['sql'][-1]:.0f})"
        )
    # Of all rounds together: in one of them it is the second or third slowest call.
    at_rest, in_storm = (percentile(others[name], 0.99) * 1e3 for name in ("calm", "storm"))
    note = f"{len(others['calm']):,} calls"
    return [
        _rate("argon2 alone", rates["argon2"], f"{THREADS} threads"),
        _rate("sign-in", rates["sign_in"]),
        Figure(
            name="auth/sign-in rate to argon2",
            rounds=ratios(rates["sign_in"], rates["argon2"]),
            unit="",
            at_least=0.9,
        ),
        Figure(name="auth/sign-in CPU of auth_svc", rounds=tuple(cpu["sign_in"]), unit="ms/call"),
        Figure(name="auth/other call p99, calm", rounds=(at_rest,), unit="ms", note=note),
        Figure(name="auth/other call p99, sign-in storm", rounds=(in_storm,), unit="ms", note=note),
        Figure(
            name="auth/other call p99, storm to calm",
            rounds=(in_storm / at_rest,),
            unit="",
            at_most=1.5,
        ),
        _rate("refresh SQL alone", rates["sql"], "asyncpg, 16 at once"),
        _rate("refresh", rates["refresh"], "16 sessions at once"),
        Figure(
            name="auth/refresh rate to SQL",
            rounds=ratios(rates["refresh"], rates["sql"]),
            unit="",
            at_least=0.4,
        ),
        Figure(name="auth/refresh CPU of auth_svc", rounds=tuple(cpu["refresh"]), unit="ms/call"),
        _rate("API key exchange", rates["exchange"]),
        Figure(name="auth/API key exchange CPU of auth_svc", rounds=tuple(cpu["exchange"]), unit="ms/call"),
        *_beside_keycloak(cpu, rounds=rounds, say=say),
    ]


def _beside_keycloak(cpu: dict[str, list[float]], *, rounds: int, say: Callable[[str], None]) -> list[Figure]:
    """Tokens and sign-ins for a CPU second, ours to Keycloak's."""
    if not keycloak.is_present():
        return []
    say("starting Keycloak …")
    spent: dict[str, list[float]] = defaultdict(list)
    with (
        tempfile.TemporaryDirectory(prefix="meshboard-keycloak-") as folder,
        keycloak.running(Path(folder)) as peer,
    ):
        meter = Meter({"keycloak": peer.pid})
        _send(peer.client_tokens(3000))  # Java compiles what is called often
        _send(peer.sign_ins(50))
        for _ in range(rounds):
            for name, load in (("exchange", peer.client_tokens(2000)), ("sign_in", peer.sign_ins(60))):
                meter.start()
                sent = _send(load)
                spent[name].append(meter.stop()["keycloak"] / sent.requests * 1e3)
    return [
        Figure(name="auth/Keycloak client token CPU", rounds=tuple(spent["exchange"]), unit="ms/call"),
        Figure(name="auth/Keycloak sign-in CPU", rounds=tuple(spent["sign_in"]), unit="ms/call"),
        Figure(
            name="auth/API key exchanges per CPU second to Keycloak's client tokens",
            rounds=ratios(spent["exchange"], cpu["exchange"]),
            unit="",
            at_least=5,
        ),
        Figure(
            name="auth/sign-ins per CPU second to Keycloak's",
            rounds=ratios(spent["sign_in"], cpu["sign_in"]),
            unit="",
        ),
    ]


def _rate(name: str, values: Sequence[float], note: str = "") -> Figure:
    return Figure(name=f"auth/{name} rate", rounds=tuple(values), unit="calls/s", note=note)


def _metered(mesh: Mesh, work: Callable[[], Any]) -> tuple[Any, float]:
    meter = Meter({"auth_svc": mesh.pids["auth_svc"]})
    meter.start()
    result = work()
    return result, meter.stop()["auth_svc"]


def _send(load: Load) -> Sent:
    with Generator(load) as generator:
        generator.start()
        return generator.wait()


def _sign_ins(mesh: Mesh, account: Account, count: int) -> Load:
    body = SignInRequest(email=account.email, password=account.password).SerializeToString()
    return Load(
        protocol="grpc",
        address=mesh.address("auth"),
        path=SIGN_IN,
        headers=(),
        bodies=partial(_repeat, body, count),
        concurrency=CONCURRENCY,
    )


def _exchanges(mesh: Mesh, api_key: str, count: int) -> Load:
    body = ExchangeApiKeyRequest(api_key=api_key).SerializeToString()
    return Load(
        protocol="grpc",
        address=mesh.address("auth"),
        path=EXCHANGE,
        headers=(),
        bodies=partial(_repeat, body, count),
        concurrency=CONCURRENCY,
    )


def _others(mesh: Mesh, account: Account, seconds: float) -> Load:
    body = ListSessionsRequest(page_size=1).SerializeToString()
    return Load(
        protocol="grpc",
        address=mesh.address("auth"),
        path=OTHER,
        headers=account.authorization(),
        bodies=partial(_repeat, body, int(OTHERS_PER_SECOND * seconds)),
        concurrency=32,
        per_second=OTHERS_PER_SECOND,
        at_once=True,
    )


def _repeat(body: bytes, count: int) -> list[bytes]:
    return [body] * max(1, count)


def _family_hash(refresh_token: str) -> bytes:
    return hashlib.sha256(base64.urlsafe_b64decode(refresh_token.removeprefix("mbr_") + "==")[:16]).digest()


# --- in processes of their own ----------------------------------------------------------------------------


def _alone(work: Callable[..., Any], *arguments: object) -> Sent:
    sent = _spawned(work, *arguments)
    assert isinstance(sent, Sent)
    return sent


def _spawned(work: Callable[..., Any], *arguments: object) -> Any:
    """What `work(*arguments)` gives in a process of its own. Raises LoadFailedError."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_call, args=(theirs, work, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(LIMIT_SECONDS):
            raise LoadFailedError(f"{work.__name__} did not finish in time.")
        answer = ours.recv()
    except EOFError:
        raise LoadFailedError(f"{work.__name__} ended.") from None
    finally:
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()
    if isinstance(answer, LoadFailedError):
        raise answer
    return answer


def _call(pipe: Connection, work: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    try:
        pipe.send(work(*arguments))
    except Exception as error:
        pipe.send(LoadFailedError(f"{work.__name__}: {error!r}"))


def _hash(hashed: str, password: str, seconds: float) -> Sent:
    """Verifies a password again and again, in as many threads as auth_svc has for it."""
    hasher = PasswordHasher()
    began, spent = time.monotonic(), time.process_time()

    def verify() -> int:
        done = 0
        while time.monotonic() < began + seconds:
            hasher.verify(hashed, password)
            done += 1
        return done

    with ThreadPoolExecutor(THREADS) as threads:
        done = sum(future.result() for future in [threads.submit(verify) for _ in range(THREADS)])
    return Sent(done, began, time.monotonic(), time.process_time() - spent)


def _update(url: str, family_hashes: list[bytes], seconds: float) -> Sent:
    """What a refresh asks of the database and nothing else: lock the session's row, change it, commit."""
    return uvloop.run(_update_all(url, family_hashes, seconds))


async def _update_all(url: str, family_hashes: list[bytes], seconds: float) -> Sent:
    async with asyncpg.create_pool(url, min_size=10, max_size=10) as pool:
        began, spent = time.monotonic(), time.process_time()

        async def worker(family_hash: bytes) -> int:
            done = 0
            while time.monotonic() < began + seconds:
                async with pool.acquire() as connection, connection.transaction():
                    row = await connection.fetchrow(
                        "SELECT * FROM sessions WHERE family_hash = $1 FOR UPDATE", family_hash
                    )
                    await connection.execute(
                        "UPDATE sessions SET generation = $2, last_use_time = now(), expire_time = $3"
                        " WHERE session_id = $1",
                        row["session_id"],
                        row["generation"] + 1,
                        row["expire_time"],
                    )
                done += 1
            return done

        done = sum(await asyncio.gather(*(worker(family_hash) for family_hash in family_hashes)))
        return Sent(done, began, time.monotonic(), time.process_time() - spent)


def _chain(address: str, refresh_tokens: list[str], rounds: int) -> tuple[Sent, list[str]]:
    found: tuple[Sent, list[str]] = _spawned(_refresh, address, refresh_tokens, rounds)
    return found


def _refresh(address: str, refresh_tokens: list[str], rounds: int) -> tuple[Sent, list[str]]:
    """Refreshes each session so often, all sessions at once; gives the newest tokens too."""
    return uvloop.run(_refresh_all(address, refresh_tokens, rounds))


async def _refresh_all(address: str, refresh_tokens: list[str], rounds: int) -> tuple[Sent, list[str]]:
    channels = [
        grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(CONNECTIONS)
    ]
    methods = [
        channel.unary_unary(REFRESH, RefreshRequest.SerializeToString, RefreshResponse.FromString)
        for channel in channels
    ]
    for channel in channels:
        await channel.channel_ready()
    began, spent = time.monotonic(), time.process_time()

    async def worker(number: int, token: str) -> str:
        method: Any = methods[number % CONNECTIONS]
        for _ in range(rounds):
            token = (await method(RefreshRequest(refresh_token=token), timeout=LIMIT_SECONDS)).refresh_token
        return token

    newest = await asyncio.gather(*(worker(n, token) for n, token in enumerate(refresh_tokens)))
    sent = Sent(rounds * len(refresh_tokens), began, time.monotonic(), time.process_time() - spent)
    for channel in channels:
        await channel.close()
    return sent, list(newest)
