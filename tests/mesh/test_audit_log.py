"""The audit log through the gateway."""

from __future__ import annotations

import json

import pytest

from tests.conditions import eventually
from tests.mesh.people import Person

pytestmark = [pytest.mark.xdist_group("mesh")]


async def test_a_workspace_exports_its_log(ann: Person):
    path = f"/v1/workspaces/{ann.workspace_id}/auditEntries"

    async def sealed() -> bool:
        listed = (await ann.get(path))["auditEntries"]
        return bool(listed) and all(entry["position"] != "0" for entry in listed)

    await eventually(sealed)
    listed = [entry["auditEntryId"] for entry in (await ann.get(path))["auditEntries"]]
    # Server-sent events, which the gateway makes of a stream.
    async with ann.http.get(f"{ann.url}{path}:export", headers=ann.headers) as response:
        assert response.status == 200
        lines = [line for line in (await response.text()).splitlines() if line]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    exported = [entry["auditEntryId"] for chunk in chunks for entry in chunk["auditEntries"]]
    assert exported[: len(listed)] == listed[::-1]
