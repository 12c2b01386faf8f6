"""What the store has and does, as figures: parts, merges, mutations, and the space that is left.

The server that answers tells of itself: in a cluster, of one. It is asked by the pipeline, of which there is one.
"""

import asyncio

import structlog
from prometheus_client import Gauge

from services.analytics_svc.event_store import EventStore, EventStoreError, UnavailableError

log = structlog.get_logger(__name__)

LOOK_SECONDS = 15.0

# By the name of the column in _LOOK.
GAUGES = {
    name: Gauge(f"meshboard_event_store_{name}", text)
    for name, text in {
        "rows": "Events in the store.",
        "bytes": "Bytes of events on the disk.",
        "parts": "Parts that the events lie in: each insert makes one, merges make fewer.",
        "largest_partition_parts": "Parts of the partition that has most; at 3,000 the store refuses inserts.",
        "partitions": "Partitions of the events.",
        "merges": "Merges under way.",
        "merging_bytes": "Bytes that merges under way have to read.",
        "merged_rows": "Rows that merges have written since the store was started.",
        "mutations": "Rewrites that are not done, such as those of retention.",
        "free_bytes": "Bytes that are free on the disk of the store.",
    }.items()
}

_LOOK = """
SELECT sum(p.rows) AS rows, sum(p.bytes) AS bytes, sum(p.parts) AS parts, max(p.parts) AS largest_partition_parts,
    count() AS partitions,
    (SELECT count() FROM system.merges) AS merges,
    (SELECT sum(total_size_bytes_compressed) FROM system.merges) AS merging_bytes,
    (SELECT sum(value) FROM system.events WHERE event = 'MergedRows') AS merged_rows,
    (SELECT count() FROM system.mutations WHERE NOT is_done) AS mutations,
    (SELECT min(free_space) FROM system.disks) AS free_bytes
FROM (
    SELECT partition_id, sum(rows) AS rows, sum(bytes_on_disk) AS bytes, count() AS parts
    FROM system.parts
    WHERE active AND database = currentDatabase() AND table IN ('events', 'events_shard')
    GROUP BY partition_id
) AS p
"""


async def look(store: EventStore) -> None:
    """Sets the figures. Raises UnavailableError or EventStoreError."""
    found = await store.query(_LOOK, timeout=10)
    for name, value in zip(found.names, found.rows[0], strict=True):
        GAUGES[name].set(float(value or 0))


async def follow_store(store: EventStore) -> None:
    """Looks every 15 seconds until it is cancelled."""
    while True:
        try:
            await look(store)
        except (EventStoreError, UnavailableError) as error:
            log.debug("store_not_seen", error=str(error)[:300])
        await asyncio.sleep(LOOK_SECONDS)
