"""Postgres: connections, migrations, and the tables that every service has.

The tables are written twice on purpose: as SQL in `create_*`, frozen because old migrations call it, and as
mapped classes for the code. A test compares the two. A change to one of these tables is a new function that
each service calls from a new migration.
"""

import asyncio
import importlib.util
import itertools
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Protocol

import asyncpg
import structlog
from prometheus_client import Gauge
from sqlalchemy import (
    URL,
    BigInteger,
    CheckConstraint,
    Connection,
    DateTime,
    Engine,
    Identity,
    Index,
    LargeBinary,
    Text,
    UniqueConstraint,
    Uuid,
    event,
    exc,
    func,
    make_url,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, dialect
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_dbapi
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool, PoolProxiedConnection, QueuePool
from sqlalchemy.util import greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet
from uuid_utils.compat import uuid7

from services.chassis import telemetry

log = structlog.get_logger(__name__)

_pool_size = Gauge(
    "meshboard_postgres_pool_size",
    "Connections that the pool may open.",
    ["database"],
    multiprocess_mode="livesum",
)
_pool_open = Gauge(
    "meshboard_postgres_pool_open", "Connections that are open.", ["database"], multiprocess_mode="livesum"
)
_pool_used = Gauge(
    "meshboard_postgres_pool_used", "Connections in use.", ["database"], multiprocess_mode="livesum"
)

# Ids are strings in the contracts and uuid columns in Postgres; they are converted here, in the driver.
Id = Annotated[str, mapped_column(Uuid(as_uuid=False))]
Time = Annotated[datetime, mapped_column(DateTime(timezone=True))]

_DRIVER_ERRORS = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    AsyncAdapt_asyncpg_dbapi.Error,  # of a connection that is made for the pool
)
_DIALECT = dialect()  # type: ignore[no-untyped-call]

# "mesh" in ASCII: the advisory lock of whoever migrates this database.
_MIGRATION_LOCK = 0x6D657368


def new_id() -> str:
    """A new id: a UUIDv7, so that ids sort by the time of their making."""
    return str(uuid7())


class Executes(Protocol):
    """What the functions below need of `alembic.op`."""

    def execute(self, sql: str, /) -> None:
        """Runs one statement."""


class ChassisBase(DeclarativeBase):
    """Tables of the chassis, in every service's own database."""


class OutboxRow(ChassisBase):
    """A domain event, written in the transaction that it tells about."""

    __tablename__ = "outbox"
    __table_args__ = (
        Index("outbox_pending", "id", postgresql_where=text("publish_time IS NULL")),
        Index("outbox_published", "publish_time", postgresql_where=text("publish_time IS NOT NULL")),
    )

    id: Mapped[Id] = mapped_column(primary_key=True)
    subject: Mapped[str] = mapped_column(Text)
    payload: Mapped[bytes] = mapped_column(LargeBinary)
    headers: Mapped[dict[str, str]] = mapped_column(JSONB)
    create_time: Mapped[Time] = mapped_column(server_default=func.now())
    publish_time: Mapped[Time | None]


class InboxRow(ChassisBase):
    """A domain event whose effect is in this database."""

    __tablename__ = "inbox"
    __table_args__ = (Index("inbox_receive_time", "receive_time"),)

    consumer: Mapped[str] = mapped_column(Text, primary_key=True)
    event_id: Mapped[Id] = mapped_column(primary_key=True)
    receive_time: Mapped[Time] = mapped_column(server_default=func.now())


