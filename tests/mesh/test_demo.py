"""The demo, as `up --demo` makes it: its numbers are those of the log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest

from cli import demo
from tests.conditions import eventually
from tests.mesh.people import Person
from tests.parts import Mesh

pytestmark = pytest.mark.xdist_group("mesh")

# Facts of the log, counted without this project.
EVENTS, VISITORS, NOT_FOUND, FAULTS, BUSIEST, BUSIEST_COUNT = 9999, 1753, 213, 3, "2015-05-19T19:00:00Z", 136


@pytest.fixture(scope="module")
async def made(mesh: Mesh) -> dict[str, str]:
    await demo.run(mesh.gateway_url, mesh.stack.data_dir)
    content: dict[str, str] = json.loads((mesh.stack.data_dir / "secrets" / "demo.json").read_text())
    return content


@pytest.fixture
async def owner(mesh: Mesh, http: aiohttp.ClientSession, made: dict[str, str]) -> Person:
    person = Person(http, mesh.gateway_url)
    person.headers["authorization"] = f"Bearer {await demo.sign_in(mesh.gateway_url, mesh.stack.data_dir)}"
    return person


async def test_the_dashboard_has_the_true_numbers(owner: Person, made: dict[str, str]):
    dashboard_id = made["dashboardId"]
    listed = (await owner.get(f"/v1/dashboards/{dashboard_id}/widgets"))["widgets"]
    titles = {widget["widgetId"]: widget["title"] for widget in listed}
    data = (await owner.get(f"/v1/dashboards/{dashboard_id}:data"))["widgets"]
    results = {titles[widget["widgetId"]]: widget["result"]["rows"] for widget in data}
    assert results["Requests"] == [[EVENTS]]
    assert results["Visitors"] == [[VISITORS]]
    per_hour = results["Requests per hour"]
    assert sum(count for _, count in per_hour) == EVENTS
    assert max(per_hour, key=lambda row: row[1]) == [BUSIEST, BUSIEST_COUNT]
    statuses = dict(results["Status codes"])
    assert (statuses["404"], statuses["500"]) == (NOT_FOUND, FAULTS)
    assert results["Top paths"][0] == ["/favicon.ico", 807]
    assert sum(count for _, count in results["Robots and people"]) == EVENTS
    assert {kind for kind, _ in results["Robots and people"]} == {"true", "false"}
    assert results["Bytes sent"][0][0] == sum(count for _, count in results["Bytes sent per hour"])
    assert results["Browsers"][0][1] >= results["Browsers"][-1][1]


async def test_sending_it_again_changes_nothing(mesh: Mesh, owner: Person, made: dict[str, str]):
    gateway = demo.Gateway(owner.http, mesh.gateway_url)
    sent = await demo.send_log(gateway, demo.LOG, made["writeKey"])
    assert (sent.accepted, sent.refused) == (EVENTS, 1)
    # A marker sent afterwards: when it counts, all before it have been through the pipeline.
    await owner.send(made["writeKey"], {"event": "marker", "distinctId": "marker"})

    async def marked() -> bool:
        filters = [{"property": "event", "operator": "EQUAL", "values": ["marker"]}]
        result = await owner.run_query(sourceIds=[made["sourceId"]], filters=filters)
        return bool(result["rows"] == [[1]])

    await eventually(marked)
    filters = [{"property": "event", "operator": "EQUAL", "values": ["request"]}]
    result = await owner.run_query(sourceIds=[made["sourceId"]], filters=filters)
    assert result["rows"] == [[EVENTS]]


async def test_a_second_demo_finds_the_first(
    mesh: Mesh, made: dict[str, str], capsys: pytest.CaptureFixture[str]
):
    await demo.run(mesh.gateway_url, mesh.stack.data_dir)
    assert made["dashboardId"] in capsys.readouterr().out


def test_the_printed_lines_work_when_pasted(mesh: Mesh, made: dict[str, str], tmp_path: Path):
    """curl, and buf, as printed. grpcurl is a Go program that is not at hand everywhere; buf speaks the same way."""
    block = demo._block(mesh.gateway_url, mesh.stack.data_dir, made)
    lines = [line.strip() for line in block.splitlines() if line.startswith("  ")]
    data = next(line for line in lines if line.startswith("curl -s ") and line.endswith(":data"))
    buf = next(line for line in lines if " curl --protocol grpc " in line)
    event = next(line for line in lines if "events:ingest" in line)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for line, expected in ((data, '"widgets"'), (buf, '"widgets"'), (event, '"acceptedCount"')):
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=demo.ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
