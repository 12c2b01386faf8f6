"""The services of the mesh, and the chassis that they share."""

import os
import tempfile

# prometheus-client decides when it is imported whether several processes share the counters. This package is
# imported before any of its modules, so whichever of them imports it first, this comes before.
if int(os.environ.get("MESHBOARD_WORKERS") or 1) > 1:
    os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", tempfile.mkdtemp(prefix="meshboard-metrics-"))
