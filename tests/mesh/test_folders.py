"""Folders and what lies in them, at the gateway of the whole mesh."""

from __future__ import annotations

import pytest

from tests.conditions import eventually
from tests.mesh.people import Person

pytestmark = pytest.mark.xdist_group("mesh")


async def test_a_folder_closes_what_lies_in_it_and_the_audit_log_tells(ann: Person):
    folder = (await ann.post("/v1/folders", {"title": "Finance"}))["folder"]["folderId"]
    inner = (await ann.post("/v1/folders", {"title": "2026", "parentFolderId": folder}))["folder"]["folderId"]
    made = (await ann.post("/v1/dashboards", {"title": "Revenue", "folderId": inner}))["dashboard"]
    dashboard = made["dashboardId"]
    listed = await ann.get(f"/v1/dashboards?folderId={inner}")
    assert [each["dashboardId"] for each in listed["dashboards"]] == [dashboard]
    moved = await ann.post(f"/v1/dashboards/{dashboard}:move", {"folderId": folder})
    assert moved["dashboard"]["folderId"] == folder
    assert (await ann.call("DELETE", f"/v1/folders/{folder}")).reason == "FOLDER_NOT_EMPTY"
    assert (await ann.call("POST", f"/v1/folders/{folder}:move", {"parentFolderId": inner})).reason == (
        "FOLDER_CYCLE"
    )
    # Ann's own grant goes in the same change, so that what is said to everyone counts for her too.
    (own,) = (await ann.get(f"/v1/folders/{folder}/grants"))["grants"]
    closing = {"subject": {"workspace": True}, "role": "viewer", "effect": "DENY"}
    change = {"create": [closing], "deleteGrantIds": [own["grantId"]]}
    assert len((await ann.post(f"/v1/folders/{folder}/grants:batchUpdate", change))["grants"]) == 1
    assert (await ann.call("GET", f"/v1/folders/{folder}")).reason == "FOLDER_NOT_FOUND"
    assert (await ann.call("GET", f"/v1/dashboards/{dashboard}")).status == 200

    async def told() -> bool:
        entries = await ann.get(f"/v1/workspaces/{ann.workspace_id}/auditEntries?pageSize=100")
        kinds = [entry["kind"] for entry in entries["auditEntries"]]
        return {"folder.created", "dashboard.moved", "grant.created", "grant.deleted"} <= set(kinds)

    await eventually(told)
