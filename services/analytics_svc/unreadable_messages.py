"""Messages of the event log that could not be read: `python -m services.analytics_svc.unreadable_messages`.

Nobody knows which source or workspace they are of, so none but the operator of a mesh sees them. It needs the settings
of analytics_svc and its database, no running service. Answers go to stdout, talk to stderr. The exit code is 0 when all
is done, 1 when there is no such message, 3 when Postgres does not answer.
"""

import argparse
import asyncio
import base64
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import structlog
from meshboard.analytics.v1.events_pb2 import FailedEventsDiscarded
from sqlalchemy import delete, func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.analytics_svc.models import FailedEvent
from services.analytics_svc.settings import AnalyticsSettings
from services.chassis import db, outbox
from services.chassis.settings import load

OPERATOR = "operator"
DONE, ABSENT, AWAY = 0, 1, 3

Sessions = async_sessionmaker[AsyncSession]

_UNREADABLE = FailedEvent.source_id.is_(None)


async def newest(sessions: Sessions, limit: int) -> tuple[list[dict[str, Any]], int]:
    """The newest messages as JSON has them, without what they hold; and how many there are."""
    async with sessions() as session:
        found = await session.execute(
            select(
                FailedEvent.failed_event_id,
                FailedEvent.sequence,
                func.octet_length(FailedEvent.batch).label("size_bytes"),
                FailedEvent.error,
                FailedEvent.create_time,
            )
            .where(_UNREADABLE)
            .order_by(FailedEvent.failed_event_id.desc())
            .limit(limit)
        )
        rows = [{**row._asdict(), "create_time": row.create_time.isoformat()} for row in found]
        return rows, await session.scalar(select(func.count()).where(_UNREADABLE)) or 0


async def message(sessions: Sessions, failed_event_id: str) -> bytes | None:
    """What stands in the log, byte for byte."""
    async with sessions() as session:
        return await session.scalar(
            select(FailedEvent.batch).where(_UNREADABLE, FailedEvent.failed_event_id == failed_event_id)
        )


async def discard(sessions: Sessions, ids: Sequence[str]) -> int:
    """Gives messages up for good, and tells how many were there. Emits `FailedEventsDiscarded`."""
    outbox.actor.set(OPERATOR)
    async with sessions.begin() as session:
        gone = await session.scalars(
            delete(FailedEvent)
            .where(_UNREADABLE, FailedEvent.failed_event_id.in_(ids))
            .returning(FailedEvent.failed_event_id)
        )
        event = FailedEventsDiscarded(failed_event_ids=gone)
        if event.failed_event_ids:
            outbox.add(session, event)
    return len(event.failed_event_ids)


async def run(sessions: Sessions, arguments: argparse.Namespace) -> int:
    """Runs one command, and gives its exit code."""
    as_json = arguments.output == "json"
    if arguments.command == "list":
        rows, count = await newest(sessions, arguments.limit)
        if as_json:
            print(json.dumps({"messages": rows, "count": count}, indent=2))
        else:
            for row in rows:
                print("{failed_event_id}  {create_time}  {size_bytes} bytes  {error}".format_map(row))
            print(f"{count} messages of the event log could not be read.", file=sys.stderr)
        return DONE
    if arguments.command == "show":
        payload = await message(sessions, arguments.id)
        if payload is None:
            print("There is no such message.", file=sys.stderr)
            return ABSENT
        if as_json:
            found = {"failed_event_id": arguments.id, "payload": base64.b64encode(payload).decode()}
            print(json.dumps(found, indent=2))
        else:
            sys.stdout.buffer.write(payload)
            sys.stdout.flush()
        return DONE
    count = await discard(sessions, arguments.id)
    print(json.dumps({"discarded_count": count}) if as_json else f"discarded: {count}")
    return DONE if count else ABSENT


def parser() -> argparse.ArgumentParser:
    """The commands."""
    result = argparse.ArgumentParser(description=__doc__)
    commands = result.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list")
    listing.add_argument("--limit", type=int, default=100)
    commands.add_parser("show").add_argument("id", type=_id)
    commands.add_parser("discard").add_argument("id", type=_id, nargs="+")
    for command in commands.choices.values():
        command.add_argument("-o", "--output", choices=("text", "json"), default="text")
    return result


def _id(text: str) -> str:
    return str(UUID(text))


async def run_on(postgres_url: str, arguments: argparse.Namespace) -> int:
    """Runs one command on a database, and gives its exit code."""
    sessions = db.connect(postgres_url, pool_size=1)
    try:
        return await run(sessions, arguments)
    except (OSError, TimeoutError, SQLAlchemyError) as error:
        if not db.is_away(error):
            raise
        print("PostgreSQL does not answer: start the mesh first.", file=sys.stderr)
        return AWAY
    finally:
        await db.engine(sessions).dispose()


def main() -> None:
    """Does what the command line says."""
    arguments = parser().parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    raise SystemExit(asyncio.run(run_on(load(AnalyticsSettings).postgres_url, arguments)))


if __name__ == "__main__":
    main()
