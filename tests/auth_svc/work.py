"""How much work a call makes: its SQL statements, and how often a password is hashed."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from argon2 import PasswordHasher
from sqlalchemy import Engine, event
from sqlalchemy.engine import make_url

from tests.auth_svc.conftest import Services

# What runs beside all calls: sending mails, receiving events, reaping, asking whether Postgres is there.
_BESIDE = re.compile(
    r"(UPDATE|DELETE FROM) mails\b|FROM mails\b|\binbox\b|\bended_keys\b|^SELECT 1$|^DELETE FROM (tickets WHERE"
    r" tickets.expire_time|sessions|accounts)|\baudit_seals\b",
)


@dataclass
class Work:
    """`statements` as SQL without values."""

    statements: list[str] = field(default_factory=list)
    hashes: int = 0


@asynccontextmanager
async def work_of(services: Services) -> AsyncIterator[Work]:
    """What auth_svc does for the calls that are made in the block."""
    work = Work()
    database = make_url(services.auth_settings.postgres_url).database

    def count(connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if connection.engine.url.database == database and not _BESIDE.search(statement):
            work.statements.append(statement)

    def counted(hashing: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            work.hashes += 1
            return hashing(*arguments, **more)

        return call

    event.listen(Engine, "before_cursor_execute", count)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PasswordHasher, "hash", counted(PasswordHasher.hash))
            patch.setattr(PasswordHasher, "verify", counted(PasswordHasher.verify))
            yield work
    finally:
        event.remove(Engine, "before_cursor_execute", count)
