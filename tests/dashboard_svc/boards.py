"""What tests of dashboards ask again and again."""

from __future__ import annotations

from typing import Any

from google.protobuf.field_mask_pb2 import FieldMask
from meshboard.dashboard.v1 import dashboard_service_pb2, draft_service_pb2, version_service_pb2
from meshboard.dashboard.v1.dashboard_pb2 import Dashboard
from sqlalchemy import select

from services.chassis.db import OutboxRow
from tests.dashboard_svc.conftest import Mesh
from tests.harness import Member


async def get(mesh: Mesh, member: Member, dashboard_id: str) -> Dashboard:
    """The dashboard as the member sees it."""
    request = dashboard_service_pb2.GetDashboardRequest(dashboard_id=dashboard_id)
    dashboard: Dashboard = (await mesh.dashboards.GetDashboard(request, metadata=member.metadata)).dashboard
    return dashboard


async def update(
    mesh: Mesh, member: Member, dashboard_id: str, *, reason: str = "", etag: str = "", **fields: Any
) -> Dashboard:
    """Changes these fields."""
    wanted = Dashboard(dashboard_id=dashboard_id, etag=etag, **fields)
    request = dashboard_service_pb2.UpdateDashboardRequest(
        dashboard=wanted, update_mask=FieldMask(paths=fields), reason=reason
    )
    updated: Dashboard = (await mesh.dashboards.UpdateDashboard(request, metadata=member.metadata)).dashboard
    return updated


async def listed(mesh: Mesh, member: Member, page_size: int = 2, **fields: Any) -> list[Dashboard]:
    """The whole list, page by page."""
    request = dashboard_service_pb2.ListDashboardsRequest(page_size=page_size, **fields)
    found: list[Dashboard] = []
    while True:
        page = await mesh.dashboards.ListDashboards(request, metadata=member.metadata)
        found += page.dashboards
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


async def start_draft(mesh: Mesh, member: Member, dashboard_id: str) -> Dashboard:
    """Begins a draft."""
    request = draft_service_pb2.StartDraftRequest(dashboard_id=dashboard_id)
    draft: Dashboard = (await mesh.drafts.StartDraft(request, metadata=member.metadata)).dashboard
    return draft


async def publish(mesh: Mesh, member: Member, dashboard_id: str, reason: str = "") -> Dashboard:
    """Publishes the draft."""
    request = draft_service_pb2.PublishDashboardRequest(dashboard_id=dashboard_id, reason=reason)
    published: Dashboard = (await mesh.drafts.PublishDashboard(request, metadata=member.metadata)).dashboard
    return published


async def versions(mesh: Mesh, member: Member, dashboard_id: str) -> list[version_service_pb2.Version]:
    """All versions, the newest first."""
    request = version_service_pb2.ListVersionsRequest(dashboard_id=dashboard_id, page_size=2)
    found: list[version_service_pb2.Version] = []
    while True:
        page = await mesh.versions.ListVersions(request, metadata=member.metadata)
        found += page.versions
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


async def delete(mesh: Mesh, member: Member, dashboard_id: str) -> None:
    """Puts the dashboard into the bin."""
    request = dashboard_service_pb2.DeleteDashboardRequest(dashboard_id=dashboard_id)
    await mesh.dashboards.DeleteDashboard(request, metadata=member.metadata)


async def events(mesh: Mesh, member: Member) -> list[str]:
    """The names of the domain events of the member's workspace, in their order."""
    async with mesh.db() as session:
        subjects = await session.scalars(
            select(OutboxRow.subject)
            .where(OutboxRow.headers["Workspace-Id"].astext == member.workspace_id)
            .order_by(OutboxRow.id)
        )
        return [subject.rpartition(".")[2] for subject in subjects]
