import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("service", ["auth", "user", "dashboard", "analytics"])
def test_workers_share_their_metrics(service: str, tmp_path: Path) -> None:
    """Whatever a service imports first, counters live in files that all its workers write."""
    shown = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import services.{service}_svc.__main__, prometheus_client.values as v; print(v.ValueClass.__name__)",
        ],
        env={**os.environ, "MESHBOARD_WORKERS": "2", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == "MmapedValue"