class GrantRow(ChassisBase):
    """A role given (or denied) to a subject on one resource; `subject_id` is absent for 'workspace'."""

    __tablename__ = "grants"
    __table_args__ = (
        UniqueConstraint(
            "workspace_id",
            "resource_type",
            "resource_id",
            "subject_type",
            "subject_id",
            "role",
            name="grants_subject_once",
            postgresql_nulls_not_distinct=True,
        ),
        UniqueConstraint(
            "workspace_id",
            "resource_type",
            "resource_id",
            "creator_id",
            "request_id",
            name="grants_request_once",
        ),
        CheckConstraint("subject_type IN ('user', 'team', 'workspace')", name="grants_subject_type"),
        CheckConstraint("(subject_type = 'workspace') = (subject_id IS NULL)", name="grants_subject_id"),
        CheckConstraint("effect IN ('ALLOW', 'DENY')", name="grants_effect"),
        # Lookups by resource use the unique constraint's index.
        Index(
            "grants_of_subject", "workspace_id", "subject_type", "subject_id", "resource_type", "resource_id"
        ),
    )

    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    grant_id: Mapped[Id] = mapped_column(primary_key=True)
    resource_type: Mapped[str] = mapped_column(Text)
    resource_id: Mapped[Id]
    subject_type: Mapped[str] = mapped_column(Text)
    subject_id: Mapped[Id | None]
    role: Mapped[str] = mapped_column(Text)
    effect: Mapped[str] = mapped_column(Text)
    expire_time: Mapped[Time | None]
    creator_id: Mapped[Id]
    request_id: Mapped[str | None] = mapped_column(Text)
    create_time: Mapped[Time] = mapped_column(server_default=func.now())


class SearchQueueRow(ChassisBase):
    """A document whose row has changed, or is gone: triggers on the tables of the owner add it (see `indexing`)."""

    __tablename__ = "search_queue"

    queue_id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    index_name: Mapped[str] = mapped_column(Text)
    workspace_id: Mapped[Id]
    document_id: Mapped[Id]


class SearchIndexRow(ChassisBase):
    """Which generation of an index is searched, in which engine, and which one is being built beside it."""

    __tablename__ = "search_indexes"

    index_name: Mapped[str] = mapped_column(Text, primary_key=True)
    engine: Mapped[str] = mapped_column(Text)
    generation: Mapped[int | None] = mapped_column(BigInteger)
    next_generation: Mapped[int | None] = mapped_column(BigInteger)


class SearchDocumentRow(ChassisBase):
    """A document in the search engine that is Postgres; with a `gone_time` it only keeps older ones from coming back.

    `texts` are the words of each field, in the order of the index; `words` all of them.
    """

    __tablename__ = "search_documents"
    __table_args__ = (
        Index(
            "search_documents_words",
            "words",
            postgresql_using="gin",
            postgresql_ops={"words": "gin_trgm_ops"},
        ),
        Index("search_documents_gone", "gone_time", postgresql_where=text("gone_time IS NOT NULL")),
    )

    index_name: Mapped[str] = mapped_column(Text, primary_key=True)
    generation: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    document_id: Mapped[Id] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(BigInteger)
    parent_id: Mapped[Id | None]
    texts: Mapped[list[str]] = mapped_column(ARRAY(Text))
    words: Mapped[str] = mapped_column(Text)
    gone_time: Mapped[Time | None]


def create_outbox(op: Executes) -> None:
    """Creates the outbox and the trigger that wakes the relay at commit."""
    op.execute("""
        CREATE TABLE outbox (
            id uuid PRIMARY KEY,
            subject text NOT NULL,
            payload bytea NOT NULL,
            headers jsonb NOT NULL,
            create_time timestamptz NOT NULL DEFAULT now(),
            publish_time timestamptz
        )
    """)
    op.execute("CREATE INDEX outbox_pending ON outbox (id) WHERE publish_time IS NULL")
    op.execute("CREATE INDEX outbox_published ON outbox (publish_time) WHERE publish_time IS NOT NULL")
    op.execute("""
        CREATE FUNCTION outbox_notify() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_notify('outbox', ''); RETURN NULL; END $$
    """)
    op.execute("""
        CREATE TRIGGER outbox_notify AFTER INSERT ON outbox
        FOR EACH STATEMENT EXECUTE FUNCTION outbox_notify()
    """)


def create_inbox(op: Executes) -> None:
    """Creates the inbox."""
    op.execute("""
        CREATE TABLE inbox (
            consumer text NOT NULL,
            event_id uuid NOT NULL,
            receive_time timestamptz NOT NULL DEFAULT now(),
            PRIMARY KEY (consumer, event_id)
        )
    """)
    op.execute("CREATE INDEX inbox_receive_time ON inbox (receive_time)")


