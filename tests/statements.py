"""The SQL statements that calls make."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import asyncpg
from sqlalchemy import Engine, event
from sqlalchemy.engine import make_url

from services.chassis.deadline import seconds_left


@contextmanager
def _told(note: Callable[[str | None, str], None]) -> Iterator[None]:
    """Has `note` told the database and text of each statement by SQLAlchemy, and of each fetched past it."""
    fetch = asyncpg.Connection.fetch

    def by_engine(connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        note(connection.engine.url.database, statement)

    async def by_driver(self: Any, query: str, *arguments: Any, **options: Any) -> Sequence[Any]:
        note(self._params.database, query)
        rows: Sequence[Any] = await fetch(self, query, *arguments, **options)
        return rows

    event.listen(Engine, "before_cursor_execute", by_engine)
    asyncpg.Connection.fetch = by_driver
    try:
        yield
    finally:
        asyncpg.Connection.fetch = fetch
        event.remove(Engine, "before_cursor_execute", by_engine)


@contextmanager
def statements_on(url: str) -> Iterator[list[str]]:
    """The statements that anything in this process makes on a database, without values."""
    database, found = make_url(url).database, list[str]()

    def note(at: str | None, statement: str) -> None:
        if at == database:
            found.append(statement)

    with _told(note):
        yield found


@contextmanager
def statements_about(*words: str) -> Iterator[list[str]]:
    """Those in which one of the words is; others are made beside them all the time."""
    found: list[str] = []

    def note(_at: str | None, statement: str) -> None:
        if any(word in statement for word in words):
            found.append(statement)

    with _told(note):
        yield found


@contextmanager
def statements_of_calls() -> Iterator[list[str]]:
    """Those that calls make; indexer, relay and the like work beside them, outside of any call."""
    found: list[str] = []

    def note(_at: str | None, statement: str) -> None:
        if math.isfinite(seconds_left()):
            found.append(statement)

    with _told(note):
        yield found
