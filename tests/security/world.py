"""Who and what the permission matrix is about."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp

from cli.mails import read
from services.chassis.access import WORKSPACE_HEADER
from services.chassis.auth import SERVICE_TOKEN_KEY, ServiceTokens
from tests.conditions import eventually
from tests.harness import new_id
from tests.mesh.people import Person
from tests.parts import Mesh

ROLES = ("guest", "viewer", "editor", "admin", "owner")
WIDGET = {"title": "w", "kind": "NUMBER", "layout": {"width": 4, "height": 4}}

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

    async def new_member(self, role: str) -> Person:
        """One more member with this role."""
        return await join(self.mesh, self.members["owner"], role)


async def build(mesh: Mesh, http: aiohttp.ClientSession) -> World:
    """Makes everybody and everything, through the gateway."""
    owner = await Person(http, mesh.gateway_url).sign_up()
    owner.headers[WORKSPACE_HEADER] = owner.workspace_id
    stranger = await Person(http, mesh.gateway_url).sign_up()
    base = f"/v1/workspaces/{owner.workspace_id}"
    await owner.post(f"{base}/roles", {"name": "guest", "permissions": ["workspaces.view"]})
    members = {role: await join(mesh, owner, role) for role in ROLES[:-1]} | {"owner": owner}
    own = await things(mesh, owner)
    hidden = await things(mesh, owner)
    await hide(owner, hidden)
    deleted = await things(mesh, owner)
    await delete(owner, deleted)
    foreign = await things(mesh, stranger)
    absent = {name: new_id() for name in own} | {"role": "never-was"}
    account = await owner.post(f"{base}/serviceAccounts", {"title": "machine", "role": "admin"})
    keys = f"{base}/serviceAccounts/{account['serviceAccount']['serviceAccountId']}/apiKeys"
    key = await owner.post(keys, {"title": "key", "scopes": ["teams.view"]})
    exchanged = await owner.post("/v1/auth:exchangeApiKey", {"apiKey": key["secret"]})
    here = {"workspace": owner.workspace_id}
    # An invitation that was revoked is still there, to be looked at.
    deleted["invitation"] = absent["invitation"]
    return World(
        mesh,
        members,
        exchanged["accessToken"],
        {
            "own": own,
            "sibling": hidden,
            "foreign": {**foreign, **here},
            "deleted": deleted,
            "absent": {**absent, **here},
            "elsewhere": foreign,
            "nowhere": absent,
        },
    )


async def join(mesh: Mesh, owner: Person, role: str) -> Person:
    """Somebody who has come by an invitation into the owner's workspace."""
    person = Person(owner.http, owner.url)
    invited = await owner.post(
        f"/v1/workspaces/{owner.workspace_id}/invitations", {"email": person.email, "role": role}
    )
    assert invited["invitation"]["email"] == person.email
    await person.sign_up(invitationToken=await invitation_token(mesh, person.email))
    person.headers[WORKSPACE_HEADER] = owner.workspace_id
    return person


async def invitation_token(mesh: Mesh, email: str) -> str:
    """The token in the link that was mailed to this address."""
    found: list[str] = []

    def arrived() -> bool:
        mails = [mail for mail in read(mesh.stack.mails_dir) if mail.to == email]
        found.extend(token for mail in mails for token in re.findall(r"#invitation=(\S+)", mail.text))
        return bool(found)

    await eventually(arrived)
    return found[0]


async def things(mesh: Mesh, keeper: Person) -> dict[str, str]:
    """One thing of each kind in the keeper's workspace."""
    workspace = keeper.workspace_id
    base = f"/v1/workspaces/{workspace}"
    name = f"r{secrets.token_hex(4)}"
    member = await join(mesh, keeper, "viewer")
    team = await keeper.post(f"{base}/teams", {"title": name})
    team_id = team["team"]["teamId"]
    await keeper.post(f"{base}/teams/{team_id}/members", {"userId": member.user_id})
    await keeper.post(f"{base}/roles", {"name": name, "permissions": ["workspaces.view"]})
    managed = await keeper.post(
        f"{base}/users", {"email": f"{name}@example.org", "displayName": "Managed", "role": "viewer"}
    )
    invitation = await keeper.post(f"{base}/invitations", {"email": f"i{name}@example.org"})
    account = await keeper.post(f"{base}/serviceAccounts", {"title": name, "role": "viewer"})
    source_id, _ = await keeper.new_source()
    victim, _ = await keeper.new_source()
    folder = await keeper.post("/v1/folders", {"title": name})
    dashboard_id = await keeper.new_dashboard(title="Hidden or not")
    query = {
        "sourceIds": [source_id],
        "timeRange": {"lastSeconds": 60},
        "measures": [{"aggregation": "COUNT"}],
    }
    widget = await keeper.post(f"/v1/dashboards/{dashboard_id}/widgets", {**WIDGET, "query": query})
    return {
        "workspace": workspace,
        "member": member.user_id,
        "team": team_id,
        "role": name,
        "managed": managed["member"]["user"]["userId"],
        "invitation": invitation["invitation"]["invitationId"],
        "service_account": account["serviceAccount"]["serviceAccountId"],
        "source": source_id,
        "victim_source": victim,
        "folder": folder["folder"]["folderId"],
        "dashboard": dashboard_id,
        "widget": widget["widget"]["widgetId"],
    }


async def hide(keeper: Person, found: Things) -> None:
    """Denies the workspace the things, and lets the team have them; the keeper is as blind as the others."""
    for path in (
        f"/v1/sources/{found['source']}",
        f"/v1/sources/{found['victim_source']}",
        f"/v1/folders/{found['folder']}",
        f"/v1/dashboards/{found['dashboard']}",
    ):
        own = await keeper.get(f"{path}/grants")
        team = {"subject": {"teamId": found["team"]}, "role": "editor", "effect": "ALLOW"}
        hidden = {"subject": {"workspace": True}, "role": "viewer", "effect": "DENY"}
        await keeper.post(f"{path}/grants", team)
        await keeper.post(f"{path}/grants", hidden)
        for grant in own["grants"]:
            await done(keeper, f"{path}/grants/{grant['grantId']}")


async def delete(keeper: Person, found: Things) -> None:
    """Deletes everything but the workspace."""
    base = f"/v1/workspaces/{found['workspace']}"
    await done(keeper, f"/v1/dashboards/{found['dashboard']}")
    await keeper.post(f"/v1/dashboards/{found['dashboard']}:purge", {})
    for path in (
        f"/v1/folders/{found['folder']}",
        f"/v1/sources/{found['source']}",
        f"/v1/sources/{found['victim_source']}",
        f"{base}/serviceAccounts/{found['service_account']}",
        f"{base}/invitations/{found['invitation']}",
        f"{base}/roles/{found['role']}",
        f"{base}/teams/{found['team']}",
        f"{base}/members/{found['member']}",
        f"{base}/users/{found['managed']}",
    ):
        await done(keeper, path)


async def done(keeper: Person, path: str) -> None:
    """Deletes one thing."""
    answer = await keeper.call("DELETE", path)
    assert answer.status == 200, (path, answer)