def create_grants(op: Executes) -> None:
    """Creates the grants on this service's resources."""
    op.execute("""
        CREATE TABLE grants (
            workspace_id uuid NOT NULL,
            grant_id uuid NOT NULL,
            resource_type text NOT NULL,
            resource_id uuid NOT NULL,
            subject_type text NOT NULL,
            subject_id uuid,
            role text NOT NULL,
            effect text NOT NULL,
            expire_time timestamptz,
            creator_id uuid NOT NULL,
            request_id text,
            create_time timestamptz NOT NULL DEFAULT now(),
            PRIMARY KEY (workspace_id, grant_id),
            CONSTRAINT grants_subject_type CHECK (subject_type IN ('user', 'team', 'workspace')),
            CONSTRAINT grants_subject_id CHECK ((subject_type = 'workspace') = (subject_id IS NULL)),
            CONSTRAINT grants_effect CHECK (effect IN ('ALLOW', 'DENY')),
            CONSTRAINT grants_subject_once UNIQUE NULLS NOT DISTINCT
                (workspace_id, resource_type, resource_id, subject_type, subject_id, role),
            CONSTRAINT grants_request_once UNIQUE
                (workspace_id, resource_type, resource_id, creator_id, request_id)
        )
    """)
    op.execute("""
        CREATE INDEX grants_by_subject ON grants (workspace_id, subject_type, subject_id, resource_type)
    """)


def order_grants_of_subjects(op: Executes) -> None:
    """Has the index on the grants of a subject go on by resource. To be called outside of a transaction."""
    op.execute("DROP INDEX CONCURRENTLY IF EXISTS grants_of_subject")  # left by an attempt that was ended
    op.execute("""
        CREATE INDEX CONCURRENTLY grants_of_subject
        ON grants (workspace_id, subject_type, subject_id, resource_type, resource_id)
    """)
    op.execute("DROP INDEX CONCURRENTLY IF EXISTS grants_by_subject")


def create_search(op: Executes) -> None:
    """Creates the queue of what has to be indexed, with the trigger that wakes the indexer, and the documents."""
    op.execute("""
        CREATE TABLE search_queue (
            queue_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            index_name text NOT NULL,
            workspace_id uuid NOT NULL,
            document_id uuid NOT NULL
        )
    """)
    op.execute("""
        CREATE FUNCTION search_queue_notify() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_notify('search_queue', ''); RETURN NULL; END $$
    """)
    op.execute("""
        CREATE TRIGGER search_queue_notify AFTER INSERT ON search_queue
        FOR EACH STATEMENT EXECUTE FUNCTION search_queue_notify()
    """)
    op.execute("CREATE SEQUENCE search_versions")
    op.execute("""
        CREATE TABLE search_indexes (
            index_name text PRIMARY KEY,
            engine text NOT NULL,
            generation bigint,
            next_generation bigint
        )
    """)
    op.execute("""
        CREATE TABLE search_documents (
            index_name text NOT NULL,
            generation bigint NOT NULL,
            workspace_id uuid NOT NULL,
            document_id uuid NOT NULL,
            version bigint NOT NULL,
            parent_id uuid,
            texts text[] NOT NULL,
            words text NOT NULL,
            gone_time timestamptz,
            PRIMARY KEY (index_name, generation, workspace_id, document_id)
        )
    """)
    op.execute("CREATE INDEX search_documents_words ON search_documents USING gin (words gin_trgm_ops)")
    op.execute(
        "CREATE INDEX search_documents_gone ON search_documents (gone_time) WHERE gone_time IS NOT NULL"
    )


def create_chassis_tables(op: Executes) -> None:
    """Creates outbox, inbox and grants: for the first migration of a service that owns resources."""
    create_outbox(op)
    create_inbox(op)
    create_grants(op)


def connect(
    url: str, pool_size: int = 10, *, statement_timeout_seconds: float = 10
) -> async_sessionmaker[AsyncSession]:
    """Makes a pool of at most `pool_size` connections; the first is opened when it is needed.

    `url` is `postgresql://user:password@host/database`, with `?host=/directory` for a unix socket. Use as
    `async with db.begin() as session`. A statement that runs longer is ended by Postgres, a transaction
    that idles for 30 s too. Waiting for a free connection ends with `sqlalchemy.exc.TimeoutError` after 5 s.
    """
    engine = create_async_engine(
        _driver_url(url),
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=5,
        pool_recycle=3600,
        pool_use_lifo=True,
        # Parameters are people's data and secrets: they stay out of errors and logs.
        hide_parameters=True,
        connect_args=_connect_args(url, statement_timeout_seconds),
    )
    event.listen(engine.sync_engine, "checkout", _refuse_closed)
    event.listen(engine.sync_engine, "do_connect", _refuse_to_wait)
    _measure(engine)
    telemetry.trace_statements(engine.sync_engine)
    return async_sessionmaker(engine, expire_on_commit=False)


