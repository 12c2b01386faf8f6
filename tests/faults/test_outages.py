"""What callers meet while a part is away: an answer that says so, and no right beyond its end."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from services.chassis.bus import Bus
from tests.conditions import eventually
from tests.mesh.memberships import admit
from tests.mesh.people import Answer, Person
from tests.parts import Mesh

pytestmark = [pytest.mark.xdist_group("faults"), pytest.mark.timeout(300)]

# After this long without a heartbeat owners are asked instead of caches.
TRUST_SECONDS = 2.0
# Of a call whose caller sets none: the gateway's.
DEADLINE_SECONDS = 20.0
# What a busy machine adds to it.
SLACK_SECONDS = 1.5


EVENT = {"event": "sent", "distinctId": "someone"}
DATA = 5  # the place of a dashboard's data among the calls


@asynccontextmanager
async def stopped(mesh: Mesh, name: str) -> AsyncIterator[None]:
    """Takes a part away, and brings it back."""
    await mesh.supervisor.stop(name)
    try:
        yield
    finally:
        await mesh.supervisor.start(name)


@asynccontextmanager
async def frozen(mesh: Mesh, name: str) -> AsyncIterator[None]:
    """Has a part hang: it takes connections and never answers (postgres: no new ones)."""
    mesh.supervisor.kill(name, signal.SIGSTOP)
    try:
        yield
    finally:
        mesh.supervisor.kill(name, signal.SIGCONT)


async def serves(person: Person, path: str, **headers: str) -> bool:
    return (await person.call("GET", path, **headers)).status == 200


async def until_served(person: Person, path: str) -> None:
    await eventually(lambda: serves(person, path), 60)


async def until_refused(person: Person, path: str, **headers: str) -> tuple[Answer, float]:
    """The first answer that is no success, and how long it took to come to that."""
    began = time.monotonic()
    while (answer := await person.call("GET", path, **headers)).status == 200:
        assert time.monotonic() - began < 30, "served for ever"
        await asyncio.sleep(0.02)
    return answer, time.monotonic() - began


async def heartbeat(mesh: Mesh, subject: str) -> None:
    """Waits for the next one, so that trust surely lasts for its whole time from here."""
    (part,) = (part for part in mesh.stack.parts() if part.name == "dashboard_svc")
    heard = asyncio.Event()
    bus = await Bus.connect(part.env["MESHBOARD_NATS_URL"], "test")
    try:
        await bus.listen(subject, lambda _: heard.set())
        await asyncio.wait_for(heard.wait(), 20)
    finally:
        await bus.close()


async def test_a_crash_of_auth_svc_passes(fragile: Mesh, ann: Person):
    path = f"/v1/dashboards/{await ann.new_dashboard()}"
    restarts = fragile.supervisor.children["auth_svc"].restarts
    # A call beside a heartbeat: where none had come for a while, it is the first that learns all that has ended since.
    await heartbeat(fragile, "beat.auth")
    assert await serves(ann, path)
    fragile.supervisor.kill("auth_svc")
    first = await ann.call("GET", path)
    assert first.status == 200, f"tokens that have been seen go on being served: {first}"
    back = asyncio.create_task(fragile.supervisor.until_ready("auth_svc", restarts=restarts + 1))
    seen = []
    while not back.done():
        seen.append(await ann.call("GET", path))
        await asyncio.sleep(0.02)
    await back
    assert {answer.status for answer in seen} <= {200, 503}
    assert {answer.reason for answer in seen if answer.status == 503} <= {"DEPENDENCY_UNAVAILABLE"}
    await until_served(ann, path)
    await ann.post("/v1/auth:signIn", {"email": ann.email, "password": ann.password})


async def test_without_auth_svc_nobody_signs_in_and_ended_sessions_cannot_be_told(fragile: Mesh, ann: Person):
    path = f"/v1/dashboards/{await ann.new_dashboard()}"
    async with stopped(fragile, "auth_svc"):
        credentials = {"email": ann.email, "password": ann.password}
        answer = await ann.call("POST", "/v1/auth:signIn", credentials)
        assert (answer.status, answer.body["code"], answer.reason) == (503, 14, "DEPENDENCY_UNAVAILABLE")
        answer, seconds = await until_refused(ann, path)
        assert (answer.status, answer.reason) == (503, "DEPENDENCY_UNAVAILABLE")
        assert seconds < TRUST_SECONDS + SLACK_SECONDS
    await until_served(ann, path)
    await ann.post("/v1/auth:signIn", credentials)


@pytest.mark.parametrize("away", [stopped, frozen])
async def test_without_user_svc_rights_are_not_assumed(fragile: Mesh, ann: Person, away):
    path = f"/v1/dashboards/{await ann.new_dashboard()}"
    async with away(fragile, "user_svc"):
        answer, seconds = await until_refused(ann, path)
        # The call that finds out waits for user_svc as long as one may wait for a peer.
        assert seconds < TRUST_SECONDS + SLACK_SECONDS + (5 if away is frozen else 0)
        answers = [answer, *await asyncio.gather(*(ann.call("GET", path) for _ in range(5)))]
        assert {a.status for a in answers} <= {503, 504}
        assert {a.reason for a in answers} <= {"DEPENDENCY_UNAVAILABLE", "DEADLINE_PASSED"}
    await until_served(ann, path)


@pytest.mark.parametrize("away", [stopped, frozen])
async def test_without_nats_no_right_outlives_its_end(fragile: Mesh, ann: Person, bob: Person, away):
    path = f"/v1/dashboards/{await ann.new_dashboard()}"
    guest = Person(bob.http, bob.url)
    guest.headers = {**bob.headers, "x-workspace-id": ann.workspace_id}
    membership = f"/v1/workspaces/{ann.workspace_id}/members"
    await admit(fragile, ann, bob, "viewer")
    home = f"/v1/dashboards/{await bob.new_dashboard()}"
    await until_served(guest, path)
    await until_served(bob, home)
    async with guest.watch(path.removeprefix("/v1/dashboards/")) as watch:
        await watch.next()
        async with away(fragile, "nats"):
            removed = await ann.call("DELETE", f"{membership}/{bob.user_id}")
            assert removed.status == 200, removed
            began = time.monotonic()
            (answer, seconds), ending = await asyncio.gather(until_refused(guest, path), watch.next())
            assert (answer.status, answer.reason) == (404, "WORKSPACE_NOT_FOUND")
            assert seconds < TRUST_SECONDS + SLACK_SECONDS
            assert ending["end"] == {"reason": "ACCESS_LOST"}
            assert time.monotonic() - began < TRUST_SECONDS + SLACK_SECONDS

            assert await serves(bob, home)
            await bob.post("/v1/auth:signOut", {})
            answer, seconds = await until_refused(bob, home)
            assert (answer.status, answer.reason) == (401, "SESSION_REVOKED")
            assert seconds < TRUST_SECONDS + SLACK_SECONDS

            assert await serves(ann, path), "who has rights keeps them"
    await until_served(ann, path)


@pytest.mark.parametrize(
    ("part", "away"),
    [
        ("postgres", stopped),
        ("nats", stopped),
        ("valkey", stopped),
        ("store", stopped),
        ("pipeline", stopped),
        ("auth_svc", stopped),
        ("user_svc", stopped),
        ("analytics_svc", stopped),
        ("postgres", frozen),
        ("valkey", frozen),
        pytest.param("store", frozen, marks=pytest.mark.long),
        pytest.param("nats", frozen, marks=pytest.mark.long),
        pytest.param("auth_svc", frozen, marks=pytest.mark.long),
        pytest.param("analytics_svc", frozen, marks=pytest.mark.long),
    ],
)
async def test_what_is_away_is_no_fault(fragile: Mesh, ann: Person, part: str, away):
    source_id, write_key = await ann.new_source()
    query = {"sourceIds": [source_id], "measures": [{"aggregation": "COUNT"}]}
    dashboard_id = await ann.new_dashboard({"title": "Events", "kind": "NUMBER", "query": query})

    async def use_everything() -> list[Answer]:
        return await asyncio.gather(
            ann.call("GET", "/v1/users/me"),
            ann.call("POST", "/v1/auth:signIn", {"email": ann.email, "password": ann.password}),
            ann.call("GET", f"/v1/dashboards/{dashboard_id}"),
            ann.call("GET", "/v1/dashboards"),
            ann.call("POST", "/v1/dashboards", {"title": "Another"}),
            ann.call("GET", f"/v1/dashboards/{dashboard_id}:data"),
            ann.call("POST", "/v1/queries:run", {"query": query}),
            ann.call("POST", "/v1/events:ingest", {"events": [EVENT]}, **{"x-write-key": write_key}),
        )

    async with away(fragile, part):
        began = time.monotonic()
        answers = await use_everything()
        assert time.monotonic() - began < DEADLINE_SECONDS + SLACK_SECONDS
        answers += await use_everything()
        assert {answer.status for answer in answers} <= {200, 503, 504}, answers
        assert {a.reason for a in answers if a.status != 200} <= {"DEPENDENCY_UNAVAILABLE", "DEADLINE_PASSED"}

    async def all_well() -> bool:
        answers = await use_everything()
        (widget,) = (answers[DATA].body or {}).get("widgets") or [{}]
        return {answer.status for answer in answers} == {200} and bool(widget.get("result"))

    await eventually(all_well, 60)
