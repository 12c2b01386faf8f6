"""Invitations through the whole mesh: from the mail to the membership, and what a deleted workspace leaves."""

from __future__ import annotations

import aiohttp
import pytest

from tests.conditions import eventually
from tests.mesh.memberships import admit, invite
from tests.mesh.people import Person
from tests.parts import Mesh

pytestmark = pytest.mark.xdist_group("mesh")


async def test_somebody_new_signs_up_with_the_mailed_link(
    mesh: Mesh, ann: Person, http: aiohttp.ClientSession
):
    carl = Person(http, mesh.gateway_url)
    token = await invite(mesh, ann, carl, "editor")
    preview = await carl.post("/v1/invitations:preview", {"token": token})
    assert (preview["email"], preview["role"]) == (carl.email, "editor")
    credentials = {"email": carl.email, "password": carl.password, "displayName": "Carl"}
    carl.account = await carl.post("/v1/auth:signUp", {**credentials, "invitationToken": token})
    carl.headers["authorization"] = f"Bearer {carl.account['accessToken']}"
    assert carl.workspace_id == ann.workspace_id
    await carl.new_dashboard()
    answer = await carl.call("POST", "/v1/invitations:preview", {"token": token})
    assert (answer.status, answer.reason) == (404, "INVITATION_INVALID")


async def test_nobody_adds_a_stranger(ann: Person, bob: Person):
    members = f"/v1/workspaces/{ann.workspace_id}/members"
    answer = await ann.call("POST", members, {"userId": bob.user_id, "role": "viewer"})
    assert (answer.status, answer.reason) == (404, "USER_NOT_FOUND")


async def test_a_deleted_workspace_shuts_everywhere(mesh: Mesh, ann: Person, bob: Person):
    await admit(mesh, ann, bob, "editor")
    bob.headers["x-workspace-id"] = ann.workspace_id
    dashboard_id = await ann.new_dashboard()
    _, write_key = await ann.new_source()
    event = {"event": "view", "distinctId": "ada"}
    await ann.send(write_key, event)
    async with bob.watch(dashboard_id) as watch:
        await watch.next()
        answer = await ann.call("DELETE", f"/v1/workspaces/{ann.workspace_id}")
        assert answer.status == 200, answer
        assert (await watch.next(seconds=10))["end"] == {"reason": "ACCESS_LOST"}
    for path in (f"/v1/dashboards/{dashboard_id}", "/v1/dashboards", "/v1/sources"):
        answer = await bob.call("GET", path)
        assert (answer.status, answer.reason) == (404, "WORKSPACE_NOT_FOUND")

    async def refused() -> bool:
        sent = await ann.call("POST", "/v1/events:ingest", {"events": [event]}, **{"x-write-key": write_key})
        return sent.status == 401 and sent.reason == "WRITE_KEY_INVALID"

    await eventually(refused, seconds=10)
