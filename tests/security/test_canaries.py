"""Marked passwords, tokens and seeds go through every flow, and are looked for wherever something is kept."""

from __future__ import annotations

import base64
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import asyncpg
import pyotp
import pytest
from redis.asyncio import Redis

from cli.parts import SERVICES
from tests.conditions import eventually
from tests.mesh.people import Person
from tests.parts import Mesh

pytestmark = [pytest.mark.xdist_group("mesh"), pytest.mark.timeout(240)]


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        yield session


def links_in_mails(mesh: Mesh, address: str) -> list[str]:
    """The tokens of the links that were mailed to an address, the oldest first."""
    found = []
    for file in sorted((mesh.stack.data_dir / "mails").glob("*.eml")):
        text = file.read_text()
        if address in text:
            found += [line.partition("=")[2] for line in text.splitlines() if "/account#" in line]
    return found


async def until_mailed(mesh: Mesh, address: str, count: int) -> str:
    """The token of the newest link, once there are so many."""
    await eventually(lambda: len(links_in_mails(mesh, address)) >= count)
    return links_in_mails(mesh, address)[-1]


async def live(mesh: Mesh, person: Person) -> list[str]:
    """Goes through every flow that has a secret, and gives the secrets."""
    hidden = [person.password]
    await person.sign_up()

    def keep(answer: dict[str, Any]) -> dict[str, Any]:
        names = ("accessToken", "refreshToken", "refreshKey", "deviceToken", "mfaToken", "secret")
        hidden.extend(answer[name] for name in names if answer.get(name))
        hidden.extend(answer.get("recoveryCodes", []))
        if answer.get("accessToken"):
            person.headers["authorization"] = f"Bearer {answer['accessToken']}"
        return answer

    keep(person.account)
    token = await until_mailed(mesh, person.email, 1)
    hidden.append(token)
    await person.post("/v1/auth:verifyEmail", {"token": token})

    await person.post("/v1/auth:requestPasswordReset", {"email": person.email})
    token = await until_mailed(mesh, person.email, 2)
    new_password = f"canary-{secrets.token_hex(12)}"
    hidden += [token, new_password]
    await person.post("/v1/auth:resetPassword", {"token": token, "newPassword": new_password})
    credentials = {"email": person.email, "password": new_password}
    keep(await person.post("/v1/auth:signIn", credentials))

    totp = keep(await person.post("/v1/auth/factors:beginTotp", {}))
    code = pyotp.TOTP(totp["secret"]).now()
    confirmed = {"mfaToken": totp["mfaToken"], "code": code, "title": "Phone"}
    recovery = keep(await person.post("/v1/auth/factors:confirmTotp", confirmed))["recoveryCodes"]
    step = keep(await person.post("/v1/auth:signIn", credentials))
    wrong = {"mfaToken": step["mfaToken"], "recoveryCode": f"X{recovery[0][1:-1]}"}
    assert (await person.call("POST", "/v1/auth:completeSignIn", wrong)).status == 401
    right = {"mfaToken": step["mfaToken"], "recoveryCode": recovery[0]}
    tokens = keep(await person.post("/v1/auth:completeSignIn", right))
    keep(
        await person.post(
            "/v1/auth:refresh",
            {"refreshToken": tokens["refreshToken"], "refreshKey": tokens["refreshKey"]},
        )
    )

    accounts = f"/v1/workspaces/{person.workspace_id}/serviceAccounts"
    made = await person.post(accounts, {"title": "Robot", "role": "viewer"})
    keys = f"{accounts}/{made['serviceAccount']['serviceAccountId']}/apiKeys"
    key = await person.post(keys, {"title": "Key"})
    hidden.append(key["secret"])
    exchanged = await person.post("/v1/auth:exchangeApiKey", {"apiKey": key["secret"]})
    hidden.append(exchanged["accessToken"])
    assert (await person.call("POST", "/v1/auth:exchangeApiKey", {"apiKey": new_password})).status == 401

    guest = Person(person.http, person.url)
    guest.password = f"canary-{secrets.token_hex(12)}"
    invitations = f"/v1/workspaces/{person.workspace_id}/invitations"
    await person.post(invitations, {"email": guest.email})
    token = await until_mailed(mesh, guest.email, 1)
    hidden += [token, guest.password]
    await guest.post("/v1/invitations:preview", {"token": token})
    assert (await guest.call("POST", "/v1/invitations:preview", {"token": token[:-1]})).status == 404
    invited = {"email": guest.email, "password": guest.password, "displayName": "Guest"}
    await guest.post("/v1/auth:signUp", {**invited, "invitationToken": token})

    dashboard_id = await person.new_dashboard()
    of_link = f"canary-{secrets.token_hex(12)}"
    link = await person.post(f"/v1/dashboards/{dashboard_id}/shareLinks", {"password": of_link})
    shared = f"/v1/shared/{link['token']}"
    opened = await guest.post(f"{shared}:unlock", {"password": of_link})
    hidden += [link["token"], of_link, opened["ticket"]]
    await guest.get(f"{shared}:data", **{"x-share-ticket": opened["ticket"]})
    await guest.get(f"{shared}?ticket={opened['ticket']}")
    assert (await guest.call("GET", f"{shared}/nope")).status == 404
    assert (await guest.call("POST", f"{shared}:unlock", {"password": new_password})).status == 401
    async with person.http.get(link["url"]) as page:
        assert page.status == 200

    new_email = f"{secrets.token_hex(8)}@example.org"
    await person.post("/v1/auth/account:changeEmail", {"newEmail": new_email})
    hidden.append(await until_mailed(mesh, new_email, 1))
    third_password = f"canary-{secrets.token_hex(12)}"
    hidden.append(third_password)
    change = {"currentPassword": new_password, "newPassword": third_password}
    keep(await person.post("/v1/auth/account:changePassword", change))
    return hidden


