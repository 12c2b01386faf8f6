"""What the pipeline notes of events that a step has refused, until they are stored after all."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal, NamedTuple

from meshboard.analytics.v1.event_log_pb2 import LoggedBatch
from sqlalchemy import delete
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from uuid_utils.compat import uuid7

from services.analytics_svc.models import FailedEvent

MAX_ERROR_CHARACTERS = 1000


class Failure(NamedTuple):
    """A batch of one event, or the payload of a message that is none; which step has refused it, and why.

    `retry_ids` are the retries that were under way in its message.
    """

    batch: LoggedBatch
    payload: bytes
    step: Literal["read", "enrich", "insert"]
    error: Exception
    retry_ids: Sequence[str] = ()


async def note_failures(
    db: async_sessionmaker[AsyncSession], failures: Sequence[Failure], epoch: int, now: datetime
) -> None:
    """Keeps each once: what has failed before stays as it is, maybe fixed by now, unless this was its retry."""
    rows: dict[tuple[str | None, bytes], dict[str, Any]] = {}
    for failure in failures:
        row = _row(failure, epoch, now)
        rows.setdefault((row["source_id"], row["identity"]), row)
    statement = insert(FailedEvent).values(list(rows.values()))
    new = statement.excluded
    async with db.begin() as session:
        await session.execute(
            statement.on_conflict_do_update(
                constraint="failed_events_once",
                set_={
                    "batch": new.batch,
                    "sequence": new.sequence,
                    "step": new.step,
                    "error": new.error,
                    "attempt_count": FailedEvent.attempt_count + 1,
                    "retry_id": None,
                    "version": FailedEvent.version + 1,
                    "update_time": new.update_time,
                },
                where=FailedEvent.retry_id.in_({id_ for failure in failures for id_ in failure.retry_ids}),
            )
        )


async def forget_source(session: AsyncSession, workspace_id: str, source_id: str) -> None:
    """Removes the failed events of a source that is deleted."""
    await session.execute(
        delete(FailedEvent).where(
            FailedEvent.workspace_id == workspace_id, FailedEvent.source_id == source_id
        )
    )


def _row(failure: Failure, epoch: int, now: datetime) -> dict[str, Any]:
    batch = failure.batch
    # Postgres has no text with a NUL in it.
    error = f"{type(failure.error).__name__}: {failure.error}".replace("\0", "")[:MAX_ERROR_CHARACTERS]
    identity = batch.events[0].insert_id if batch.events else f"message {epoch} {batch.sequence}"
    return {
        "failed_event_id": str(uuid7()),
        "workspace_id": batch.workspace_id or None,
        "source_id": batch.source_id or None,
        "identity": identity.encode(),
        "sequence": batch.sequence,
        "batch": failure.payload,
        "step": failure.step,
        "error": error,
        "create_time": now,
        "update_time": now,
    }
