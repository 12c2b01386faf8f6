"""Seconds from the acknowledgement of an event until a query counts it: on an idle mesh, and under half its top rate.

One event at a time goes to a source of its own, and its count is asked for until it has grown. So the figure holds the
time of the query that sees it, and a pause between queries.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from bench import ingest
from bench.figures import Figure, percentile
from bench.load import Generator
from bench.mesh import Account, Mesh

TARGET_SECONDS = 0.5
PAUSE_SECONDS = 0.005
LOAD_BATCH = 1000


def measure(
    mesh: Mesh, account: Account, *, probes: int, load_seconds: float, say: Callable[[str], None]
) -> list[Figure]:
    """Percentiles of `probes` events without load, and of as many as fit into `load_seconds` with it."""
    idle = probe(account, probes, float("inf"))
    say(f"idle: {len(idle)} events")
    # A burst says what the top is today; half of it is sent while events are watched. A burst of fewer events would
    # mostly wait for its last insert, and say too little.
    burst = ingest.send(mesh, account, "grpc", 100 * LOAD_BATCH, LOAD_BATCH)
    half = burst.events / burst.visible_seconds / 2
    _, write_key = account.create_source()
    count = int(half * load_seconds) // LOAD_BATCH * LOAD_BATCH
    load = ingest.load_of(mesh, "grpc", write_key, count, LOAD_BATCH, per_second=half / LOAD_BATCH)
    with Generator(load) as generator:
        generator.start()
        loaded = probe(account, probes, load_seconds)
        sent = generator.wait()
    rate = sent.per_second * LOAD_BATCH
    say(f"under {rate:,.0f} events/s: {len(loaded)} events")
    return figures(idle, loaded, rate)


def probe(account: Account, probes: int, seconds: float) -> list[float]:
    """Seconds from acknowledgement to visible, of up to `probes` events within `seconds`."""
    source_id, write_key = account.create_source()
    delays: list[float] = []
    body = json.dumps({"events": [{"event": "probe", "distinctId": "bench"}]}).encode()
    end = time.monotonic() + seconds
    while len(delays) < probes and time.monotonic() < end:
        account.ingest(write_key, body)
        acknowledged = time.monotonic()
        seen = account.wait_for(source_id, len(delays) + 1, pause=PAUSE_SECONDS)
        delays.append(seen - acknowledged)
    return delays


def figures(idle: list[float], loaded: list[float], rate: float) -> list[Figure]:
    """The figures of delays in seconds, without load and under `rate` events per second."""
    result = []
    for state, delays in (("idle", idle), ("under load", loaded)):
        note = f"{len(delays)} events" + (f" beside {rate:,.0f} events/s" if state == "under load" else "")
        result += [
            Figure(
                name=f"visible/{state} p{share * 100:.0f}",
                rounds=(percentile(delays, share),),
                unit="s",
                at_most=TARGET_SECONDS if share == 0.99 else None,
                note=note,
            )
            for share in (0.5, 0.99)
        ]
    return result
