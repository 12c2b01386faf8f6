"""The store over its protocol, and its client: one suite for chDB and for a ClickHouse server."""

import asyncio
import time
from uuid import uuid4

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.analytics_svc.event_store import (
    DataRefusedError,
    EventStore,
    EventStoreError,
    TooExpensiveError,
    UnavailableError,
)
from services.analytics_svc.store import MERGE_NICENESS
from tests.analytics_svc.conftest import StoreProcess, running_store
from tests.conditions import eventually

ENDLESS = "SELECT count() FROM numbers(1000000000000)"
AWKWARD = st.text(alphabet=st.sampled_from("\\'\"\t\n\r\0[],{}é\U0001f389a"))


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8")) | AWKWARD, st.lists(AWKWARD, max_size=3))
async def test_binds_any_text(store: EventStore, text: str, texts: list[str]) -> None:
    answer = await store.query("SELECT {a:String}, {b:Array(String)}", {"a": text, "b": texts})
    assert answer.rows == [[text, texts]]


async def test_answers_ping_and_keeps_settings_to_one_request(
    store: EventStore, store_process: StoreProcess
) -> None:
    connector = aiohttp.UnixConnector(str(store_process.folder / "store.sock"))
    async with aiohttp.ClientSession(connector=connector) as session:
        async with session.get("http://store/ping") as answer:
            assert await answer.text() == "Ok.\n"
        url = "http://store/?query=SELECT+getSetting('max_rows_to_read')"
        async with session.get(f"{url}&max_rows_to_read=7") as answer:
            assert await answer.text() == "7\n"
        async with session.get(url) as answer:
            assert await answer.text() == "0\n"
        async with session.post("http://store/?x)=1", data="SELECT 1") as answer:
            assert (answer.status, answer.headers["X-ClickHouse-Exception-Code"]) == (500, "115")


async def test_names_the_error(store: EventStore) -> None:
    with pytest.raises(EventStoreError, match="UNKNOWN_IDENTIFIER") as caught:
        await store.query("SELECT nosuch")
    assert caught.value.code == 47


async def test_ends_a_query_at_its_time_limit(store: EventStore) -> None:
    with pytest.raises(TooExpensiveError):
        await store.query(ENDLESS, timeout=0.3)


async def test_ends_the_query_of_a_client_that_goes_away(store: EventStore) -> None:
    running = [asyncio.create_task(store.query(ENDLESS, timeout=100)) for _ in range(8)]
    await _until(store, 4)  # the others wait for a reader
    for task in running:
        task.cancel()
    await _until(store, 0)


async def _until(store: EventStore, count: int) -> None:
    async def reached() -> bool:
        return await _under_way(store) == count

    await eventually(reached)


async def _under_way(store: EventStore) -> int:
    # The statement begins like a write, so that it does not wait behind the readers.
    body = await store.scan(
        "(SELECT count() FROM system.processes WHERE query LIKE '%1000000000000%' AND query NOT LIKE '%processes%')"
        " FORMAT TSV"
    )
    return int(body)


async def test_runs_readers_beside_each_other(store: EventStore) -> None:
    async def took() -> float:
        start = time.monotonic()
        await store.query("SELECT sleep(0.5)")
        return time.monotonic() - start

    assert max(await asyncio.gather(*[took() for _ in range(4)])) < 1.5


async def test_keeps_one_of_two_inserts_with_the_same_token(store: EventStore) -> None:
    table = f"t{uuid4().hex}"
    await store.execute(
        f"CREATE TABLE {table} (a UInt64) ENGINE = MergeTree ORDER BY a"
        " SETTINGS non_replicated_deduplication_window = 100"
    )
    for token in ("first", "first", "second"):
        await store.insert(f"INSERT INTO {table} (a) FORMAT JSONEachRow", b'{"a":1}\n{"a":2}\n', token=token)
        await store.insert(
            f"INSERT INTO {table} SELECT a + 10 FROM input('a UInt64') FORMAT CSV",
            b"1\n2\n",
            token=f"{token} too",
        )
    assert (await store.query(f"SELECT a, count() FROM {table} GROUP BY a ORDER BY a")).rows == [
        [1, 2],
        [2, 2],
        [11, 2],
        [12, 2],
    ]
    with pytest.raises(DataRefusedError):
        await store.insert(f"INSERT INTO {table} (a) FORMAT JSONEachRow", b'{"a":"x"}\n', token="third")


async def test_takes_megabytes_without_a_warning(store: EventStore) -> None:
    table = f"t{uuid4().hex}"
    await store.execute(f"CREATE TABLE {table} (a UInt64) ENGINE = MergeTree ORDER BY a")
    await store.insert(f"INSERT INTO {table} (a) FORMAT CSV", b"1234567\n" * 250_000, token="large")
    assert (await store.query(f"SELECT count(), sum(a) FROM {table}")).rows == [[250_000, 1234567 * 250_000]]


async def test_keeps_its_rows_through_kill_9_and_ends_cleanly() -> None:
    async with running_store() as process:
        store = EventStore(process.url)
        await store.execute("CREATE TABLE t (a UInt64) ENGINE = MergeTree ORDER BY a")
        await store.insert("INSERT INTO t (a) FORMAT CSV", b"1\n2\n", token="x")
        await process.kill()
        with pytest.raises(UnavailableError):
            await store.query("SELECT 1")
        await process.start()
        assert (await store.query("SELECT count() FROM t")).rows == [[2]]
        async with aiohttp.ClientSession() as session:
            for path in ("livez", "readyz", "metrics"):
                async with session.get(f"http://127.0.0.1:{process.port}/{path}") as answer:
                    assert answer.status == 200
        await store.close()
        assert await process.stop() == 0


async def test_ends_within_seconds_while_a_query_runs() -> None:
    async with running_store() as process:
        store = EventStore(process.url)
        running = asyncio.create_task(store.query(ENDLESS, timeout=100))

        async def begun() -> bool:
            return await _under_way(store) == 1

        await eventually(begun)
        assert await process.stop() == 0
        with pytest.raises((UnavailableError, EventStoreError)):
            await running
        await store.close()


async def test_merges_give_way_to_inserts_and_queries(store: EventStore) -> None:
    setting = "SELECT value FROM system.server_settings WHERE name = 'os_threads_nice_value_merge_mutate'"
    assert (await store.query(setting)).rows == [[str(MERGE_NICENESS)]]
