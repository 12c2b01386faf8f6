"""Dashboards as files through the real gateway and command line, and templates on a real log."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from cli.dashboards import TOKEN_VARIABLE
from cli.demo import LOG
from cli.send import KEY_VARIABLE
from tests.conditions import eventually
from tests.mesh.people import Person
from tests.parts import Mesh

pytestmark = pytest.mark.xdist_group("mesh")

EVENTS = 9999
# The days of the log.
DAYS = "timeRange.startTime=2015-05-17T00:00:00Z&timeRange.endTime=2015-05-21T00:00:00Z"
TEMPLATES = ("api-traffic", "product", "web-analytics")
# Widgets with a time range of their own, which is not that of the log, and those that show what the log does not have.
EMPTY = {
    "live-visitors",
    "daily-users",
    "weekly-users",
    "monthly-users",
    "retention",
    "campaigns",
    "p95",
}


async def command(mesh: Mesh, token: str, *arguments: Any) -> tuple[int | None, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli.main", *map(str, arguments), "--data", str(mesh.stack.data_dir)),
        env={**os.environ, TOKEN_VARIABLE: token},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    output, said = await process.communicate()
    return process.returncode, output.decode(), said.decode()


def token_of(person: Person) -> str:
    return person.headers["authorization"].removeprefix("Bearer ")


@pytest.fixture(scope="module")
async def owner(mesh: Mesh) -> Any:
    """Someone with a source that has the log."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as http:
        person = await Person(http, mesh.gateway_url).sign_up()
        source = await person.post("/v1/sources", {"title": "The log"})
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cli.main", "send", "--data", str(mesh.stack.data_dir)),
            *("--state", str(mesh.stack.data_dir / "sent"), str(LOG)),
            env={**os.environ, KEY_VARIABLE: source["writeKey"]},
            stderr=subprocess.DEVNULL,
        )
        await process.wait()
        query = {"query": {"sourceIds": [source["source"]["sourceId"]]}}

        async def is_read() -> bool:
            rows = (await person.post("/v1/queries:run", query))["result"]["rows"]
            return bool(rows == [[EVENTS]])

        await eventually(is_read)
        yield person, source["source"]["sourceId"]


@pytest.mark.parametrize("template", TEMPLATES)
async def test_every_widget_of_a_template_answers(owner: tuple[Person, str], template: str):
    ann, source_id = owner
    made = await ann.post("/v1/dashboards:fromTemplate", {"template": template, "sourceId": source_id})
    dashboard_id = made["dashboard"]["dashboardId"]
    listed = (await ann.get("/v1/dashboardTemplates"))["templates"]
    (told,) = [each for each in listed if each["template"] == template]
    widgets = (await ann.get(f"/v1/dashboards/{dashboard_id}/widgets"))["widgets"]
    assert len(widgets) == told["widgetCount"] > 8
    # Each is what a person could write: all that writers are asked about is asked about it.
    file = (await ann.get(f"/v1/dashboards/{dashboard_id}:export"))["file"]
    planned = await ann.post("/v1/dashboards:apply", {"file": {**file, "name": "again"}, "dryRun": True})
    assert planned["outcome"] == "CREATED"
    names = {widget["widgetId"]: widget["name"] for widget in widgets}
    for choices in ("", "&choices=country=", "&choices=path=/blog/tags/puppet"):
        if "path" in choices and template == "product":
            continue
        if "country" in choices and template == "api-traffic":
            continue
        data = (await ann.get(f"/v1/dashboards/{dashboard_id}:data?{DAYS}{choices}"))["widgets"]
        assert {each["widgetId"] for each in data} == names.keys()
        for each in data:
            assert "error" not in each or each["error"] is None, (names[each["widgetId"]], each)
            if not choices and names[each["widgetId"]] not in EMPTY:
                shown = each.get("result") or each.get("funnel")
                assert shown, names[each["widgetId"]]
                assert shown.get("rows") or shown.get("total"), names[each["widgetId"]]


