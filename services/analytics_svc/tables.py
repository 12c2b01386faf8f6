"""The tables of the event store, and how batches of the event log become rows of them."""

import asyncio
import time
from collections.abc import Iterable, Mapping

from services.analytics_svc.event_store import EventStore, UnavailableError, Value
from services.analytics_svc.persons import persons_table

# Partitions follow the time of receipt: a batch falls into one (two, when one ends), however old its events are, and
# the look-up of duplicates reads the newest only. What is kept for about as long lies together, in stretches that are
# short beside that: days up to a month, weeks up to a year, months beyond. So it is removed by dropping partitions, see
# removals.py. The key serves queries: one source, a stretch of days, an event.
#
# `quarters` has how many events there are in each quarter of an hour, for Selection.quarters, and when the last of them
# was received, for removals.py. It belongs to the parts of the table: it is written, merged, rewritten and dropped with
# them, so that it says what they say. `sequences` lets live tails read what came last.
_QUARTER = "workspace_id, source_id, toStartOfFifteenMinutes(time), event, is_robot"
_KEPT = "count(), min(time), max(time), max(receive_time), max(retention_days)"
_QUARTERS = f"quarters (SELECT {_QUARTER}, {_KEPT} GROUP BY {_QUARTER})"
_SEQUENCES = "sequences sequence TYPE minmax"
_COLUMNS = f"""
    workspace_id UUID,
    source_id UUID,
    event LowCardinality(String),
    distinct_id String,
    insert_id String,
    time DateTime64(3, 'UTC'),
    receive_time DateTime64(3, 'UTC'),
    url String,
    path String,
    host LowCardinality(String),
    referrer String,
    referrer_host LowCardinality(String),
    user_agent String,
    browser LowCardinality(String),
    os LowCardinality(String),
    device LowCardinality(String),
    is_robot Bool,
    country LowCardinality(String),
    utm_source LowCardinality(String),
    utm_medium LowCardinality(String),
    utm_campaign LowCardinality(String),
    utm_term LowCardinality(String),
    utm_content LowCardinality(String),
    strings Map(LowCardinality(String), String),
    numbers Map(LowCardinality(String), Float64),
    sequence UInt64,
    position UInt32,
    previous_id String,
    region LowCardinality(String),
    city LowCardinality(String),
    retention_days UInt16,
    INDEX insert_ids insert_id TYPE bloom_filter(0.001),
    INDEX {_SEQUENCES},
    PROJECTION {_QUARTERS}
"""
_ORDER = """
PARTITION BY (
    multiIf(retention_days = 0, 0, retention_days <= 31, 1, retention_days <= 366, 2, 3),
    multiIf(
        retention_days BETWEEN 1 AND 31, toDate(receive_time),
        retention_days BETWEEN 32 AND 366, toMonday(receive_time),
        toStartOfMonth(receive_time))
)
ORDER BY (workspace_id, source_id, toDate(time), event, time)
"""
# How many tokens of inserts are remembered.
_TOKENS = 10_000
# An insert that would leave less is not made, so that merges have room, and the queries that wait for them.
_KEPT_FREE_BYTES = 256 << 20
# Merges cost more than all else that is done with an event. So they wait until parts have so many of about their size
# beside them, instead of 5, and an event is written half as often; queries find a few more parts.
_MERGE_BASE = 12
# What one insert brings is one file and not one for each column: to make and sync a hundred costs half as much as to
# understand the events. What is merged from several large inserts has its columns apart.
_COMPACT_BYTES = 32 << 20

_EMBEDDED = f"""
CREATE TABLE IF NOT EXISTS events ({_COLUMNS})
ENGINE = MergeTree {_ORDER}
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, non_replicated_deduplication_window = {_TOKENS}
"""

# On a cluster each shard has the events of some people, all of them, and each of its replicas has a copy. What asks for
# `events` asks all shards. `{shard}`, `{database}` and `{replica}` are filled in by the servers.
_CLUSTER = (
    f"""
CREATE TABLE IF NOT EXISTS events_shard ON CLUSTER '%(cluster)s' ({_COLUMNS})
ENGINE = ReplicatedMergeTree('/clickhouse/tables/{{shard}}/{{database}}/events_shard', '{{replica}}') {_ORDER}
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1, replicated_deduplication_window = {_TOKENS},
    replicated_deduplication_window_seconds = 604800
""",
    """
CREATE TABLE IF NOT EXISTS events ON CLUSTER '%(cluster)s' AS events_shard
ENGINE = Distributed('%(cluster)s', currentDatabase(), events_shard, sipHash64(source_id, distinct_id))
""",
)

