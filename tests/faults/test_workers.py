"""A worker that dies is replaced and leaves nothing in the metrics; a parent that dies takes its workers along."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conditions import eventually
from tests.faults.conftest import newcomer
from tests.parts import Mesh, running_mesh

pytestmark = [pytest.mark.xdist_group("faults"), pytest.mark.timeout(300)]

WORKERS = 2
POOL_SIZE = 10


@pytest.fixture(scope="module")
async def crew(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mesh]:
    async with running_mesh(tmp_path_factory.mktemp("crew"), workers=WORKERS, limits=False) as mesh:
        yield mesh


def workers(mesh: Mesh) -> list[psutil.Process]:
    return psutil.Process(mesh.supervisor.pid("user_svc")).children()


def serve(worker: psutil.Process, mesh: Mesh) -> bool:
    """Whether the worker listens on the private port, which it does last."""
    private = mesh.stack.port_of("user_private")
    return private in {c.laddr.port for c in worker.net_connections() if c.status == psutil.CONN_LISTEN}


async def figure(http: aiohttp.ClientSession, mesh: Mesh, name: str) -> float:
    """The sum of a figure of user_svc, whichever worker tells it."""
    async with http.get(f"http://127.0.0.1:{mesh.stack.port_of('user_private')}/metrics") as answer:
        families = text_string_to_metric_families(await answer.text())
        return sum(sample.value for family in families for sample in family.samples if sample.name == name)


async def test_a_killed_worker_is_replaced(crew: Mesh, http: aiohttp.ClientSession):
    ann = await newcomer(http, crew.gateway_url)
    victim, other = workers(crew)
    calls = await figure(http, crew, "meshboard_rpc_calls_total")
    assert calls > 0
    victim.kill()
    await eventually(lambda: victim not in workers(crew) and len(workers(crew)) == WORKERS)
    assert other in workers(crew)
    await eventually(lambda: all(serve(worker, crew) for worker in workers(crew)))
    assert crew.supervisor.children["user_svc"].restarts == 0

    async def whole_again() -> bool:
        try:
            return await figure(http, crew, "meshboard_postgres_pool_size") == WORKERS * POOL_SIZE
        except aiohttp.ClientError:  # a connection to the one that has just died
            return False

    await eventually(whole_again)
    assert await figure(http, crew, "meshboard_rpc_calls_total") >= calls

    async def serves() -> bool:
        return (await ann.call("GET", "/v1/users/me")).status == 200

    await eventually(serves)


async def test_workers_end_with_their_parent(crew: Mesh, http: aiohttp.ClientSession):
    ann = await newcomer(http, crew.gateway_url)
    orphans = workers(crew)
    restarts = crew.supervisor.children["user_svc"].restarts
    crew.supervisor.kill("user_svc")
    await crew.supervisor.until_ready("user_svc", restarts=restarts + 1)
    await eventually(lambda: not any(orphan.is_running() for orphan in orphans))
    assert len(workers(crew)) == WORKERS

    async def serves() -> bool:
        return (await ann.call("GET", "/v1/users/me")).status == 200

    await eventually(serves)
