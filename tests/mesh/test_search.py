"""Searching through the gateway of the whole mesh, and building anew what is searched."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import pytest

from cli.envoy_config import REPOSITORY
from tests.conditions import eventually
from tests.mesh.memberships import admit
from tests.mesh.people import Person
from tests.parts import Mesh

pytestmark = pytest.mark.xdist_group("mesh")


async def meshboard(*arguments: object) -> tuple[int | None, str]:
    """What a command as a person types it gives."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "cli.main",
        *map(str, arguments),
        cwd=REPOSITORY,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    return process.returncode, output.decode()


async def found(person: Person, query: str, **headers: str) -> list[dict[str, Any]]:
    hits: list[dict[str, Any]] = (await person.get(f"/v1/search?query={query}", **headers))["hits"]
    return hits


async def test_what_is_written_is_found_by_who_may_see_it(mesh: Mesh, ann: Person, bob: Person) -> None:
    dashboard = (await ann.post("/v1/dashboards", {"title": "Quokka count"}))["dashboard"]

    async def is_found() -> bool:
        return [hit["dashboard"]["dashboardId"] for hit in await found(ann, "quoka")] == [
            dashboard["dashboardId"]
        ]

    await eventually(is_found)
    (hit,) = await found(ann, "quokka")
    assert hit["highlights"] == [
        {
            "field": "title",
            "fragments": [{"text": "Quokka", "matched": True}, {"text": " count", "matched": False}],
        }
    ]
    assert await found(bob, "quokka") == []
    await admit(mesh, ann, bob)
    in_hers = {"x-workspace-id": ann.workspace_id}

    async def both_are_found() -> bool:
        members = await bob.get("/v1/users:search?query=someone", **in_hers)
        return len(members["users"]) == 2 and len(await found(bob, "quokka", **in_hers)) == 1

    await eventually(both_are_found)
    refusal = await ann.call("GET", "/v1/dashboards:search?query=%25")
    assert (refusal.status, refusal.reason) == (400, "SEARCH_QUERY_INVALID")
    assert (await ann.call("GET", "/v1/search")).reason == "VALIDATION_FAILED"


async def test_an_operator_builds_anew_what_is_searched(mesh: Mesh, ann: Person) -> None:
    await ann.post("/v1/dashboards", {"title": "Numbat count"})
    code, output = await meshboard("reindex", "--data", mesh.stack.data_dir, "-o", "json")
    assert code == 0
    dashboards, users = json.loads(output)["indexes"]
    assert (dashboards["index"], users["index"]) == ("dashboards", "users")
    assert dashboards["documents"] >= 1
    assert users["documents"] >= 1

    async def is_found() -> bool:
        return len(await found(ann, "numbat")) == 1

    await eventually(is_found)
