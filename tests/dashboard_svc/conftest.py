"""dashboard_svc on real Postgres, NATS and Valkey, with stand-ins for the services that it calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from meshboard.analytics.v1.events_pb2 import Tick
from meshboard.analytics.v1.query_pb2 import Query
from meshboard.dashboard.v1.annotation_service_pb2_grpc import (
    AnnotationServiceStub,
    add_AnnotationServiceServicer_to_server,
)
from meshboard.dashboard.v1.dashboard_pb2 import Dashboard as DashboardMessage
from meshboard.dashboard.v1.dashboard_pb2 import Widget as WidgetMessage
from meshboard.dashboard.v1.dashboard_service_pb2 import CreateDashboardRequest
from meshboard.dashboard.v1.dashboard_service_pb2_grpc import (
    DashboardServiceStub,
    add_DashboardServiceServicer_to_server,
)
from meshboard.dashboard.v1.draft_service_pb2_grpc import (
    DraftServiceStub,
    add_DraftServiceServicer_to_server,
)
from meshboard.dashboard.v1.file_service_pb2_grpc import (
    FileServiceStub,
    add_FileServiceServicer_to_server,
)
from meshboard.dashboard.v1.folder_pb2 import Folder as FolderMessage
from meshboard.dashboard.v1.folder_service_pb2 import CreateFolderRequest
from meshboard.dashboard.v1.folder_service_pb2_grpc import (
    FolderServiceStub,
    add_FolderServiceServicer_to_server,
)
from meshboard.dashboard.v1.library_service_pb2_grpc import (
    LibraryWidgetServiceStub,
    add_LibraryWidgetServiceServicer_to_server,
)
from meshboard.dashboard.v1.search_service_pb2_grpc import (
    SearchServiceStub,
    add_SearchServiceServicer_to_server,
)
from meshboard.dashboard.v1.share_service_pb2_grpc import (
    ShareServiceStub,
    add_ShareServiceServicer_to_server,
)
from meshboard.dashboard.v1.template_service_pb2_grpc import (
    TemplateServiceStub,
    add_TemplateServiceServicer_to_server,
)
from meshboard.dashboard.v1.variable_service_pb2_grpc import (
    VariableServiceStub,
    add_VariableServiceServicer_to_server,
)
from meshboard.dashboard.v1.version_service_pb2_grpc import (
    VersionServiceStub,
    add_VersionServiceServicer_to_server,
)
from meshboard.dashboard.v1.widget_kind_service_pb2_grpc import (
    WidgetKindServiceStub,
    add_WidgetKindServiceServicer_to_server,
)
from meshboard.dashboard.v1.widget_service_pb2 import CreateWidgetRequest
from meshboard.dashboard.v1.widget_service_pb2_grpc import (
    WidgetServiceStub,
    add_WidgetServiceServicer_to_server,
)
from meshboard.user.v1.internal_grant_service_pb2_grpc import (
    InternalGrantServiceStub,
    add_InternalGrantServiceServicer_to_server,
)
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import auth, errors, times
from services.chassis import db as chassis_db
from services.chassis.bus import Bus
from services.chassis.cache import Cache
from services.chassis.clients import Peer
from services.chassis.grants import InternalGrantServicer
from services.chassis.guesses import Counts
from services.chassis.outbox import Relay
from services.chassis.paging import Pages
from services.chassis.passwords import Passwords
from services.chassis.rechecks import Span
from services.chassis.rights import Rights
from services.chassis.search import Engine
from services.chassis.search_engines import engine_of
from services.chassis.server import Server
from services.dashboard_svc.annotations import Annotations, AnnotationServicer
from services.dashboard_svc.answers import Answers
from services.dashboard_svc.boards import Boards
from services.dashboard_svc.content_checks import ContentChecks
from services.dashboard_svc.custom_widgets import CustomWidgets
from services.dashboard_svc.dashboard_search import DashboardSearch
from services.dashboard_svc.dashboards import DASHBOARD, DashboardServicer, grants_on_dashboards
from services.dashboard_svc.drafts import DraftServicer
from services.dashboard_svc.feeds import Feeds
from services.dashboard_svc.files import FileServicer
from services.dashboard_svc.folders import FOLDER, FolderServicer, grants_on_folders
from services.dashboard_svc.library_widgets import LibraryWidgetServicer
from services.dashboard_svc.searches import SearchServicer
from services.dashboard_svc.settings import Settings
from services.dashboard_svc.share_links import ShareLinks, Tickets
from services.dashboard_svc.shares import ShareServicer, password_delayed
from services.dashboard_svc.snapshots import Snapshots
from services.dashboard_svc.sources import Sources
from services.dashboard_svc.templates import TemplateServicer
from services.dashboard_svc.validation import Validation
from services.dashboard_svc.variables import VariableServicer
from services.dashboard_svc.versions import VersionServicer
from services.dashboard_svc.widget_kinds import WidgetKindServicer
from services.dashboard_svc.widget_upgrades import WidgetUpgrades
from services.dashboard_svc.widgets import WidgetServicer
from tests.dashboard_svc.stand_ins import StandInAnalytics, StandInUsers, serving_stand_ins
from tests.harness import Identity, Member, make_keys, make_settings, new_id, serving
from tests.parts import Parts


@dataclass
class Mesh:
    """A running dashboard_svc, and what stands around it."""

    identity: Absentee
    analytics: StandInAnalytics
    analytics_address: str
    users: StandInUsers
    db: async_sessionmaker[AsyncSession]
    bus: Bus
    server: Server
    feeds: Feeds
    answers: Answers
    engine: Engine
    dashboards: Any
    drafts: Any
    versions: Any
    folders: Any
    widgets: Any
    library: Any
    kinds: Any
    files: Any
    templates: Any
    internal_grants: Any
    searches: Any
    annotations: Any
    variables: Any
    shares: Any
    links: ShareLinks
    another: Any = field(repr=False)

    async def dashboard(
        self, member: Member, title: str = "Traffic", folder: FolderMessage | None = None
    ) -> DashboardMessage:
        """A new dashboard of the member."""
        folder_id = folder.folder_id if folder else ""
        response = await self.dashboards.CreateDashboard(
            CreateDashboardRequest(title=title, folder_id=folder_id), metadata=member.metadata
        )
        dashboard: DashboardMessage = response.dashboard
        return dashboard

    async def folder(
        self, member: Member, title: str = "Teams", parent: FolderMessage | None = None
    ) -> FolderMessage:
        """A new folder of the member."""
        parent_folder_id = parent.folder_id if parent else ""
        response = await self.folders.CreateFolder(
            CreateFolderRequest(title=title, parent_folder_id=parent_folder_id), metadata=member.metadata
        )
        folder: FolderMessage = response.folder
        return folder

    async def widget(
        self, member: Member, dashboard: DashboardMessage, query: Query | None = None, **more: Any
    ) -> WidgetMessage:
        """A new widget, by default the count of a source of its own."""
        request = CreateWidgetRequest(
            **{
                "dashboard_id": dashboard.dashboard_id,
                "kind": WidgetMessage.TABLE,
                "query": query or Query(source_ids=[new_id()]),
                **more,
            }
        )
        widget: WidgetMessage = (await self.widgets.CreateWidget(request, metadata=member.metadata)).widget
        return widget

    async def tick(self, source_id: str) -> None:
        """Says, as the pipeline does, that a source has new events."""
        await self.bus.emit(f"tick.{source_id}", Tick(source_id=source_id).SerializeToString())


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_keys(tmp_path_factory.mktemp("keys"))


class Absentee(Identity):
    """An identity that can be out of reach."""

    away = False

    async def fetch_rights(self, user_id: str, workspace_id: str) -> Rights:
        if self.away:
            raise errors.unavailable("user does not answer.")
        return await super().fetch_rights(user_id, workspace_id)


@pytest.fixture
def identity(keys: Path) -> Absentee:
    return Absentee(keys)


@pytest.fixture(scope="session")
async def database_url(parts: Parts) -> str:
    url = await parts.fresh_database("dashboard")
    await chassis_db.migrate(url, "services.dashboard_svc")
    return url


@pytest.fixture
def span() -> Span:
    """How long streams live; tests override it."""
    return Span(heartbeat_seconds=15, watch_seconds=3600)


@pytest.fixture
def engine_of_searches() -> dict[str, Any]:
    """The settings of the search engine; tests of searches override it."""
    return {}


@pytest.fixture
async def mesh(
    parts: Parts,
    keys: Path,
    identity: Absentee,
    database_url: str,
    span: Span,
    engine_of_searches: dict[str, Any],
) -> AsyncIterator[Mesh]:
    analytics, users = StandInAnalytics(), StandInUsers()
    all_links: list[ShareLinks] = []
    all_answers: list[Answers] = []
    settings = make_settings(Settings, parts, keys, database_url, **engine_of_searches)
    db = chassis_db.connect(database_url, settings.postgres_pool_size)
    bus = await Bus.connect(parts.nats_url, "test")
    engine = engine_of(settings, db)
    relay = asyncio.create_task(Relay(database_url, bus, "dashboard").run())
    async with serving_stand_ins(analytics, users) as address:

        @asynccontextmanager
        async def replica() -> AsyncIterator[tuple[grpc.aio.Channel, Server, Feeds]]:
            cache = await Cache.connect(parts.redis_url, bus, "dashboard")
            tokens = auth.ServiceTokens("dashboard", keys)
            peers = [Peer("user", address, tokens), Peer("analytics", address, tokens)]
            boards, pages = Boards(db, cache), Pages(settings.derived_key("page tokens"))
            answers, sources = Answers(peers[1]), Sources(peers[1])
            feeds = Feeds(boards.load, answers, settings.derived_key("watch cursors"))
            await feeds.listen(bus)
            search = DashboardSearch(db, engine, DASHBOARD)
            servers: list[Server] = []
            dashboards = DashboardServicer(
                db=db,
                boards=boards,
                sources=sources,
                pages=pages,
                grants=grants_on_dashboards(db, peers[0], pages),
                search=search,
                answers=answers,
                feeds=feeds,
                span=span,
                draining=lambda: servers[0].draining.is_set(),  # noqa: PLW0108 - made below
                bin_days=settings.bin_days,
            )
            files = FileServicer(
                db,
                boards,
                dashboards.grants,
                ContentChecks(Validation(db, sources), sources),
                CustomWidgets(db),
            )
            templates = TemplateServicer(db, pages, dashboards.grants, sources)
            drafts = DraftServicer(db, boards, answers)
            versions = VersionServicer(db, boards, sources, pages)
            validation = Validation(db, sources)
            custom = CustomWidgets(db)
            widgets = WidgetServicer(db, boards, pages, validation, custom)
            library = LibraryWidgetServicer(
                db=db, boards=boards, pages=pages, validation=validation, custom=custom, dashboards=DASHBOARD
            )
            upgrades = WidgetUpgrades(
                db=db, boards=boards, pages=pages, sources=sources, dashboards=DASHBOARD
            )
            widget_kinds = WidgetKindServicer(db, pages, upgrades)
            folders = FolderServicer(db=db, pages=pages, grants=grants_on_folders(db, peers[0], pages))
            internal_grants = InternalGrantServicer(db, [DASHBOARD, FOLDER], pages, times.now)
            tickets = Tickets(
                settings.derived_keys("share tickets"), settings.share_ticket_seconds, times.now
            )
            links = ShareLinks(db, boards, tickets, settings.public_url, times.now)
            await links.listen(bus)
            all_links.append(links)
            all_answers.append(answers)
            redis, passwords = Redis.from_url(parts.redis_url), Passwords(settings)
            shares = ShareServicer(
                db=db,
                settings=settings,
                boards=boards,
                pages=pages,
                answers=answers,
                annotations=Annotations(db, answers),
                feeds=feeds,
                links=links,
                snapshots=Snapshots(db, cache),
                passwords=passwords,
                guesses=Counts(redis, "dashboard", password_delayed),
                sources=Sources(peers[1]),
                span=span,
                draining=lambda: servers[0].draining.is_set(),  # noqa: PLW0108 - made below
            )
            access = identity.access(
                "dashboard",
                db=db,
                resources=[DASHBOARD, FOLDER],
                credentials={"share_link": links.check},
            )
            searches = SearchServicer(db, search, peers[0], pages)
            annotations = AnnotationServicer(db, boards, pages, Annotations(db, answers))
            variables = VariableServicer(boards, pages, answers)
            registrations = [
                lambda server: add_DashboardServiceServicer_to_server(dashboards, server),
                lambda server: add_DraftServiceServicer_to_server(drafts, server),
                lambda server: add_VersionServiceServicer_to_server(versions, server),
                lambda server: add_FolderServiceServicer_to_server(folders, server),
                lambda server: add_WidgetServiceServicer_to_server(widgets, server),
                lambda server: add_LibraryWidgetServiceServicer_to_server(library, server),
                lambda server: add_WidgetKindServiceServicer_to_server(widget_kinds, server),
                lambda server: add_FileServiceServicer_to_server(files, server),
                lambda server: add_TemplateServiceServicer_to_server(templates, server),
                lambda server: add_InternalGrantServiceServicer_to_server(internal_grants, server),
                lambda server: add_AnnotationServiceServicer_to_server(annotations, server),
                lambda server: add_VariableServiceServicer_to_server(variables, server),
                lambda server: add_SearchServiceServicer_to_server(searches, server),
                lambda server: add_ShareServiceServicer_to_server(shares, server),
            ]
            async with serving(settings, registrations, access) as (channel, server):
                servers.append(server)
                yield channel, server, feeds
            passwords.close()
            await redis.aclose()
            for peer in peers:
                await peer.close()
            await cache.close()

        async with replica() as (channel, server, feeds):
            yield Mesh(
                identity=identity,
                analytics=analytics,
                analytics_address=address,
                users=users,
                db=db,
                bus=bus,
                server=server,
                feeds=feeds,
                answers=all_answers[0],
                engine=engine,
                dashboards=DashboardServiceStub(channel),
                drafts=DraftServiceStub(channel),
                versions=VersionServiceStub(channel),
                folders=FolderServiceStub(channel),
                internal_grants=InternalGrantServiceStub(channel),
                widgets=WidgetServiceStub(channel),
                library=LibraryWidgetServiceStub(channel),
                kinds=WidgetKindServiceStub(channel),
                files=FileServiceStub(channel),
                templates=TemplateServiceStub(channel),
                searches=SearchServiceStub(channel),
                annotations=AnnotationServiceStub(channel),
                variables=VariableServiceStub(channel),
                shares=ShareServiceStub(channel),
                links=all_links[0],
                another=replica,
            )
    relay.cancel()
    await asyncio.gather(relay, return_exceptions=True)
    await engine.close()
    await bus.close()
    await chassis_db.engine(db).dispose()