async def test_a_file_moves_to_another_workspace(
    mesh: Mesh, owner: tuple[Person, str], bob: Person, tmp_path: Path
):
    ann, source_id = owner
    made = await ann.post("/v1/dashboards:fromTemplate", {"template": "product", "sourceId": source_id})
    path = f"/v1/dashboards/{made['dashboard']['dashboardId']}"
    await ann.call("PATCH", f"{path}?updateMask=name", {"name": "moving"})
    file = tmp_path / "moving.yaml"
    code, _, said = await command(mesh, token_of(ann), "export", "moving", "-f", file)
    assert code == 0, said
    written = yaml.safe_load(file.read_text())
    assert written["sources"] == {"the-log": "The log"}
    assert source_id not in file.read_text()
    assert made["dashboard"]["dashboardId"] not in file.read_text()

    # There is no such source there yet.
    code, _, said = await command(mesh, token_of(bob), "apply", "-f", file)
    assert code == 1
    assert 'No source that you can see is called "The log"' in said.replace("'", '"')
    # Another workspace's source is as absent.
    code, _, said = await command(
        mesh, token_of(bob), "apply", "-f", file, "--source", f"the-log={source_id}"
    )
    assert code == 1
    assert "SOURCE_NOT_FOUND" in said

    await bob.post("/v1/sources", {"title": "The log"})
    code, output, said = await command(mesh, token_of(bob), "apply", "-f", file, "--dry-run", "-o", "json")
    assert code == 0, said
    assert json.loads(output)[0]["outcome"] == "CREATED"
    assert not (await bob.get("/v1/dashboards"))["dashboards"]
    code, _, said = await command(mesh, token_of(bob), "apply", "-f", tmp_path)
    assert code == 0, said
    assert "created" in said
    code, _, said = await command(mesh, token_of(bob), "apply", "-f", tmp_path)
    assert code == 0
    assert "nothing to change" in said
    code, output, _ = await command(mesh, token_of(bob), "export", "moving")
    there = yaml.safe_load(output)
    assert there.pop("baseVersion") != written.pop("baseVersion")
    assert there == written


async def test_a_conflict_is_told_and_force_settles_it(mesh: Mesh, bob: Person, tmp_path: Path):
    source = await bob.post("/v1/sources", {"title": "Shop"})
    file = tmp_path / "shop.yml"
    text = """
name: shop
sources: {shop: Shop}
content:
  title: Shop
  description: |
    What is sold,
    and to whom.
  widgets:
    - {name: orders, title: Orders, kind: NUMBER, query: {sourceIds: [shop]}}
"""
    file.write_text(text)
    code, output, said = await command(mesh, token_of(bob), "apply", "-f", file, "-o", "json")
    assert code == 0, said
    dashboard_id = json.loads(output)[0]["dashboardId"]
    await bob.call("PATCH", f"/v1/dashboards/{dashboard_id}?updateMask=title", {"title": "Here"})
    file.write_text(text.replace("title: Shop", "title: There"))
    code, _, said = await command(mesh, token_of(bob), "apply", "-f", file)
    assert code == 2
    assert '! title: here "Here", in the file "There"' in said
    code, _, said = await command(mesh, token_of(bob), "apply", "-f", file, "--force")
    assert code == 0
    assert '~ title: "Here" → "There"' in said
    shown = (await bob.get(f"/v1/dashboards/{dashboard_id}"))["dashboard"]
    assert (shown["title"], shown["description"]) == ("There", "What is sold,\nand to whom.\n")
    assert token_of(bob) not in said
    assert source["source"]["sourceId"] not in file.read_text()


async def test_says_what_is_missing(mesh: Mesh, bob: Person, tmp_path: Path):
    (tmp_path / "a.yaml").write_text("name: &a x")
    code, _, said = await command(mesh, token_of(bob), "apply", "-f", tmp_path)
    assert code == 1
    assert "anchors and aliases are not read" in said
    code, _, said = await command(mesh, "", "export", "x")
    assert code == 1
    assert TOKEN_VARIABLE in said
    code, _, said = await command(mesh, token_of(bob), "export", "nothing-of-this-name")
    assert code == 1
    assert "No dashboard has the name" in said
