"""A mesh to break, and people who use it meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest

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


@pytest.fixture
async def ann(fragile: Mesh, http: aiohttp.ClientSession) -> Person:
    return await Person(http, fragile.gateway_url).sign_up()


@pytest.fixture
async def bob(fragile: Mesh, http: aiohttp.ClientSession) -> Person:
    return await Person(http, fragile.gateway_url).sign_up()
