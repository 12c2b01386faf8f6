"""What processes spend: CPU time and memory, with all the processes below them."""

from __future__ import annotations

from collections.abc import Mapping

import psutil

from cli import processes


def cpu_seconds(pid: int) -> float:
    """User and system time of the process and those below it, in steps of the system's clock (10 ms on Linux)."""
    total = 0.0
    for process in _family(pid):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def memory_bytes(pid: int) -> int:
    """Resident memory: PSS, in which shared pages count in parts; RSS where the system does not tell PSS."""
    return processes.memory_bytes(pid) or sum(process.memory_info().rss for process in _family(pid))


class Meter:
    """The CPU time that named processes spend from `start` to `stop`."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = pids
        self._began: dict[str, float] = {}

    def start(self) -> None:
        self._began = {name: cpu_seconds(pid) for name, pid in self._pids.items()}

    def stop(self) -> dict[str, float]:
        """The seconds of each."""
        return {name: cpu_seconds(pid) - self._began[name] for name, pid in self._pids.items()}


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
