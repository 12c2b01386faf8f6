"""Sealing of audit entries, and finding what was tampered with."""

import asyncio
import base64
import os
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest
from meshboard.auth.v1.events_pb2 import AuditEntrySealed, AuditHeadPublished
from sqlalchemy import delete, func, select, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.auth_svc import audit
from services.auth_svc.audit_chain import ChainKeys, Report, Sealer, canonical, chain_keys, verify
from services.auth_svc.models import AuditEntryRow, AuditSeal, AuditUnsealed
from services.auth_svc.origins import Origin
from services.auth_svc.settings import AuthSettings
from services.chassis import db
from services.chassis.bus import DOMAIN, Bus
from services.chassis.db import OutboxRow
from services.chassis.times import now
from tests.conditions import eventually
from tests.harness import new_id


@dataclass
class Chain:
    """A database with a chain, and the heads that were published of it."""

    sessions: async_sessionmaker[AsyncSession]
    settings: AuthSettings
    keys: ChainKeys
    bus: Bus

    async def add(self, count: int = 1, *, time: datetime | None = None) -> list[str]:
        """Entries, as an act would add them; gives their ids."""
        async with self.sessions.begin() as session:
            for number in range(count):
                audit.record(
                    session,
                    "test.happened",
                    Origin(address="192.0.2.1"),
                    (time or now()) + timedelta(microseconds=number),
                    actor_id=new_id(),
                    workspace_id=new_id() if number % 2 else "",
                    title="Größe ☃",
                    number=number,
                    methods=["pwd", "otp"],
                )
            await session.flush()
            return list(
                await session.scalars(
                    select(AuditEntryRow.audit_entry_id)
                    .order_by(AuditEntryRow.audit_entry_id.desc())
                    .limit(count)
                )
            )

    async def seal(self) -> None:
        """Seals all that waits, and publishes the head."""
        sealer = Sealer(self.sessions, self.keys, now)
        while await sealer.round():
            pass
        await self.publish()

    async def publish(self) -> None:
        """Does what the relay does with the heads."""
        async with self.sessions.begin() as session:
            subject = AuditHeadPublished.DESCRIPTOR.full_name
            rows = list(
                await session.scalars(
                    delete(OutboxRow).where(OutboxRow.subject == subject).returning(OutboxRow)
                )
            )
        for row in sorted(rows, key=lambda row: row.id):
            await self.bus.publish(subject, row.payload, message_id=row.id)

    async def tamper(self, *statements: str) -> None:
        """Does what only the owner of the tables can."""
        async with self.sessions.begin() as session:
            for table in ("audit_entries", "audit_seals"):
                await session.execute(text(f"ALTER TABLE {table} DISABLE TRIGGER append_only"))
            for statement in statements:
                await session.execute(text(statement))
            for table in ("audit_entries", "audit_seals"):
                await session.execute(text(f"ALTER TABLE {table} ENABLE TRIGGER append_only"))

    async def report(self, *, patience_seconds: float = 10) -> Report:
        """What `verify` says."""
        return await verify(self.sessions, self.keys, self.bus, patience_seconds=patience_seconds)

    async def seals(self) -> list[AuditSeal]:
        """The chain."""
        async with self.sessions() as session:
            return list(await session.scalars(select(AuditSeal).order_by(AuditSeal.position)))


@pytest.fixture
async def chain(settings: AuthSettings) -> AsyncIterator[Chain]:
    sessions = db.connect(settings.postgres_url)
    bus = await Bus.connect(settings.nats_url, "test")
    # The heads of other tests' chains are on the same subject.
    await bus._jetstream.purge_stream(DOMAIN, subject=AuditHeadPublished.DESCRIPTOR.full_name)
    yield Chain(sessions, settings, chain_keys(settings), bus)
    await bus.close()
    await db.engine(sessions).dispose()


async def test_a_chain_that_nobody_touched_is_well(chain: Chain):
    await chain.add(7)
    await chain.seal()
    await chain.add(5)
    await chain.seal()
    report = await chain.report()
    assert (report.problems, report.tail_unknown) == ([], "")
    assert (report.positions, report.heads) == (12, 2)
    assert [seal.position for seal in await chain.seals()] == list(range(1, 13))


async def test_an_empty_log_is_well_but_for_its_unknown_tail(chain: Chain):
    await chain.seal()
    report = await chain.report()
    assert (report.positions, report.problem_count) == (0, 0)
    assert report.tail_unknown == "NATS has no head of the chain"