def engine(db: async_sessionmaker[AsyncSession]) -> AsyncEngine:
    """The engine under `db`: for pool metrics, and to `dispose()` of it at the end."""
    bound = db.kw["bind"]
    assert isinstance(bound, AsyncEngine)
    return bound


async def lock(session: AsyncSession, number: int, workspace_id: str) -> None:
    """Has whoever asks for this lock of the workspace as well wait for the end of the transaction."""
    await session.execute(select(func.pg_advisory_xact_lock(number, func.hashtext(workspace_id))))


async def fetch_at_once(db: async_sessionmaker[AsyncSession], sql: str, *arguments: object) -> Sequence[Any]:
    """The rows that one statement gives. It is a transaction by itself, and goes to asyncpg as it is (`$1`).

    For the few statements that are on the way of very many calls: it costs a third of what a session does. Raises
    ConnectionError while Postgres is away.
    """
    with telemetry.span(f"sql {sql.split(None, 1)[0]}", "CLIENT", sql=sql):
        async with driver_connection(db) as connection:
            rows: Sequence[Any] = await connection.fetch(sql, *arguments)
        return rows


@asynccontextmanager
async def driver_connection(db: async_sessionmaker[AsyncSession]) -> AsyncIterator[asyncpg.Connection]:
    """A connection of the pool as asyncpg has it, for statements that the ORM would make slow.

    Raises ConnectionError while Postgres is away.
    """
    try:
        # Of the pool itself: the engine's connection, which can begin transactions, costs more than the statement.
        pooled = await _take(engine(db).sync_engine)
        try:
            yield pooled.driver_connection
        finally:
            pooled.close()  # asyncpg ends its transactions itself: nothing is waited for
    except asyncpg.CharacterNotInRepertoireError:
        raise
    except _DRIVER_ERRORS as error:
        # No other input makes such a statement fail: it is the database's trouble, and passes. So does a connection
        # that Postgres refuses.
        raise ConnectionError("the database cannot do it now") from error


async def _take(pool_of: Engine) -> PoolProxiedConnection:
    """A connection of the pool. One that is idle is taken at once: to switch greenlets costs more than a statement."""
    assert isinstance(pool_of.pool, QueuePool)
    if pool_of.pool.checkedin():
        try:
            return pool_of.raw_connection()
        except exc.MissingGreenlet:  # it was closed meanwhile, or is too old: another one is to be made
            pass
    return await greenlet_spawn(pool_of.raw_connection)


class Adds(Protocol):
    """Where new rows go: a session, or `Rows`."""

    def add(self, row: Any, /) -> None:
        """Takes a row."""


class Rows:
    """New rows that go to Postgres with little ado: for what happens very often, or for many rows at once."""

    def __init__(self) -> None:
        self._rows: list[DeclarativeBase] = []

    def add(self, row: DeclarativeBase, /) -> None:
        """Takes a row; what is not set in it gets the default of its column."""
        self._rows.append(row)

    async def insert(self, connection: asyncpg.Connection) -> None:
        """Inserts the rows on a `driver_connection`, those of a table by one statement.

        Rows of a table have the same columns set, and no arrays.
        """
        by_table: dict[type[DeclarativeBase], list[dict[str, Any]]] = {}
        for row in self._rows:
            by_table.setdefault(type(row), []).append(_columns(row))
        for table, rows in by_table.items():
            columns = [[_value(row[name]) for row in rows] for name in rows[0]]
            await connection.execute(_insert_all(table, tuple(rows[0])), *columns)

    async def insert_if(
        self, db: async_sessionmaker[AsyncSession], condition: str, *arguments: object
    ) -> bool | None:
        """Inserts the rows if the one row that `condition` gives says true in its one column; gives what it says.

        None when it gives no row. It may be an UPDATE with RETURNING: the rows are then inserted under its lock. All is
        one statement, as by `fetch_at_once`.
        """
        shapes, values = [], list(arguments)
        for row in self._rows:
            columns = _columns(row)
            shapes.append((row.__tablename__, tuple(columns)))
            values += map(_value, columns.values())
        found = await fetch_at_once(db, _insert_if(condition, len(arguments), tuple(shapes)), *values)
        return found[0][0] if found else None


