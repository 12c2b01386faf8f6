"""The processes of analytics_svc: `python -m services.analytics_svc [--role serve|pipeline|store]`.

`serve` may run any number of times, with workers; the pipeline and the store run once. Each imports what it needs only:
the store is to stay small.
"""

import argparse
import ctypes
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop

from services.analytics_svc.settings import AnalyticsSettings
from services.chassis import telemetry
from services.chassis.settings import load

# glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Above the largest message of the event log; and what a process may keep without using it.
_BATCH_BYTES, _KEPT_BYTES = 8 << 20, 16 << 20


def main() -> None:
    """Reads the role from the command line and runs it until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m services.analytics_svc", description=__doc__)
    parser.add_argument("--role", choices=("serve", "pipeline", "store"), default="serve")
    role = parser.parse_args().role
    if role != "store":
        keep_memory()
    if role == "serve":
        from services.analytics_svc import serving  # noqa: PLC0415
        from services.chassis import server  # noqa: PLC0415

        server.main("analytics", AnalyticsSettings, serving.serve)
    elif role == "pipeline":
        from services.analytics_svc import pipeline  # noqa: PLC0415

        run_once("pipeline", pipeline.serve)
    else:
        from services.analytics_svc import store  # noqa: PLC0415

        run_once("store", store.serve)


def keep_memory() -> None:
    """Has glibc keep the memory of batches for the next ones: to get it anew costs as much as to parse them."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _BATCH_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def run_once(name: str, serve: Callable[[AnalyticsSettings], Coroutine[Any, Any, None]]) -> None:
    """Runs a role that has no workers, whatever the setting says."""
    settings = load(AnalyticsSettings)
    telemetry.start(name, level=settings.log_level, otlp_endpoint=settings.otlp_endpoint)
    try:
        uvloop.run(serve(settings))
    finally:
        telemetry.stop()


if __name__ == "__main__":
    main()
