"""The operator's commands as a person types them, on a whole mesh."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from cli.envoy_config import REPOSITORY
from tests.conditions import eventually
from tests.mesh.people import Person
from tests.parts import running_mesh

pytestmark = [pytest.mark.xdist_group("mesh"), pytest.mark.timeout(300)]


def meshboard(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "cli.main", *map(str, arguments)]
    return subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)


def answer(*arguments: object) -> Any:
    done = meshboard(*arguments, "-o", "json")
    assert done.returncode == 0, done
    return json.loads(done.stdout)


async def test_the_master_key_is_changed_and_all_goes_on(tmp_path: Path):
    data = tmp_path / "data"
    master = data / "secrets" / "master.key"
    async with aiohttp.ClientSession() as http:
        async with running_mesh(data) as mesh:
            ann = await Person(http, mesh.gateway_url).sign_up()
            (first,) = answer("keys", "list", "--data", data)["keys"]
            made = answer("keys", "rotate", "--data", data)
            assert [key["state"] for key in answer("keys", "list", "--data", data)["keys"]] == [
                "signs",
                "next",
            ]

            async def sealed() -> bool:
                return meshboard("audit", "export", "--data", data).stdout.count("\n") >= 3

            await eventually(sealed)
            assert answer("audit", "verify", "--data", data)["good"]
        before = master.read_text()
        done = meshboard("keys", "new-master", "--data", data)
        assert (done.returncode, done.stdout) == (0, "")
        new, *older = master.read_text().split()
        assert (older, stat.S_IMODE(master.stat().st_mode)) == (before.split(), 0o600)
        assert new not in done.stderr
        assert [path.name for path in master.parent.glob(".master*")] == []

        async with running_mesh(data) as mesh:
            counts = answer("keys", "reseal", "--data", data)
            assert counts["signing_keys"] == {"current": 0, "resealed": 2, "unreadable": 0}
            assert answer("keys", "reseal", "--data", data)["signing_keys"]["resealed"] == 0
            again = Person(http, mesh.gateway_url)
            credentials = {"email": ann.email, "password": ann.password}
            signed_in = await again.post("/v1/auth:signIn", credentials)
            again.headers["authorization"] = f"Bearer {signed_in['accessToken']}"
            assert (await again.get("/v1/users/me"))["user"]["userId"] == ann.user_id
            refreshed = {"refreshToken": ann.account["refreshToken"], "refreshKey": ann.account["refreshKey"]}
            assert await again.post("/v1/auth:refresh", refreshed)

            async def resealing_is_sealed() -> bool:
                return "secrets.resealed" in meshboard("audit", "export", "--data", data).stdout

            await eventually(resealing_is_sealed)
            entries = [
                json.loads(line) for line in meshboard("audit", "export", "--data", data).stdout.splitlines()
            ]
            assert [entry["position"] for entry in entries] == list(range(1, len(entries) + 1))
            assert entries[0]["seal"][:8] != entries[-1]["seal"][:8]
            report = answer("audit", "verify", "--data", data)
            assert report["good"]
            assert report["positions"] >= len(entries)

            retired = answer("keys", "retire", first["key_id"], "--data", data)
            assert retired == {"retired": first["key_id"], "signs": made["key_id"]}

            async def refused() -> bool:
                return (await again.call("GET", "/v1/users/me")).status == 401

            await eventually(refused, seconds=10)


def test_says_plainly_what_is_missing(tmp_path: Path):
    done = meshboard("audit", "verify", "--data", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "not the data folder of a mesh" in done.stderr
    (tmp_path / "VERSION").write_text("1\n")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "master.key").write_text("")
    done = meshboard("keys", "list", "--data", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"Start it with: up --data {tmp_path}" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        *(("audit", "verify"), ("audit", "export"), ("accounts", "disable"), ("accounts", "enable")),
        *(
            ("keys", "list"),
            ("keys", "rotate"),
            ("keys", "retire"),
            ("keys", "reseal"),
            ("keys", "new-master"),
        ),
    ],
    ids=" ".join,
)
def test_each_command_shows_an_example(words: tuple[str, str]):
    shown = " ".join(meshboard(*words, "--help").stdout.split())
    assert f"Example: ./dev {' '.join(words)}" in shown
