"""Fixtures for all tests: real servers, started once per run (once per worker with xdist)."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.harness import Identity, make_keys
from tests.parts import Parts, running


@pytest.fixture(scope="session")
async def parts(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Parts]:
    async with running(tmp_path_factory.mktemp("parts")) as servers:
        yield servers


@pytest.fixture(scope="session")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    """Stands in for auth_svc and user_svc."""
    return Identity(make_keys(tmp_path_factory.mktemp("keys")))
