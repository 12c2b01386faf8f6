"""The embedded event store: one chDB directory behind ClickHouse's HTTP protocol.

chDB (ClickHouse as a library) allows one process per directory, so this process owns it and every other one speaks
HTTP to it, exactly as to a ClickHouse server. Of the protocol there is: `POST /` and `GET /` with `query`, any FORMAT,
`param_<name>` for `{name:Type}`, every other parameter as a setting, the body as the query or as the data of an INSERT
(also of `INSERT … SELECT … FROM input('…')`); `GET /ping`. An error is a 500 with `X-ClickHouse-Exception-Code` and
ClickHouse's text. There are no sessions: every request has a connection of its own.
"""

import asyncio
import os
import re
import tempfile
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import structlog
from aiohttp import web
from chdb.state.sqlitelike import Connection
from prometheus_client import Histogram

from services.analytics_svc import crash_points
from services.analytics_svc.settings import AnalyticsSettings
from services.chassis import telemetry
from services.chassis.process import private_http, until_stopped

log = structlog.get_logger(__name__)

READERS = 4
# Merges can wait, and inserts and queries have someone who waits for them. Not the last of the scale: where processors
# are busy for long, merges still have a quarter of what another thread has, and parts do not pile up.
MERGE_NICENESS = 5
MAX_BODY_BYTES = 256 << 20
# Statements under way get this long when the process is told to stop.
STOP_SECONDS = 3.0
MAX_URL_BYTES = 1 << 20  # as in ClickHouse: bound parameters are part of it

_seconds = Histogram("meshboard_store_seconds", "Seconds of statements, waiting included.", ["kind"])

_READS = re.compile(r"\s*(SELECT|WITH|SHOW|DESCRIBE|DESC|EXISTS|EXPLAIN)\b", re.IGNORECASE)
_INSERT = re.compile(r"\s*INSERT\s+INTO\b", re.IGNORECASE)
_FORMAT = re.compile(r"\bFORMAT\s+(\w+)\s*;?\s*$", re.IGNORECASE)
_INPUT = re.compile(r"\binput\s*\(", re.IGNORECASE)
_ERROR = re.compile(r"Code: (\d+)\. ")
_NAME = re.compile(r"\(([A-Z][A-Z_]+)\)")
_SETTING = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Request:
    """One statement, with what belongs to it."""

    query: str
    data: bytes
    settings: Mapping[str, str]
    params: Mapping[str, str]

    @property
    def reads(self) -> bool:
        """Whether the statement changes nothing, so that it may run beside others."""
        return _READS.match(self.query) is not None


class Engine:
    """The chDB directory: one statement that writes at a time, a few that read beside it."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = str(directory / "chdb")
        self._incoming = directory / "incoming"
        self._incoming.mkdir(exist_ok=True)
        # The engine runs for as long as a connection is open, and has the settings of the first one.
        self._keeper = Connection(f"{self._path}?os_threads_nice_value_merge_mutate={MERGE_NICENESS}")
        self._threads = ThreadPoolExecutor(READERS + 2, thread_name_prefix="chdb")
        self._readers = asyncio.Semaphore(READERS)
        self._writer = asyncio.Semaphore(1)

    async def close(self) -> None:
        """Ends the queries under way, waits for the inserts, and closes the directory."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._threads, self._kill, "/* ")
        await asyncio.to_thread(self._threads.shutdown)
        self._keeper.close()

    async def ready(self) -> bool:
        """Whether queries are answered."""
        await self.run(Request(query="SELECT 1", data=b"", settings={}, params={}))
        return True

    async def run(self, request: Request) -> bytes:
        """The result in the format that the statement names. A cancelled call ends its statement, unless that is an
        INSERT: those are short, and their outcome must be certain before the next one starts. Raises chDB's errors."""
        kind = "read" if request.reads else "write"
        with _seconds.labels(kind).time():
            async with self._readers if request.reads else self._writer:
                return await self._run_alone(request)

    async def _run_alone(self, request: Request) -> bytes:
        mark = f"/* {uuid.uuid4()} */ "
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(self._threads, self._run, mark, request)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            # Again and again: the statement may not have begun yet when it is looked for.
            while request.reads and not (await asyncio.wait([running], timeout=0.1))[0]:
                await loop.run_in_executor(self._threads, self._kill, mark)
            await asyncio.wait([running])
            running.exception()
            raise

    def _run(self, mark: str, request: Request) -> bytes:
        with closing(Connection(self._path)) as connection:
            if request.settings:
                assignments = (f"{name} = {_literal(value)}" for name, value in request.settings.items())
                connection.query("SET " + ", ".join(assignments))
            if request.data and _INSERT.match(request.query):
                return self._insert(connection, request)
            result = connection.query(mark + request.query, "TabSeparated", params=dict(request.params))
            return bytes(result.bytes())

    def _insert(self, connection: Connection, request: Request) -> bytes:
        found = _FORMAT.search(request.query)
        if found is None:
            raise RuntimeError(
                "Code: 62. DB::Exception: An INSERT with data must end in FORMAT. (SYNTAX_ERROR)"
            )
        statement, data_format = request.query[: found.start()], found[1]
        if not _INPUT.search(statement):
            with connection.send_insert(statement, data_format) as insert:
                insert.append(request.data)
                insert.finish()
            return b""
        # The library has no input(): what it would read is given to file(), which takes the same description.
        with tempfile.NamedTemporaryFile(dir=self._incoming) as file:
            file.write(request.data)
            file.flush()
            source = f"file({_literal(file.name)}, {_literal(data_format)}, "
            statement = _INPUT.sub(lambda _: source, statement, count=1)
            connection.query(statement, "Null", params=dict(request.params))
        return b""

    def _kill(self, mark: str) -> None:
        with closing(Connection(self._path)) as connection:
            connection.query(
                "KILL QUERY WHERE startsWith(query, {mark:String}) ASYNC", "Null", params={"mark": mark}
            )


