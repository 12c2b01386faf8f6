"""The process of dashboard_svc."""

from __future__ import annotations

from functools import partial

from meshboard.dashboard.v1.annotation_service_pb2_grpc import add_AnnotationServiceServicer_to_server
from meshboard.dashboard.v1.dashboard_service_pb2_grpc import add_DashboardServiceServicer_to_server
from meshboard.dashboard.v1.draft_service_pb2_grpc import add_DraftServiceServicer_to_server
from meshboard.dashboard.v1.file_service_pb2_grpc import add_FileServiceServicer_to_server
from meshboard.dashboard.v1.folder_service_pb2_grpc import add_FolderServiceServicer_to_server
from meshboard.dashboard.v1.library_service_pb2_grpc import add_LibraryWidgetServiceServicer_to_server
from meshboard.dashboard.v1.search_service_pb2_grpc import add_SearchServiceServicer_to_server
from meshboard.dashboard.v1.share_service_pb2_grpc import add_ShareServiceServicer_to_server
from meshboard.dashboard.v1.template_service_pb2_grpc import add_TemplateServiceServicer_to_server
from meshboard.dashboard.v1.variable_service_pb2_grpc import add_VariableServiceServicer_to_server
from meshboard.dashboard.v1.version_service_pb2_grpc import add_VersionServiceServicer_to_server
from meshboard.dashboard.v1.widget_kind_service_pb2_grpc import add_WidgetKindServiceServicer_to_server
from meshboard.dashboard.v1.widget_service_pb2_grpc import add_WidgetServiceServicer_to_server
from meshboard.user.v1.events_pb2 import MemberRemoved, TeamDeleted, UserErasureRequested, WorkspaceDeleted
from meshboard.user.v1.internal_grant_service_pb2_grpc import add_InternalGrantServiceServicer_to_server
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncSession

from services.chassis import auth, completions, db, times, trust
from services.chassis.access import Access
from services.chassis.bus import Bus
from services.chassis.cache import Cache
from services.chassis.clients import Peer
from services.chassis.erasures import erase_grants, erasing
from services.chassis.grants import InternalGrantServicer
from services.chassis.guesses import Counts
from services.chassis.inbox import consume
from services.chassis.indexing import Indexer
from services.chassis.outbox import Relay
from services.chassis.paging import Pages
from services.chassis.passwords import Passwords
from services.chassis.process import until_stopped
from services.chassis.rechecks import Span
from services.chassis.search_engines import engine_of
from services.chassis.server import Server, main
from services.dashboard_svc import bin, favourites
from services.dashboard_svc.annotations import Annotations, AnnotationServicer
from services.dashboard_svc.answers import Answers
from services.dashboard_svc.boards import Boards
from services.dashboard_svc.consumers import on_workspace_deleted
from services.dashboard_svc.content_checks import ContentChecks
from services.dashboard_svc.custom_widgets import CustomWidgets
from services.dashboard_svc.dashboard_search import CORPUS, DashboardSearch
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


