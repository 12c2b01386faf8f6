"""What is remembered of the events of the last 7 days."""

import random
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from meshboard.analytics.v1.event_columns_pb2 import WrittenBatch
from meshboard.analytics.v1.event_log_pb2 import LoggedBatch, LoggedEvent

from services.analytics_svc.duplicates import WINDOW, Duplicates, Keys, SeenKeys
from services.analytics_svc.event_keys import key_of, keys_of
from services.analytics_svc.event_store import EventStore
from services.analytics_svc.pipeline import written
from services.analytics_svc.tables import insert_events
from tests.harness import new_id

NOW = datetime.now(UTC)


def batch(workspace_id: str, source_id: str, receive_time: datetime, insert_ids: list[str]) -> WrittenBatch:
    made = LoggedBatch(workspace_id=workspace_id, source_id=source_id)
    made.receive_time.FromDatetime(receive_time)
    made.events.extend(LoggedEvent(event="view", distinct_id="ada", insert_id=i) for i in insert_ids)
    return written(made)


def left(batches: list[WrittenBatch]) -> list[list[str]]:
    return [[LoggedEvent.FromString(event).insert_id for event in made.events] for made in batches]


async def drop(duplicates: Duplicates, batches: list[WrittenBatch]) -> int:
    return await duplicates.drop(batches, [duplicates.suspects(made) for made in batches])


def array_of(*keys: int) -> Keys:
    return np.array(keys, np.uint64)


@pytest.mark.parametrize("at_once", [1, 1_000, 100_000])
def test_never_calls_a_known_key_new(at_once: int) -> None:
    dice = random.Random(1)
    seen = SeenKeys(capacity=1 << 14)
    keys = array_of(*(dice.getrandbits(64) for _ in range(100_000)))[: at_once * 20_000]  # it grows
    pieces = [keys[start : start + at_once] for start in range(0, len(keys), at_once)]
    maybe = sum(int(seen.add(piece).sum()) for piece in pieces)
    assert maybe < 20  # each look-up costs the store tens of milliseconds
    assert all(seen.add(piece).all() for piece in pieces)


def test_knows_what_comes_twice_at_once() -> None:
    seen = SeenKeys()
    assert seen.add(array_of(5, 7 << 40, 5, 9 << 50, 7 << 40)).tolist() == [False, False, True, False, True]
    assert seen.add(array_of(2**64 - 1, 9 << 50, 12345678901234567890)).tolist() == [False, True, False]
    assert seen.add(array_of()).tolist() == []


def test_forgets_what_was_filled_long_ago() -> None:
    seen = SeenKeys(capacity=64)
    keys = array_of(*(key_of("source", str(number)) for number in range(1_000)))
    seen.add(keys)
    seen.forget(-1)
    assert not seen.add(keys).all()


async def test_hashes_as_the_store_does(store: EventStore) -> None:
    source_id, insert_id = new_id(), "order é 1"
    sql = "SELECT toString(xxh3(concat({a:String}, {b:String})))"
    rows = (await store.query(sql, {"a": source_id, "b": insert_id})).rows
    assert rows == [[str(key_of(source_id, insert_id))]]
    keys = keys_of(source_id, [b"other", insert_id.encode()])
    assert int.from_bytes(keys[8:], "little") == key_of(source_id, insert_id)


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
