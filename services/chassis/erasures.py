"""How a service erases what it knows of a person: in one transaction with the answer that says so.

user_svc asks with `UserErasureRequested` and collects the answers. While a service is down the event waits for it; one
that comes again changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, cast

from meshboard.user.v1.events_pb2 import UserErased, UserErasureRequested
from sqlalchemy import CursorResult, delete
from sqlalchemy.ext.asyncio import AsyncSession

from services.chassis import outbox
from services.chassis.db import GrantRow
from services.chassis.inbox import Handler
from services.chassis.rights import USER


@dataclass(frozen=True, slots=True)
class Erased:
    """How many things are gone, and how many stay that know the person by its id alone; by kind."""

    erased: dict[str, int]
    kept: dict[str, int] = field(default_factory=dict)


Eraser = Callable[[AsyncSession, str], Awaitable[Erased]]


def erasing(service: str, *erasers: Eraser) -> Handler:
    """What the service does with `UserErasureRequested`: each `eraser(session, user_id)`, and `UserErased`."""

    async def on_user_erasure_requested(session: AsyncSession, event: UserErasureRequested) -> None:
        erased: Counter[str] = Counter()
        kept: Counter[str] = Counter()
        for erase in erasers:
            done = await erase(session, event.user_id)
            erased.update(done.erased)
            kept.update(done.kept)
        answer = UserErased(
            erasure_id=event.erasure_id, user_id=event.user_id, service=service, erased=erased, kept=kept
        )
        answer.time.GetCurrentTime()
        outbox.add(session, answer)

    return on_user_erasure_requested


async def erase_grants(session: AsyncSession, user_id: str) -> Erased:
    """Deletes all grants to the person, in every workspace."""
    done = await session.execute(
        delete(GrantRow).where(GrantRow.subject_type == USER, GrantRow.subject_id == user_id)
    )
    return Erased({"grants": cast("CursorResult[Any]", done).rowcount})
