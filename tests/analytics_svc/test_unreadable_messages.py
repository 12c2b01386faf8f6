"""Messages of the event log that could not be read, as the operator sees them."""

import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from click.testing import CliRunner
from meshboard.analytics.v1.event_log_pb2 import LoggedBatch
from meshboard.analytics.v1.events_pb2 import FailedEventsDiscarded
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from cli.main import main
from services.analytics_svc import unreadable_messages
from services.analytics_svc.failures import Failure, note_failures
from services.analytics_svc.models import FailedEvent
from services.chassis import db as chassis_db
from services.chassis.db import OutboxRow
from services.chassis.outbox import ACTOR
from tests.harness import new_id
from tests.parts import Parts

Sessions = async_sessionmaker[AsyncSession]
Run = Callable[..., Awaitable[tuple[int, bytes]]]


@pytest.fixture
async def sessions(parts: Parts) -> AsyncIterator[Sessions]:
    """A database that has two unreadable messages and a failed event."""
    url = await parts.fresh_database("analytics")
    await chassis_db.migrate(url, "services.analytics_svc")
    made = chassis_db.connect(url)
    error = ValueError("no message")
    event = LoggedBatch(workspace_id=new_id(), source_id=new_id())
    event.events.add(insert_id="a")
    unreadable = [Failure(LoggedBatch(sequence=n), b"\xff\0" * n, "read", error) for n in (1, 2)]
    failed = Failure(event, event.SerializeToString(), "insert", error)
    await note_failures(made, [*unreadable, failed], 1, datetime.now(UTC))
    yield made
    await chassis_db.engine(made).dispose()


@pytest.fixture
def call(sessions: Sessions, capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    """Runs a command, and gives its exit code and what it writes."""

    async def run(*arguments: str) -> tuple[int, bytes]:
        code = await unreadable_messages.run(sessions, unreadable_messages.parser().parse_args(arguments))
        return code, capfdbinary.readouterr().out

    return run


async def answer(call: Run, *arguments: str) -> Any:
    code, out = await call(*arguments, "-o", "json")
    assert code == 0
    return json.loads(out)


async def test_lists_shows_and_discards_them(sessions: Sessions, call: Run) -> None:
    listed = await answer(call, "list")
    assert listed["count"] == 2
    assert sorted((m["sequence"], m["size_bytes"], m["error"]) for m in listed["messages"]) == [
        (1, 2, "ValueError: no message"),
        (2, 4, "ValueError: no message"),
    ]
    assert len((await answer(call, "list", "--limit", "1"))["messages"]) == 1
    ids = {m["sequence"]: m["failed_event_id"] for m in listed["messages"]}
    assert await call("show", ids[2]) == (0, b"\xff\0\xff\0")
    assert base64.b64decode((await answer(call, "show", ids[1]))["payload"]) == b"\xff\0"
    assert ids[1].encode() in (await call("list"))[1]

    assert await answer(call, "discard", ids[1], new_id()) == {"discarded_count": 1}
    assert (await call("discard", ids[1]))[0] == 1
    assert (await call("show", ids[1]))[0] == 1
    assert (await answer(call, "list"))["count"] == 1
    async with sessions() as session:
        (row,) = (await session.scalars(select(OutboxRow))).all()
    assert row.subject == FailedEventsDiscarded.DESCRIPTOR.full_name
    assert row.headers[ACTOR] == "operator"
    assert FailedEventsDiscarded.FromString(row.payload).failed_event_ids == [ids[1]]


async def test_takes_nothing_that_a_source_has(sessions: Sessions, call: Run) -> None:
    async with sessions() as session:
        of_source = FailedEvent.source_id.is_not(None)
        owned = await session.scalar(select(FailedEvent.failed_event_id).where(of_source))
    assert owned
    assert (await call("show", owned))[0] == 1
    assert (await call("discard", owned))[0] == 1


async def test_says_when_postgres_does_not_answer(capsys: pytest.CaptureFixture[str]) -> None:
    nobody = "postgresql://nobody@127.0.0.1:1/none"
    code = await unreadable_messages.run_on(nobody, unreadable_messages.parser().parse_args(["list"]))
    said = capsys.readouterr()
    assert (code, said.out) == (3, "")
    assert "start the mesh first" in said.err


@pytest.mark.parametrize("command", [["list"], ["show", new_id()], ["discard", new_id()]])
def test_the_command_asks_for_a_mesh(command: list[str], tmp_path: Any) -> None:
    done = CliRunner().invoke(main, ["events", "unreadable", *command, "--data", str(tmp_path / "none")])
    assert done.exit_code == 1
    assert "not the data folder of a mesh" in done.output
