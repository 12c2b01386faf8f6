"""What the figures of the store say."""

from meshboard.analytics.v1.event_log_pb2 import LoggedBatch, LoggedEvent

from services.analytics_svc.event_store import EventStore
from services.analytics_svc.store_metrics import GAUGES, look
from services.analytics_svc.tables import create_tables, insert_events
from tests.analytics_svc.conftest import running_store
from tests.conditions import eventually
from tests.harness import new_id


def value(name: str) -> float:
    return float(next(iter(GAUGES[name].collect())).samples[0].value)


async def test_shows_parts_and_what_becomes_of_them() -> None:
    async with running_store() as process:
        store = EventStore(process.url)
        await create_tables(store)
        await look(store)
        assert [value(name) for name in ("rows", "parts", "largest_partition_parts", "partitions")] == [0] * 4
        assert value("free_bytes") > 0
        await store.execute("SYSTEM STOP MERGES")
        source = LoggedBatch(workspace_id=new_id(), source_id=new_id())
        for number in range(4):
            source.sequence = number
            source.retention_days = 7 if number == 3 else 0
            source.receive_time.GetCurrentTime()
            del source.events[:]
            source.events.extend(LoggedEvent(event="view", distinct_id="ada") for _ in range(10))
            await insert_events(store, [source.SerializeToString()], token=str(number))
        await look(store)
        assert [value(name) for name in ("rows", "parts", "largest_partition_parts", "partitions")] == [
            40,
            4,
            3,
            2,
        ]
        assert value("bytes") > 0
        merged = value("merged_rows")
        await store.execute("SYSTEM START MERGES")
        await store.execute("OPTIMIZE TABLE events FINAL")

        async def compacted() -> bool:
            await look(store)
            return value("largest_partition_parts") == 1

        await eventually(compacted)
        assert value("merged_rows") >= merged + 30
        assert (value("merges"), value("mutations")) == (0, 0)
        await store.close()
