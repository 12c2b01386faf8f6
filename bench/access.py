"""Who may do what: the cost of a decision, lists that are filtered by it, and how soon a grant taken back is gone.

The workspace has 50,000 dashboards in 400 folders, three deep, with thousands of grants that give and withhold. Its
lists are asked for by its owner, who has made all of it and has a grant on each; by a member of nested teams, from whom
much is withheld; and by one who sees three dashboards.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import asyncpg
import grpc
import grpc.aio
from meshboard.dashboard.v1 import dashboard_service_pb2 as dashboards_pb
from meshboard.dashboard.v1.dashboard_service_pb2_grpc import DashboardServiceStub
from meshboard.user.v1.workspace_service_pb2 import ListMembersRequest
from meshboard.user.v1.workspace_service_pb2_grpc import WorkspaceServiceStub
from sqlalchemy import select

from bench.figures import Figure, percentile
from bench.mesh import Account, Mesh, MeshFailedError
from services.chassis import db, resources
from services.chassis.rights import ALLOW, DENY, ROLES, TEAM, USER, WORKSPACE, Grant, Level, Rights, decide
from services.dashboard_svc.dashboards import DASHBOARD
from services.dashboard_svc.models import Dashboard

TARGETS = {"decision": 20.0, "cold decision": 5.0, "dashboards": 50.0, "members": 20.0, "revocation": 2.0}
LARGE_PAGE = 1000
CALL_SECONDS = 30.0
WAIT_SECONDS = 10.0

_FOLDERS = """
    INSERT INTO folders
        (workspace_id, folder_id, title, parent_folder_id, version, creator_id, create_time, update_time)
    SELECT $1, gen_random_uuid(), 'Folder ' || n, ($3::uuid[])[1 + n % greatest(cardinality($3::uuid[]), 1)], 1,
        $2, now(), now()
    FROM generate_series(1, $4) AS n RETURNING folder_id
"""
_DASHBOARDS = """
    INSERT INTO dashboards
        (workspace_id, dashboard_id, folder_id, title, description, version, creator_id, create_time, update_time)
    SELECT $1, gen_random_uuid(), ($3::uuid[])[1 + n % cardinality($3::uuid[])], 'Dashboard ' || n, '', 1,
        $2, now(), now()
    FROM generate_series(1, $4) AS n
"""
_GRANTS = """
    INSERT INTO grants
        (workspace_id, grant_id, resource_type, resource_id, subject_type, subject_id, role, effect, creator_id)
    SELECT $1, gen_random_uuid(), {type}, {id}, {subject}, {role}, {effect}, $2 FROM {rows} WHERE workspace_id = $1
"""
_MEMBERS = """
    WITH people AS (
        INSERT INTO users (user_id, display_name, email, create_time, update_time)
        SELECT gen_random_uuid(), 'Member ' || n, $1 || '-' || n || '@meshboard.example', now(), now()
        FROM generate_series(1, $2) AS n RETURNING user_id
    )
    INSERT INTO members (workspace_id, user_id, role, create_time)
    SELECT $1::uuid, user_id, 'viewer', now() FROM people
"""


@dataclass(frozen=True)
class Crowd:
    """The owner of a workspace, two members of it, and the teams of the first."""

    owner: Account
    member: Account
    outsider: Account
    team_ids: list[str]

    def callers(self) -> dict[str, Account]:
        """Who asks for lists."""
        return {"who made all": self.owner, "a member": self.member, "who sees three": self.outsider}

    def metadata(self, account: Account) -> tuple[tuple[str, str], ...]:
        """What a call in the owner's workspace carries."""
        return (*account.authorization(), ("x-workspace-id", self.owner.workspace_id))


def measure(
    mesh: Mesh, owner: Account, *, dashboards: int, members: int, probes: int, say: Callable[[str], None]
) -> list[Figure]:
    """Fills the owner's workspace, and measures. Raises MeshFailedError."""
    return asyncio.run(_measure(mesh, owner, dashboards=dashboards, members=members, probes=probes, say=say))


