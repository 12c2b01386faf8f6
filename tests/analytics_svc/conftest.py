"""The event store as its own process, as in the mesh, and analytics_svc's servicers and pipeline in front of it."""

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from google.protobuf.json_format import MessageToDict, ParseDict
from meshboard.analytics.v1.catalogue_service_pb2_grpc import (
    CatalogueServiceStub,
    add_CatalogueServiceServicer_to_server,
)
from meshboard.analytics.v1.cohort_service_pb2_grpc import (
    CohortServiceStub,
    add_CohortServiceServicer_to_server,
)
from meshboard.analytics.v1.compat_service_pb2_grpc import (
    CompatServiceStub,
    add_CompatServiceServicer_to_server,
)
from meshboard.analytics.v1.event_log_pb2 import LoggedBatch
from meshboard.analytics.v1.event_service_pb2_grpc import (
    EventServiceStub,
    add_EventServiceServicer_to_server,
)
from meshboard.analytics.v1.failed_event_service_pb2_grpc import (
    FailedEventServiceStub,
    add_FailedEventServiceServicer_to_server,
)
from meshboard.analytics.v1.ingest_service_pb2 import IngestRequest, IngestResponse
from meshboard.analytics.v1.ingest_service_pb2_grpc import (
    IngestServiceStub,
    add_IngestServiceServicer_to_server,
)
from meshboard.analytics.v1.insight_service_pb2_grpc import (
    InsightServiceStub,
    add_InsightServiceServicer_to_server,
)
from meshboard.analytics.v1.internal_query_service_pb2_grpc import (
    InternalQueryServiceStub,
    add_InternalQueryServiceServicer_to_server,
)
from meshboard.analytics.v1.query_pb2 import Query
from meshboard.analytics.v1.query_service_pb2 import RunQueryRequest
from meshboard.analytics.v1.query_service_pb2_grpc import QueryServiceStub, add_QueryServiceServicer_to_server
from meshboard.analytics.v1.source_pb2 import Source as SourceMessage
from meshboard.analytics.v1.source_service_pb2 import CreateSourceRequest
from meshboard.analytics.v1.source_service_pb2_grpc import (
    SourceServiceStub,
    add_SourceServiceServicer_to_server,
)
from meshboard.analytics.v1.write_key_service_pb2_grpc import (
    WriteKeyServiceStub,
    add_WriteKeyServiceServicer_to_server,
)
from meshboard.user.v1.internal_user_service_pb2 import CheckSubjectsRequest, CheckSubjectsResponse
from meshboard.user.v1.internal_user_service_pb2_grpc import (
    InternalUserServiceServicer,
    add_InternalUserServiceServicer_to_server,
)
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.analytics_svc.catalogue import CatalogueServicer
from services.analytics_svc.cohorts import CohortServicer
from services.analytics_svc.compat import CompatServicer
from services.analytics_svc.event_log import EventLog, ensure_log
from services.analytics_svc.event_store import EventStore
from services.analytics_svc.failed_events import FailedEventServicer
from services.analytics_svc.ingest import IngestServicer
from services.analytics_svc.insights import InsightServicer
from services.analytics_svc.pipeline import Pipeline, enrich
from services.analytics_svc.queries import Queries, QueryServicer
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
from services.analytics_svc.write_keys import HEADER, WriteKeys, WriteKeyServicer
from services.chassis import auth
from services.chassis import db as chassis_db
from services.chassis.bus import Bus
from services.chassis.cache import Cache
from services.chassis.clients import Peer
from services.chassis.paging import Pages
from services.chassis.rechecks import Span
from tests.conditions import eventually
from tests.harness import Identity, Member, make_settings, new_id, serving
from tests.parts import Parts, free_port

LOG_BYTES = 1 << 30


