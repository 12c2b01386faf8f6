"""The processes of analytics_svc: `python -m services.analytics_svc [--role serve|pipeline|store]`.

`serve` may run any number of times, with workers; the pipeline and the store run once. Each imports what it needs only:
the store is to stay small.
"""

import argparse
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop

from services.analytics_svc.settings import AnalyticsSettings
from services.chassis import telemetry
from services.chassis.settings import load


def main() -> None:
    """Reads the role from the command line and runs it until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m services.analytics_svc", description=__doc__)
    parser.add_argument("--role", choices=("serve", "pipeline", "store"), default="serve")
    role = parser.parse_args().role
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
