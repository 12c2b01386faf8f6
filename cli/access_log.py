"""Access logs in the combined format, as events.

Format: https://httpd.apache.org/docs/2.4/logs.html#combined
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

_QUOTED = r'"([^"\\]*(?:\\.[^"\\]*)*)"'
_LINE = re.compile(rf"(\S+) \S+ (\S+) \[([^\]]+)\] {_QUOTED} (\d{{3}}) (\d+|-) {_QUOTED} {_QUOTED}")
_PIECES = (
    "address, identity and user",
    "time in [brackets]",
    '"request"',
    "status",
    "size",
    '"referrer"',
    '"user agent"',
)


class LineRefused(ValueError):
    """The line is not in the format; the message says what is missing."""


def event_of(line: str, insert_id: str) -> dict[str, Any]:
    """The event, in JSON form, that a line tells of. Raises LineRefused.

    The visitor is the client's address. Properties: `method`, `protocol`, `status` (number), `bytes` (number; absent
    when the log has `-`), `user` when the log names one.
    """
    match = _LINE.fullmatch(line)
    if match is None:
        raise LineRefused(_what_is_wrong(line))
    address, user, when, request, status, size, referrer, user_agent = match.groups()
    method, _, rest = request.partition(" ")
    url, _, protocol = rest.rpartition(" ")
    properties: dict[str, Any] = {"method": method, "protocol": protocol, "status": int(status)}
    if size != "-":
        properties["bytes"] = int(size)
    if user != "-":
        properties["user"] = user
    try:
        time = datetime.strptime(when, "%d/%b/%Y:%H:%M:%S %z")
    except ValueError as error:
        raise LineRefused(f"the time {when!r} is not of the form 17/May/2015:10:05:03 +0000") from error
    return {
        "event": "request",
        "distinctId": address,
        "insertId": insert_id,
        "time": time.astimezone(UTC).isoformat(),
        "url": url,
        "referrer": "" if referrer == "-" else referrer,
        "userAgent": "" if user_agent == "-" else user_agent,
        "properties": properties,
    }


def _what_is_wrong(line: str) -> str:
    """Names the first piece that the line lacks."""
    patterns = (
        r"\S+ \S+ \S+ ",
        r"\[[^\]]+\] ",
        f"{_QUOTED} ",
        r"\d{3} ",
        r"(?:\d+|-) ",
        f"{_QUOTED} ",
        _QUOTED,
    )
    position = 0
    for name, pattern in zip(_PIECES, patterns, strict=True):
        match = re.compile(pattern).match(line, position)
        if match is None:
            return f"{name} is missing or not terminated"
        position = match.end()
    return "there is more after the user agent"
