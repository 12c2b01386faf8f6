"""The composition root of the role `serve`: sources, ingest and queries."""

from functools import partial

from meshboard.analytics.v1.catalogue_service_pb2_grpc import add_CatalogueServiceServicer_to_server
from meshboard.analytics.v1.cohort_service_pb2_grpc import add_CohortServiceServicer_to_server
from meshboard.analytics.v1.compat_service_pb2 import SendBatchRequest, SendTrackRequest
from meshboard.analytics.v1.compat_service_pb2_grpc import add_CompatServiceServicer_to_server
from meshboard.analytics.v1.event_service_pb2 import ListEventsRequest, TailEventsRequest
from meshboard.analytics.v1.event_service_pb2_grpc import add_EventServiceServicer_to_server
from meshboard.analytics.v1.failed_event_service_pb2_grpc import add_FailedEventServiceServicer_to_server
from meshboard.analytics.v1.ingest_service_pb2 import IngestRequest, IngestStreamRequest
from meshboard.analytics.v1.ingest_service_pb2_grpc import add_IngestServiceServicer_to_server
from meshboard.analytics.v1.insight_service_pb2_grpc import add_InsightServiceServicer_to_server
from meshboard.analytics.v1.internal_query_service_pb2 import RunWidgetQueriesRequest
from meshboard.analytics.v1.internal_query_service_pb2_grpc import add_InternalQueryServiceServicer_to_server
from meshboard.analytics.v1.query_service_pb2 import RunQueryRequest
from meshboard.analytics.v1.query_service_pb2_grpc import add_QueryServiceServicer_to_server
from meshboard.analytics.v1.source_service_pb2_grpc import add_SourceServiceServicer_to_server
from meshboard.analytics.v1.write_key_service_pb2_grpc import add_WriteKeyServiceServicer_to_server
from meshboard.user.v1.events_pb2 import MemberRemoved, TeamDeleted, UserErasureRequested, WorkspaceDeleted
from meshboard.user.v1.internal_grant_service_pb2_grpc import add_InternalGrantServiceServicer_to_server

from services.analytics_svc import crash_points
from services.analytics_svc.catalogue import CatalogueServicer
from services.analytics_svc.cohorts import CohortServicer
from services.analytics_svc.compat import CompatServicer
from services.analytics_svc.consumers import on_workspace_deleted
from services.analytics_svc.event_log import EventLog, ensure_log
from services.analytics_svc.event_store import EventStore
from services.analytics_svc.failed_events import FailedEventServicer
from services.analytics_svc.geo import GeoDatabase
from services.analytics_svc.ingest import IngestServicer
from services.analytics_svc.insights import InsightServicer
from services.analytics_svc.queries import Limits, Queries, QueryServicer
from services.analytics_svc.quotas import Quotas
from services.analytics_svc.raw_events import EventServicer
from services.analytics_svc.rules import Rulebook
from services.analytics_svc.settings import AnalyticsSettings
from services.analytics_svc.sources import SOURCE, SourceServicer, grants_on_sources
from services.analytics_svc.summaries import Summaries
from services.analytics_svc.tables import create_tables
from services.analytics_svc.tails import Tails
from services.analytics_svc.user_agents import AgentFields
from services.analytics_svc.widget_queries import InternalQueryServicer
from services.analytics_svc.write_keys import WriteKeys, WriteKeyServicer
from services.chassis import auth, db, trust
from services.chassis.access import Access
from services.chassis.bus import Bus
from services.chassis.cache import Cache
from services.chassis.clients import Peer
from services.chassis.db import new_id
from services.chassis.erasures import erase_grants, erasing
from services.chassis.grants import InternalGrantServicer
from services.chassis.inbox import consume
from services.chassis.interceptor import warm_up
from services.chassis.outbox import Relay
from services.chassis.paging import Pages
from services.chassis.process import until_stopped
from services.chassis.rechecks import Span
from services.chassis.server import Server
from services.chassis.times import now


