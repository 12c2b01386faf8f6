"""Dashboards as files: given out, applied, merged, refused."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from meshboard.dashboard.v1.dashboard_pb2 import DashboardContent
from meshboard.dashboard.v1.file_service_pb2 import (
    ApplyDashboardRequest,
    ApplyDashboardResponse,
    DashboardFile,
    ExportDashboardRequest,
)
from meshboard.dashboard.v1.version_service_pb2 import ListVersionsRequest

from tests.dashboard_svc.conftest import Mesh
from tests.harness import Member, new_id

pytestmark = pytest.mark.usefixtures("mesh")

SOURCE = new_id()


def a_file(name: str = "shop", **more: Any) -> DashboardFile:
    """A file of a dashboard with two widgets; `more` are fields of its content."""
    content = {
        "title": "Shop",
        "variables": [{"name": "host", "text": {}}],
        "widgets": [a_widget("orders"), a_widget("visitors")],
        **more,
    }
    return DashboardFile(name=name, content=ParseDict(content, DashboardContent()))


def a_widget(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "title": name.title(), "kind": "TABLE", "query": {"sourceIds": [SOURCE]}, **more}


async def apply(mesh: Mesh, member: Member, file: DashboardFile, **more: Any) -> ApplyDashboardResponse:
    request = ApplyDashboardRequest(file=file, **more)
    response: ApplyDashboardResponse = await mesh.files.ApplyDashboard(request, metadata=member.metadata)
    return response


async def export(mesh: Mesh, member: Member, dashboard_id: str) -> DashboardFile:
    request = ExportDashboardRequest(dashboard_id=dashboard_id)
    file: DashboardFile = (await mesh.files.ExportDashboard(request, metadata=member.metadata)).file
    return file


async def version_ids(mesh: Mesh, member: Member, dashboard_id: str) -> list[str]:
    request = ListVersionsRequest(dashboard_id=dashboard_id)
    response = await mesh.versions.ListVersions(request, metadata=member.metadata)
    return [version.version_id for version in response.versions]


async def test_creates_then_changes_then_nothing(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    created = await apply(mesh, ann, a_file())
    dashboard_id = created.dashboard.dashboard_id
    assert created.outcome == ApplyDashboardResponse.CREATED
    assert created.dashboard.name == "shop"
    before = await version_ids(mesh, ann, dashboard_id)

    again = await apply(mesh, ann, a_file())
    assert again.outcome == ApplyDashboardResponse.UNCHANGED
    assert not again.changes
    assert again.dashboard == created.dashboard
    assert await version_ids(mesh, ann, dashboard_id) == before

    changed = await apply(mesh, ann, a_file(title="Store", widgets=[a_widget("orders", title="Sales")]))
    assert changed.outcome == ApplyDashboardResponse.CHANGED
    assert [change.path for change in changed.changes] == [
        "title",
        "widgets[orders].title",
        "widgets[visitors]",
    ]
    assert (await export(mesh, ann, dashboard_id)).content.title == "Store"
