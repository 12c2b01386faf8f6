import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import chain
from typing import Any
from uuid import uuid4

from google.protobuf.message import Message
from meshboard.user.v1.events_pb2 import MemberRemoved, TeamMemberAdded, WorkspaceUpdated
from meshboard.user.v1.workspace_pb2 import Workspace
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from uuid_utils.compat import uuid7

from services.chassis import inbox, outbox
from services.chassis.bus import DEAD_LETTERS, Bus
from tests.conditions import eventually
from tests.harness import NOWHERE
from tests.parts import Parts

Sessions = async_sessionmaker[AsyncSession]


@asynccontextmanager
async def consuming(
    bus: Bus,
    db: Sessions,
    service: str,
    handlers: Mapping[type[Message], inbox.Handler | inbox.Repeatable],
    **options: Any,
) -> AsyncIterator[None]:
    task = asyncio.create_task(inbox.consume(bus, db, service, handlers, **options))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def publish(bus: Bus, user_id: str, *, event_id: str = "", message_id: str = "") -> str:
    """Publishes MemberRemoved as the relay does, and gives its event id."""
    event_id = event_id or str(uuid7())
    await bus.publish(
        "meshboard.user.v1.MemberRemoved",
        MemberRemoved(workspace_id=user_id, user_id=user_id).SerializeToString(),
        message_id=message_id or event_id,
        headers={outbox.EVENT_ID: event_id, outbox.WORKSPACE_ID: NOWHERE, outbox.ACTOR: "user:u1"},
        timeout=20,
    )
    return event_id


async def note(session: AsyncSession, event: MemberRemoved) -> None:
    await session.execute(text("INSERT INTO effects VALUES (:id)"), {"id": event.user_id})


async def effects(db: Sessions, user_id: str) -> int:
    async with db() as session:
        count = await session.scalar(
            text("SELECT count(*) FROM effects WHERE subject_id = :id"), {"id": user_id}
        )
    return int(count or 0)


async def test_each_event_has_one_effect(db: Sessions, bus: Bus) -> None:
    user_id, last = uuid4().hex, uuid4().hex
    event_id = await publish(bus, user_id)
    # As after a failover of the relay, beyond the duplicate window of the stream:
    await publish(bus, user_id, event_id=event_id, message_id=uuid4().hex)
    await publish(bus, last)
    async with consuming(bus, db, uuid4().hex, {MemberRemoved: note}):
        await eventually(lambda: has_effect(db, last))
    assert await effects(db, user_id) == 1


async def has_effect(db: Sessions, user_id: str) -> bool:
    return await effects(db, user_id) > 0


async def test_replicas_share_the_events(db: Sessions, bus: Bus) -> None:
    service, users = uuid4().hex, [uuid4().hex for _ in range(40)]
    handlers: dict[type[Message], inbox.Handler] = {MemberRemoved: note}
    async with consuming(bus, db, service, handlers), consuming(bus, db, service, handlers):
        for user_id in users:
            await publish(bus, user_id)

        async def all_there() -> bool:
            return all([await has_effect(db, user_id) for user_id in users])

        await eventually(all_there)
    assert [await effects(db, user_id) for user_id in users] == [1] * 40


async def test_a_redelivery_after_the_effect_has_none(db: Sessions, bus: Bus) -> None:
    """The consumer dies between commit and acknowledgement."""
    user_id, service = uuid4().hex, uuid4().hex
    event_id = await publish(bus, user_id)
    async with db.begin() as session:
        await session.execute(
            text("INSERT INTO inbox (consumer, event_id) VALUES (:consumer, :id)"),
            {"consumer": service, "id": event_id},
        )
    last = uuid4().hex
    await publish(bus, last)
    async with consuming(bus, db, service, {MemberRemoved: note}):
        await eventually(lambda: has_effect(db, last))
    assert await effects(db, user_id) == 0


async def test_a_failure_leaves_no_trace_and_is_tried_again(db: Sessions, bus: Bus) -> None:
    user_id = uuid4().hex
    attempts: list[int] = []

    async def fail_twice(session: AsyncSession, event: MemberRemoved) -> None:
        await note(session, event)
        if event.user_id == user_id:
            attempts.append(inbox.current.get().attempt)
            if len(attempts) < 3:
                raise ValueError("not yet")

    await publish(bus, user_id)
    async with consuming(bus, db, uuid4().hex, {MemberRemoved: fail_twice}, backoff_seconds=[0.05, 0.05]):
        await eventually(lambda: has_effect(db, user_id))
    assert attempts == [1, 2, 3]
    assert await effects(db, user_id) == 1