async def serve(settings: Settings) -> None:  # noqa: PLR0915 - the composition root
    """Runs the service until it is told to stop."""
    await db.migrate(settings.postgres_url, "services.dashboard_svc")
    sessions = db.connect(settings.postgres_url, settings.postgres_pool_size)
    bus = await Bus.connect(settings.nats_url, "dashboard")
    cache = await Cache.connect(settings.redis_url, bus, "dashboard")

    redis = Redis.from_url(settings.redis_url, socket_timeout=1, socket_connect_timeout=1)

    boards = Boards(sessions, cache)
    tickets = Tickets(settings.derived_keys("share tickets"), settings.share_ticket_seconds, times.now)
    links = ShareLinks(sessions, boards, tickets, settings.public_url, times.now)
    await links.listen(bus)
    tokens = auth.ServiceTokens("dashboard", settings.keys_dir)
    auth_peer = Peer("auth", settings.auth_address, tokens)
    user_peer = Peer("user", settings.user_address, tokens)
    analytics_peer = Peer("analytics", settings.analytics_address, tokens)
    access = Access(
        await trust.follow_keys(bus, settings.public_url, trust.keys_of(auth_peer)),
        tokens,
        await trust.follow_revocations(bus, *trust.sessions_of(auth_peer)),
        await trust.follow_rights(bus, trust.rights_of(user_peer)),
        db=sessions,
        resources=[DASHBOARD, FOLDER],
        credentials={"share_link": links.check},
    )

    sources = Sources(analytics_peer)
    pages = Pages(settings.derived_key("page tokens"))
    answers = Answers(
        analytics_peer,
        per_workspace=settings.data_calls_per_workspace,
        cached_bytes=settings.answer_cache_bytes,
    )
    feeds = Feeds(boards.load, answers, settings.derived_key("watch cursors"))
    await feeds.listen(bus)
    grants = grants_on_dashboards(sessions, user_peer, pages)
    engine = engine_of(settings, sessions)
    search = DashboardSearch(sessions, engine, DASHBOARD)
    dashboards = DashboardServicer(
        db=sessions,
        boards=boards,
        sources=sources,
        pages=pages,
        grants=grants,
        search=search,
        answers=answers,
        feeds=feeds,
        span=Span(settings.heartbeat_seconds, settings.watch_seconds),
        draining=lambda: server.draining.is_set(),  # noqa: PLW0108 - the server is made below
        bin_days=settings.bin_days,
    )
    drafts = DraftServicer(sessions, boards, answers)
    versions = VersionServicer(sessions, boards, sources, pages)
    folder_grants = grants_on_folders(sessions, user_peer, pages)
    folders = FolderServicer(db=sessions, pages=pages, grants=folder_grants)
    internal_grants = InternalGrantServicer(sessions, [DASHBOARD, FOLDER], pages, times.now)
    validation = Validation(sessions, sources)
    custom = CustomWidgets(sessions)
    widgets = WidgetServicer(sessions, boards, pages, validation, custom)
    library = LibraryWidgetServicer(
        db=sessions, boards=boards, pages=pages, validation=validation, custom=custom, dashboards=DASHBOARD
    )
    upgrades = WidgetUpgrades(db=sessions, boards=boards, pages=pages, sources=sources, dashboards=DASHBOARD)
    widget_kinds = WidgetKindServicer(sessions, pages, upgrades)
    annotations = AnnotationServicer(sessions, boards, pages, Annotations(sessions, answers))
    variables = VariableServicer(boards, pages, answers)
    passwords = Passwords(settings)
    shares = ShareServicer(
        db=sessions,
        settings=settings,
        boards=boards,
        pages=pages,
        answers=answers,
        annotations=Annotations(sessions, answers),
        feeds=feeds,
        links=links,
        snapshots=Snapshots(sessions, cache),
        passwords=passwords,
        guesses=Counts(redis, "dashboard", password_delayed),
        sources=sources,
        span=Span(settings.heartbeat_seconds, settings.watch_seconds),
        draining=lambda: server.draining.is_set(),  # noqa: PLW0108 - the server is made below
    )
    files = FileServicer(sessions, boards, grants, ContentChecks(validation, sources), custom)
    templates = TemplateServicer(sessions, pages, grants, sources)
    searches = SearchServicer(sessions, search, user_peer, pages)

    async def on_team_deleted(session: AsyncSession, event: TeamDeleted) -> None:
        for owned in (grants, folder_grants):
            await owned.on_team_deleted(session, event)

    async def on_member_removed(session: AsyncSession, event: MemberRemoved) -> None:
        for owned in (grants, folder_grants):
            await owned.on_member_removed(session, event)
        await favourites.on_member_removed(session, event)

    async def bus_ready() -> bool:
        return bus.connected

    server = Server(
        settings,
        [
            lambda s: add_DashboardServiceServicer_to_server(dashboards, s),
            lambda s: add_DraftServiceServicer_to_server(drafts, s),
            lambda s: add_VersionServiceServicer_to_server(versions, s),
            lambda s: add_FolderServiceServicer_to_server(folders, s),
            lambda s: add_WidgetServiceServicer_to_server(widgets, s),
            lambda s: add_LibraryWidgetServiceServicer_to_server(library, s),
            lambda s: add_WidgetKindServiceServicer_to_server(widget_kinds, s),
            lambda s: add_AnnotationServiceServicer_to_server(annotations, s),
            lambda s: add_VariableServiceServicer_to_server(variables, s),
            lambda s: add_FileServiceServicer_to_server(files, s),
            lambda s: add_TemplateServiceServicer_to_server(templates, s),
            lambda s: add_InternalGrantServiceServicer_to_server(internal_grants, s),
            lambda s: add_SearchServiceServicer_to_server(searches, s),
            lambda s: add_ShareServiceServicer_to_server(shares, s),
        ],
        access,
        ready=[partial(db.ready, sessions), bus_ready],
    )
    passwords.mind_calls(server.calls, lambda short: completions.let_gather(not short))
    await server.start()
    completions.let_gather()
    try:
        await until_stopped(
            Relay(settings.postgres_url, bus, "dashboard").run(),
            bin.run(sessions, times.now),
            links.run(),
            Indexer(settings.postgres_url, sessions, engine, CORPUS).run(),
            consume(
                bus,
                sessions,
                "dashboard",
                {
                    MemberRemoved: on_member_removed,
                    TeamDeleted: on_team_deleted,
                    WorkspaceDeleted: on_workspace_deleted,
                    UserErasureRequested: erasing("dashboard", erase_grants, favourites.erase_favourites),
                },
            ),
        )
    finally:
        await server.stop()
        await links.close()
        passwords.close()
        await redis.aclose()
        for peer in (auth_peer, user_peer, analytics_peer):
            await peer.close()
        await engine.close()
        await cache.close()
        await bus.close()
        await db.engine(sessions).dispose()


if __name__ == "__main__":
    # Thousands of streams are told of each change at once.
    completions.hear_together()
    main("dashboard", Settings, serve)
