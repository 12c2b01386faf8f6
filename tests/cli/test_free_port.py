"""The ports that tests are given."""

import pytest

from tests.parts import free_port


def test_no_port_is_given_twice_in_a_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "2")
    ports = {}
    for worker in ("gw0", "gw1"):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
        ports[worker] = [free_port() for _ in range(500)]
        assert len(set(ports[worker])) == 500
    assert not set(ports["gw0"]) & set(ports["gw1"])
