"""The statements that make the tables: run on the embedded store, read by its parser where they are for a cluster."""

import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest
from meshboard.analytics.v1.event_log_pb2 import LoggedBatch

from services.analytics_svc.event_store import ON_CLUSTER, EventStore
from services.analytics_svc.tables import create_tables, insert_events, statements
from tests.analytics_svc.conftest import running_store
from tests.conditions import eventually
from tests.harness import new_id

# What `quarters` keeps, asked of it alone, and of the events alone.
_QUARTERS = """
SELECT source_id, toStartOfFifteenMinutes(time) AS quarter, event, is_robot, count(), min(time), max(time),
    max(receive_time), max(retention_days)
FROM events GROUP BY source_id, quarter, event, is_robot ORDER BY source_id, quarter, event, is_robot
"""
_FROM_COUNTS = {"force_optimize_projection_name": "quarters"}
_FROM_EVENTS = {"optimize_use_projections": 0}


@pytest.fixture
async def own_store() -> AsyncIterator[EventStore]:
    """A store that a test may change as it likes."""
    async with running_store() as process:
        client = EventStore(process.url)
        await create_tables(client)
        yield client
        await client.close()


def random_batch(dice: random.Random, source_id: str, day: int, count: int) -> bytes:
    """Events received on a day of November 2026, most of them at borders of quarters of an hour."""
    batch = LoggedBatch(workspace_id=new_id(), source_id=source_id, retention_days=7)
    received = datetime(2026, 11, day, 12, tzinfo=UTC)
    batch.receive_time.FromDatetime(received)
    for number in range(count):
        time = received - timedelta(
            milliseconds=900_000 * dice.randrange(8) + dice.choice([0, 1, -1, 450_000])
        )
        event = batch.events.add(event=dice.choice(["view", "buy"]), distinct_id="ada", insert_id=f"{number}")
        event.is_robot = dice.random() < 0.3
        event.time.FromDatetime(time)
    return batch.SerializeToString()


async def counted(store: EventStore) -> int:
    """How many events there are by their counts, which are those of the events."""
    counts = (await store.query(_QUARTERS, settings=_FROM_COUNTS)).rows
    assert counts == (await store.query(_QUARTERS, settings=_FROM_EVENTS)).rows
    return sum(row[4] for row in counts)


async def test_may_run_again(store: EventStore) -> None:
    await create_tables(store)
    await create_tables(store)


@pytest.mark.parametrize("number", range(len(statements("meshboard"))))
async def test_is_understood_for_a_cluster(store: EventStore, number: int) -> None:
    """There is no cluster here: what can be seen is that each statement is one, and that nothing is left to fill in."""
    statement = statements("meshboard")[number]
    tree = (await store.scan(f"EXPLAIN AST {statement}")).decode()
    assert tree.startswith(("CreateQuery", "AlterQuery"))
    assert "events" in tree or "persons" in tree
    assert "ON CLUSTER 'meshboard'" in statement
    assert "%" not in statement


async def test_a_cluster_has_the_columns_and_the_order_of_the_embedded_table(store: EventStore) -> None:
    name = "cluster_columns"
    shard = statements("meshboard")[0]
    engine = shard[shard.index("ENGINE") : shard.index(")", shard.index("ENGINE")) + 1]
    # The same definition without what only a cluster has.
    embedded = shard.replace(engine, "ENGINE = MergeTree").replace(" ON CLUSTER 'meshboard'", "")
    embedded = embedded.replace("events_shard (", f"{name} (")
    embedded = embedded[: embedded.index("SETTINGS")]
    await store.execute(embedded)
    described = (
        "SELECT name, type FROM system.columns WHERE table = {table:String} AND database = currentDatabase()"
    )
    keys = (
        "SELECT partition_key, sorting_key FROM system.tables"
        " WHERE name = {table:String} AND database = currentDatabase()"
    )
    projections = (
        "SELECT name, query FROM system.projections"
        " WHERE table = {table:String} AND database = currentDatabase()"
    )
    indices = (
        "SELECT name, type, expr FROM system.data_skipping_indices"
        " WHERE table = {table:String} AND database = currentDatabase()"
    )
    for question in (described, keys, projections, indices):
        one, other = [(await store.query(question, {"table": table})).rows for table in (name, "events")]
        assert one == other
    await store.execute(f"DROP TABLE {name}")