async def _measure(
    mesh: Mesh, owner: Account, *, dashboards: int, members: int, probes: int, say: Callable[[str], None]
) -> list[Figure]:
    decisions = [_decision_microseconds() for _ in range(5)]
    result = [
        _figure("decision", decisions, "µs", TARGETS["decision"], "CPU time; rights and grants at hand")
    ]
    start = time.monotonic()
    crowd = Crowd(owner, Account(mesh), Account(mesh), [])
    await _seed(mesh, crowd, dashboards, members)
    say(f"{dashboards:,} dashboards and {members:,} members in {time.monotonic() - start:.1f} s")
    cold = await _cold_decisions(mesh, crowd, probes * 3)
    result.append(
        _percentile("cold decision", cold, TARGETS["cold decision"], "from Postgres, past the network")
    )
    async with (
        grpc.aio.insecure_channel(mesh.address("dashboard")) as to_dashboards,
        grpc.aio.insecure_channel(mesh.address("user")) as to_users,
    ):
        for name, account in crowd.callers().items():
            first, later = await _pages(DashboardServiceStub(to_dashboards), crowd, account, probes)
            result.append(_percentile(f"dashboards, {name}, first page", first, TARGETS["dashboards"]))
            if later:
                result.append(_percentile(f"dashboards, {name}, later page", later, TARGETS["dashboards"]))
            say(f"lists for {name}")
        listed = await _members(WorkspaceServiceStub(to_users), crowd, probes)
        result.append(_percentile(f"{members:,} members, first page", listed, TARGETS["members"]))
        gone = await _revocations(DashboardServiceStub(to_dashboards), mesh, crowd, max(3, probes // 10))
        say(f"{len(gone)} grants taken back")
    result.append(
        Figure(
            name="access/grant taken back, until refused everywhere p95",
            rounds=(percentile(gone, 0.95),),
            unit="s",
            at_most=TARGETS["revocation"],
            note="a call, and an open stream",
        )
    )
    return result


def _figure(name: str, values: list[float], unit: str, at_most: float, note: str = "") -> Figure:
    return Figure(name=f"access/{name}", rounds=tuple(values), unit=unit, at_most=at_most, note=note)


def _percentile(name: str, seconds: list[float], at_most: float, note: str = "") -> Figure:
    """The 99th percentile, in milliseconds."""
    note = "; ".join(filter(None, (f"{len(seconds)} calls", note)))
    return _figure(f"{name} p99", [percentile(seconds, 0.99) * 1000], "ms", at_most, note)


def _decision_microseconds(count: int = 20_000) -> float:
    """The pure function: a dashboard in three folders, and four grants on each that apply."""
    grants = [
        Grant(TEAM, "viewer", ALLOW, "a"),
        Grant(TEAM, "owner", DENY, "b"),
        Grant(USER, "viewer", ALLOW, "c"),
        Grant(WORKSPACE, "viewer", ALLOW, "d"),
    ]
    levels = [Level(grants, "folder" if depth else "dashboard", str(depth)) for depth in range(4)]
    rights = Rights("me", "workspace", "editor", ROLES["editor"], frozenset("xyz"), 1)
    start = time.thread_time()
    for _ in range(count):
        decide(rights, levels, "dashboards.edit")
    return (time.thread_time() - start) / count * 1e6


async def _seed(mesh: Mesh, crowd: Crowd, dashboards: int, members: int) -> None:
    workspace_id, owner_id = crowd.owner.workspace_id, crowd.owner.user_id
    users = await asyncpg.connect(mesh.environment("user_svc")["MESHBOARD_POSTGRES_URL"])
    try:
        await users.execute(_MEMBERS, workspace_id, members)
        for account in (crowd.member, crowd.outsider):
            await users.execute(
                "INSERT INTO members (workspace_id, user_id, role, create_time) VALUES ($1, $2, 'viewer', now())",
                workspace_id,
                account.user_id,
            )
        await users.execute("ANALYZE users, members")
    finally:
        await users.close()
    teams = f"/v1/workspaces/{workspace_id}/teams"
    for number in range(8):
        parent = {"parentTeamId": crowd.team_ids[-1]} if number % 4 else {}
        team = crowd.owner.post(teams, {"title": f"Team {number}", **parent})["team"]
        crowd.team_ids.append(team["teamId"])
    # In the lowest of four teams, so that the grants to all four apply.
    crowd.owner.post(f"{teams}/{crowd.team_ids[3]}/members", {"userId": crowd.member.user_id})
    owned = await asyncpg.connect(mesh.environment("dashboard_svc")["MESHBOARD_POSTGRES_URL"])
    try:
        await _seed_dashboards(owned, crowd, workspace_id, owner_id, dashboards)
    finally:
        await owned.close()


async def _seed_dashboards(
    owned: asyncpg.Connection[Any], crowd: Crowd, workspace_id: str, owner_id: str, dashboards: int
) -> None:
    folder_ids: list[str] = []
    for count in (40, 120, 240):
        rows = await owned.fetch(_FOLDERS, workspace_id, owner_id, folder_ids[-120:], count)
        folder_ids += [row["folder_id"] for row in rows]
    await owned.execute(_DASHBOARDS, workspace_id, owner_id, folder_ids, dashboards)

    async def grant(kind: str, subject: str, role: str, effect: str, rows: str = "", *values: object) -> None:
        id_ = f"{kind}_id"
        sql = _GRANTS.format(
            type=f"'{kind}'", id=id_, subject=subject, role=role, effect=effect, rows=rows or f"{kind}s"
        )
        await owned.execute(sql, workspace_id, owner_id, *values)

    await grant("dashboard", "'user', $2", "'owner'", "'ALLOW'")
    await grant("folder", "'user', $2", "'owner'", "'ALLOW'")
    some = "folders CROSS JOIN unnest($3::uuid[]) WITH ORDINALITY AS team (id, n)"
    by_chance = "CASE WHEN (hashtext({0}::text) + n) % 3 = 0 THEN 'DENY' ELSE 'ALLOW' END"
    chosen = f"(SELECT * FROM {some} WHERE (hashtext(folder_id::text) + n) % 2 = 0) AS chosen"
    await grant("folder", "'team', id", "'viewer'", by_chance.format("folder_id"), chosen, crowd.team_ids)
    few = (
        "(SELECT dashboards.*, $3::uuid[] AS teams, 1 AS n FROM dashboards WHERE workspace_id = $1"
        " ORDER BY dashboard_id LIMIT 6000) AS few"
    )
    team = "'team', teams[1 + abs(hashtext(dashboard_id::text) % 8)]"
    await grant("dashboard", team, "'viewer'", by_chance.format("dashboard_id"), few, crowd.team_ids)
    top = "(SELECT * FROM folders WHERE parent_folder_id IS NULL) AS top"
    await grant("folder", "'user', $3::uuid", "'viewer'", "'DENY'", top, crowd.outsider.user_id)
    three = "(SELECT * FROM dashboards WHERE workspace_id = $1 ORDER BY dashboard_id LIMIT 3) AS three"
    await grant("dashboard", "'user', $3::uuid", "'viewer'", "'ALLOW'", three, crowd.outsider.user_id)
    await owned.execute("ANALYZE dashboards, folders, grants")


async def _cold_decisions(mesh: Mesh, crowd: Crowd, count: int) -> list[float]:
    sessions = db.connect(mesh.environment("dashboard_svc")["MESHBOARD_POSTGRES_URL"], 2)
    teams = frozenset(crowd.team_ids[:4])
    workspace_id, user_id = crowd.owner.workspace_id, crowd.member.user_id
    rights = Rights(user_id, workspace_id, "viewer", ROLES["viewer"], teams, 1)
    seconds = []
    try:
        async with sessions() as session:
            asked = resources.visible_ids(DASHBOARD, rights, datetime.now(UTC), None, 1000)
            of_workspace = select(Dashboard.dashboard_id).where(Dashboard.workspace_id == workspace_id)
            ids = [*await session.scalars(of_workspace.where(asked))]
        for _ in range(count):
            dashboard_id = random.choice(ids)
            start = time.perf_counter()
            async with sessions() as session:
                found = await resources.find(
                    session, DASHBOARD, [workspace_id], [dashboard_id], [user_id, *teams]
                )
            places = found[workspace_id, dashboard_id]
            levels = resources.levels_for(places, user_id, teams, datetime.now(UTC))
            if not decide(rights, levels, DASHBOARD.view):
                raise MeshFailedError("What is listed is not visible.")
            seconds.append(time.perf_counter() - start)
    finally:
        await db.engine(sessions).dispose()
    return seconds


async def _pages(stub: Any, crowd: Crowd, account: Account, probes: int) -> tuple[list[float], list[float]]:
    """Seconds for first pages, and for pages anywhere in the list."""
    metadata = crowd.metadata(account)
    tokens = []
    request = dashboards_pb.ListDashboardsRequest(page_size=LARGE_PAGE)
    while True:
        page = await stub.ListDashboards(request, metadata=metadata, timeout=CALL_SECONDS)
        if not page.next_page_token:
            break
        tokens.append(page.next_page_token)
        request.page_token = page.next_page_token
    first = dashboards_pb.ListDashboardsRequest()
    later = [dashboards_pb.ListDashboardsRequest(page_token=token) for token in tokens]
    return (
        [await _timed(stub.ListDashboards(first, metadata=metadata)) for _ in range(probes)],
        [
            await _timed(stub.ListDashboards(later[number % len(later)], metadata=metadata))
            for number in range(probes if later else 0)
        ],
    )


async def _members(stub: Any, crowd: Crowd, probes: int) -> list[float]:
    request = ListMembersRequest(workspace_id=crowd.owner.workspace_id)
    metadata = crowd.metadata(crowd.owner)
    return [await _timed(stub.ListMembers(request, metadata=metadata)) for _ in range(probes)]


async def _timed(call: Awaitable[Any]) -> float:
    start = time.perf_counter()
    await call
    return time.perf_counter() - start


async def _revocations(stub: Any, mesh: Mesh, crowd: Crowd, probes: int) -> list[float]:
    """Seconds from taking a grant back until a call is refused and an open stream has ended."""
    made = crowd.owner.post("/v1/dashboards", {"title": "Watched"})["dashboard"]["dashboardId"]
    grants = f"/v1/dashboards/{made}/grants"
    crowd.owner.post(grants, {"subject": {"workspace": True}, "role": "viewer", "effect": "DENY"})
    metadata = crowd.metadata(crowd.member)
    get = dashboards_pb.GetDashboardRequest(dashboard_id=made)
    seconds = []
    for _ in range(probes):
        granted = crowd.owner.post(grants, {"subject": {"userId": crowd.member.user_id}, "role": "viewer"})
        stream = stub.WatchDashboard(
            dashboards_pb.WatchDashboardRequest(dashboard_id=made), metadata=metadata, timeout=CALL_SECONDS
        )
        await stream.read()
        grant_id = granted["grant"]["grantId"]
        take_back = dashboards_pb.DeleteDashboardGrantRequest(dashboard_id=made, grant_id=grant_id)
        await stub.DeleteDashboardGrant(take_back, metadata=crowd.metadata(crowd.owner))
        start = time.perf_counter()

        async def until_refused(since: float = start) -> float:
            while time.perf_counter() - since < WAIT_SECONDS:
                try:
                    await stub.GetDashboard(get, metadata=metadata)
                except grpc.aio.AioRpcError:
                    return time.perf_counter() - since
            raise MeshFailedError("A grant that was taken back still holds.")

        async def until_ended(watched: Any = stream, since: float = start) -> float:
            async with asyncio.timeout(WAIT_SECONDS):
                while await watched.read() is not grpc.aio.EOF:
                    pass
            return time.perf_counter() - since

        seconds.append(max(await asyncio.gather(until_refused(), until_ended())))
    return seconds
