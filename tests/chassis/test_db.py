import asyncio
import subprocess
import sys

import asyncpg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, exc, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.pool import QueuePool
from uuid_utils.compat import uuid7

from cli.envoy_config import REPOSITORY
from services.chassis import db as chassis_db
from services.chassis.db import ChassisBase, GrantRow, InboxRow, OutboxRow, Rows, fetch_at_once
from tests.conditions import eventually
from tests.parts import Parts

Sessions = async_sessionmaker[AsyncSession]


def connections_in_use(db: Sessions) -> int:
    pool = chassis_db.engine(db).sync_engine.pool
    assert isinstance(pool, QueuePool)
    return pool.checkedout()


async def test_many_replicas_migrate_at_once(parts: Parts) -> None:
    url = await parts.fresh_database("user")
    await asyncio.gather(*(chassis_db.migrate(url, "tests.chassis.example_svc") for _ in range(5)))
    db = chassis_db.connect(url)
    async with db() as session:
        assert await session.scalar(text("SELECT version_num FROM alembic_version")) == "0004"
        assert await session.scalar(text("SELECT to_regclass('effects_subject_id') IS NOT NULL"))
    await chassis_db.engine(db).dispose()


async def test_migrate_leaves_a_newer_database_alone(database_url: str, db: Sessions) -> None:
    async with db.begin() as session:
        await session.execute(text("UPDATE alembic_version SET version_num = '0009'"))
    await chassis_db.migrate(database_url, "tests.chassis.example_svc")
    async with db() as session:
        assert await session.scalar(text("SELECT version_num FROM alembic_version")) == "0009"


async def test_migrate_gives_up_waiting(database_url: str, db: Sessions) -> None:
    async with db.begin() as session:
        await session.execute(text("UPDATE alembic_version SET version_num = '0003'"))
    async with db() as session:
        await session.execute(text("SELECT pg_advisory_lock(:key)"), {"key": 0x6D657368})
        with pytest.raises(TimeoutError):
            await chassis_db.migrate(database_url, "tests.chassis.example_svc", timeout=0.3)


async def test_with_nothing_to_migrate_alembic_takes_no_memory(database_url: str, db: Sessions) -> None:
    starts = (
        "import asyncio, sys\n"
        "from services.chassis import db\n"
        "asyncio.run(db.migrate(sys.stdin.readline(), 'tests.chassis.example_svc'))\n"
        "print('alembic' in sys.modules)\n"
    )
    said = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", starts],
        cwd=REPOSITORY,
        input=database_url,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert said.stdout == "False\n"


async def test_tables_are_as_the_classes_say(db: Sessions) -> None:
    def differences(connection: Connection) -> list[object]:
        names = set(ChassisBase.metadata.tables)
        context = MigrationContext.configure(
            connection,
            opts={
                "compare_type": True,
                "compare_server_default": True,
                "include_name": lambda name, kind, _: kind != "table" or name in names,
            },
        )
        return list(compare_metadata(context, ChassisBase.metadata))

    async with chassis_db.engine(db).connect() as connection:
        assert await connection.run_sync(differences) == []


def grant(**values: object) -> dict[str, object]:
    return {
        "workspace_id": str(uuid7()),
        "grant_id": str(uuid7()),
        "resource_type": "thing",
        "resource_id": str(uuid7()),
        "subject_type": "workspace",
        "role": "viewer",
        "effect": "ALLOW",
        "creator_id": str(uuid7()),
        **values,
    }


async def test_a_workspace_gets_a_role_on_a_resource_once(db: Sessions) -> None:
    first = grant()
    async with db.begin() as session:
        await session.execute(insert(GrantRow).values(first))
        row = await session.scalar(
            insert(GrantRow)
            .values({**first, "grant_id": str(uuid7())})
            .on_conflict_do_nothing()
            .returning(GrantRow.grant_id)
        )
        assert row is None
        assert await session.scalar(text("SELECT count(*) FROM grants")) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"subject_type": "user"},
        {"subject_id": str(uuid7())},
        {"subject_type": "robot", "subject_id": str(uuid7())},
        {"effect": "MAYBE"},
    ],
)
async def test_a_grant_that_means_nothing_is_refused(db: Sessions, wrong: dict[str, object]) -> None:
    with pytest.raises(exc.IntegrityError):
        async with db.begin() as session:
            await session.execute(insert(GrantRow).values(grant(**wrong)))


async def test_ids_are_strings(db: Sessions) -> None:
    values = grant()
    async with db.begin() as session:
        await session.execute(insert(GrantRow).values(values))
        assert await session.scalar(text("SELECT pg_typeof(grant_id)::text FROM grants")) == "uuid"
    async with db() as session:
        row = await session.get_one(GrantRow, (values["workspace_id"], values["grant_id"]))
        assert row.resource_id == values["resource_id"]


