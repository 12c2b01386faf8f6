"""Drafts, versions, favourites, duplicates and the bin, at the gateway of the whole mesh."""

from __future__ import annotations

import pytest

from tests.conditions import eventually
from tests.mesh.people import Person

pytestmark = pytest.mark.xdist_group("mesh")


async def test_a_dashboard_is_drafted_published_restored_and_purged(ann: Person):
    source_id, _ = await ann.new_source()
    variable = {"name": "country", "propertyValues": {"sourceId": source_id, "property": "country"}}
    body = {"title": "Sales", "tags": ["sales"], "variables": [variable], "name": "sales"}
    made = (await ann.post("/v1/dashboards", body))["dashboard"]
    path = f"/v1/dashboards/{made['dashboardId']}"
    assert (await ann.get(path))["dashboard"] == made

    await ann.post(f"{path}/draft", {})
    answer = await ann.call("PATCH", f"{path}?updateMask=title,tags", {"title": "Returns", "tags": []})
    assert (answer.status, answer.body["dashboard"]["title"]) == (200, "Returns")
    seen = (await ann.get(path))["dashboard"]
    assert (seen["title"], seen["hasDraft"]) == ("Sales", True)
    assert [each["title"] for each in (await ann.get("/v1/dashboards?tags=sales"))["dashboards"]] == ["Sales"]
    draft = await ann.get(f"{path}/draft")
    assert (draft["dashboard"]["title"], draft["widgets"]) == ("Returns", [])
    assert (await ann.get(f"{path}/draft:data"))["widgets"] == []
    published = await ann.post(f"{path}/draft:publish", {"reason": "Returns too"})
    assert published["dashboard"]["title"] == "Returns"
    assert (await ann.call("POST", f"{path}/draft:discard", {})).reason == "DRAFT_NOT_FOUND"

    newest, oldest = (await ann.get(f"{path}/versions"))["versions"]
    assert (newest["reason"], oldest["reason"]) == ("Returns too", "")
    ends = f"fromVersionId={oldest['versionId']}&toVersionId={newest['versionId']}"
    changes = (await ann.get(f"{path}/versions:diff?{ends}"))["changes"]
    assert [(each["path"], each["before"]) for each in changes] == [("title", "Sales"), ("tags", ["sales"])]
    version = f"{path}/versions/{oldest['versionId']}"
    assert (await ann.get(version))["content"]["title"] == "Sales"

    await ann.post(f"{path}:favourite", {})
    copy = (await ann.post(f"{path}:duplicate", {"title": "Copy"}))["dashboard"]
    assert (copy["title"], copy["variables"]) == ("Copy", published["dashboard"]["variables"])
    marked = (await ann.get("/v1/dashboards?favourites=true"))["dashboards"]
    assert [each["dashboardId"] for each in marked] == [made["dashboardId"]]
    await ann.post(f"{path}:unfavourite", {})

    assert (await ann.call("DELETE", path)).status == 200
    assert (await ann.call("GET", path)).reason == "DASHBOARD_NOT_FOUND"
    assert len((await ann.get("/v1/dashboards?deleted=true"))["dashboards"]) == 1
    assert (await ann.post(f"{path}:undelete", {}))["dashboard"]["name"] == "sales"
    assert (await ann.call("POST", f"{path}:purge", {})).reason == "DASHBOARD_NOT_IN_BIN"
    assert (await ann.call("DELETE", path)).status == 200
    await ann.post(f"{path}:purge", {})
    assert (await ann.get("/v1/dashboards?deleted=true"))["dashboards"] == []

    async def told() -> bool:
        entries = await ann.get(f"/v1/workspaces/{ann.workspace_id}/auditEntries?pageSize=100")
        kinds = {entry["kind"] for entry in entries["auditEntries"]}
        return {f"dashboard.{what}" for what in ("published", "deleted", "undeleted", "purged")} <= kinds

    await eventually(told)


async def test_a_version_is_restored(ann: Person):
    made = (await ann.post("/v1/dashboards", {"title": "Old"}))["dashboard"]
    path = f"/v1/dashboards/{made['dashboardId']}"
    await ann.post(f"{path}/draft", {})
    await ann.call("PATCH", f"{path}?updateMask=title", {"title": "New"})
    published = (await ann.post(f"{path}/draft:publish", {"reason": "new"}))["dashboard"]
    old = (await ann.get(f"{path}/versions"))["versions"][-1]
    body = {"etag": published["etag"], "reason": "The old one was better"}
    restored = await ann.post(f"{path}/versions/{old['versionId']}:restore", body)
    assert (restored["dashboard"]["title"], restored["problems"]) == ("Old", [])
    newest = (await ann.get(f"{path}/versions"))["versions"][0]
    assert (newest["reason"], newest["restoredVersionId"]) == ("The old one was better", old["versionId"])
    assert (await ann.call("POST", f"{path}/versions/999:restore", {})).reason == "VERSION_NOT_FOUND"
