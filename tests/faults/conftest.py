"""A mesh to break, and people who use it meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest

from tests.conditions import eventually
from tests.mesh.people import Person
from tests.parts import Mesh, running_mesh


@pytest.fixture(scope="package")
async def fragile(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mesh]:
    async with running_mesh(tmp_path_factory.mktemp("fragile"), limits=False) as mesh:
        yield mesh


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        yield session


async def newcomer(http: aiohttp.ClientSession, url: str) -> Person:
    """Someone with an account, once services find each other again after what the test before has broken."""
    person = Person(http, url)

    async def at_home() -> bool:
        try:
            if not person.account:
                await person.sign_up()
            source_id, _ = await person.new_source()
            await person.new_dashboard({"title": "A", "kind": "NUMBER", "query": {"sourceIds": [source_id]}})
        except AssertionError:
            return False
        return True

    await eventually(at_home, 60)
    return person


@pytest.fixture
async def ann(fragile: Mesh, http: aiohttp.ClientSession) -> Person:
    return await newcomer(http, fragile.gateway_url)


@pytest.fixture
async def bob(fragile: Mesh, http: aiohttp.ClientSession) -> Person:
    return await newcomer(http, fragile.gateway_url)