def _columns(row: DeclarativeBase) -> dict[str, Any]:
    return {name: value for name, value in vars(row).items() if not name.startswith("_")}


def _value(value: object) -> object:
    """As the driver wants it, in which SQLAlchemy has JSON pass as text."""
    return json.dumps(value) if isinstance(value, dict) else value


@lru_cache(maxsize=64)
def _insert_all(table: type[DeclarativeBase], columns: tuple[str, ...]) -> str:
    types = [table.__table__.c[name].type.compile(_DIALECT) for name in columns]
    arrays = ", ".join(f"${number}::{kind}[]" for number, kind in enumerate(types, 1))
    return f"INSERT INTO {table.__tablename__} ({', '.join(columns)}) SELECT * FROM unnest({arrays})"  # noqa: S608 - ours


@lru_cache(maxsize=64)
def _insert_if(condition: str, arguments: int, shapes: tuple[tuple[str, tuple[str, ...]], ...]) -> str:
    numbers = itertools.count(arguments + 1)
    inserts: list[str] = []
    for table, columns in shapes:
        values = ", ".join(f"${next(numbers)}" for _ in columns)
        insert = f"INSERT INTO {table} ({', '.join(columns)}) SELECT {values} FROM condition WHERE said"  # noqa: S608 - ours
        inserts.append(f"insert_{len(inserts)} AS ({insert})")
    return f"WITH condition (said) AS ({condition}), {', '.join(inserts)} SELECT said FROM condition"  # noqa: S608


async def ready(db: async_sessionmaker[AsyncSession], timeout: float = 2) -> bool:
    """Whether Postgres answers within `timeout` seconds."""
    try:
        async with asyncio.timeout(timeout), db() as session:
            await session.execute(text("SELECT 1"))
    except (OSError, TimeoutError, exc.SQLAlchemyError) as error:
        log.warning("postgres_not_ready", error=str(error))
        return False
    return True


def is_away(failure: BaseException) -> bool:
    """Whether a failure says that Postgres cannot be reached, starts, stops, is full or is busy: a retry may help."""
    match failure:
        case ConnectionError() | FileNotFoundError():  # nobody listens, or there is no such unix socket
            return True
        case exc.InterfaceError() | exc.OperationalError() | exc.TimeoutError():
            return True
        case exc.DBAPIError():
            # Classes of https://www.postgresql.org/docs/current/errcodes-appendix.html. An InternalError without a
            # state is asyncpg's, of a connection that broke in the middle of an answer.
            state = getattr(failure.orig, "sqlstate", None) or ""
            broken = isinstance(failure, exc.InternalError) and not state
            passes = state[:2] in {"08", "40", "53", "57"} or state == "55P03"
            return failure.connection_invalidated or broken or passes
    return False


async def migrate(url: str, package: str, *, timeout: float = 120) -> None:
    """Brings the database to the newest revision in `migrations/versions` of `package` ("services.user_svc").

    Any number of replicas may call it at once: one migrates, the others wait for it, up to `timeout` seconds
    (TimeoutError); a Postgres that is away is tried again for as long. A database that is ahead of this code is
    left alone, because during a roll-out the old code starts after the new one has migrated.
    """
    folder = _folder(package) / "migrations"
    migrations = create_async_engine(
        _driver_url(url), poolclass=NullPool, hide_parameters=True, connect_args=_connect_args(url, 0)
    )
    try:
        deadline = time.monotonic() + timeout
        while not await _migrate(migrations, folder, timeout):
            if time.monotonic() > deadline:
                raise TimeoutError(f"Postgres did not answer for {timeout:.0f} s")
            await asyncio.sleep(0.5)
    finally:
        await migrations.dispose()


async def _migrate(engine: AsyncEngine, folder: Path, timeout: float) -> bool:
    """Says whether Postgres was there to be migrated."""
    try:
        async with engine.connect() as connection:
            if await _revision(connection) != _newest_revision(folder):
                async with _migration_lock(connection, timeout):
                    await connection.run_sync(_upgrade, folder)
    except (OSError, exc.SQLAlchemyError) as error:
        if not is_away(error):
            raise
        log.warning("migration_waits_for_postgres", error=str(error))
        return False
    return True


