"""Events per second, in batches of several sizes: until all are acknowledged, and until a query counts them all.

The load, the gateway, the service, NATS, the pipeline and the store share the machine's cores.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from bench import direct, events
from bench.figures import Figure, percentile, ratios
from bench.load import Generator, Load
from bench.mesh import Account, Mesh
from bench.processes import Meter

SIZES = {1: 64, 100: 16, 1000: 8}  # events in a batch, and how many batches are under way
TARGETS: Mapping[tuple[str, int], int] = {("grpc", 1000): 100_000, ("json", 1000): 60_000, ("grpc", 1): 2_500}
METHOD = "/meshboard.analytics.v1.IngestService/Ingest"
PATH = "/v1/events:ingest"
Protocol = Literal["grpc", "json"]


@dataclass(frozen=True)
class Round:
    """One load. `cpu` is seconds by process, until all events were visible."""

    events: int
    acknowledged_seconds: float
    visible_seconds: float
    latencies: tuple[float, ...]
    cpu: Mapping[str, float]


def load_of(
    mesh: Mesh, protocol: Protocol, write_key: str, count: int, size: int, *, per_second: float = 0
) -> Load:
    """`count` events in batches of `size`: gRPC straight at the service, JSON through the gateway."""
    make = events.grpc_batches if protocol == "grpc" else events.json_batches
    return Load(
        protocol=protocol,
        address=mesh.address("analytics") if protocol == "grpc" else mesh.gateway,
        path=METHOD if protocol == "grpc" else PATH,
        headers=(("x-write-key", write_key),),
        bodies=partial(make, count, size, secrets.token_hex(4)),
        concurrency=SIZES[size],
        per_second=per_second,
    )


def send(mesh: Mesh, account: Account, protocol: Protocol, count: int, size: int) -> Round:
    """Sends `count` events to a new source."""
    source_id, write_key = account.create_source()
    meter = Meter(mesh.pids)
    with Generator(load_of(mesh, protocol, write_key, count, size)) as generator:
        meter.start()
        generator.start()
        sent = generator.wait()
        visible = account.wait_for(source_id, count, pause=0.05)
        cpu = {**meter.stop(), "client": sent.cpu_seconds}
    return Round(count, sent.ended - sent.began, visible - sent.began, sent.latencies, cpu)


def measure(
    mesh: Mesh,
    account: Account,
    *,
    rounds: int,
    events_by_size: Mapping[int, int],
    say: Callable[[str], None],
) -> list[Figure]:
    """Rates for each size and protocol, the CPU time of each process, and the ratio to chDB alone."""
    measured: dict[tuple[int, Protocol], list[Round]] = {}
    alone: list[float] = []
    largest = max(events_by_size)
    count = events_by_size[largest]
    send(mesh, account, "grpc", 10 * largest, largest)  # connections, caches and statements come into being
    for number in range(rounds):
        ids = (secrets.token_hex(4), *account.create_source()[:1] * 2)
        inserted = direct.insert(partial(events.logged_batches, count, largest, *ids))
        alone.append(inserted.per_second * largest)
        say(f"round {number + 1}: chDB alone {alone[-1]:,.0f} events/s")
        for size, total in events_by_size.items():
            for protocol in ("grpc", "json"):
                one = send(mesh, account, protocol, total, size)
                measured.setdefault((size, protocol), []).append(one)
                rate = total / one.visible_seconds
                say(f"round {number + 1}: {protocol}, batches of {size}: {rate:,.0f} events/s until visible")
    return figures(measured, alone)


def figures(measured: Mapping[tuple[int, Protocol], Sequence[Round]], alone: Sequence[float]) -> list[Figure]:
    """The figures of rounds by size and protocol; `alone` is what chDB takes by itself, in events per second."""
    result = [
        Figure(
            name="ingest/chDB alone",
            rounds=tuple(alone),
            unit="events/s",
            note=f"{direct.BATCHES_PER_INSERT} batches of {max(size for size, _ in measured):,} an insert",
        )
    ]
    largest = max(size for size, _ in measured)
    for (size, protocol), rounds in measured.items():
        name = f"ingest/{protocol} {size}"
        visible = tuple(one.events / one.visible_seconds for one in rounds)
        acknowledged = tuple(one.events / one.acknowledged_seconds for one in rounds)
        answer = tuple(percentile(one.latencies, 0.99) * 1000 for one in rounds)
        result += [
            Figure(name=f"{name} until acknowledged", rounds=acknowledged, unit="events/s"),
            Figure(
                name=f"{name} until visible",
                rounds=visible,
                unit="events/s",
                at_least=TARGETS.get((protocol, size)),
            ),
            Figure(name=f"{name} acknowledgement p99", rounds=answer, unit="ms"),
        ]
        if size == largest:
            result.append(Figure(name=f"{name} to chDB alone", rounds=ratios(visible, alone), unit=""))
        for process in rounds[0].cpu:
            spent = tuple(one.cpu[process] / one.events * 1e6 for one in rounds)
            if any(value >= 0.05 for value in spent):
                result.append(Figure(name=f"{name} CPU of {process}", rounds=spent, unit="µs/event"))
    return result
