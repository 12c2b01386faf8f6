"""Programs with API keys, and admins as members, at the gateway of the whole mesh."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from tests.conditions import eventually
from tests.mesh.memberships import admit
from tests.mesh.people import Person, Watch
from tests.parts import Mesh

pytestmark = pytest.mark.xdist_group("mesh")


class Machine(Person):
    """A program that holds an API key."""

    service_account_id = ""

    async def exchange(self, secret: str) -> Machine:
        """Carries a token of this key from now on."""
        self.headers.pop("authorization", None)
        answer = await self.post("/v1/auth:exchangeApiKey", {"apiKey": secret})
        self.headers["authorization"] = f"Bearer {answer['accessToken']}"
        return self


async def make(ann: Person, mesh: Mesh, scopes: list[str]) -> tuple[Machine, str, str]:
    """A program in Ann's workspace, its key, and the path of its account."""
    path = f"/v1/workspaces/{ann.workspace_id}/serviceAccounts"
    account = (await ann.post(path, {"title": "CI", "role": "editor"}))["serviceAccount"]
    path += f"/{account['serviceAccountId']}"
    secret = (await ann.post(f"{path}/apiKeys", {"title": "key", "scopes": scopes}))["secret"]
    program = await Machine(ann.http, mesh.gateway_url).exchange(secret)
    program.service_account_id = account["serviceAccountId"]
    return program, secret, path


async def test_a_program_reads_watches_and_is_out_at_once(mesh: Mesh, ann: Person, bob: Person):
    dashboard_id = await ann.new_dashboard()
    scopes = ["dashboards.view", "dashboards.list"]
    program, secret, path = await make(ann, mesh, scopes)
    found = await program.get(f"/v1/dashboards/{dashboard_id}")
    assert found["dashboard"]["dashboardId"] == dashboard_id
    for method, route, reason in (
        ("POST", "/v1/dashboards", "SCOPE_MISSING"),
        ("GET", f"/v1/workspaces/{bob.workspace_id}", "WORKSPACE_NOT_FOUND"),
        ("POST", "/v1/workspaces", "PERSON_REQUIRED"),
        ("POST", path + "/apiKeys", "PERSON_REQUIRED"),
    ):
        answer = await program.call(method, route, {"title": "T"} if method == "POST" else None)
        assert answer.reason == reason, answer
    async with program.watch(dashboard_id) as watch:
        await watch.next()
        async with asyncio.timeout(2):
            answer = await ann.call("PATCH", path, {"disabled": True})
            assert answer.status == 200, answer
            await asyncio.gather(watch_ends(watch), call_ends(program), exchange_ends(program, secret))
    answer = await ann.call("PATCH", path + "?updateMask=disabled", {"disabled": False})
    assert answer.status == 200, answer
    await program.exchange(secret)
    await program.get(f"/v1/dashboards/{dashboard_id}")


async def watch_ends(watch: Watch) -> None:
    assert (await watch.next())["end"] == {"reason": "SESSION_REVOKED"}


async def call_ends(program: Person) -> None:
    async def refused() -> bool:
        answer = await program.call("GET", "/v1/dashboards")
        return answer.status == 401 and answer.reason == "SESSION_REVOKED"

    await eventually(refused)


async def exchange_ends(program: Person, secret: str) -> None:
    async def refused() -> bool:
        answer = await program.call("POST", "/v1/auth:exchangeApiKey", {"apiKey": secret}, authorization="")
        return answer.status == 401 and answer.reason == "API_KEY_INVALID"

    await eventually(refused)


async def test_grants_to_a_program_end_with_it(mesh: Mesh, ann: Person):
    dashboard_id = await ann.new_dashboard()
    program, _, path = await make(ann, mesh, [])
    subject = {"userId": program.service_account_id}
    deny = {"subject": subject, "role": "viewer", "effect": "DENY"}
    await ann.post(f"/v1/dashboards/{dashboard_id}/grants", deny)
    answer = await program.call("GET", f"/v1/dashboards/{dashboard_id}")
    assert (answer.status, answer.reason) == (404, "DASHBOARD_NOT_FOUND")
    assert len((await ann.get(f"/v1/dashboards/{dashboard_id}/grants"))["grants"]) == 2
    assert (await ann.call("DELETE", path)).status == 200

    async def gone() -> bool:
        grants = (await ann.get(f"/v1/dashboards/{dashboard_id}/grants"))["grants"]
        return [grant["role"] for grant in grants] == ["owner"]

    await eventually(gone)
    members = await ann.get(f"/v1/workspaces/{ann.workspace_id}/members")
    assert [member["user"]["userId"] for member in members["members"]] == [ann.user_id]


async def test_an_admin_sees_what_a_member_sees(
    mesh: Mesh, ann: Person, bob: Person, http: aiohttp.ClientSession
):
    members = f"/v1/workspaces/{ann.workspace_id}/members"
    await admit(mesh, ann, bob, "viewer")
    dashboard_id = await ann.new_dashboard()
    session = await ann.post(f"{members}/{bob.user_id}:impersonate", {"reason": "ticket 17"})
    assert session["refreshToken"]
    as_bob = Person(http, mesh.gateway_url)
    as_bob.headers["authorization"] = f"Bearer {session['accessToken']}"
    assert (await as_bob.get("/v1/users/me"))["user"]["userId"] == bob.user_id
    answer = await as_bob.call("PATCH", f"/v1/dashboards/{dashboard_id}", {"title": "Mine"})
    assert (answer.status, answer.reason) == (403, "PERMISSION_MISSING")
    async with as_bob.watch(dashboard_id) as watch:
        await watch.next()
        await ann.call("DELETE", f"{members}/{bob.user_id}")
        end = (await watch.next(seconds=2))["end"]
        assert end["reason"] in {"ACCESS_LOST", "SESSION_REVOKED"}
    await eventually(lambda: is_out(as_bob), seconds=2)
    await bob.get("/v1/users/me")


async def is_out(person: Person) -> bool:
    return (await person.call("GET", "/v1/users/me")).status == 401