async def test_each_entry_and_the_head_are_announced(chain: Chain):
    await chain.add(3)
    sealer = Sealer(chain.sessions, chain.keys, now)
    assert await sealer.round() == 3
    seals = await chain.seals()
    async with chain.sessions() as session:
        rows = list(await session.scalars(select(OutboxRow).order_by(OutboxRow.id)))
        entries = {row.audit_entry_id: row for row in await session.scalars(select(AuditEntryRow))}
        assert await session.scalar(select(func.count()).select_from(AuditUnsealed)) == 0
    *sealed, head = rows
    for row, seal in zip(sealed, seals, strict=True):
        event = AuditEntrySealed.FromString(row.payload)
        assert (event.audit_entry.position, event.seal) == (seal.position, seal.seal)
        entry = entries[seal.audit_entry_id]
        assert event.audit_entry == audit.entry_to_pb(entry, seal.position)
        assert row.headers.get("Workspace-Id", "") == (entry.workspace_id or "")
    published = AuditHeadPublished.FromString(head.payload)
    assert (published.position, published.seal) == (3, seals[-1].seal)
    # Nothing happened, and the hour is not over.
    assert await sealer.round() == 0
    async with chain.sessions() as session:
        assert await session.scalar(select(func.count()).select_from(OutboxRow)) == 4


async def test_the_head_is_published_again_each_hour(chain: Chain):
    await chain.add()
    sealer = Sealer(chain.sessions, chain.keys, now)
    await sealer.round()
    sealer._next_head = 0
    await sealer.round()
    await chain.publish()
    report = await chain.report()
    assert (report.positions, report.heads, report.problems) == (1, 2, [])


async def test_order_is_by_time_and_a_late_commit_comes_later(chain: Chain):
    start = now()
    (second,) = await chain.add(time=start)
    (first,) = await chain.add(time=start - timedelta(seconds=5))
    await chain.seal()
    (late,) = await chain.add(time=start - timedelta(seconds=60))
    await chain.seal()
    assert [seal.audit_entry_id for seal in await chain.seals()] == [first, second, late]
    assert (await chain.report()).problems == []


async def test_what_is_not_committed_has_no_seal(chain: Chain):
    async with chain.sessions.begin() as session:
        audit.record(session, "test.happened", Origin(), now())
        await session.flush()
        await chain.seal()
        await session.rollback()
    await chain.seal()
    assert await chain.seals() == []


async def test_many_writers_and_sealers_make_one_chain(chain: Chain):
    stop = asyncio.Event()

    async def seal() -> None:
        sealer = Sealer(chain.sessions, chain.keys, now)
        while not stop.is_set():
            await sealer.round()

    async def write() -> None:
        for _ in range(20):
            await chain.add(random.randint(1, 4))

    sealers = [asyncio.create_task(seal()) for _ in range(3)]
    await asyncio.gather(*(write() for _ in range(4)))
    stop.set()
    await asyncio.gather(*sealers)
    await chain.seal()
    async with chain.sessions() as session:
        count = await session.scalar(select(func.count()).select_from(AuditEntryRow))
    report = await chain.report(patience_seconds=0)
    assert (report.problems, report.positions) == ([], count)


async def test_a_sealer_that_dies_in_the_middle_leaves_nothing_behind(chain: Chain):
    await chain.add(3)
    sealer = Sealer(chain.sessions, chain.keys, now)
    blocker = chain.sessions()
    async with blocker:
        # The last statement of a round waits for this lock, with the seals written and not committed.
        await blocker.execute(text("LOCK TABLE outbox IN ACCESS EXCLUSIVE MODE"))
        round_ = asyncio.create_task(sealer.round())

        async def killed() -> bool:
            # In a transaction of its own: within one, pg_stat_activity stays as it was first seen.
            async with chain.sessions() as session:
                found = await session.scalars(
                    text(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                        " WHERE datname = current_database() AND wait_event_type = 'Lock'"
                    )
                )
                return any(found)

        await eventually(killed)
        await blocker.rollback()
    with pytest.raises(ConnectionError):
        await round_
    assert await chain.seals() == []
    await chain.seal()
    report = await chain.report()
    assert (report.positions, report.problems) == (3, [])


async def test_run_goes_on_when_postgres_breaks_its_connections(chain: Chain, settings: AuthSettings):
    pool = db.connect(settings.postgres_url, 1)
    task = asyncio.create_task(Sealer(pool, chain.keys, now).run())
    try:
        for expected in (1, 2):
            await chain.add()

            async def sealed(expected: int = expected) -> bool:
                return len(await chain.seals()) == expected

            await eventually(sealed)
            async with chain.sessions() as session:
                await session.execute(
                    text(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                    )
                )
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await db.engine(pool).dispose()