async def test_what_is_refused_to_the_end_becomes_a_dead_letter(db: Sessions, bus: Bus) -> None:
    user_id, neighbour, service = uuid4().hex, uuid4().hex, uuid4().hex
    attempts = 0

    async def refuse(session: AsyncSession, event: MemberRemoved) -> None:
        nonlocal attempts
        if event.user_id == user_id:
            attempts += 1
            raise ValueError("never\nDETAIL: somebody@example.com")
        await note(session, event)

    event_id = await publish(bus, user_id)
    await publish(bus, neighbour)
    letters = await bus.pull(
        DEAD_LETTERS, f"t{uuid4().hex}", subject=f"dead.{service}.meshboard.user.v1.MemberRemoved"
    )
    async with consuming(bus, db, service, {MemberRemoved: refuse}, backoff_seconds=[0.05, 0.05]):
        (letter,) = await letters.fetch(10, timeout=20)
        await eventually(lambda: has_effect(db, neighbour))
        assert await letters.fetch(10, timeout=0.3) == []
    assert attempts == 3
    assert MemberRemoved.FromString(letter.payload).user_id == user_id
    assert letter.headers[outbox.EVENT_ID] == event_id
    assert letter.headers["Error"] == "ValueError: never"
    await letters.close()


async def test_garbage_becomes_a_dead_letter_and_blocks_nobody(db: Sessions, bus: Bus) -> None:
    service, neighbour = uuid4().hex, uuid4().hex
    subject = "meshboard.user.v1.WorkspaceUpdated"  # of no other test here: all read from the beginning

    async def note_workspace(session: AsyncSession, event: WorkspaceUpdated) -> None:
        await note(session, MemberRemoved(user_id=event.workspace.workspace_id))

    await bus.publish(subject, b"\xff", headers={outbox.EVENT_ID: str(uuid7())})
    await bus.publish(subject, b"")  # without an id
    good = WorkspaceUpdated(workspace=Workspace(workspace_id=neighbour)).SerializeToString()
    await bus.publish(subject, good, headers={outbox.EVENT_ID: str(uuid7())})
    letters = await bus.pull(DEAD_LETTERS, f"t{uuid4().hex}", subject=f"dead.{service}.>")
    async with consuming(bus, db, service, {WorkspaceUpdated: note_workspace}, backoff_seconds=[]):
        await eventually(lambda: has_effect(db, neighbour))
    found = []
    while batch := await letters.fetch(10, timeout=0.5):
        found += batch
    assert {letter.payload for letter in found} == {b"\xff", b""}
    await letters.close()


async def test_repeatable_handlers_get_many_at_once_and_bad_ones_by_themselves(
    db: Sessions, bus: Bus
) -> None:
    good, bad, service = [uuid4().hex for _ in range(20)], uuid4().hex, uuid4().hex
    batches: list[list[str]] = []

    async def note_all(events: Sequence[MemberRemoved]) -> None:
        batches.append([event.user_id for event in events])
        if bad in batches[-1]:
            raise ValueError("never")
        async with db.begin() as session:
            for event in events:
                await note(session, event)

    for user_id in (*good[:10], bad, *good[10:]):
        await publish(bus, user_id)
    letters = await bus.pull(DEAD_LETTERS, f"t{uuid4().hex}", subject=f"dead.{service}.>")
    handlers: dict[type[Message], inbox.Repeatable] = {MemberRemoved: inbox.Repeatable(note_all)}
    async with consuming(bus, db, service, handlers, backoff_seconds=[]):
        await eventually(lambda: has_effect(db, good[-1]))
        (letter,) = await letters.fetch(10, timeout=20)
    assert MemberRemoved.FromString(letter.payload).user_id == bad
    assert [await effects(db, user_id) for user_id in good] == [1] * 20
    assert [bad] in batches
    assert max(map(len, batches)) > 1
    async with db() as session:
        assert await session.scalar(text("SELECT count(*) FROM inbox")) == 0
    await letters.close()


async def test_what_comes_while_a_repeatable_handler_rests_is_one_batch(db: Sessions, bus: Bus) -> None:
    batches: list[list[str]] = []

    async def take(events: Sequence[MemberRemoved]) -> None:
        batches.append([event.user_id for event in events])

    user_ids = [uuid4().hex for _ in range(12)]
    handlers: dict[type[Message], inbox.Repeatable] = {MemberRemoved: inbox.Repeatable(take)}
    async with consuming(bus, db, uuid4().hex, handlers):
        await publish(bus, user_ids[0])
        await eventually(lambda: user_ids[0] in chain(*batches))
        for user_id in user_ids[1:]:
            await publish(bus, user_id)
        await eventually(lambda: user_ids[-1] in chain(*batches))
    taken = [batch for batch in batches if not set(batch).isdisjoint(user_ids[1:])]
    assert max(map(len, taken)) > 1, "one by one, at twelve times the cost"


async def test_a_repeatable_handler_that_was_away_catches_up_in_few_batches(db: Sessions, bus: Bus) -> None:
    batches: list[list[str]] = []

    async def take(events: Sequence[MemberRemoved]) -> None:
        batches.append([event.user_id for event in events])

    user_ids = [uuid4().hex for _ in range(100)]
    for user_id in user_ids:
        await publish(bus, user_id)
    handlers: dict[type[Message], inbox.Repeatable] = {MemberRemoved: inbox.Repeatable(take)}
    async with consuming(bus, db, uuid4().hex, handlers):
        await eventually(lambda: user_ids[-1] in chain(*batches))
    assert max(map(len, batches)) > 50, "sixteen by sixteen, with a rest after each, it would never catch up"


