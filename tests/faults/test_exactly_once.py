"""Whatever is killed while events are being sent: each acknowledged event is counted exactly once."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import aiohttp
import pytest

from tests.conditions import eventually
from tests.faults.conftest import newcomer
from tests.faults.traffic import Traffic
from tests.mesh.people import Person
from tests.parts import Mesh, running_mesh

pytestmark = [pytest.mark.xdist_group("faults"), pytest.mark.timeout(300)]

VICTIMS = ("analytics_svc", "pipeline", "store", "nats", "envoy", "postgres", "valkey")


async def kill(mesh: Mesh, *victims: str) -> None:
    """Kills parts one right after the other, and waits until each runs again."""
    children = mesh.supervisor.children
    restarts = {name: children[name].restarts for name in victims}
    for name in victims:
        mesh.supervisor.kill(name)
        await eventually(
            lambda name=name: not children[name].running or children[name].restarts > restarts[name]
        )
    for name in victims:
        await mesh.supervisor.until_ready(name, restarts=restarts[name] + 1)


async def test_each_event_counts_once_whatever_is_killed(fragile: Mesh, ann: Person):
    async with Traffic(ann, *await ann.new_source()) as traffic:
        for victim in VICTIMS:
            await traffic.flow()
            await kill(fragile, victim)
        await traffic.flow()
        # First what keeps things, then who may believe that it has kept them.
        await kill(fragile, "nats", "analytics_svc")
        await traffic.flow()
        await kill(fragile, "nats", "store", "postgres", "valkey", "analytics_svc", "pipeline")
        await traffic.flow()
    assert traffic.retries, "nobody noticed the kills"
    await traffic.check()


async def test_each_event_counts_once_whatever_step_is_cut(tmp_path: Path, http: aiohttp.ClientSession):
    """Every process ends again and again, right behind steps of its own: see crash_points.py."""
    points = "receive:31,publish:23,plan:9,link:14,insert:5,finish:7,write:11"
    async with running_mesh(tmp_path, limits=False, settings={"MESHBOARD_CRASH_AT": points}) as mesh:
        ann = await newcomer(http, mesh.gateway_url)
        # Slowly, so that there are several inserts from one end of analytics_svc to the next, after which it is started
        # again twice as late as the time before.
        async with Traffic(ann, *await ann.new_source(), pause=0.2) as traffic:
            cut = [mesh.supervisor.children[name] for name in ("analytics_svc", "pipeline", "store")]
            while not all(child.restarts for child in cut):
                await traffic.flow(200)
        await traffic.check()


async def test_the_check_notices_when_duplicates_are_let_through(tmp_path: Path, http: aiohttp.ClientSession):
    settings = {"MESHBOARD_UNSAFE_NO_DEDUPLICATION": "1"}
    async with running_mesh(tmp_path, limits=False, settings=settings) as mesh:
        ann = await Person(http, mesh.gateway_url).sign_up()
        async with Traffic(ann, *await ann.new_source()) as traffic:
            await traffic.flow()
            await kill(mesh, "pipeline")
            await traffic.flow()
        with pytest.raises(AssertionError, match="some more than once"):
            await traffic.check()


async def test_a_watcher_comes_to_the_same_count(fragile: Mesh, ann: Person):
    source_id, write_key = await ann.new_source()
    query = {"sourceIds": [source_id], "measures": [{"aggregation": "COUNT"}]}
    dashboard_id = await ann.new_dashboard({"title": "Events", "kind": "NUMBER", "query": query})
    async with ann.watch(dashboard_id) as watch:
        async with Traffic(ann, source_id, write_key) as traffic:
            for victim in ("store", "nats", "analytics_svc", "valkey", "pipeline"):
                await traffic.flow(50)
                await kill(fragile, victim)
            await traffic.flow(50)
        async with asyncio.timeout(60):
            seen: object = None
            while seen != [[traffic.acknowledged]]:
                message = await watch.next(60)
                (widget,) = message["changes"] or message["snapshot"]["widgets"]
                seen = (widget.get("result") or {}).get("rows")


@pytest.mark.long
@pytest.mark.timeout(14_400)
async def test_ten_thousand_events_sent_five_times_at_once_through_fifty_rounds(
    fragile: Mesh, http: aiohttp.ClientSession
):
    chance = random.Random(50)
    for _ in range(50):
        ann = await newcomer(http, fragile.gateway_url)  # whose token is good for ten minutes
        async with Traffic(ann, *await ann.new_source(), batch=100, copies=5) as traffic:
            arriving = asyncio.create_task(traffic.flow(10_000, seconds=240))
            while not arriving.done():
                await kill(fragile, *chance.sample(("analytics_svc", "nats", "envoy"), chance.randint(1, 3)))
                await asyncio.wait([arriving], timeout=2 * chance.random())
            await arriving
        await traffic.check()


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(3))
async def test_each_event_counts_once_through_many_kills(fragile: Mesh, ann: Person, seed: int):
    chance = random.Random(seed)
    async with Traffic(ann, *await ann.new_source()) as traffic:
        for _ in range(12):
            await traffic.flow(chance.randrange(20, 2000), seconds=180)
            await kill(fragile, *chance.sample(VICTIMS, chance.randint(1, len(VICTIMS))))
        await traffic.flow(seconds=180)
    await traffic.check()