@pytest.mark.parametrize(
    "change",
    [
        "kind = 'test.other'",
        "actor_id = ''",
        "impersonator_id = 'somebody'",
        "subject_id = 'somebody'",
        "workspace_id = gen_random_uuid()",
        "session_id = 'another'",
        "address = ''",
        "outcome = 'REFUSED'",
        "reason = 'WHY'",
        "time = time + interval '1 microsecond'",
        "details = details || '{\"number\": 99}'",
        "details = details - 'title'",
    ],
)
async def test_finds_a_changed_entry(chain: Chain, change: str):
    await chain.add(5)
    await chain.seal()
    third = (await chain.seals())[2].audit_entry_id
    await chain.tamper(f"UPDATE audit_entries SET {change} WHERE audit_entry_id = '{third}'")
    report = await chain.report()
    assert report.problem_count == 1
    assert report.problems[0].startswith(f"position 3: the entry {third}")


async def test_finds_a_removed_entry(chain: Chain):
    await chain.add(5)
    await chain.seal()
    third = (await chain.seals())[2].audit_entry_id
    await chain.tamper(f"DELETE FROM audit_entries WHERE audit_entry_id = '{third}'")
    assert (await chain.report()).problems == [f"position 3: the entry {third} has been removed"]


async def test_finds_a_removed_seal(chain: Chain):
    await chain.add(5)
    await chain.seal()
    third = (await chain.seals())[2].audit_entry_id
    await chain.tamper("DELETE FROM audit_seals WHERE position = 3")
    assert (await chain.report(patience_seconds=0)).problems == [
        "position 3: the seal has been removed",
        f"no position: the entry {third} has not been sealed",
    ]


async def test_finds_an_entry_that_was_removed_together_with_its_seal(chain: Chain):
    await chain.add(6)
    await chain.seal()
    gone = [seal.audit_entry_id for seal in (await chain.seals())[2:4]]
    await chain.tamper(
        "DELETE FROM audit_seals WHERE position IN (3, 4)",
        f"DELETE FROM audit_entries WHERE audit_entry_id IN ('{gone[0]}', '{gone[1]}')",
    )
    assert (await chain.report()).problems == ["position 3 to 4: the seal has been removed"]


async def test_finds_a_removed_beginning(chain: Chain):
    await chain.add(4)
    await chain.seal()
    await chain.tamper("DELETE FROM audit_seals WHERE position = 1")
    assert (await chain.report()).problems[0] == "position 1: the seal has been removed"


async def test_finds_a_gap_that_was_closed(chain: Chain):
    await chain.add(5)
    await chain.seal()
    third = (await chain.seals())[2].audit_entry_id
    await chain.tamper(
        "DELETE FROM audit_seals WHERE position = 3",
        f"DELETE FROM audit_entries WHERE audit_entry_id = '{third}'",
        "UPDATE audit_seals SET position = position - 1 WHERE position = 4",
        "UPDATE audit_seals SET position = position - 1 WHERE position = 5",
    )
    problems = (await chain.report()).problems
    assert [problem.partition(":")[0] for problem in problems[:2]] == ["position 3", "position 4"]
    assert problems[2].startswith("position 5: published at ")


async def test_finds_an_inserted_entry(chain: Chain):
    await chain.add(5)
    await chain.seal()
    intruder, copied = new_id(), (await chain.seals())[2].audit_entry_id
    await chain.tamper(
        "UPDATE audit_seals SET position = -position WHERE position >= 3",
        "UPDATE audit_seals SET position = 1 - position WHERE position < 0",
        f"INSERT INTO audit_entries SELECT '{intruder}', time, kind, outcome, reason, actor_id, impersonator_id,"
        f" subject_id, workspace_id, session_id, address, details FROM audit_entries"
        f" WHERE audit_entry_id = '{copied}'",
        f"INSERT INTO audit_seals SELECT 3, '{intruder}', seal FROM audit_seals WHERE position = 4",
    )
    problems = (await chain.report()).problems
    assert problems[0].startswith(f"position 3: the entry {intruder}")
    assert [problem.partition(":")[0] for problem in problems] == [
        *("position 3", "position 4", "position 5", "position 6"),
        "position 5",
    ]


async def test_finds_an_entry_that_was_put_in_past_the_sealer(chain: Chain):
    await chain.add(2)
    await chain.seal()
    intruder = new_id()
    await chain.tamper(
        f"INSERT INTO audit_entries SELECT '{intruder}', time, kind, outcome, reason, actor_id, impersonator_id,"
        " subject_id, workspace_id, session_id, address, details FROM audit_entries LIMIT 1"
    )
    await chain.seal()
    assert (await chain.report()).problems == []  # it is younger than the patience
    assert (await chain.report(patience_seconds=0)).problems == [
        f"no position: the entry {intruder} has not been sealed"
    ]