_SETTING = (
    f"MODIFY SETTING min_free_disk_bytes_to_perform_insert = {_KEPT_FREE_BYTES},"
    f" merge_selector_base = {_MERGE_BASE}, min_bytes_for_wide_part = {_COMPACT_BYTES},"
    " lightweight_mutation_projection_mode = 'rebuild'"
)
# Columns that came later, for tables that were made without them. Such tables keep their partitions of months.
_CHANGES = (
    "ADD COLUMN IF NOT EXISTS previous_id String,"
    " ADD COLUMN IF NOT EXISTS region LowCardinality(String),"
    " ADD COLUMN IF NOT EXISTS city LowCardinality(String),"
    " ADD COLUMN IF NOT EXISTS retention_days UInt16"
)
_ADDITIONS = f"ADD INDEX IF NOT EXISTS {_SEQUENCES}, ADD PROJECTION IF NOT EXISTS {_QUARTERS}"
# Parts from before have neither, and are read whole until this has been through them.
_BUILD = "MATERIALIZE INDEX sequences, MATERIALIZE PROJECTION quarters"
_UNBUILT = """
SELECT count() FROM {parts} WHERE database = currentDatabase() AND table = '{table}' AND active
    AND NOT has(projections, 'quarters')
"""
_BUILDING = """
SELECT count() FROM {mutations} WHERE database = currentDatabase() AND table = '{table}' AND NOT is_done
    AND command LIKE '%MATERIALIZE PROJECTION%'
"""

# What is read of `LoggedBatch`, in the engine's words: `optional` makes what a property is not come as NULL.
_SCHEMA = """
syntax = "proto3";
message Timestamp { int64 seconds = 1; int32 nanos = 2; }
message Value { optional double number_value = 2; optional string string_value = 3; optional bool bool_value = 4; }
message Struct { map<string, Value> fields = 1; }
message LoggedEvent {
  string event = 1; string distinct_id = 2; string insert_id = 3; Timestamp time = 4; Struct properties = 5;
  string url = 6; string referrer = 7; string user_agent = 8;
  string browser = 9; string os = 10; string device = 11; bool is_robot = 12; string country = 13;
  string previous_id = 14; string region = 16; string city = 17;
}
message LoggedBatch {
  repeated LoggedEvent events = 2; string workspace_id = 3; string source_id = 4; Timestamp receive_time = 5;
  int64 sequence = 6; int32 retention_days = 8;
}
"""

# The data is a run of LoggedBatch messages, each behind its length: every value below is computed by the engine.
_INSERT_EVENTS = """
INSERT INTO events (
    workspace_id, source_id, event, distinct_id, insert_id, time, receive_time,
    url, path, host, referrer, referrer_host, user_agent, browser, os, device, is_robot, country,
    utm_source, utm_medium, utm_campaign, utm_term, utm_content, strings, numbers, sequence, position,
    previous_id, region, city, retention_days
)
WITH
    tupleElement(e, 'url') AS address,
    tupleElement(e, 'referrer') AS from_address,
    tupleElement(tupleElement(e, 'properties'), 'fields') AS fields,
    mapFilter((k, v) -> isNotNull(v.1), fields) AS number_fields,
    mapFilter((k, v) -> isNotNull(v.2) OR isNotNull(v.3), fields) AS string_fields
SELECT
    toUUID(workspace_id), toUUID(source_id),
    tupleElement(e, 'event'), tupleElement(e, 'distinct_id'), tupleElement(e, 'insert_id'),
    fromUnixTimestamp64Milli(e.time.1 * 1000 + intDiv(e.time.2, 1000000), 'UTC'),
    fromUnixTimestamp64Milli(receive_time.1 * 1000 + intDiv(receive_time.2, 1000000), 'UTC'),
    address, path(address), lower(domain(address)), from_address, lower(domain(from_address)),
    tupleElement(e, 'user_agent'), tupleElement(e, 'browser'), tupleElement(e, 'os'), tupleElement(e, 'device'),
    tupleElement(e, 'is_robot'), tupleElement(e, 'country'),
    decodeURLFormComponent(extractURLParameter(address, 'utm_source')),
    decodeURLFormComponent(extractURLParameter(address, 'utm_medium')),
    decodeURLFormComponent(extractURLParameter(address, 'utm_campaign')),
    decodeURLFormComponent(extractURLParameter(address, 'utm_term')),
    decodeURLFormComponent(extractURLParameter(address, 'utm_content')),
    mapApply((k, v) -> (k, ifNull(v.2, if(assumeNotNull(v.3), 'true', 'false'))), string_fields),
    mapApply((k, v) -> (k, assumeNotNull(v.1)), number_fields),
    sequence, position,
    tupleElement(e, 'previous_id'), tupleElement(e, 'region'), tupleElement(e, 'city'), retention_days
FROM (
    SELECT workspace_id, source_id, receive_time, sequence, retention_days, e, position
    FROM input('
        events Array(Tuple(
            event String, distinct_id String, insert_id String, time Tuple(seconds Int64, nanos Int32),
            properties Tuple(fields Map(String, Tuple(
                number_value Nullable(Float64), string_value Nullable(String), bool_value Nullable(Bool)))),
            url String, referrer String, user_agent String,
            browser String, os String, device String, is_robot Bool, country String,
            previous_id String, region String, city String)),
        workspace_id String, source_id String, receive_time Tuple(seconds Int64, nanos Int32), sequence UInt64,
        retention_days UInt16')
    ARRAY JOIN events AS e, arrayEnumerate(events) AS position
)
FORMAT Protobuf
"""

