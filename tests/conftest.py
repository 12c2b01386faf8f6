"""Fixtures for all tests: real servers, started once per run (once per worker with xdist)."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.parts import Parts, running


@pytest.fixture(scope="session")
async def parts(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Parts]:
    async with running(tmp_path_factory.mktemp("parts")) as servers:
        yield servers
