"""Fixtures for all tests: real servers, started once per run (once per worker with xdist)."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.elasticsearch import ON_ELASTICSEARCH, Elastic, running_elasticsearch
from tests.harness import Identity, make_keys
from tests.parts import Mesh, Parts, running, running_mesh


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the long form of soak and fault rounds as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--long"):
        return
    long = [item for item in items if item.get_closest_marker("long")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


@pytest.fixture(scope="session")
async def parts(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Parts]:
    async with running(tmp_path_factory.mktemp("parts")) as servers:
        yield servers


@pytest.fixture(scope="session")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    """Stands in for auth_svc and user_svc."""
    return Identity(make_keys(tmp_path_factory.mktemp("keys")))


@pytest.fixture(scope="session")
async def elasticsearch() -> AsyncIterator[Elastic]:
    """Elasticsearch. Mark what uses it with ON_ELASTICSEARCH: one worker then runs one."""
    async with running_elasticsearch() as server:
        yield server


@pytest.fixture(scope="session", params=["postgres", pytest.param("elasticsearch", marks=ON_ELASTICSEARCH)])
def search_engine(request: pytest.FixtureRequest) -> str:
    """The address of Elasticsearch, or "" for Postgres: what uses it runs with each engine."""
    return request.getfixturevalue("elasticsearch").url if request.param == "elasticsearch" else ""


@pytest.fixture(scope="session")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mesh]:
    """The whole mesh behind its gateway. Mark the module with xdist_group("mesh"): one worker then runs one mesh."""
    async with running_mesh(tmp_path_factory.mktemp("mesh")) as whole:
        yield whole
