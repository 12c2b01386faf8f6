"""Places where a process can be made to end at once, as kill -9 ends it, to see what is lost or counted twice then.

The setting `crash_at` names places and at which pass of each: `plan:3,insert:5`. Only tests set it.
"""

import os
import signal

# Each stands behind what it is named after. In `serve`: judging a request, having its events on disk. In the pipeline:
# the steps of a range. In the store: running a statement that writes, before its answer.
POINTS = frozenset(
    {"receive", "publish", "fetch", "read", "drop", "plan", "link", "insert", "finish", "tell", "write"}
)

_left: dict[str, int] = {}


def arm(crash_at: str) -> None:
    """Reads the setting. Raises ValueError for what is no such place or no number from 1."""
    _left.clear()
    for part in filter(None, crash_at.split(",")):
        point, _, passes = part.partition(":")
        if point not in POINTS or int(passes or 1) < 1:
            raise ValueError(
                f"crash_at: {part!r} is not one of {', '.join(sorted(POINTS))}, with a number from 1"
            )
        _left[point] = int(passes or 1)


def reached(point: str) -> None:
    """Ends the process, when it is to end here at this pass."""
    if point in _left:
        _left[point] -= 1
        if not _left[point]:
            os.kill(os.getpid(), signal.SIGKILL)