async def test_unknown_fields_and_types_do_not_block(db: Sessions, bus: Bus) -> None:
    user_id = uuid4().hex
    newer = MemberRemoved(workspace_id=user_id, user_id=user_id).SerializeToString() + b"\xf2\xe8\x01\x03new"
    await bus.publish("meshboard.user.v1.NeverHeardOf", b"?")
    await bus.publish("meshboard.user.v1.MemberRemoved", newer, headers={outbox.EVENT_ID: str(uuid7())})
    async with consuming(bus, db, uuid4().hex, {MemberRemoved: note}):
        await eventually(lambda: has_effect(db, user_id))


async def test_a_failing_type_does_not_hold_up_another(db: Sessions, bus: Bus) -> None:
    user_id = uuid4().hex
    stuck = asyncio.Event()

    async def hang(_session: AsyncSession, _event: TeamMemberAdded) -> None:
        stuck.set()
        await asyncio.Event().wait()

    await bus.publish(
        "meshboard.user.v1.TeamMemberAdded",
        TeamMemberAdded().SerializeToString(),
        headers={outbox.EVENT_ID: str(uuid7())},
    )
    async with consuming(bus, db, uuid4().hex, {MemberRemoved: note, TeamMemberAdded: hang}):
        await stuck.wait()
        await publish(bus, user_id)
        await eventually(lambda: has_effect(db, user_id))


async def test_a_handler_knows_where_its_event_comes_from(db: Sessions, bus: Bus) -> None:
    user_id = uuid4().hex
    seen: list[tuple[inbox.Event, str]] = []

    async def look(_session: AsyncSession, event: MemberRemoved) -> None:
        if event.user_id == user_id:
            seen.append((inbox.current.get(), outbox.actor.get()))

    event_id = await publish(bus, user_id)
    async with consuming(bus, db, uuid4().hex, {MemberRemoved: look}):
        await eventually(lambda: len(seen) == 1)
    event, actor = seen[0]
    assert (event.event_id, event.workspace_id, event.attempt) == (event_id, NOWHERE, 1)
    assert actor == "user:u1"


async def test_waits_for_postgres_without_counting_attempts(parts: Parts, db: Sessions, bus: Bus) -> None:
    user_id, service = uuid4().hex, uuid4().hex
    letters = await bus.pull(DEAD_LETTERS, f"t{uuid4().hex}", subject=f"dead.{service}.>")
    await parts.supervisor.stop("postgres")
    await publish(bus, user_id)
    async with consuming(bus, db, service, {MemberRemoved: note}, backoff_seconds=[]):
        assert await letters.fetch(1, timeout=2) == []
        await parts.supervisor.start("postgres")
        await eventually(lambda: has_effect(db, user_id))
    assert await letters.fetch(1, timeout=0.3) == []
    await letters.close()


async def test_one_effect_each_through_kills_of_nats(
    parts: Parts, database_url: str, db: Sessions, bus: Bus
) -> None:
    users = [uuid4().hex for _ in range(60)]
    relay = asyncio.create_task(outbox.Relay(database_url, bus, "test").run())
    async with consuming(bus, db, uuid4().hex, {MemberRemoved: note}):
        for number, user_id in enumerate(users):
            if number == 20:
                restarts = parts.supervisor.children["nats"].restarts
                parts.supervisor.kill("nats")
            async with db.begin() as session:
                outbox.add(session, MemberRemoved(workspace_id=user_id, user_id=user_id))
        await parts.supervisor.until_ready("nats", restarts=restarts + 1)

        async def all_there() -> bool:
            return all([await has_effect(db, user_id) for user_id in users])

        await eventually(all_there, seconds=60)
    relay.cancel()
    with suppress(asyncio.CancelledError):
        await relay
    assert [await effects(db, user_id) for user_id in users] == [1] * 60


async def test_what_follows_the_commit_finds_it_done(db: Sessions, bus: Bus) -> None:
    user_id, found = uuid4().hex, list[int]()
    failures = [RuntimeError("first try")]

    async def handler(session: AsyncSession, event: MemberRemoved) -> None:
        async def look() -> None:
            found.append(await effects(db, event.user_id))

        await note(session, event)
        inbox.after_commit(session, look)
        if event.user_id == user_id and failures:
            raise failures.pop()

    await publish(bus, user_id)
    async with consuming(bus, db, uuid4().hex, {MemberRemoved: handler}, backoff_seconds=[0.1]):
        await eventually(lambda: has_effect(db, user_id))
        await eventually(lambda: bool(found))
    assert not failures
    assert 0 not in found