async def test_connections_say_who_they_are_and_have_limits(database_url: str) -> None:
    db = chassis_db.connect(database_url, statement_timeout_seconds=0.2)
    async with db() as session:
        name = await session.scalar(text("SELECT current_setting('application_name')"))
        assert str(name).startswith("meshboard user")
    with pytest.raises(exc.DBAPIError, match="statement timeout"):
        async with db() as session:
            await session.execute(text("SELECT pg_sleep(5)"))
    await chassis_db.engine(db).dispose()


async def test_errors_do_not_show_parameters(db: Sessions) -> None:
    with pytest.raises(exc.DBAPIError) as raised:
        async with db() as session:
            await session.execute(text("SELECT 1 / (:secret - 77123)"), {"secret": 77123})
    assert "77123," not in str(raised.value)
    assert "hide_parameters" in str(raised.value)


@pytest.mark.parametrize("at_once", [False, True])
async def test_a_cancelled_call_cancels_its_statement(db: Sessions, at_once: bool) -> None:
    statement = "SELECT pg_sleep(30) /* cancel me */"

    async def sleep() -> None:
        if at_once:
            await fetch_at_once(db, statement)
        async with db() as session:
            await session.execute(text(statement))

    async def sleeping() -> int:
        async with db() as session:
            count = await session.scalar(
                text(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                    " AND state = 'active' AND query LIKE '%cancel me%' AND pid <> pg_backend_pid()"
                )
            )
        return int(count or 0)

    async def begun() -> bool:
        return await sleeping() == 1

    async def ended() -> bool:
        return await sleeping() == 0

    task = asyncio.create_task(sleep())
    await eventually(begun)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(ended, seconds=3)
    assert connections_in_use(db) == 0


async def test_lost_connections_are_replaced_unseen(parts: Parts, db: Sessions) -> None:
    async with db() as session:
        await session.execute(text("SELECT 1"))
    pid_query = text("SELECT pg_backend_pid()")
    async with db() as session:
        old = await session.scalar(pid_query)
    other = chassis_db.connect(parts.admin_url)
    async with other() as session:
        await session.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": old})
    await chassis_db.engine(other).dispose()
    async with db() as session:
        assert await session.scalar(pid_query) != old


async def test_a_statement_at_once_finds_no_lost_connection(parts: Parts, db: Sessions) -> None:
    pid = "SELECT pg_backend_pid()"
    ((old,),) = await fetch_at_once(db, pid)
    other = chassis_db.connect(parts.admin_url)
    await fetch_at_once(other, "SELECT pg_terminate_backend($1, 5000)", old)
    await chassis_db.engine(other).dispose()
    ((new,),) = await fetch_at_once(db, pid)
    assert new != old
    assert connections_in_use(db) == 0


async def test_statements_at_once_take_connections_that_are_idle_closed_or_none(
    parts: Parts, db: Sessions, caplog: pytest.LogCaptureFixture
) -> None:
    pid = "SELECT pg_backend_pid() FROM pg_sleep(0.05)"
    for _ in range(2):  # the first round opens them, the second finds them idle
        found = await asyncio.gather(*(fetch_at_once(db, pid) for _ in range(3)))
        pids = {row[0] for (row,) in found}
        assert len(pids) == 3
    other = chassis_db.connect(parts.admin_url)
    await fetch_at_once(
        other, "SELECT pg_terminate_backend(pid, 5000) FROM unnest($1::int[]) AS pid", [*pids]
    )
    await chassis_db.engine(other).dispose()
    found = await asyncio.gather(*(fetch_at_once(db, pid) for _ in range(3)))
    assert not pids & {row[0] for (row,) in found}
    late = asyncio.create_task(fetch_at_once(db, "SELECT pg_sleep(5)"))
    await asyncio.sleep(0)
    late.cancel()
    with pytest.raises(asyncio.CancelledError):
        await late
    assert (await fetch_at_once(db, "SELECT 7"))[0][0] == 7
    assert connections_in_use(db) == 0
    with pytest.raises(ConnectionError):  # lost in the middle of a statement
        await fetch_at_once(db, "SELECT pg_terminate_backend(pg_backend_pid())")
    assert (await fetch_at_once(db, "SELECT 7"))[0][0] == 7
    assert connections_in_use(db) == 0
    assert not caplog.records


