"""Dashboards from templates."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from meshboard.dashboard.v1 import template_service_pb2 as pb
from meshboard.dashboard.v1.dashboard_pb2 import DashboardContent
from meshboard.dashboard.v1.events_pb2 import DashboardCreated
from meshboard.dashboard.v1.template_service_pb2_grpc import TemplateServiceServicer
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import auth, errors, outbox, times
from services.chassis.grants import Grants
from services.chassis.paging import Pages
from services.dashboard_svc.boards import shown
from services.dashboard_svc.contents import record, write_content
from services.dashboard_svc.convert import dashboard_to_pb
from services.dashboard_svc.definitions import clean, sources_of
from services.dashboard_svc.favourites import for_caller
from services.dashboard_svc.new_dashboards import insert_dashboard, made_before
from services.dashboard_svc.sources import Sources
from services.dashboard_svc.template_contents import TEMPLATES

Context = Any
# What widgets are counted with: any source will do.
_NOWHERE = "00000000-0000-0000-0000-000000000000"


class TemplateServicer(TemplateServiceServicer):
    """meshboard.dashboard.v1.TemplateService."""

    def __init__(
        self,
        db: async_sessionmaker[AsyncSession],
        pages: Pages,
        grants: Grants,
        sources: Sources,
        *,
        now: Callable[[], datetime] = times.now,
    ) -> None:
        self.db = db
        self.pages = pages
        self.grants = grants
        self.sources = sources
        self.now = now

    async def ListDashboardTemplates(
        self, request: pb.ListDashboardTemplatesRequest, context: Context
    ) -> pb.ListDashboardTemplatesResponse:
        """Lists what the code has."""
        page = self.pages.open(request, auth.caller().workspace_id)
        names = page.rest(sorted(TEMPLATES), lambda name: (name,))
        found, next_page_token = page.close(names, lambda name: (name,))
        return pb.ListDashboardTemplatesResponse(
            templates=map(_template, found), next_page_token=next_page_token
        )

    async def CreateDashboardFromTemplate(
        self, request: pb.CreateDashboardFromTemplateRequest, context: Context
    ) -> pb.CreateDashboardFromTemplateResponse:
        """Writes the template's content, with the source in it."""
        caller, now = auth.caller(), self.now()
        content = _content(request)
        await self.sources.require(sources_of(content))
        async with self.db.begin() as session:
            dashboard = await insert_dashboard(
                session,
                self.grants,
                content,
                folder_id=request.folder_id,
                now=now,
                request_id=request.request_id,
            )
            if dashboard is None:
                first = await made_before(session, request.request_id)
                assert first is not None, "without a name nothing else is taken"
                (answer,) = await shown(session, [first])
                return pb.CreateDashboardFromTemplateResponse(dashboard=await for_caller(session, answer))
            created = DashboardCreated(dashboard=dashboard_to_pb(dashboard))
            outbox.add(session, created, workspace_id=caller.workspace_id)
            await write_content(session, dashboard, content, author_id=caller.user_id, now=now)
            await record(session, dashboard, caller.user_id)
        return pb.CreateDashboardFromTemplateResponse(dashboard=dashboard_to_pb(dashboard))


def _content(request: pb.CreateDashboardFromTemplateRequest) -> DashboardContent:
    template = TEMPLATES.get(request.template)
    if template is None:
        raise errors.not_found("TEMPLATE_NOT_FOUND", "There is no such template.")
    content = template.content(request.source_id.lower())
    if request.title:
        content.title = request.title
        clean(content, ["title"])
    return content


def _template(name: str) -> pb.DashboardTemplate:
    template = TEMPLATES[name]
    return pb.DashboardTemplate(
        template=name,
        title=template.title,
        description=template.description,
        widget_count=len(template.content(_NOWHERE).widgets),
    )