async def serve(settings: AnalyticsSettings) -> None:
    """Serves until the process is told to stop."""
    crash_points.arm(settings.crash_at)
    await db.migrate(settings.postgres_url, "services.analytics_svc")
    sessions = db.connect(settings.postgres_url, settings.postgres_pool_size)
    store = EventStore(settings.event_store_url, cluster=settings.event_store_cluster)
    await create_tables(store)
    bus = await Bus.connect(settings.nats_url, "analytics")
    await ensure_log(bus, settings.event_log_bytes)
    cache = await Cache.connect(settings.redis_url, bus, "analytics")
    tokens = auth.ServiceTokens("analytics", settings.keys_dir)
    auth_peer = Peer("auth", settings.auth_address, tokens)
    user_peer = Peer("user", settings.user_address, tokens)

    write_keys = WriteKeys(sessions, cache, now)
    quotas = Quotas(sessions, now)
    rights = await trust.follow_rights(bus, trust.rights_of(user_peer))
    revocations = await trust.follow_revocations(bus, *trust.sessions_of(auth_peer))
    access = Access(
        await trust.follow_keys(bus, settings.public_url, trust.keys_of(auth_peer)),
        tokens,
        revocations,
        rights,
        db=sessions,
        resources=[SOURCE],
        credentials={"write_key": write_keys.check},
    )

    pages = Pages(settings.derived_key("page tokens"))
    grants = grants_on_sources(sessions, user_peer, pages, now=now, new_id=new_id)
    sources = SourceServicer(sessions, write_keys, grants, pages, now=now, new_id=new_id)
    keys = WriteKeyServicer(sessions, write_keys, pages, now=now, new_id=new_id)
    log = EventLog(bus, now)
    ingest = IngestServicer(
        log,
        now,
        rulebook=Rulebook(settings.derived_key("pseudonyms")),
        quotas=quotas,
        agents=AgentFields(),
        geo=GeoDatabase(settings.geo_database) if settings.geo_database else None,
    )
    failed_events = FailedEventServicer(sessions, log, pages, now=now, new_id=new_id)
    internal_grants = InternalGrantServicer(sessions, [SOURCE], pages, now)
    limits = Limits(
        settings.query_seconds,
        settings.query_memory_bytes,
        settings.query_rows,
        settings.queries_per_workspace,
    )
    queries = Queries(sessions, store, now, limits)
    catalogue = CatalogueServicer(sessions, Summaries(queries), pages, now)
    tails = Tails(queries, per_workspace=settings.tails_per_workspace, at_most=settings.tails)
    await tails.listen(bus)
    events = EventServicer(
        queries,
        pages,
        tails,
        Span(settings.heartbeat_seconds, settings.watch_seconds),
        draining=lambda: server.draining.is_set(),  # noqa: PLW0108 - the server is made below
    )
    cohorts = CohortServicer(queries, pages, new_id=new_id)
    server = Server(
        settings,
        [
            lambda server: add_SourceServiceServicer_to_server(sources, server),
            lambda server: add_WriteKeyServiceServicer_to_server(keys, server),
            lambda server: add_IngestServiceServicer_to_server(ingest, server),
            lambda server: add_CompatServiceServicer_to_server(CompatServicer(ingest), server),
            lambda server: add_FailedEventServiceServicer_to_server(failed_events, server),
            lambda server: add_QueryServiceServicer_to_server(QueryServicer(queries), server),
            lambda server: add_EventServiceServicer_to_server(events, server),
            lambda server: add_InsightServiceServicer_to_server(InsightServicer(queries), server),
            lambda server: add_CohortServiceServicer_to_server(cohorts, server),
            lambda server: add_InternalQueryServiceServicer_to_server(InternalQueryServicer(queries), server),
            lambda server: add_CatalogueServiceServicer_to_server(catalogue, server),
            lambda server: add_InternalGrantServiceServicer_to_server(internal_grants, server),
        ],
        access,
        ready=[lambda: db.ready(sessions), store.ready],
    )
    warm_up(
        IngestRequest(),
        IngestStreamRequest(),
        SendBatchRequest(),
        SendTrackRequest(),
        RunQueryRequest(),
        RunWidgetQueriesRequest(),
        ListEventsRequest(),
        TailEventsRequest(),
    )
    try:
        await server.start()
        await until_stopped(
            Relay(settings.postgres_url, bus, "analytics").run(),
            write_keys.run(),
            quotas.run(),
            consume(
                bus,
                sessions,
                "analytics",
                {
                    MemberRemoved: grants.on_member_removed,
                    TeamDeleted: grants.on_team_deleted,
                    WorkspaceDeleted: partial(on_workspace_deleted, write_keys),
                    UserErasureRequested: erasing("analytics", erase_grants),
                },
            ),
        )
    finally:
        await server.stop()
        await auth_peer.close()
        await user_peer.close()
        await cache.close()
        await bus.close()
        await store.close()
        await db.engine(sessions).dispose()
