"""Every log line is JSON, whatever somebody sent."""

from __future__ import annotations

import json
import subprocess
import sys

_SAYS = """
import structlog
from services.chassis import telemetry
telemetry.start("example")
structlog.get_logger().info("said", text=chr(0xD800) + "\\n", number=2**70, thing=object, log="access")
try:
    raise ValueError("lost")
except ValueError:
    structlog.get_logger().exception("fault")
telemetry.access(rpc="Get", ms=0.25)
"""


def test_a_line_holds_what_json_can_hardly_say():
    said = subprocess.run([sys.executable, "-c", _SAYS], capture_output=True, check=True, timeout=60)
    first, second, third = map(json.loads, said.stdout.splitlines())
    assert (first["event"], first["text"], first["number"]) == ("said", "\ud800\n", 2**70)
    assert (first["log"], first["service"], first["level"]) == ("access", "example", "info")
    assert first["thing"] == "<class 'object'>"
    assert second["log"] == "error"
    assert (third["log"], third["service"], third["rpc"], third["ms"]) == ("access", "example", "Get", 0.25)
    assert "ValueError: lost" in second["exception"]
