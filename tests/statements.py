"""The SQL statements that calls make."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.engine import make_url


@contextmanager
def statements_on(url: str) -> Iterator[list[str]]:
    """The statements that anything in this process makes on a database, without values."""
    database, found = make_url(url).database, list[str]()

    def note(connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if connection.engine.url.database == database:
            found.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        event.remove(Engine, "before_cursor_execute", note)
