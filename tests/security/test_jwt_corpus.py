"""No broken access token opens anything: not through the gateway, and not past it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import aiohttp
import grpc
import pytest

from tests.mesh.people import Answer, Person
from tests.parts import Mesh
from tests.security.forging import claims_of, forge_of
from tests.security.jwt_corpus import BROKEN, REASONS, VALID, Forge
from tests.security.ways import AUTH, GATEWAY, Ways, ways_into

pytestmark = pytest.mark.xdist_group("mesh")

LARGEST_HEADER = 32_768
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED


@pytest.fixture(scope="module")
async def ways(mesh: Mesh) -> AsyncIterator[Ways]:
    async with ways_into(mesh) as ways:
        yield ways


@pytest.fixture(scope="module")
async def forge(mesh: Mesh) -> AsyncIterator[Forge]:
    async with aiohttp.ClientSession() as http:
        yield await forge_of(mesh, http)


def is_text(token: str) -> bool:
    """Whether it can be the value of a header: anything else has no way in but HTTP written by hand."""
    return token.isascii() and token.isprintable()


def is_quoted(token: str) -> bool:
    """Whether it is something in quotes."""
    return token[:1] == token[-1:] == '"'


@pytest.mark.parametrize("name", BROKEN)
async def test_a_broken_token_is_refused_everywhere(ways: Ways, forge: Forge, name: str):
    token = BROKEN[name](forge)
    assert token != VALID["plain"](forge)
    if not is_quoted(token):  # a cookie in quotes is the same cookie (RFC 6265, section 4.1.1)
        assert_refused_as_json(name, token, await ways.with_cookie(token))
    assert_refused_as_json(name, token, await ways.with_header(token))
    if not is_text(token):
        return
    found = await asyncio.gather(*(ways.natively(way, token) for way in ways.calls))
    outcomes = dict(zip(ways.calls, found, strict=True))
    code, _ = outcomes.pop(GATEWAY)
    if len(token) > LARGEST_HEADER:
        assert grpc.StatusCode.OK not in {code, *(code for code, _ in outcomes.values())}
        return
    assert outcomes == dict.fromkeys(outcomes, (UNAUTHENTICATED, REASONS.get(name, "TOKEN_INVALID")))
    if "," in token:  # the gateway takes it for two headers, and answers 400
        assert code is grpc.StatusCode.INTERNAL
    elif name.startswith("aud "):  # its 403, of which gRPC makes this
        assert code in {UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}
    else:
        assert code is UNAUTHENTICATED


def assert_refused_as_json(name: str, token: str, answer: Answer) -> None:
    if len(token) > LARGEST_HEADER:
        assert answer.status in {0, 431}
    elif answer.status == 400:
        assert "," in token or not is_text(token), "a header that is none"
    else:
        assert (answer.status, answer.body["code"]) == (401, 16), answer
        assert answer.reason in {REASONS.get(name), "TOKEN_INVALID", "TOKEN_MISSING"}


@pytest.mark.parametrize("name", VALID)
async def test_a_valid_one_is_accepted_everywhere(
    ways: Ways, forge: Forge, http: aiohttp.ClientSession, name: str
):
    # A session of its own, because the method of auth_svc ends it.
    person = await Person(http, ways.url).sign_up()
    second = await person.post("/v1/workspaces", {"title": "Second"})
    own = replace(
        forge,
        claims=claims_of(person.account["accessToken"]),
        other_workspace_id=second["workspace"]["workspaceId"],
    )
    token = VALID[name](own)
    answers = await asyncio.gather(ways.with_header(token), ways.with_cookie(token))
    assert [answer.status for answer in answers] == [200, 200], answers
    workspace_id = claims_of(token)["wid"]
    for service in (GATEWAY, "user", "dashboard", "analytics", AUTH):
        expected = (grpc.StatusCode.OK, "")
        if not workspace_id and service in {"dashboard", "analytics"}:
            expected = (grpc.StatusCode.NOT_FOUND, "WORKSPACE_NOT_FOUND")  # known, and without a workspace
        assert await ways.natively(service, token) == expected, service


def test_the_corpus_is_large():
    assert len(BROKEN) >= 60
    assert len(VALID) >= 5
    assert REASONS.keys() <= BROKEN.keys()
