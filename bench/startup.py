"""How long `up` takes on data that is there already, and what the processes hold when nothing happens."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.figures import Figure
from bench.mesh import Mesh, running
from bench.processes import memory_bytes

TARGET_SECONDS = 15.0
TARGET_BYTES = 1e9
MEGABYTE = 1e6


def measure(
    data_dir: Path, port: int, *, rounds: int, rest_seconds: float, say: Callable[[str], None]
) -> list[Figure]:
    """Starts the mesh `rounds` times, and reads the memory of each process after `rest_seconds` without work.

    `data_dir` must hold the data of a mesh that has stopped.
    """
    starts: list[float] = []
    parts: list[Mapping[str, float]] = []
    memory: list[Mapping[str, int]] = []
    for number in range(rounds):
        began = time.monotonic()
        with running(data_dir, port) as mesh:
            starts.append(time.monotonic() - began)
            say(f"round {number + 1}: ready after {starts[-1]:.1f} s")
            parts.append(mesh.ready_seconds)
            time.sleep(rest_seconds)
            memory.append(memory_of(mesh))
    return figures(starts, parts, memory)


def memory_of(mesh: Mesh) -> dict[str, int]:
    """Bytes by part."""
    return {name: memory_bytes(pid) for name, pid in mesh.pids.items()}


def figures(
    starts: Sequence[float], parts: Sequence[Mapping[str, float]], memory: Sequence[Mapping[str, int]]
) -> list[Figure]:
    """The figures of seconds until all is ready, seconds by part, and bytes by part, round by round."""
    result = [
        Figure(
            name="startup/warm, until all is ready", rounds=tuple(starts), unit="s", at_most=TARGET_SECONDS
        )
    ]
    for name in parts[0]:
        seconds = tuple(one[name] for one in parts)
        result.append(Figure(name=f"startup/{name}", rounds=seconds, unit="s", note="from its own start"))
    totals = tuple(sum(one.values()) / MEGABYTE for one in memory)
    target = TARGET_BYTES / MEGABYTE
    result.append(Figure(name="memory/all processes at rest", rounds=totals, unit="MB", at_most=target))
    for name in memory[0]:
        megabytes = tuple(one[name] / MEGABYTE for one in memory)
        result.append(Figure(name=f"memory/{name}", rounds=megabytes, unit="MB"))
    return result
