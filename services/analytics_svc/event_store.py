"""The client of the event store: ClickHouse's HTTP protocol, on a unix socket or by address.

The store is `store.py` (chDB) or a ClickHouse server; the statements are the same for both.
"""

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from services.chassis import telemetry

Value = str | int | float | bool | Sequence[str] | Sequence[float]

# ClickHouse's numbers of errors (src/Common/ErrorCodes.cpp), where the kind of error makes a difference to us.
_TOO_EXPENSIVE = frozenset({158, 159, 160, 241, 307, 396, 394})
_DATA_REFUSED = frozenset({6, 25, 26, 27, 32, 33, 38, 41, 53, 69, 70, 72, 117, 131, 349, 376, 407, 444, 469})

# Of the URL, which may have 1 MiB, for one list of texts.
_PIECE_BYTES = 1 << 18
# On a cluster: an insert is answered when most replicas of each shard have it, queries see what has been answered, and
# a subquery finds what it names on all shards.
ON_CLUSTER: Mapping[str, Value] = {
    "distributed_foreground_insert": 1,
    "insert_quorum": "auto",
    "insert_quorum_parallel": 0,
    "select_sequential_consistency": 1,
    "distributed_product_mode": "global",
    "prefer_localhost_replica": 0,
}


class EventStoreError(Exception):
    """The store refused a statement, with ClickHouse's number of the error."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class TooExpensiveError(EventStoreError):
    """The statement needed more time, memory or rows than it may have."""


class DataRefusedError(EventStoreError):
    """The data of an INSERT cannot be read: another attempt would fail as well."""


class UnavailableError(Exception):
    """The store cannot be reached, or did not answer in time. An INSERT may have happened or not."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What a query gave, names of columns and a list of cells for each row, and what it took."""

    names: list[str]
    rows: list[list[Any]]
    rows_read: int = 0
    bytes_read: int = 0
    seconds: float = 0.0


class EventStore:
    """One pool of connections to the store at `url`: `http://host:8123` or `http+unix:///path/of.sock`.

    `cluster` is the name that a cluster has in the configuration of its servers; `url` is one of them, or stands for
    all.
    """

    def __init__(self, url: str, *, cluster: str = "", connections: int = 16) -> None:
        self.cluster = cluster
        self._settings = ON_CLUSTER if cluster else {}
        parts = urlsplit(url)
        connector: aiohttp.BaseConnector
        if parts.scheme == "http+unix":
            connector, self._url = aiohttp.UnixConnector(parts.path, limit=connections), "http://store/"
        else:
            connector, self._url = aiohttp.TCPConnector(limit=connections), url
        self._session = aiohttp.ClientSession(connector=connector, auto_decompress=True)

    def table_of(self, table: str) -> str:
        """What ALTER TABLE names to change the rows of a table: on a cluster, the table of each shard."""
        return f"{table}_shard ON CLUSTER '{self.cluster}'" if self.cluster else table

    async def close(self) -> None:
        """Closes the connections."""
        await self._session.close()

    async def ready(self) -> bool:
        """Whether the store answers within 2 seconds."""
        try:
            await self.query("SELECT 1", timeout=2)
        except (UnavailableError, EventStoreError):
            return False
        return True

    async def query(
        self,
        sql: str,
        params: Mapping[str, Value] | None = None,
        *,
        settings: Mapping[str, Value] | None = None,
        timeout: float = 30,
    ) -> Rows:
        """Runs a SELECT, whose values are `{name:Type}` in the SQL and `params` here. Not-a-number comes as None.

        Raises TooExpensiveError, EventStoreError, UnavailableError. Cancelling the call ends the query.
        """
        body = await self._send(
            sql + "\nFORMAT JSONCompact",
            b"",
            params or {},
            {"output_format_json_quote_64bit_integers": 0, "max_execution_time": timeout, **(settings or {})},
            timeout,
        )
        answer = json.loads(body)
        took = answer["statistics"]
        return Rows(
            [column["name"] for column in answer["meta"]],
            answer["data"],
            took["rows_read"],
            took["bytes_read"],
            took["elapsed"],
        )

    async def scan(
        self, sql: str, params: Mapping[str, Value] | None = None, *, timeout: float = 300
    ) -> bytes:
        """Runs a SELECT that names its own FORMAT, and gives the bytes."""
        return await self._send(sql, b"", params or {}, {"max_execution_time": timeout}, timeout)

    async def execute(
        self, sql: str, params: Mapping[str, Value] | None = None, *, timeout: float = 60
    ) -> None:
        """Runs a statement without a result, such as CREATE TABLE."""
        await self._send(sql, b"", params or {}, {}, timeout)

    async def insert(
        self,
        sql: str,
        data: bytes,
        *,
        token: str,
        settings: Mapping[str, Value] | None = None,
        timeout: float = 120,
    ) -> None:
        """Runs an INSERT that ends in FORMAT, with its data. Of two with the same `token` the table keeps one.

        Raises DataRefusedError when the data is at fault; EventStoreError and UnavailableError may pass.
        """
        await self._send(sql, data, {}, {"insert_deduplication_token": token, **(settings or {})}, timeout)

    async def _send(
        self,
        sql: str,
        data: bytes,
        params: Mapping[str, Value],
        settings: Mapping[str, Value],
        timeout: float,
    ) -> bytes:
        query = {name: _setting(value) for name, value in {**self._settings, **settings}.items()}
        query |= {f"param_{name}": parameter(value) for name, value in params.items()}
        if data:
            query["query"] = sql
        with telemetry.span(f"event store {sql.split(None, 1)[0]}", "CLIENT", sql=sql[:2000]):
            try:
                async with self._session.post(
                    self._url,
                    params=query,
                    # As a file, so that megabytes are sent in pieces and do not hold up the event loop.
                    data=io.BytesIO(data) if data else sql.encode(),
                    headers=telemetry.trace_headers(),
                    # The store ends the statement by itself; this is for a store that hangs.
                    timeout=aiohttp.ClientTimeout(total=timeout + 5),
                ) as response:
                    body = await response.read()
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                # By its type: the text may quote the address, and with it the values of parameters.
                raise UnavailableError(f"the event store does not answer: {type(error).__name__}") from error
        if response.status == 200:
            return body
        code = int(response.headers.get("X-ClickHouse-Exception-Code", "0"))
        raise _error_class(code)(code, body.decode(errors="replace"))


def pieces(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in lists, each of which has room in a statement as a bound array: parameters are part of its URL."""
    piece: list[str] = []
    room = _PIECE_BYTES
    for text in texts:
        size = 3 * len(text.encode()) + 9  # each byte may become three, and so may quotes and the comma
        if piece and size > room:
            yield piece
            piece, room = [], _PIECE_BYTES
        piece.append(text)
        room -= size
    if piece:
        yield piece


def _error_class(code: int) -> type[EventStoreError]:
    if code in _TOO_EXPENSIVE:
        return TooExpensiveError
    return DataRefusedError if code in _DATA_REFUSED else EventStoreError


def _setting(value: Value) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def parameter(value: Value) -> str:
    """A value as the protocol has it."""
    # A text travels in ClickHouse's escaped format (the one of TabSeparated), an array as it is written in SQL.
    if isinstance(value, str):
        for raw, escaped in (("\\", "\\\\"), ("\t", "\\t"), ("\n", "\\n"), ("\r", "\\r"), ("\0", "\\0")):
            value = value.replace(raw, escaped)
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    return "[" + ",".join(_quote(item) if isinstance(item, str) else repr(item) for item in value) + "]"


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