def spellings(secret: str) -> Iterator[bytes]:
    """A secret as it could stand somewhere."""
    yield secret.encode()
    yield secret.encode().hex().encode()
    yield base64.b64encode(secret.encode()).rstrip(b"=")[:-1]
    if "-" in secret and secret.replace("-", "").isalnum():
        yield secret.replace("-", "").encode()


def find(secrets_hidden: list[str], where: str, content: bytes) -> list[str]:
    return [
        f"{where}: {secret[:8]}…"
        for secret in secrets_hidden
        if any(spelling in content for spelling in spellings(secret))
    ]


async def test_no_secret_is_kept_anywhere(mesh: Mesh, http: aiohttp.ClientSession):
    person = Person(http, mesh.gateway_url)
    person.password = f"canary-{secrets.token_hex(12)}"
    hidden = await live(mesh, person)
    assert len(hidden) > 25
    found: list[str] = []

    files = [*(mesh.stack.data_dir / "logs").rglob("*"), *(mesh.stack.data_dir / "nats").rglob("*")]
    contents = {file: file.read_bytes() for file in files if file.is_file()}
    for file, content in contents.items():
        found += find(hidden, str(file.relative_to(mesh.stack.data_dir)), content)
    # What is looked through is what the flows have written.
    assert any(b"AuditEntrySealed" in content or b"SignedIn" in content for content in contents.values())
    assert any(person.user_id.encode() in content for content in contents.values())

    rows = 0
    environments = {part.name: part.env for part in mesh.stack.parts()}
    for service in SERVICES:
        connection = await asyncpg.connect(environments[f"{service}_svc"]["MESHBOARD_POSTGRES_URL"])
        tables = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        for (table,) in tables:
            for (row,) in await connection.fetch(f'SELECT t::text FROM "{table}" t'):
                rows += 1
                found += find(hidden, f"{service}.{table}", row.encode())
        await connection.close()
    assert rows > 20

    redis = Redis.from_url(environments["auth_svc"]["MESHBOARD_REDIS_URL"])
    async for key in redis.scan_iter():
        found += find(hidden, f"valkey {key[:40]!r}", key + (await redis.dump(key) or b""))
    await redis.aclose()

    assert found == []


def test_the_search_finds_what_is_there():
    """The test of the test: each spelling is found."""
    secret = "canary-0123456789abcdef"
    for spelling in spellings(secret):
        assert find([secret], "x", b"before " + spelling + b" after") == ["x: canary-0…"]
    assert find([secret], "x", b"canary-0123456789") == []