@pytest.mark.parametrize("seed", range(3))
async def test_counts_go_with_the_events(own_store: EventStore, seed: int) -> None:
    dice = random.Random(seed)
    sources = [new_id(), new_id()]
    total = 0
    for number in range(8):
        count = dice.randrange(1, 40)
        batch = random_batch(dice, sources[number % 2], 10 + number % 3, count)
        for _ in range(dice.randrange(1, 3)):  # some come twice
            await insert_events(own_store, [batch], token=str(number))
        total += count
        assert await counted(own_store) == total
    await own_store.execute("OPTIMIZE TABLE events FINAL")
    assert await counted(own_store) == total

    async def removed(statement: str) -> None:
        nonlocal total
        await own_store.execute(statement)
        left = await counted(own_store)
        assert 0 < left < total
        total = left

    at_once = "SETTINGS mutations_sync = 1"
    first, second, _ = (
        row[0]
        for row in (
            await own_store.query("SELECT DISTINCT _partition_id FROM events ORDER BY _partition_id")
        ).rows
    )
    await removed(f"ALTER TABLE events DROP PARTITION ID '{first}'")
    # Both sources have events there, at the same times.
    await removed(
        f"ALTER TABLE events DELETE IN PARTITION ID '{second}' WHERE source_id = '{sources[0]}' {at_once}"
    )
    await removed("DELETE FROM events WHERE event = 'buy'")


async def test_an_older_store_gets_what_came_later(own_store: EventStore) -> None:
    await own_store.execute("ALTER TABLE events DROP PROJECTION quarters, DROP INDEX sequences")
    dice = random.Random(4)
    await insert_events(own_store, [random_batch(dice, new_id(), 10, 20)], token="before")
    await create_tables(own_store)
    await insert_events(own_store, [random_batch(dice, new_id(), 10, 30)], token="after")
    assert await counted(own_store) == 50

    async def whole() -> bool:
        unbuilt = "SELECT count() FROM system.parts WHERE active AND table = 'events' AND empty(projections)"
        return (await own_store.query(unbuilt)).rows == [[0]]

    await eventually(whole)
    assert await counted(own_store) == 50
    rewrites = await own_store.query("SELECT count() FROM system.mutations")
    await create_tables(own_store)
    assert (await own_store.query("SELECT count() FROM system.mutations")).rows == rewrites.rows


async def test_what_came_last_is_found_by_its_place(store: EventStore) -> None:
    """As live tails look for it: not all that was received since yesterday is read."""
    ids = {"w": new_id(), "s": new_id()}
    await store.execute(
        "INSERT INTO events (workspace_id, source_id, event, time, receive_time, sequence)"
        " SELECT {w:UUID}, {s:UUID}, ['view', 'buy'][number % 2 + 1], at, at, number FROM"
        " (SELECT number, toDateTime64('2026-11-10', 3, 'UTC') + number / 2 AS at FROM numbers(100000))",
        ids,
    )
    scope = "workspace_id = {w:UUID} AND source_id = {s:UUID}"
    found = await store.query(f"SELECT count() FROM events WHERE {scope} AND sequence > 99900", ids)
    assert found.rows == [[99]]
    assert found.rows_read < 30_000


async def test_knows_each_setting_of_a_cluster(store: EventStore) -> None:
    known = await store.query(
        "SELECT name FROM system.settings WHERE name IN {names:Array(String)}", {"names": list(ON_CLUSTER)}
    )
    assert {row[0] for row in known.rows} == set(ON_CLUSTER)


def test_alters_the_table_of_each_shard() -> None:
    assert EventStore.table_of(_named(""), "events") == "events"
    assert EventStore.table_of(_named("c1"), "events") == "events_shard ON CLUSTER 'c1'"


def _named(cluster: str) -> EventStore:
    made = EventStore.__new__(EventStore)
    made.cluster = cluster
    return made
