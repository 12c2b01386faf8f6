"""Attackers, and what they attack: the whole mesh, or auth_svc and user_svc in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest

from tests.auth_svc.conftest import services  # noqa: F401 - a fixture
from tests.mesh.people import Person
from tests.parts import Mesh


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    jar = aiohttp.DummyCookieJar()
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(timeout=timeout, cookie_jar=jar) as session:
        yield session


@pytest.fixture
async def ann(mesh: Mesh, http: aiohttp.ClientSession) -> Person:
    """Someone with an account."""
    return await Person(http, mesh.gateway_url).sign_up()


@pytest.fixture
async def bob(mesh: Mesh, http: aiohttp.ClientSession) -> Person:
    """Someone else."""
    return await Person(http, mesh.gateway_url).sign_up()
