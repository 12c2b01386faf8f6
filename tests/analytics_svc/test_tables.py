"""The statements that make the tables: run on the embedded store, read by its parser where they are for a cluster."""

import pytest

from services.analytics_svc.event_store import ON_CLUSTER, EventStore
from services.analytics_svc.tables import create_tables, statements


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
    for question in (described, keys):
        one, other = [(await store.query(question, {"table": table})).rows for table in (name, "events")]
        assert one == other
    await store.execute(f"DROP TABLE {name}")


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