async def test_finds_a_cut_tail(chain: Chain):
    await chain.add(5)
    await chain.seal()
    gone = (await chain.seals())[-1].audit_entry_id
    cut = (
        "DELETE FROM audit_seals WHERE position = 5",
        f"DELETE FROM audit_entries WHERE audit_entry_id = '{gone}'",
    )
    await chain.tamper(*cut)
    (problem,) = (await chain.report()).problems
    assert problem.startswith("position 5: published at ")
    assert problem.endswith("and not in the table")
    # The chain grows again: the last head is right, and the one before still tells.
    await chain.add(3)
    await chain.seal()
    (problem,) = (await chain.report()).problems
    assert problem.startswith("position 5: published at ")
    assert problem.endswith("with another seal")


async def test_finds_a_changed_head(chain: Chain):
    await chain.add(3)
    await chain.seal()
    await chain.tamper(
        "UPDATE audit_seals SET seal = set_byte(seal, 10, get_byte(seal, 10) # 1) WHERE position = 3"
    )
    problems = (await chain.report()).problems
    assert [problem.partition(":")[0] for problem in problems] == ["position 3", "position 3"]
    assert problems[1].endswith("with another seal")


async def test_says_when_the_tail_cannot_be_checked(chain: Chain):
    await chain.add(3)
    await chain.seal()
    report = await verify(chain.sessions, chain.keys, None)
    assert (report.problem_count, report.tail_unknown) == (0, "no NATS server with JetStream answers")


async def test_the_tables_refuse_a_mistake(chain: Chain):
    await chain.add()
    await chain.seal()
    for statement in ("DELETE FROM audit_entries", "UPDATE audit_seals SET position = 2"):
        with pytest.raises(Exception, match="append-only"):
            async with chain.sessions.begin() as session:
                await session.execute(text(statement))


async def test_old_seals_hold_after_the_master_key_has_changed(chain: Chain):
    await chain.add(3)
    await chain.seal()
    file = chain.settings.master_key_file
    assert file is not None
    old = file.read_text()
    new = base64.b64encode(os.urandom(32)).decode()
    file.write_text(f"{new}\n{old}")
    chain.keys = chain_keys(chain.settings)
    await chain.add(2)
    await chain.seal()
    seals = await chain.seals()
    assert [seal.seal[:4] for seal in seals] == [seals[0].seal[:4]] * 3 + [seals[4].seal[:4]] * 2
    assert seals[0].seal[:4] != seals[4].seal[:4]
    assert (await chain.report()).problems == []

    file.write_text(new)
    chain.keys = chain_keys(chain.settings)
    assert (await chain.report()).problems == [
        f"position {position}: sealed with a key that the master key file does not have"
        for position in (1, 2, 3)
    ]


async def test_walks_and_reports_in_bounded_memory(chain: Chain, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("services.auth_svc.audit_chain._CHUNK", 3)
    monkeypatch.setattr("services.auth_svc.audit_chain._BATCH", 4)
    monkeypatch.setattr("services.auth_svc.audit_chain._PROBLEMS_KEPT", 2)
    await chain.add(11)
    await chain.seal()
    report = await chain.report()
    assert (report.positions, report.heads, report.problems) == (11, 3, [])
    await chain.tamper("UPDATE audit_entries SET kind = 'test.other'")
    report = await chain.report()
    assert (report.problem_count, len(report.problems)) == (11, 2)


def test_the_canonical_form_is_what_it_is():
    """Changing it breaks every chain there is: a new form needs a new version, and the old one stays."""
    row = AuditEntryRow(
        audit_entry_id="0199c1f0-0000-7000-8000-000000000001",
        time=datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
        kind="session.begun",
        outcome="DONE",
        reason="",
        actor_id="a",
        impersonator_id="i",
        subject_id="s",
        workspace_id=None,
        session_id="n",
        address="192.0.2.1",
        details={"z": ["é"], "a": {"c": 1, "b": True}},
    )
    assert canonical(row) == (
        b'[1,"0199c1f0-0000-7000-8000-000000000001",1767323045678901,"session.begun","DONE","","a","i","s","","n",'
        b'"192.0.2.1",{"a":{"b":true,"c":1},"z":["\\u00e9"]}]'
    )
    keys = ChainKeys([bytes(range(32))])
    # From `openssl dgst -sha256 -mac HMAC`, after the fingerprint.
    assert keys.seal(b"before", 7, row).hex() == (
        "630dcd29232540518e3d2368904685400689afa859816a3dd3174f5a4a749efd0003d123"
    )
