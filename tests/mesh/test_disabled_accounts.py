"""An account that is disabled while its person is at work."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from cli.envoy_config import REPOSITORY
from tests.conditions import eventually
from tests.mesh.people import Person
from tests.parts import Mesh

pytestmark = [pytest.mark.xdist_group("mesh")]


def set_account(mesh: Mesh, word: str, email: str) -> None:
    words = [sys.executable, "-m", "cli.main", "accounts", word, email, "--data", str(mesh.stack.data_dir)]
    subprocess.run(words, cwd=REPOSITORY, capture_output=True, timeout=60, check=True)


async def test_streams_end_and_calls_are_refused_within_two_seconds(mesh: Mesh, ann: Person, bob: Person):
    dashboard_id = await ann.new_dashboard()
    async with ann.watch(dashboard_id) as watch:
        await watch.next()
        set_account(mesh, "disable", ann.email)
        disabled = time.monotonic()
        assert (await watch.next(2))["end"] == {"reason": "SESSION_REVOKED"}

        async def refused_everywhere() -> bool:
            paths = ("/v1/users/me", "/v1/dashboards", "/v1/sources", "/v1/auth/auditEntries")
            answers = [await ann.call("GET", path) for path in paths]
            return all(answer.status == 401 and answer.reason == "SESSION_REVOKED" for answer in answers)

        await eventually(refused_everywhere, seconds=2 - (time.monotonic() - disabled))
    tokens = {name: ann.account[name] for name in ("refreshToken", "refreshKey")}
    assert (await ann.call("POST", "/v1/auth:refresh", tokens)).reason == "REFRESH_TOKEN_INVALID"
    credentials = {"email": ann.email, "password": ann.password}
    assert (await ann.call("POST", "/v1/auth:signIn", credentials)).reason == "ACCOUNT_DISABLED"
    assert (
        await ann.call("POST", "/v1/auth:signIn", {**credentials, "password": "something else"})
    ).reason == "CREDENTIALS_WRONG"
    await bob.get("/v1/users/me")

    set_account(mesh, "enable", ann.email)
    signed_in = await ann.post("/v1/auth:signIn", credentials)
    ann.headers["authorization"] = f"Bearer {signed_in['accessToken']}"
    kinds = [entry["kind"] for entry in (await ann.get("/v1/auth/auditEntries"))["auditEntries"]]
    assert kinds[:4].count("account.enabled") == 1
    assert "account.disabled" in kinds
