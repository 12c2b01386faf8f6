"""Starts one of the three processes of analytics_svc. Each role imports what it needs and nothing else."""

import argparse
import asyncio

from services.analytics_svc.settings import AnalyticsSettings
from services.chassis import telemetry
from services.chassis.settings import load


def main() -> None:
    """Reads the role from the command line and runs it until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m services.analytics_svc", description=__doc__)
    parser.add_argument("--role", choices=("serve", "pipeline", "store"), default="serve")
    match parser.parse_args().role:
        case "store":
            from services.analytics_svc import store  # noqa: PLC0415

            settings = load(AnalyticsSettings)
            telemetry.start("store", level=settings.log_level)
            asyncio.run(store.serve(settings))


if __name__ == "__main__":
    main()
