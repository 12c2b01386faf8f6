"""What is remembered of the events of the last 7 days."""

import random
from datetime import UTC, datetime, timedelta

from meshboard.analytics.v1.event_log_pb2 import LoggedBatch, LoggedEvent

from services.analytics_svc.duplicates import WINDOW, Duplicates, SeenKeys, key_of
from services.analytics_svc.event_store import EventStore
from services.analytics_svc.tables import insert_events
from tests.harness import new_id

NOW = datetime.now(UTC)


def batch(workspace_id: str, source_id: str, receive_time: datetime, insert_ids: list[str]) -> LoggedBatch:
    made = LoggedBatch(workspace_id=workspace_id, source_id=source_id)
    made.receive_time.FromDatetime(receive_time)
    made.events.extend(LoggedEvent(event="view", distinct_id="ada", insert_id=i) for i in insert_ids)
    return made


def left(batches: list[LoggedBatch]) -> list[list[str]]:
    return [[event.insert_id for event in made.events] for made in batches]


async def drop(duplicates: Duplicates, batches: list[LoggedBatch]) -> int:
    return await duplicates.drop(batches, [duplicates.suspects(made) for made in batches])


def test_never_calls_a_known_key_new() -> None:
    dice = random.Random(1)
    seen = SeenKeys(capacity=1 << 14)
    keys = [dice.getrandbits(64) for _ in range(100_000)]  # it grows three times
    maybe = sum(seen.add(key) for key in keys)
    assert maybe < 1_000
    assert all(seen.add(key) for key in keys)


def test_forgets_what_was_filled_long_ago() -> None:
    seen = SeenKeys(capacity=64)
    keys = [key_of("source", str(number)) for number in range(1_000)]
    for key in keys:
        seen.add(key)
    seen.forget(-1)
    assert not all(seen.add(key) for key in keys)


async def test_hashes_as_the_store_does(store: EventStore) -> None:
    source_id, insert_id = new_id(), "order é 1"
    sql = "SELECT toString(xxh3(concat({a:String}, {b:String})))"
    rows = (await store.query(sql, {"a": source_id, "b": insert_id})).rows
    assert rows == [[str(key_of(source_id, insert_id))]]


async def test_drops_within_seven_days_of_receipt_only(store: EventStore) -> None:
    workspace_id, source_id, other_id = new_id(), new_id(), new_id()
    for age, insert_ids in (
        (WINDOW + timedelta(minutes=1), ["old"]),
        (WINDOW - timedelta(minutes=1), ["young"]),
    ):
        data = batch(workspace_id, source_id, NOW - age, insert_ids).SerializeToString()
        await insert_events(store, [data], token=new_id())
    duplicates = Duplicates(store)
    await duplicates.remember(NOW)
    batches = [
        batch(workspace_id, source_id, NOW, ["old", "young", "new", "new", "a"]),
        batch(workspace_id, other_id, NOW, ["young", "a"]),
        batch(workspace_id, source_id, NOW, ["a", "b", "new"]),
    ]
    assert await drop(duplicates, batches) == 4
    assert left(batches) == [["old", "new", "a"], ["young", "a"], ["b"]]


async def test_is_exact_when_everything_is_suspect(store: EventStore) -> None:
    workspace_id, source_id = new_id(), new_id()
    insert_ids = [f"it's \\ {number}" for number in range(3_000)]
    stored = batch(workspace_id, source_id, NOW, insert_ids[::2]).SerializeToString()
    await insert_events(store, [stored], token=new_id())
    duplicates = Duplicates(store)
    await duplicates.remember(NOW)
    batches = [batch(workspace_id, source_id, NOW, insert_ids)]
    await drop(duplicates, [batch(workspace_id, source_id, NOW, insert_ids)])  # as if this had failed later
    assert await drop(duplicates, batches) == 1_500
    assert left(batches) == [insert_ids[1::2]]


async def test_looks_up_the_longest_ids_too(store: EventStore) -> None:
    """All of them at once would make a longer address than the store takes, and hold up the pipeline for ever."""
    workspace_id, source_id = new_id(), new_id()
    insert_ids = [f"{'🙂' * 190}\0\n\t'\\ {number}" for number in range(1_000)]
    data = batch(workspace_id, source_id, NOW, insert_ids).SerializeToString()
    await insert_events(store, [data], token=new_id())
    duplicates = Duplicates(store)
    await duplicates.remember(NOW)
    assert await drop(duplicates, [batch(workspace_id, source_id, NOW, [*insert_ids, "new"])]) == 1_000
