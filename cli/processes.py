"""What the system knows about processes: who is who, and how much memory they hold."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import defaultdict
from contextlib import suppress
from pathlib import Path


def start_time(pid: int) -> str:
    """Returns when the process started, in the system's own notation; "" when there is none with this id.

    Together with the id it names a process for good: ids are used again.
    """
    if sys.platform == "linux":
        fields = _stat(pid)
        return "" if not fields or fields[0] == "Z" else fields[19]
    shown = subprocess.run(
        ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return shown.stdout.strip()


def is_running(pid: int, began: str) -> bool:
    """Says whether the process `pid` is still the one that started at `began` (see start_time)."""
    return began != "" and start_time(pid) == began


def kill_group(pid: int) -> None:
    """Kills what is left of the process group that the child `pid` leads."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def memory_bytes(pid: int) -> int:
    """Returns the memory of a process and all below it, 0 where the system does not tell.

    Pages shared among several processes count in parts (PSS of proc(5)).
    """
    if sys.platform != "linux":
        return 0
    children = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (fields := _stat(int(entry.name))):
            children[int(fields[1])].append(int(entry.name))
    family = [pid]
    for member in family:  # grows while it is walked
        family.extend(children[member])
    return sum(_proportional_bytes(member) for member in family)


def _stat(pid: int) -> list[str]:
    try:
        # proc(5): the name of the program, which may hold anything, ends at the last parenthesis.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _proportional_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