async def test_statements_at_once_take_the_idle_ones_of_a_pool_that_is_full(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = chassis_db.connect(parts.admin_url, pool_size=2)
    assert len(await asyncio.gather(*(fetch_at_once(small, "SELECT pg_sleep(0.05)") for _ in range(4)))) == 4
    monkeypatch.setattr(chassis_db, "greenlet_spawn", None)
    assert (await fetch_at_once(small, "SELECT 7"))[0][0] == 7
    monkeypatch.undo()
    await chassis_db.engine(small).dispose()


async def test_a_statement_at_once_says_that_postgres_is_away() -> None:
    absent = chassis_db.connect("postgresql://user:x@/user?host=/nonexistent")
    with pytest.raises(FileNotFoundError) as refused:
        await fetch_at_once(absent, "SELECT 1")
    assert chassis_db.is_away(refused.value)
    assert connections_in_use(absent) == 0
    await chassis_db.engine(absent).dispose()


async def test_a_connection_that_postgres_refuses_is_as_one_to_a_postgres_that_is_away(parts: Parts) -> None:
    url = await parts.fresh_database("user")
    name = url.partition("?")[0].rpartition("/")[2]
    admin = await asyncpg.connect(parts.admin_url)
    await admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    await admin.close()
    closed = chassis_db.connect(url)
    with pytest.raises(ConnectionError):
        await fetch_at_once(closed, "SELECT 1")
    assert connections_in_use(closed) == 0
    await chassis_db.engine(closed).dispose()


async def test_ready_says_no_in_time(parts: Parts, db: Sessions) -> None:
    assert await chassis_db.ready(db)
    absent = chassis_db.connect("postgresql://user:x@/user?host=/nonexistent")
    assert not await chassis_db.ready(absent)
    await chassis_db.engine(absent).dispose()


def two_rows() -> tuple[Rows, str, str]:
    """An event and a consumed one, and their ids."""
    rows, event_id, consumed_id = Rows(), str(uuid7()), str(uuid7())
    rows.add(OutboxRow(id=event_id, subject="a", payload=b"\x00", headers={"b": 'c"'}))
    rows.add(InboxRow(consumer="d", event_id=consumed_id))
    return rows, event_id, consumed_id


async def test_rows_go_in_with_their_defaults_in_one_statement(db: Sessions) -> None:
    rows, event_id, consumed_id = two_rows()
    assert await rows.insert_if(db, "SELECT $1 = 'yes'", "yes") is True
    async with db() as session:
        event = await session.get_one(OutboxRow, event_id)
        consumed = await session.get_one(InboxRow, ("d", consumed_id))
    assert (event.subject, event.payload, event.headers) == ("a", b"\x00", {"b": 'c"'})
    assert event.create_time == consumed.receive_time  # both are now() of one transaction
    assert event.publish_time is None


async def test_rows_do_not_go_in_unless_the_condition_says_so(db: Sessions) -> None:
    rows, event_id, consumed_id = two_rows()
    assert await rows.insert_if(db, "SELECT $1 = 'yes'", "no") is False
    assert await rows.insert_if(db, "SELECT true WHERE $1 = 'yes'", "no") is None
    async with db() as session:
        assert await session.get(OutboxRow, event_id) is None
        assert await session.get(InboxRow, ("d", consumed_id)) is None


async def test_rows_go_in_together_or_not_at_all(db: Sessions) -> None:
    rows, event_id, consumed_id = two_rows()
    rows.add(InboxRow(consumer="d", event_id=consumed_id))
    with pytest.raises(ConnectionError):
        await rows.insert_if(db, "SELECT true")
    async with db() as session:
        assert await session.get(OutboxRow, event_id) is None


async def test_many_rows_go_in_with_the_transaction(db: Sessions) -> None:
    rows, ids = Rows(), [str(uuid7()) for _ in range(40)]
    for number, event_id in enumerate(ids):
        rows.add(InboxRow(consumer="d", event_id=event_id))
        rows.add(OutboxRow(id=event_id, subject="a", payload=b"\x00", headers={"n": f'"{number}\\'}))
    async with chassis_db.driver_connection(db) as connection:
        transaction = connection.transaction()
        await transaction.start()
        await rows.insert(connection)
        await transaction.rollback()
        async with db() as session:
            assert list(await session.scalars(select(InboxRow.event_id))) == []
        async with connection.transaction():
            await rows.insert(connection)
    async with db() as session:
        assert set(await session.scalars(select(InboxRow.event_id))) == set(ids)
        events = {event.id: event for event in await session.scalars(select(OutboxRow))}
    assert [events[event_id].headers for event_id in ids] == [
        {"n": f'"{number}\\'} for number in range(len(ids))
    ]
    assert {event.payload for event in events.values()} == {b"\x00"}
