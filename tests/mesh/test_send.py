"""`send` through the real gateway: what a query counts is what the files say, however often it was interrupted."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from cli.demo import LOG
from cli.send import KEY_VARIABLE
from tests.conditions import eventually
from tests.mesh.people import Person
from tests.parts import Mesh

pytestmark = pytest.mark.xdist_group("mesh")

# Facts of the log, counted without this project.
EVENTS, VISITORS = 9999, 1753


@pytest.fixture
async def source(ann: Person) -> dict[str, Any]:
    """A source and its write key."""
    made: dict[str, Any] = await ann.post("/v1/sources", {"title": "Files"})
    return made


async def start(
    mesh: Mesh, source: dict[str, Any], state: Path, *arguments: Any
) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli.main", "send", "--data", str(mesh.stack.data_dir), "-o", "json"),
        *("--state", str(state), *(str(argument) for argument in arguments)),
        env={**os.environ, KEY_VARIABLE: source["writeKey"]},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


async def send(
    mesh: Mesh, source: dict[str, Any], state: Path, *arguments: Any
) -> tuple[int | None, dict[str, Any]]:
    process = await start(mesh, source, state, *arguments)
    output, said = await process.communicate()
    assert output, said
    report: list[dict[str, Any]] = json.loads(output)
    return process.returncode, report[0]


def said_in(state: Path) -> list[bytes]:
    """What the state says."""
    return [file.read_bytes() for file in state.glob("*.json")]


async def counted(ann: Person, source: dict[str, Any]) -> list[Any]:
    """How many events and visitors a query counts."""
    query = {
        "sourceIds": [source["source"]["sourceId"]],
        "measures": [{"aggregation": "COUNT"}, {"aggregation": "UNIQUE"}],
    }
    row: list[Any] = (await ann.post("/v1/queries:run", {"query": query}))["result"]["rows"][0]
    return row


async def test_counts_the_real_log_once(mesh: Mesh, ann: Person, source: dict[str, Any], tmp_path: Path):
    state = tmp_path / "state"
    for _ in range(3):
        before = said_in(state)
        process = await start(mesh, source, state, LOG)
        await eventually(lambda p=process, old=before: p.returncode is not None or said_in(state) != old)
        if process.returncode is None:
            process.kill()
        await process.communicate()
    (tmp_path / "renamed").write_bytes(gzip.decompress(LOG.read_bytes()))
    code, report = await send(mesh, source, state, tmp_path / "renamed")
    assert report["sent_earlier"] > 0
    assert (code, "stopped" in report) in {(0, False), (3, False)}
    # Once more, with everything forgotten: the ids alone do.
    code, report = await send(mesh, source, tmp_path / "other state", LOG)
    assert (code, report["accepted"], report["refused"]) == (3, EVENTS, 1)
    await eventually(lambda: _is(ann, source, [EVENTS, VISITORS]))
    assert await counted(ann, source) == [EVENTS, VISITORS]


async def _is(ann: Person, source: dict[str, Any], expected: list[Any]) -> bool:
    return await counted(ann, source) == expected


async def test_goes_on_when_the_gateway_comes_back(
    mesh: Mesh, ann: Person, source: dict[str, Any], tmp_path: Path
):
    file = tmp_path / "a.ndjson"
    file.write_text(
        "".join(f'{{"event":"view","distinctId":"visitor {n % 50}","n":{n}}}\n' for n in range(30_000))
    )
    process = await start(mesh, source, tmp_path / "state", file)
    await eventually(lambda: any((tmp_path / "state").glob("*.json")))
    mesh.supervisor.kill("envoy")
    output, said = await process.communicate()
    assert process.returncode == 0, said
    assert json.loads(output)[0]["accepted"] == 30_000
    await eventually(lambda: _is(ann, source, [30_000, 50]))


async def test_every_form_arrives(mesh: Mesh, ann: Person, source: dict[str, Any], tmp_path: Path):
    (tmp_path / "a.csv").write_text("customer,plan,amount\nada,pro,19.9\nbob,free,0\n")
    (tmp_path / "b.jsonl").write_text(
        '{"status":200,"ts":1793527200.25,"remote_ip":"192.0.2.1","uri":"/x","host":"shop.example"}\n'
    )
    parquet.write_table(
        pyarrow.table({"event": ["refund"], "distinct_id": ["ada"], "amount": [5.5]}), tmp_path / "c.parquet"
    )
    order = ("--set", "event=order", "--map", "distinct_id=customer")
    for file, more in (("a.csv", order), ("b.jsonl", ()), ("c.parquet", ())):
        assert (await send(mesh, source, tmp_path / "state", tmp_path / file, *more))[0] == 0
    await eventually(lambda: _is(ann, source, [4, 3]))
    catalogue = f"/v1/sources/{source['source']['sourceId']}/catalogue"

    async def known() -> bool:
        events = (await ann.get(f"{catalogue}/events"))["events"]
        return [(one["name"], one["count"]) for one in events] == [
            ("order", "2"),
            ("refund", "1"),
            ("request", "1"),
        ]

    await eventually(known)
    properties = (await ann.get(f"{catalogue}/properties?event=order"))["properties"]
    assert {one["name"]: one["type"] for one in properties} == {
        "properties.amount": "NUMBER",
        "properties.plan": "STRING",
    }
    # Names hold any character, also those of paths and queries.
    changed = await ann.call(
        "PATCH", f"{catalogue}/event?update_mask=description", {"name": "a/b?c&d:e", "description": "Odd"}
    )
    assert (changed.status, changed.body["event"]["description"]) == (200, "Odd")
    found = await ann.get(f"{catalogue}/event?name=a%2Fb%3Fc%26d%3Ae")
    assert found["event"]["etag"] == changed.body["event"]["etag"]
    absent = await ann.call("GET", f"{catalogue}/property?name=properties.never")
    assert (absent.status, absent.reason) == (404, "CATALOGUE_NAME_NOT_FOUND")
