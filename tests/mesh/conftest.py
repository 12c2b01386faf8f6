"""People for the tests of the whole mesh."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest

from tests.mesh.people import Person
from tests.parts import Mesh


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        yield session


@pytest.fixture
def stranger(mesh: Mesh, http: aiohttp.ClientSession) -> Person:
    """Someone without an account."""
    return Person(http, mesh.gateway_url)


@pytest.fixture
async def ann(mesh: Mesh, http: aiohttp.ClientSession) -> Person:
    """Someone with an account."""
    return await Person(http, mesh.gateway_url).sign_up()


@pytest.fixture
async def bob(mesh: Mesh, http: aiohttp.ClientSession) -> Person:
    """Someone else."""
    return await Person(http, mesh.gateway_url).sign_up()