def application(engine: Engine) -> web.Application:
    """The HTTP side. Serve it with `handler_cancellation`, so that a client that goes away ends its query."""

    async def ping(_: web.Request) -> web.Response:
        return web.Response(text="Ok.\n")

    async def run(http: web.Request) -> web.Response:
        body = await http.read()
        query = http.query.get("query", "")
        if not (query and _INSERT.match(query)):
            query, body = query + body.decode(), b""
        others = {name: value for name, value in http.query.items() if name not in ("query", "query_id")}
        params = {name.removeprefix("param_"): v for name, v in others.items() if name.startswith("param_")}
        settings = {name: value for name, value in others.items() if not name.startswith("param_")}
        if not all(map(_SETTING.fullmatch, settings)):
            return _failure("Code: 115. DB::Exception: Unknown setting. (UNKNOWN_SETTING)")
        try:
            with telemetry.span("store", "SERVER", carrier=http.headers, bytes=len(body)):
                request = Request(query=query, data=body, settings=settings, params=params)
                result = await engine.run(request)
        except (
            Exception
        ) as error:  # chDB raises bare RuntimeError beside its own ChdbError; the client gets the text
            return _failure(str(error))
        if request.data:
            crash_points.reached("write")
        return web.Response(body=result)

    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.add_routes([web.get("/ping", ping), web.get("/", run), web.post("/", run)])
    return app


async def serve(settings: AnalyticsSettings) -> None:
    """Serves until the process is told to stop."""
    crash_points.arm(settings.crash_at)
    directory = settings.store_dir.resolve()
    engine = Engine(directory)
    os.chdir(directory)  # where the engine writes the schemas that come with inserts
    runner = web.AppRunner(
        application(engine),
        handler_cancellation=True,
        access_log=None,
        max_line_size=MAX_URL_BYTES,
        shutdown_timeout=STOP_SECONDS,
    )
    await runner.setup()
    await web.UnixSite(runner, urlsplit(settings.event_store_url).path).start()
    private = await private_http(settings.private_listen, engine.ready)
    log.info("store_started", directory=str(directory))
    await until_stopped()
    await private.cleanup()
    await runner.cleanup()
    await engine.close()


def _failure(text: str) -> web.Response:
    found = _ERROR.search(text)
    code = found[1] if found else "1002"  # UNKNOWN_EXCEPTION
    # By its name: the text may quote events, and values of parameters.
    names = _NAME.findall(text)
    log.warning("statement failed", code=int(code), error=names[-1] if names else "")
    return web.Response(status=500, text=text, headers={"X-ClickHouse-Exception-Code": code})


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
