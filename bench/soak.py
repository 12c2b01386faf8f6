"""Memory under load: batches of 1,000 events by gRPC for minutes, as fast as they are taken, and then made visible.

The rounds of a figure are minutes. In a minute loads come one after the other, each until all of it is visible, so that
what grows is no backlog. The mesh's log and store grow meanwhile, by some 350 bytes an event.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from bench import ingest
from bench.figures import Figure
from bench.mesh import Account, Mesh
from bench.startup import MEGABYTE, memory_of

SIZE = 1000
MOST_GROWTH = 1.1  # else memory is not flat


def measure(
    mesh: Mesh,
    account: Account,
    *,
    minutes: int,
    minute_seconds: float = 60.0,
    events: int = 200_000,
    say: Callable[[str], None],
) -> list[Figure]:
    """Loads of `events` for so many minutes, and the memory of each process at the end of each."""
    rates: list[float] = []
    memory: list[Mapping[str, int]] = []
    began = time.monotonic()
    for minute in range(1, minutes + 1):
        sent, busy = 0, 0.0
        while time.monotonic() < began + minute * minute_seconds:
            one = ingest.send(mesh, account, "grpc", events, SIZE)
            sent, busy = sent + one.events, busy + one.visible_seconds
        if sent:  # else the load of the minute before took all of this one
            rates.append(sent / busy)
            memory.append(memory_of(mesh))
            megabytes = {name: round(used / MEGABYTE) for name, used in memory[-1].items()}
            say(f"minute {minute}: {rates[-1]:,.0f} events/s; MB: {sum(megabytes.values())} of {megabytes}")
    return figures(rates, memory)


def figures(rates: Sequence[float], memory: Sequence[Mapping[str, int]]) -> list[Figure]:
    """The figures of rates and bytes by part, minute by minute."""
    result = [Figure(name="soak/until visible", rounds=tuple(rates), unit="events/s")]
    totals = tuple(sum(one.values()) / MEGABYTE for one in memory)
    result.append(Figure(name="soak/all processes", rounds=totals, unit="MB"))
    growth = (totals[-1] / totals[len(totals) // 2],)
    result.append(Figure(name="soak/last minute to the middle", rounds=growth, unit="", at_most=MOST_GROWTH))
    for name in memory[0]:
        megabytes = tuple(one[name] / MEGABYTE for one in memory)
        result.append(Figure(name=f"soak/{name}", rounds=megabytes, unit="MB"))
    return result
