"""How much work a call makes: its SQL statements, and how often a password is hashed."""

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from argon2 import PasswordHasher
from sqlalchemy import Engine, event
from sqlalchemy.engine import make_url

from services.chassis.deadline import seconds_left
from tests.auth_svc.conftest import Services


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
        # What runs beside all calls has no deadline.
        if connection.engine.url.database == database and seconds_left() < math.inf:
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
