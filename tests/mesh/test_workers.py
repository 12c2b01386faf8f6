"""The same mesh with two workers a service: no answer depends on which one gives it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest

from tests.conditions import eventually
from tests.mesh.people import Person
from tests.parts import Mesh, running_mesh

pytestmark = pytest.mark.xdist_group("workers")


@pytest.fixture(scope="module")
async def two_workers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mesh]:
    async with running_mesh(tmp_path_factory.mktemp("workers"), workers=2, limits=False) as whole:
        yield whole


async def test_writes_are_seen_by_every_worker_and_revocations_too(two_workers: Mesh):
    # A connection of its own for each call, so that calls spread over the workers.
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector) as http:
        ann = await Person(http, two_workers.gateway_url).sign_up()
        source_id, write_key = await ann.new_source()
        widget = {"title": "Events", "kind": "NUMBER", "query": {"sourceIds": [source_id]}}
        dashboard_id = await ann.new_dashboard(widget)
        await asyncio.gather(
            *(
                ann.send(write_key, {"event": "e", "distinctId": str(n), "insertId": str(n)})
                for n in range(50)
            )
        )

        async def counted() -> bool:
            data = await ann.get(f"/v1/dashboards/{dashboard_id}:data")
            return bool(data["widgets"][0]["result"]["rows"] == [[50]])

        await eventually(counted)
        async with ann.watch(dashboard_id) as watch:
            await watch.next()
            await ann.send(write_key, {"event": "e", "distinctId": "more"})
            assert (await watch.next())["changes"][0]["result"]["rows"] == [[51]]

        for title in ("One", "Two", "Three"):
            patched = await ann.call("PATCH", f"/v1/dashboards/{dashboard_id}", {"title": title})
            assert patched.status == 200, patched

            async def renamed(wanted: str = title) -> bool:
                answers = await asyncio.gather(
                    *(ann.get(f"/v1/dashboards/{dashboard_id}") for _ in range(16))
                )
                return {answer["dashboard"]["title"] for answer in answers} == {wanted}

            await eventually(renamed, seconds=4)

        await ann.post("/v1/auth:signOut", {})

        async def out() -> bool:
            answers = await asyncio.gather(*(ann.call("GET", "/v1/users/me") for _ in range(16)))
            return {answer.status for answer in answers} == {401}

        await eventually(out, seconds=4)
