"""Who and what the permission matrix is about."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp

from services.chassis.auth import SERVICE_TOKEN_KEY, ServiceTokens
from tests.harness import new_id
from tests.mesh.people import Person
from tests.parts import Mesh

ROLES = ("guest", "viewer", "editor", "admin", "owner")
WIDGET = {"title": "w", "kind": "NUMBER", "layout": {"width": 4, "height": 4}}
HIDDEN = {"subject": {"workspace": True}, "role": "viewer", "effect": "DENY"}

# The id of each kind of thing, by its name; `workspace` is the one that holds them.
Things = Mapping[str, str]


@dataclass
class World:
    """The members of one workspace by role, a machine with another scope, and what they can try to reach."""

    mesh: Mesh
    members: Mapping[str, Person]
    key_token: str
    # own, sibling, foreign, deleted, absent; and in another workspace: elsewhere, nowhere
    targets: Mapping[str, Things]

    def service_headers(self, service: str, audience: str) -> dict[str, str]:
        """What a call of a service carries."""
        tokens = ServiceTokens(service, self.mesh.stack.data_dir / "secrets" / "keys")
        return {SERVICE_TOKEN_KEY: tokens.issue(audience)}


async def build(mesh: Mesh, http: aiohttp.ClientSession) -> World:
    """Makes everybody and everything, through the gateway."""
    url = mesh.gateway_url
    members = {role: await Person(http, url).sign_up() for role in ROLES}
    sibling, stranger = await Person(http, url).sign_up(), await Person(http, url).sign_up()
    owner = members["owner"]
    workspace = owner.workspace_id
    inside = {"x-workspace-id": workspace}
    await owner.post(
        f"/v1/workspaces/{workspace}/roles",
        {"name": "guest", "title": "Guest", "permissions": ["workspaces.view"]},
    )
    for role, person in {**members, "viewer ": sibling}.items():
        if person is not owner:
            await join(owner, person, role.strip())
    for person in (*members.values(), sibling):
        person.headers.update(inside)

    own = await things(owner, members["viewer"].user_id)
    hidden = await things(sibling, sibling.user_id, made_by=owner)
    foreign = await things(stranger, stranger.user_id)
    deleted = await things(owner, members["viewer"].user_id)
    await delete(owner, deleted)
    account = await owner.post(
        f"/v1/workspaces/{workspace}/serviceAccounts", {"title": "machine", "role": "admin"}
    )
    account_id = account["serviceAccount"]["serviceAccountId"]
    key = await owner.post(
        f"/v1/workspaces/{workspace}/serviceAccounts/{account_id}/apiKeys",
        {"title": "key", "scopes": ["teams.view"]},
    )
    exchanged = await owner.post("/v1/auth:exchangeApiKey", {"apiKey": key["secret"]})
    absent = {name: new_id() for name in own}
    return World(
        mesh,
        members,
        exchanged["accessToken"],
        {
            "own": own,
            "sibling": {**hidden, "workspace": workspace},
            "foreign": {**foreign, "workspace": workspace},
            "deleted": {**deleted, "workspace": workspace},
            "absent": {**absent, "workspace": workspace},
            "elsewhere": foreign,
            "nowhere": absent,
        },
    )


async def join(owner: Person, person: Person, role: str) -> None:
    """Makes someone a member of the owner's workspace."""
    await owner.post(f"/v1/workspaces/{owner.workspace_id}/members", {"userId": person.user_id, "role": role})


async def things(maker: Person, member_id: str, *, made_by: Person | None = None) -> dict[str, str]:
    """One thing of each kind. With `made_by` the workspace is that person's, and all but a team are denied them."""
    keeper = made_by or maker
    workspace = keeper.workspace_id
    base = f"/v1/workspaces/{workspace}"
    team = await keeper.post(f"{base}/teams", {"title": secrets.token_hex(4)})
    team_id = team["team"]["teamId"]
    await keeper.post(f"{base}/teams/{team_id}/members", {"userId": member_id})
    account = await keeper.post(f"{base}/serviceAccounts", {"title": "machine", "role": "viewer"})
    creator = keeper
    source_id, _ = await creator.new_source()
    dashboard_id = await creator.new_dashboard()
    query = {
        "sourceIds": [source_id],
        "timeRange": {"lastSeconds": 60},
        "measures": [{"aggregation": "COUNT"}],
    }
    widget = await creator.post(f"/v1/dashboards/{dashboard_id}/widgets", {**WIDGET, "query": query})
    found = {
        "workspace": workspace,
        "member": member_id,
        "team": team_id,
        "service_account": account["serviceAccount"]["serviceAccountId"],
        "source": source_id,
        "dashboard": dashboard_id,
        "widget": widget["widget"]["widgetId"],
    }
    if made_by:
        for path in (f"/v1/sources/{source_id}", f"/v1/dashboards/{dashboard_id}"):
            grants = await keeper.get(f"{path}/grants")
            await keeper.post(
                f"{path}/grants", {"subject": {"teamId": team_id}, "role": "editor", "effect": "ALLOW"}
            )
            await keeper.post(f"{path}/grants", HIDDEN)
            # The keeper's own grant is the nearest: without it the thing is hidden from the keeper, too.
            for grant in grants["grants"]:
                await keeper.call("DELETE", f"{path}/grants/{grant['grantId']}")
    return found


async def delete(owner: Person, found: Things) -> None:
    """Deletes what can be deleted."""
    for path in (
        f"/v1/dashboards/{found['dashboard']}",
        f"/v1/sources/{found['source']}",
        f"/v1/workspaces/{found['workspace']}/serviceAccounts/{found['service_account']}",
    ):
        answer = await owner.call("DELETE", path)
        assert answer.status == 200, answer