_CHECK_EVENTS = _INSERT_EVENTS.replace("INSERT INTO events (", "INSERT INTO events_check (")

_INSERT_SETTINGS: Mapping[str, Value] = {
    "format_schema_source": "string",
    "format_schema": _SCHEMA,
    "format_schema_message_name": "LoggedBatch",
    # One insert is one block: its token then names all of it, and the part is written once.
    "max_threads": 1,
    "max_insert_threads": 1,
    "min_insert_block_size_rows": 10_000_000,
    "min_insert_block_size_bytes": 1 << 30,
}


def statements(cluster: str) -> list[str]:
    """The statements that make the tables, for one server or for a cluster of that name. They may run again."""
    if not cluster:
        return [
            _EMBEDDED,
            f"ALTER TABLE events {_CHANGES}",
            f"ALTER TABLE events {_ADDITIONS}",
            f"ALTER TABLE events {_SETTING}",
            persons_table(cluster),
        ]
    on_cluster = f"ON CLUSTER '{cluster}'"
    changes = [
        f"ALTER TABLE events_shard {on_cluster} {_CHANGES}",
        f"ALTER TABLE events_shard {on_cluster} {_ADDITIONS}",
        f"ALTER TABLE events_shard {on_cluster} {_SETTING}",
        f"ALTER TABLE events {on_cluster} {_CHANGES}",
    ]
    return [statement % {"cluster": cluster} for statement in _CLUSTER] + changes + [persons_table(cluster)]


async def create_tables(store: EventStore, *, timeout: float = 60) -> None:
    """Creates what is missing; waits up to `timeout` seconds for the store. Several processes may call it at once.

    Raises UnavailableError or EventStoreError.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            for statement in statements(store.cluster):
                await store.execute(statement)
            return await _build(store)
        except UnavailableError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.2)


async def _build(store: EventStore) -> None:
    """Begins to give older parts what came later; the engine goes on in the background."""
    names = {"table": "events", "parts": "system.parts", "mutations": "system.mutations"}
    if store.cluster:
        names = {name: f"clusterAllReplicas('{store.cluster}', {table})" for name, table in names.items()}
        names["table"] = "events_shard"
    if not (await store.query(_UNBUILT.format(**names))).rows[0][0]:
        return
    if not (await store.query(_BUILDING.format(**names))).rows[0][0]:
        await store.execute(f"ALTER TABLE {store.table_of('events')} {_BUILD}")


async def insert_events(store: EventStore, batches: Iterable[bytes], token: str) -> None:
    """Writes serialized `LoggedBatch` messages to disk, all or none; of two calls with the same token one counts.

    Raises what `EventStore.insert` raises.
    """
    await store.insert(_INSERT_EVENTS, _framed(batches), token=token, settings=_INSERT_SETTINGS)


async def prepare_check(store: EventStore) -> None:
    """Makes what `check_events` needs: a table like that of the events, which keeps nothing.

    Raises UnavailableError or EventStoreError.
    """
    await store.execute("CREATE OR REPLACE TABLE events_check AS events ENGINE = Null")


async def check_events(store: EventStore, batches: Iterable[bytes]) -> None:
    """Raises what `insert_events` would raise, and writes nothing."""
    await store.insert(_CHECK_EVENTS, _framed(batches), token="", settings=_INSERT_SETTINGS)


def _framed(batches: Iterable[bytes]) -> bytes:
    return b"".join(_varint(len(batch)) + batch for batch in batches)


def _varint(number: int) -> bytes:
    """Protobuf's base 128 (https://protobuf.dev/programming-guides/encoding/#varints)."""
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
