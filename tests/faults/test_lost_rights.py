"""Every way to lose the sight of a dashboard: within two seconds nothing shows it any more, also without NATS."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.conditions import eventually
from tests.faults.test_outages import SLACK_SECONDS, TRUST_SECONDS, frozen, stopped, until_refused
from tests.mesh.people import Person
from tests.parts import Mesh
from tests.security.world import join

pytestmark = [pytest.mark.xdist_group("faults"), pytest.mark.timeout(300)]

VIEW = ["workspaces.view", "dashboards.view", "dashboards.list"]
HIDDEN = {"subject": {"workspace": True}, "role": "viewer", "effect": "DENY"}

Lose = Callable[[], Awaitable[object]]


@dataclass
class Scene:
    """Someone who keeps a workspace, a member of it, and the dashboard that the member is to lose."""

    mesh: Mesh
    keeper: Person
    member: Person
    dashboard_id: str

    @property
    def base(self) -> str:
        return f"/v1/workspaces/{self.keeper.workspace_id}"

    @property
    def path(self) -> str:
        return f"/v1/dashboards/{self.dashboard_id}"

    async def call(self, method: str, path: str, body: Any = None) -> Any:
        """The body of a call of the keeper that works."""
        answer = await self.keeper.call(method, path, body)
        assert answer.status == 200, (path, answer)
        return answer.body

    async def grant(self, path: str, subject: Mapping[str, Any], effect: str = "ALLOW", **more: Any) -> str:
        """The path of a new grant."""
        body = {"subject": subject, "role": "viewer", "effect": effect, **more}
        made = await self.call("POST", f"{path}/grants", body)
        return f"{path}/grants/{made['grant']['grantId']}"

    async def hide(self, path: str) -> None:
        """Denies the workspace a resource."""
        await self.call("POST", f"{path}/grants", HIDDEN)

    async def team(self, **more: Any) -> str:
        """The id of a new team."""
        made = await self.call("POST", f"{self.base}/teams", {"title": f"t{time.monotonic_ns()}", **more})
        return str(made["team"]["teamId"])

    async def enter(self, team_id: str, **more: Any) -> str:
        """Puts the member into a team, and gives the path of the membership."""
        path = f"{self.base}/teams/{team_id}/members"
        await self.call("POST", path, {"userId": self.member.user_id, **more})
        return f"{path}/{self.member.user_id}"


def soon(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")


async def membership(scene: Scene) -> Lose:
    return lambda: scene.call("DELETE", f"{scene.base}/members/{scene.member.user_id}")


async def leaving(scene: Scene) -> Lose:
    return lambda: scene.member.post(f"{scene.base}:leave", {})


async def another_role(scene: Scene) -> Lose:
    await scene.call("POST", f"{scene.base}/roles", {"name": "blind", "permissions": ["workspaces.view"]})
    path = f"{scene.base}/members/{scene.member.user_id}"
    return lambda: scene.call("PATCH", path, {"role": "blind"})


async def the_role_itself(scene: Scene) -> Lose:
    await scene.call("POST", f"{scene.base}/roles", {"name": "sighted", "permissions": VIEW})
    await scene.call("PATCH", f"{scene.base}/members/{scene.member.user_id}", {"role": "sighted"})
    path = f"{scene.base}/roles/sighted?updateMask=permissions"
    return lambda: scene.call("PATCH", path, {"permissions": ["workspaces.view"]})


async def a_grant(scene: Scene) -> Lose:
    grant = await scene.grant(scene.path, {"userId": scene.member.user_id})
    await scene.hide(scene.path)
    return lambda: scene.call("DELETE", grant)


async def a_grant_that_expires(scene: Scene) -> Lose:
    await scene.hide(scene.path)
    end = soon(3)
    await scene.grant(scene.path, {"userId": scene.member.user_id}, expireTime=end)
    return lambda: until(end)


async def a_denial(scene: Scene) -> Lose:
    return lambda: scene.grant(scene.path, {"userId": scene.member.user_id}, "DENY")


async def a_team(scene: Scene) -> Lose:
    team_id = await scene.team()
    place = await scene.enter(team_id)
    await scene.grant(scene.path, {"teamId": team_id})
    await scene.hide(scene.path)
    return lambda: scene.call("DELETE", place)


async def a_membership_of_a_team_that_expires(scene: Scene) -> Lose:
    team_id = await scene.team()
    await scene.grant(scene.path, {"teamId": team_id})
    await scene.hide(scene.path)
    end = soon(3)
    await scene.enter(team_id, expireTime=end)
    return lambda: until(end)


async def the_team_above(scene: Scene) -> Lose:
    above = await scene.team()
    below = await scene.team(parentTeamId=above)
    await scene.enter(below)
    await scene.grant(scene.path, {"teamId": above})
    await scene.hide(scene.path)
    return lambda: scene.call("POST", f"{scene.base}/teams/{below}:move", {})


async def the_team_itself(scene: Scene) -> Lose:
    team_id = await scene.team()
    await scene.enter(team_id)
    await scene.grant(scene.path, {"teamId": team_id})
    await scene.hide(scene.path)
    return lambda: scene.call("DELETE", f"{scene.base}/teams/{team_id}")


async def a_grant_on_the_folder(scene: Scene) -> Lose:
    folder = await folder_of(scene)
    grant = await scene.grant(folder, {"userId": scene.member.user_id})
    await scene.hide(folder)
    return lambda: scene.call("DELETE", grant)


async def the_place_of_the_dashboard(scene: Scene) -> Lose:
    made = await scene.call("POST", "/v1/folders", {"title": "hidden"})
    folder_id = made["folder"]["folderId"]
    await scene.hide(f"/v1/folders/{folder_id}")
    return lambda: scene.call("POST", f"{scene.path}:move", {"folderId": folder_id})


async def the_dashboard(scene: Scene) -> Lose:
    return lambda: scene.call("DELETE", scene.path)


async def the_workspace(scene: Scene) -> Lose:
    return lambda: scene.call("DELETE", scene.base)


async def the_account(scene: Scene) -> Lose:
    return lambda: scene.member.call("DELETE", f"/v1/users/{scene.member.user_id}")


async def folder_of(scene: Scene) -> str:
    """The path of a folder that the dashboard lies in from now on."""
    made = await scene.call("POST", "/v1/folders", {"title": "folder"})
    folder_id = made["folder"]["folderId"]
    await scene.call("POST", f"{scene.path}:move", {"folderId": folder_id})
    return f"/v1/folders/{folder_id}"


async def until(end: str) -> None:
    await eventually(lambda: datetime.now(UTC) >= datetime.fromisoformat(end))


WAYS = [
    membership,
    leaving,
    another_role,
    the_role_itself,
    a_grant,
    a_grant_that_expires,
    a_denial,
    a_team,
    a_membership_of_a_team_that_expires,
    the_team_above,
    the_team_itself,
    a_grant_on_the_folder,
    the_place_of_the_dashboard,
    the_dashboard,
    the_workspace,
    the_account,
]
# Kept out of short runs without NATS: what they lose, others lose in the same way.
SLOW = {leaving, a_denial, the_team_above, the_team_itself, the_place_of_the_dashboard, the_dashboard}


@asynccontextmanager
async def there(mesh: Mesh, name: str) -> AsyncIterator[None]:
    """Leaves everything as it is."""
    yield


@pytest.fixture
async def scene(fragile: Mesh, ann: Person) -> Scene:
    ann.headers["x-workspace-id"] = ann.workspace_id
    member = await join(fragile, ann, "viewer")
    return Scene(fragile, ann, member, await ann.new_dashboard())


CASES = [
    pytest.param(
        lose,
        away,
        id=f"{lose.__name__}-{away.__name__}",
        marks=[pytest.mark.long] if away is frozen or (away is stopped and lose in SLOW) else [],
    )
    for lose in WAYS
    for away in (there, stopped, frozen)
]


@pytest.mark.parametrize(("lose", "away"), CASES)
async def test_what_is_lost_is_out_of_sight_within_two_seconds(
    scene: Scene, lose: Callable[[Scene], Awaitable[Lose]], away: Any
):
    act = await lose(scene)
    member, path = scene.member, scene.path
    await eventually(lambda: sees(member, path), 10)
    async with AsyncExitStack() as stack:
        watch = await stack.enter_async_context(member.watch(scene.dashboard_id))
        await watch.next()
        await stack.enter_async_context(away(scene.mesh, "nats"))
        await act()
        began = time.monotonic()
        (answer, seconds), ending = await asyncio.gather(until_refused(member, path), watch.next())
        assert (answer.status, answer.reason) in {
            (404, "DASHBOARD_NOT_FOUND"),
            (404, "WORKSPACE_NOT_FOUND"),
            (401, "SESSION_REVOKED"),
        }
        assert seconds < TRUST_SECONDS + SLACK_SECONDS
        assert ending["end"]["reason"] in {"ACCESS_LOST", "DASHBOARD_DELETED", "SESSION_REVOKED"}
        assert time.monotonic() - began < TRUST_SECONDS + SLACK_SECONDS
        assert await is_gone(member, scene.dashboard_id)


async def sees(person: Person, path: str) -> bool:
    return (await person.call("GET", path)).status == 200


async def is_gone(person: Person, dashboard_id: str) -> bool:
    """Whether neither data nor lists have it any more."""
    data, listed = await asyncio.gather(
        person.call("GET", f"/v1/dashboards/{dashboard_id}:data"), person.call("GET", "/v1/dashboards")
    )
    shown = [each["dashboardId"] for each in listed.body.get("dashboards", [])]
    return data.status in {401, 404} and dashboard_id not in shown
