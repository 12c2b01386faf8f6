"""Every RPC, by every kind of caller, for every kind of target, on every way in, against a table written by hand."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import aiohttp
import asyncpg
import grpc.aio
import nats
import pytest

from services.chassis.access import WORKSPACE_HEADER
from services.chassis.auth import SERVICES
from services.chassis.bus import DOMAIN
from tests.conditions import eventually
from tests.parts import Mesh, running_mesh
from tests.security import world
from tests.security.calling import BY_NAME, as_json, has_route, natively, owner_of
from tests.security.matrix import MATRIX, OK, Anyone, In, On, Row, Services, SignedIn
from tests.security.world import ROLES, World

pytestmark = pytest.mark.xdist_group("matrix")

# What an RPC that is refused may still write: refusals are audited, sessions and keys remember their last use, and
# services go on with what they do in the background.
BACKGROUND = re.compile(r"audit_.*|sessions|api_keys|inbox|outbox|alembic_version|mails|tickets|search_queue")
# Columns that follow at their leisure: the sign-ins of callers are noted twice a second.
LEISURELY = "sign_in_time"


@pytest.fixture(scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mesh]:
    async with running_mesh(tmp_path_factory.mktemp("matrix"), limits=False) as whole:
        yield whole


@pytest.fixture(scope="module")
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    jar = aiohttp.DummyCookieJar()
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(timeout=timeout, cookie_jar=jar) as session:
        yield session


@pytest.fixture(scope="module")
async def everybody(mesh: Mesh, http: aiohttp.ClientSession) -> World:
    return await world.build(mesh, http)


@dataclass(frozen=True)
class Ways:
    """The three ways to call an RPC."""

    http: aiohttp.ClientSession
    url: str
    gateway: grpc.aio.Channel
    services: Mapping[str, grpc.aio.Channel]

    async def call(self, name: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> dict[str, str]:
        """The outcomes by way."""
        calls = {
            "service": natively(self.services[owner_of(name)], name, body, headers),
            "gateway": natively(self.gateway, name, body, headers),
        }
        if has_route(name):
            calls["json"] = as_json(self.http, self.url, name, body, headers)
        return dict(zip(calls, await asyncio.gather(*calls.values()), strict=True))


@pytest.fixture(scope="module")
async def ways(mesh: Mesh, http: aiohttp.ClientSession) -> AsyncIterator[Ways]:
    async with AsyncExitStack() as stack:

        async def channel(address: str) -> grpc.aio.Channel:
            return await stack.enter_async_context(grpc.aio.insecure_channel(address))

        gateway = await channel(mesh.gateway_url.removeprefix("http://"))
        services = {service: await channel(mesh.address(service)) for service in SERVICES}
        yield Ways(http, mesh.gateway_url, gateway, services)


@dataclass(frozen=True)
class Cell:
    """One call, and what may come of it."""

    caller: str
    target: str
    headers: Mapping[str, str]
    expected: tuple[str, ...]

    @property
    def passes(self) -> bool:
        """Whether the call gets past the access rules, on a thing that is there."""
        return self.target in {"own", "sibling"} and self.expected not in {*REFUSED, *HIDDEN}


REFUSED = {
    (reason,) for reason in ("TOKEN_MISSING", "PERMISSION_MISSING", "SCOPE_MISSING", "PERSON_REQUIRED")
}
HIDDEN = {(row.absent,) for row in MATRIX.values() if isinstance(row, On)}


def _names_workspace(row: Row) -> bool:
    return isinstance(row, In) and "{workspace}" in json.dumps(row.request)


def test_every_rpc_has_its_place_in_the_matrix():
    assert {name.partition("#")[0] for name in MATRIX} == set(BY_NAME)


@pytest.mark.parametrize("name", MATRIX)
async def test_callers_get_what_the_matrix_says(name: str, everybody: World, ways: Ways, mesh: Mesh):
    row = MATRIX[name]
    every = list(cells(row, everybody))
    refused = [cell for cell in every if not cell.passes]
    await eventually(lambda: has_settled(mesh), 60)
    before = await traces(mesh)
    problems = await check_all(name, row, refused, everybody, ways)
    assert not problems, "\n".join(problems)
    assert await traces(mesh) == before, "a refused call left a trace"
    problems = await check_all(name, row, [cell for cell in every if cell.passes], everybody, ways)
    # What was given to somebody is remembered now, and is still for nobody else.
    is_left = not isinstance(row, On) or row.absent not in row.passes
    again = [cell for cell in refused if is_left and cell.target in {"own", "sibling"}]
    problems += await check_all(name, row, again, everybody, ways)
    assert not problems, "\n".join(problems)


def cells(row: Row, everybody: World) -> Iterable[Cell]:
    """The calls that the row says something about."""
    match row:
        case Services():
            return  # see below
        case Anyone():
            yield Cell("anonymous", "own", {}, row.passes)
        case SignedIn():
            yield Cell("anonymous", "own", {}, ("TOKEN_MISSING",))
            yield Cell("key", "own", bearer(everybody.key_token), (row.key,))
            for role in ROLES:
                yield Cell(role, "own", everybody.members[role].headers, row.passes)
        case In() | On():
            for target in everybody.targets:
                yield from _cells_at(row, target, everybody)


def _cells_at(row: In | On, target: str, everybody: World) -> Iterable[Cell]:
    inside = {WORKSPACE_HEADER: everybody.targets[target]["workspace"]}
    if isinstance(row, In) and not row.absent and target in {"sibling", "foreign", "deleted", "absent"}:
        return
    yield Cell("anonymous", target, inside, ("TOKEN_MISSING",))
    for role, sign in zip(ROLES, row.members, strict=True):
        headers = {**everybody.members[role].headers, **inside}
        yield Cell(role, target, headers, _expected(row, sign, target))
    key: tuple[str, ...] = (row.key,)
    if row.key == OK or (isinstance(row, In) and row.scope_is_late and target not in {"own", "sibling"}):
        key = _expected(row, "+", target)
    elif target in {"elsewhere", "nowhere"} and row.key == "SCOPE_MISSING":
        key = ("WORKSPACE_NOT_FOUND",)
    yield Cell("key", target, {**bearer(everybody.key_token), **inside}, key)


def _expected(row: In | On, sign: str, target: str) -> tuple[str, ...]:
    if target in {"elsewhere", "nowhere"}:
        return ("WORKSPACE_NOT_FOUND",)
    if isinstance(row, On):
        if target != "own" or sign == "0":
            return (row.absent,)
    elif target == "sibling" and sign == "+":
        return row.passes
    elif target not in {"own", "sibling"} and sign in "+~":
        return (row.absent,)
    return row.passes if sign == "+" else ("PERMISSION_MISSING",)


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


async def check_all(name: str, row: Row, every: Iterable[Cell], everybody: World, ways: Ways) -> list[str]:
    """What is not as the matrix says; a few calls at once."""
    gate = asyncio.Semaphore(6)

    async def one(cell: Cell) -> list[str]:
        async with gate:
            return await check(name, row, cell, everybody, ways)

    return [problem for found in await asyncio.gather(*map(one, every)) for problem in found]


async def check(name: str, row: Row, cell: Cell, everybody: World, ways: Ways) -> list[str]:
    """What is not as the matrix says."""
    assert not isinstance(row, Services)
    body = filled(row.request, everybody.targets[cell.target], everybody.targets["absent"])
    if isinstance(row, SignedIn | In) and row.ends and cell.passes and cell.caller in ROLES:
        return await _check_end(name, body, cell, everybody, ways)
    outcomes = await ways.call(name, body, cell.headers)
    return [
        f"{cell.caller} at {cell.target} by {way}: {outcome}, not {' or '.join(cell.expected)}"
        for way, outcome in outcomes.items()
        if outcome not in cell.expected
        # Envoy's own answers to native gRPC carry no details.
        and not (way == "gateway" and cell.expected == ("TOKEN_MISSING",) and outcome == "UNAUTHENTICATED")
    ]


async def _check_end(
    name: str, body: Mapping[str, Any], cell: Cell, everybody: World, ways: Ways
) -> list[str]:
    """Each way with a member of its own, because the call ends its session or its membership."""
    problems = []
    calls: dict[str, Callable[[Mapping[str, str]], Awaitable[str]]] = {
        "service": lambda headers: natively(ways.services[owner_of(name)], name, body, headers),
        "gateway": lambda headers: natively(ways.gateway, name, body, headers),
        "json": lambda headers: as_json(ways.http, ways.url, name, body, headers),
    }
    for way, call in calls.items():
        fresh = await everybody.new_member(cell.caller)
        if (outcome := await call(fresh.headers)) not in cell.expected:
            problems.append(f"{cell.caller} by {way}: {outcome}")
    return problems


@pytest.mark.parametrize("name", [name for name, row in MATRIX.items() if _names_workspace(row)])
async def test_two_workspaces_in_one_call_are_refused(name: str, everybody: World, ways: Ways):
    row = MATRIX[name]
    assert isinstance(row, In)
    body = filled(row.request, everybody.targets["own"], everybody.targets["absent"])
    headers = {
        **everybody.members["owner"].headers,
        WORKSPACE_HEADER: everybody.targets["elsewhere"]["workspace"],
    }
    outcomes = await ways.call(name, body, headers)
    assert set(outcomes.values()) == {"WORKSPACE_AMBIGUOUS"}, outcomes


LISTS = {
    "dashboard": ("/v1/dashboards?pageSize=1000", "/v1/dashboards:search?query=hidden&pageSize=1000"),
    "folder": ("/v1/folders?pageSize=1000",),
    "source": ("/v1/sources?pageSize=1000",),
}


@pytest.mark.parametrize("role", ROLES)
async def test_lists_and_searches_have_nothing_of_others(role: str, everybody: World):
    """Every id that a list or a search may not show, looked for in the whole answer."""
    hidden = {
        everybody.targets[target][kind] for target in ("sibling", "foreign", "deleted") for kind in LISTS
    }
    person = everybody.members[role]
    for path in (*(path for paths in LISTS.values() for path in paths), "/v1/search?query=hidden"):
        answer = await person.call("GET", path)
        assert answer.status == 200 or (answer.status, answer.reason) == (403, "PERMISSION_MISSING")
        assert not [each for each in hidden if each in json.dumps(answer.body)], path
    if role != "guest":
        answer = await person.get("/v1/dashboards?pageSize=1000")
        assert everybody.targets["own"]["dashboard"] in json.dumps(answer), "what is theirs is there"


@pytest.mark.parametrize("name", [name for name, row in MATRIX.items() if isinstance(row, Services)])
async def test_internal_rpcs_are_for_the_named_services(name: str, everybody: World, ways: Ways):
    row = MATRIX[name]
    assert isinstance(row, Services)
    body = filled(row.request, everybody.targets["own"], everybody.targets["absent"])
    owner = row.at or owner_of(name)
    channel = ways.services[owner]
    callers = {
        "anonymous": {},
        "owner": everybody.members["owner"].headers,
        "key": bearer(everybody.key_token),
        **{service: everybody.service_headers(service, owner) for service in SERVICES},
    }
    for caller, headers in callers.items():
        outcome = await natively(channel, name, body, headers)
        assert outcome in (row.passes if caller in row.callers else ("CALLER_NOT_ALLOWED",)), caller
        # At the gateway there is no such method, whoever calls.
        assert await natively(ways.gateway, name, body, headers) in {"ROUTE_UNKNOWN", "UNIMPLEMENTED"}, caller


@pytest.mark.parametrize(
    "name", [name for name, row in MATRIX.items() if isinstance(row, SignedIn | In | On)]
)
async def test_a_service_alone_is_nobody(name: str, everybody: World, ways: Ways):
    row = MATRIX[name]
    assert isinstance(row, SignedIn | In | On)
    body = filled(row.request, everybody.targets["own"], everybody.targets["absent"])
    headers = everybody.service_headers("analytics", owner_of(name))
    assert await natively(ways.services[owner_of(name)], name, body, headers) == "TOKEN_MISSING"


def filled(request: Any, things: Mapping[str, str], absent: Mapping[str, str]) -> Any:
    """The request with ids in place of names."""
    text = json.dumps(request)
    return json.loads(
        re.sub(
            r"{(\w+)}",
            lambda match: absent["dashboard"] if match[1] == "absent" else things[match[1]],
            text,
        )
    )


async def has_settled(mesh: Mesh) -> bool:
    """Whether all services have heard of all that was done before."""
    for service in SERVICES:
        connection = await asyncpg.connect(_environment(mesh, service)["MESHBOARD_POSTGRES_URL"])
        try:
            if await connection.fetchval("SELECT EXISTS (SELECT FROM outbox WHERE publish_time IS NULL)"):
                return False
        finally:
            await connection.close()
    client = await nats.connect(_environment(mesh, "auth")["MESHBOARD_NATS_URL"])
    try:
        consumers = await client.jsm().consumers_info(DOMAIN)
    finally:
        await client.close()
    return not any(consumer.num_pending or consumer.num_ack_pending for consumer in consumers)


def _environment(mesh: Mesh, service: str) -> Mapping[str, str]:
    return next(part.env for part in mesh.stack.parts() if part.name == f"{service}_svc")


async def traces(mesh: Mesh) -> dict[str, str]:
    """A digest of each table of each service that calls could have changed."""
    found = {}
    for service in SERVICES:
        connection = await asyncpg.connect(_environment(mesh, service)["MESHBOARD_POSTGRES_URL"])
        try:
            names = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
            for (table,) in names:
                if not BACKGROUND.fullmatch(table):
                    found[f"{service}.{table}"] = await connection.fetchval(
                        "SELECT md5(coalesce(string_agg(line, '|' ORDER BY line), ''))"
                        f" FROM (SELECT (to_jsonb(t) - '{LEISURELY}')::text AS line FROM {table} t) AS lines"
                    )
            found[f"{service} events"] = str(
                await connection.fetchval("SELECT count(*) FROM outbox WHERE subject NOT LIKE '%.Audit%'")
            )
        finally:
            await connection.close()
    return found