async def _revision(connection: AsyncConnection) -> str | None:
    begun = await connection.scalar(text("SELECT to_regclass('alembic_version') IS NOT NULL"))
    revision = (
        await connection.scalar(text("SELECT max(version_num) FROM alembic_version")) if begun else None
    )
    await connection.rollback()
    return revision


def _newest_revision(folder: Path) -> str:
    """Files are named by their revision, as in `0005_sessions_in_order.py`."""
    return max(path.name.partition("_")[0] for path in folder.glob("versions/[0-9]*.py"))


def _upgrade(connection: Connection, folder: Path) -> None:
    # Imported only when there is something to do: it takes 10 MB of each process for as long as that lives.
    from alembic.operations import Operations  # noqa: PLC0415
    from alembic.runtime.migration import MigrationContext  # noqa: PLC0415
    from alembic.script import ScriptDirectory  # noqa: PLC0415

    scripts = ScriptDirectory(str(folder))
    context = MigrationContext.configure(
        connection,
        opts={
            "fn": lambda heads, _: scripts._upgrade_revs("head", heads),
            "transaction_per_migration": True,
        },
    )
    known = {script.revision for script in scripts.walk_revisions()}
    if not known.issuperset(context.get_current_heads()):
        log.warning("database_ahead_of_code", heads=context.get_current_heads())
        connection.rollback()
        return
    connection.rollback()  # the look at the revision began a transaction; each migration has its own
    with Operations.context(context):
        context.run_migrations()
    connection.commit()


@asynccontextmanager
async def _migration_lock(connection: AsyncConnection, timeout: float) -> AsyncIterator[None]:
    # Tried again and again, instead of waiting inside Postgres: a statement that waits holds a snapshot, and
    # CREATE INDEX CONCURRENTLY in the migration would wait for that snapshot, for ever.
    async with asyncio.timeout(timeout):
        while not await _try_lock(connection):  # noqa: ASYNC110 - the holder is in another process
            await asyncio.sleep(0.1)
    try:
        yield
    finally:
        await connection.rollback()
        await connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": _MIGRATION_LOCK})
        await connection.commit()


async def _try_lock(connection: AsyncConnection) -> bool:
    taken = await connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": _MIGRATION_LOCK})
    await connection.commit()  # the lock belongs to the connection, not to the transaction
    return bool(taken)


def _driver_url(url: str) -> URL:
    return make_url(url).set(drivername="postgresql+asyncpg")


def _connect_args(url: str, statement_timeout_seconds: float) -> dict[str, Any]:
    return {
        "timeout": 5,
        "server_settings": {
            "application_name": f"meshboard {make_url(url).database}",
            "statement_timeout": str(int(statement_timeout_seconds * 1000)),
            "lock_timeout": "5000",
            "idle_in_transaction_session_timeout": "30000",
            "jit": "off",  # compiling costs more than these short queries take
        },
    }


def _refuse_closed(dbapi_connection: Any, _record: object, _proxy: object) -> None:
    # After a restart of Postgres asyncpg knows that its connections are gone. To look costs nothing, unlike
    # pool_pre_ping's round trip, and a new connection takes the place before any statement fails.
    if dbapi_connection.driver_connection.is_closed():
        raise exc.InvalidatePoolError


def _refuse_to_wait(*_arguments: object) -> None:
    # Before there is a coroutine that nobody would wait for: see _take.
    if not in_greenlet():
        raise exc.MissingGreenlet


def _measure(pool_of: AsyncEngine) -> None:
    pool = pool_of.sync_engine.pool
    assert isinstance(pool, QueuePool)
    database = pool_of.url.database or ""
    _pool_size.labels(database).set(pool.size())
    used, opened = _pool_used.labels(database), _pool_open.labels(database)

    def count(leaving: int) -> None:
        used.set(pool.checkedout() - leaving)
        opened.set(pool.checkedin() + pool.checkedout())

    event.listen(pool, "checkout", lambda *_: count(0))
    event.listen(pool, "checkin", lambda *_: count(1))  # told before the connection is back


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{package} is not a package")
    return Path(spec.submodule_search_locations[0])