class StoreProcess:
    """`python -m services.analytics_svc --role store` over a directory of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"http+unix://{folder}/store.sock"
        self.port = free_port()
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, **settings: str) -> None:
        """Starts the process and waits until it answers."""
        placeholders = ("REDIS_URL", "NATS_URL", "LISTEN", "KEYS_DIR", "MASTER_KEY_FILE")
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.analytics_svc",
            "--role",
            "store",
            env={
                **os.environ,
                **{f"MESHBOARD_{name}": "unused" for name in placeholders},
                "MESHBOARD_EVENT_STORE_URL": self.url,
                "MESHBOARD_STORE_DIR": str(self.folder / "data"),
                "MESHBOARD_PRIVATE_LISTEN": f"127.0.0.1:{self.port}",
                **settings,
            },
        )
        store = EventStore(self.url)
        async with asyncio.timeout(30):
            while not await store.ready():
                assert self._process.returncode is None, "the store ended by itself"
                await asyncio.sleep(0.05)
        await store.close()

    async def ended(self) -> None:
        """Returns when the process has ended by itself."""
        assert self._process is not None
        await self._process.wait()

    async def kill(self) -> None:
        """Ends the process at once, as kill -9 does."""
        assert self._process is not None
        self._process.kill()
        await self._process.wait()

    async def stop(self) -> int:
        """Ends the process as `down` does, and gives its exit code."""
        assert self._process is not None
        if self._process.returncode is None:
            self._process.terminate()
        async with asyncio.timeout(10):
            return await self._process.wait()


@asynccontextmanager
async def running_store() -> AsyncIterator[StoreProcess]:
    """A store of its own for a test that does harm to it."""
    # Paths of unix sockets are short: pytest's own folders are not.
    with tempfile.TemporaryDirectory(prefix="mbs") as folder:
        process = StoreProcess(Path(folder))
        await process.start()
        try:
            yield process
        finally:
            await process.stop()


@pytest.fixture(scope="session")
async def store_process() -> AsyncIterator[StoreProcess]:
    async with running_store() as process:
        yield process


@pytest.fixture(scope="session")
async def store(store_process: StoreProcess) -> AsyncIterator[EventStore]:
    """A client of a store that all tests share, with its tables: each test uses a workspace of its own."""
    client = EventStore(store_process.url)
    await create_tables(client)
    yield client
    await client.close()


class StandInUsers(InternalUserServiceServicer):
    """Stands in for user_svc: knows who belongs to a workspace."""

    def __init__(self) -> None:
        self.subjects: set[tuple[str, str]] = set()

    async def CheckSubjects(self, request: CheckSubjectsRequest, context: object) -> CheckSubjectsResponse:
        def known(ids: Iterable[str]) -> list[str]:
            return [one for one in ids if (request.workspace_id, one) in self.subjects]

        return CheckSubjectsResponse(user_ids=known(request.user_ids), team_ids=known(request.team_ids))


@dataclass
class Analytics:
    """A running analytics_svc with its pipeline, and what stands around it."""

    identity: Identity
    users: StandInUsers
    db: async_sessionmaker[AsyncSession]
    bus: Bus
    store: EventStore
    channel: grpc.aio.Channel
    sources: SourceServiceStub
    keys: WriteKeyServiceStub
    write_keys: WriteKeys
    quotas: Quotas
    ingester: IngestServicer
    ingest: IngestServiceStub
    compat: CompatServiceStub
    queries: QueryServiceStub
    events: EventServiceStub
    insights: InsightServiceStub
    cohorts: CohortServiceStub
    internal: InternalQueryServiceStub
    catalogue: CatalogueServiceStub
    failed_events: FailedEventServiceStub

    async def source(self, member: Member) -> tuple[SourceMessage, str]:
        """A new source of the member, and its write key."""
        made = await self.sources.CreateSource(CreateSourceRequest(title="Shop"), metadata=member.metadata)
        return made.source, made.write_key

    async def send(self, write_key: str, events: list[dict[str, Any]]) -> IngestResponse:
        """Sends events, written as JSON has them; what is left out is made up."""
        request = IngestRequest()
        ParseDict({"events": [{"event": "view", "distinctId": "ada", **event} for event in events]}, request)
        response: IngestResponse = await self.ingest.Ingest(request, metadata=((HEADER, write_key),))
        return response

    async def ask(self, member: Member, source: SourceMessage, **query: Any) -> dict[str, Any]:
        """The result of a query, written as JSON has it."""
        message = ParseDict({"sourceIds": [source.source_id], **query}, Query())
        answer = await self.queries.RunQuery(RunQueryRequest(query=message), metadata=member.metadata)
        return MessageToDict(answer.result, always_print_fields_with_no_presence=True)

    async def count(self, member: Member, source: SourceMessage) -> int:
        """How many events of the source are in the store."""
        return int((await self.ask(member, source))["rows"][0][0])

    async def until_count(self, member: Member, source: SourceMessage, count: int) -> None:
        """Returns when so many events are visible; fails when there are more, or not so many within 20 s."""

        async def visible() -> bool:
            return await self.count(member, source) >= count

        await eventually(visible)
        assert await self.count(member, source) == count


def enrich_but_poison(batch: LoggedBatch) -> None:
    """What the pipeline does by itself, with a fault: it chokes on an event named `indigestible`."""
    for event in batch.events:
        if event.event == "indigestible":
            raise RuntimeError(f"cannot swallow {event.insert_id}\0")
    enrich(batch)


@asynccontextmanager
async def running_pipeline(
    database_url: str,
    nats_url: str,
    store_url: str,
    *,
    deduplicate: bool = True,
    max_log_bytes: int = LOG_BYTES,
) -> AsyncIterator[None]:
    """A pipeline with connections of its own; it must not end by itself."""
    db = chassis_db.connect(database_url)
    store = EventStore(store_url)
    bus = await Bus.connect(nats_url, "pipeline")
    pipeline = Pipeline(
        db,
        bus,
        store,
        lambda: datetime.now(UTC),
        max_log_bytes=max_log_bytes,
        enriching=enrich_but_poison,
        deduplicate=deduplicate,
    )
    running = asyncio.create_task(pipeline.run())
    try:
        yield
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        await bus.close()
        await store.close()
        await chassis_db.engine(db).dispose()


@pytest.fixture(scope="session")
async def database_url(parts: Parts) -> str:
    url = await parts.fresh_database("analytics")
    await chassis_db.migrate(url, "services.analytics_svc")
    return url


@pytest.fixture(scope="session")
async def analytics(
    parts: Parts, identity: Identity, database_url: str, store_process: StoreProcess, store: EventStore
) -> AsyncIterator[Analytics]:
    settings = make_settings(
        AnalyticsSettings, parts, identity.keys, database_url, event_store_url=store_process.url
    )
    db = chassis_db.connect(database_url)
    bus = await Bus.connect(parts.nats_url, "test")
    await ensure_log(bus, LOG_BYTES)
    cache = await Cache.connect(parts.redis_url, bus, "analytics")
    users = StandInUsers()
    user_server = grpc.aio.server()
    add_InternalUserServiceServicer_to_server(users, user_server)
    port = user_server.add_insecure_port("127.0.0.1:0")
    await user_server.start()
    user_peer = Peer("user", f"127.0.0.1:{port}", auth.ServiceTokens("analytics", identity.keys))

    def now() -> datetime:
        return datetime.now(UTC)

    write_keys = WriteKeys(db, cache, now)
    quotas = Quotas(db, now)
    pages = Pages(settings.derived_key("page tokens"))
    grants = grants_on_sources(db, user_peer, pages, now=now, new_id=new_id)
    sources = SourceServicer(db, write_keys, grants, pages, now=now, new_id=new_id)
    keys = WriteKeyServicer(db, write_keys, pages, now=now, new_id=new_id)
    log = EventLog(bus, now)
    ingest = IngestServicer(
        log,
        now,
        rulebook=Rulebook(settings.derived_key("pseudonyms")),
        quotas=quotas,
        agents=AgentFields(new_at_once=1),
    )
    failed_events = FailedEventServicer(db, log, pages, now=now, new_id=new_id)
    queries = Queries(db, store, now)
    catalogue = CatalogueServicer(db, Summaries(queries), pages, now)
    tails = Tails(queries, per_workspace=5, at_most=50)
    await tails.listen(bus)
    events = EventServicer(queries, pages, tails, Span(0.2, 600.0), lambda: False)
    cohorts = CohortServicer(queries, pages, new_id=new_id)
    registrations = [
        lambda server: add_SourceServiceServicer_to_server(sources, server),
        lambda server: add_WriteKeyServiceServicer_to_server(keys, server),
        lambda server: add_IngestServiceServicer_to_server(ingest, server),
        lambda server: add_CompatServiceServicer_to_server(CompatServicer(ingest), server),
        lambda server: add_QueryServiceServicer_to_server(QueryServicer(queries), server),
        lambda server: add_EventServiceServicer_to_server(events, server),
        lambda server: add_InsightServiceServicer_to_server(InsightServicer(queries), server),
        lambda server: add_CohortServiceServicer_to_server(cohorts, server),
        lambda server: add_InternalQueryServiceServicer_to_server(InternalQueryServicer(queries), server),
        lambda server: add_CatalogueServiceServicer_to_server(catalogue, server),
        lambda server: add_FailedEventServiceServicer_to_server(failed_events, server),
    ]
    access = identity.access(
        "analytics",
        db=db,
        resources=[SOURCE],
        credentials={"write_key": write_keys.check},
    )
    async with (
        serving(settings, registrations, access) as (channel, _),
        running_pipeline(database_url, parts.nats_url, store_process.url),
    ):
        yield Analytics(
            identity=identity,
            users=users,
            db=db,
            bus=bus,
            store=store,
            channel=channel,
            sources=SourceServiceStub(channel),
            keys=WriteKeyServiceStub(channel),
            write_keys=write_keys,
            quotas=quotas,
            ingester=ingest,
            ingest=IngestServiceStub(channel),
            compat=CompatServiceStub(channel),
            queries=QueryServiceStub(channel),
            events=EventServiceStub(channel),
            insights=InsightServiceStub(channel),
            cohorts=CohortServiceStub(channel),
            internal=InternalQueryServiceStub(channel),
            catalogue=CatalogueServiceStub(channel),
            failed_events=FailedEventServiceStub(channel),
        )
    await user_peer.close()
    await user_server.stop(None)
    await cache.close()
    await bus.close()
    await chassis_db.engine(db).dispose()
