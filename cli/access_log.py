"""Access logs, in the combined format or with a JSON object a line, as events.

The combined format is https://httpd.apache.org/docs/2.4/logs.html#combined. In JSON, names are those of

- nginx: its variables (https://nginx.org/en/docs/http/ngx_http_log_module.html#log_format, with `escape=json`),
- Caddy (https://caddyserver.com/docs/logging),
- Traefik (https://doc.traefik.io/traefik/observability/access-logs/),
- Envoy: those in the examples of its documentation.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence
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

    The visitor is the client's address, or its name where the log has that. Properties: `method`, `protocol`, `status`
    (number), `bytes` (number; absent when the log has `-`), `user` when the log names one.
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
    return {
        "event": "request",
        **_visitor(address),
        "insertId": insert_id,
        "time": _common_time(when),
        "url": url,
        "referrer": "" if referrer == "-" else referrer,
        "userAgent": "" if user_agent == "-" else user_agent,
        "properties": properties,
    }


def _common_time(when: str) -> str:
    try:
        time = datetime.strptime(when, "%d/%b/%Y:%H:%M:%S %z")
    except ValueError as error:
        raise LineRefused(f"the time {when!r} is not of the form 17/May/2015:10:05:03 +0000") from error
    return time.astimezone(UTC).isoformat()


def time_of(value: Any) -> str:
    """A time as RFC 3339. Texts without a zone are in UTC; numbers count from 1970, in seconds or in parts of them.

    Raises LineRefused.
    """
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).astimezone(UTC).isoformat()
    try:
        if isinstance(value, str) and not re.fullmatch(r"-?\d+(\.\d+)?", value):
            # More than microseconds is more than Python reads, and than the store keeps.
            return time_of(datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", value.strip())))
        number = float(value)
        for _ in range(3):
            if abs(number) >= 100_000_000_000:  # in seconds this is the year 5138
                number /= 1000
        return datetime.fromtimestamp(number, UTC).isoformat()
    except (ValueError, TypeError, OverflowError, OSError) as error:
        raise LineRefused(f"{str(value)[:50]!r} is no time") from error


# What a JSON access log says, and the names for it: `request.headers.Referer` is the path to a list in Caddy's.
_NAMES = {
    "address": """remote_addr ClientHost request.client_ip request.remote_ip client_ip remote_ip
        downstream_remote_address address""",
    "time": "time_iso8601 time_local StartUTC msec ts @timestamp timestamp start_time time",
    "method": "request_method RequestMethod request.method method",
    "path": "request_uri RequestPath request.uri uri path",
    "host": "http_host RequestHost request.host authority host",
    "protocol": "server_protocol RequestProtocol request.proto protocol",
    "status": "status DownstreamStatus response_code",
    "bytes": "body_bytes_sent bytes_sent DownstreamContentSize size bytes",
    "referrer": "http_referer request.headers.Referer request_Referer referer referrer",
    "user_agent": "http_user_agent request.headers.User-Agent request_User-Agent user_agent",
    "user": "remote_user ClientUsername user_id",
}
# How long a request took, with what makes seconds of it.
_DURATIONS: Mapping[str, Callable[[float], float]] = {
    "request_time": lambda seconds: seconds,
    "Duration": lambda nanoseconds: nanoseconds / 1e9,
    "duration_ms": lambda milliseconds: milliseconds / 1e3,
    "duration": lambda seconds: seconds,
}


def event_of_json(line: Mapping[str, Any], insert_id: str) -> dict[str, Any]:
    """The event that a line of a JSON access log tells of; the address, the time and the status are needed.

    As `event_of`, with the property `duration` (seconds) where the log has it. Raises LineRefused.
    """
    said = {what: _first(line, names.split()) for what, names in _NAMES.items()}
    for what in ("address", "time", "status"):
        if said[what] is None:
            raise LineRefused(f"nothing tells the {what}; it would be named {_NAMES[what].split()[0]}")
    if isinstance(request := line.get("request"), str):  # as nginx's $request: GET / HTTP/1.1
        said["method"], _, rest = request.partition(" ")
        said["path"], _, said["protocol"] = rest.rpartition(" ")
    properties: dict[str, Any] = {what: said[what] for what in ("method", "protocol", "user") if said[what]}
    for what in ("status", "bytes"):
        if said[what] is not None:
            properties[what] = _number(said[what], what)
    for name, seconds in _DURATIONS.items():
        if line.get(name) is not None:
            # Envoy's milliseconds have the name of Caddy's seconds.
            scale = 1000 if name == "duration" and "response_code" in line else 1
            properties["duration"] = seconds(_number(line[name], name)) / scale
            break
    when = said["time"]
    path, host = str(said["path"] or ""), said["host"]
    return {
        "event": "request",
        **_visitor(_without_port(str(said["address"]))),
        "insertId": insert_id,
        "time": _common_time(when) if isinstance(when, str) and when[2:3] == "/" else time_of(when),
        "url": f"{line.get('scheme', 'http')}://{host}{path}" if host and path.startswith("/") else path,
        "referrer": str(said["referrer"] or ""),
        "userAgent": str(said["user_agent"] or ""),
        "properties": properties,
    }


def _first(line: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The first of these that the line has and that says something."""
    for name in names:
        value: Any = line
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, list):
            value = value[0] if value else None
        if value is not None and value not in ("", "-") and not isinstance(value, Mapping):
            return value
    return None


def _number(value: Any, what: str) -> float:
    try:
        number = float(value)
        return int(number) if int(number) == number else number
    except (ValueError, TypeError, OverflowError) as error:
        raise LineRefused(f"the {what} {str(value)[:50]!r} is no number") from error


def _visitor(address: str) -> dict[str, str]:
    """Who it was: the address, which also tells where, unless the server has written a name in its place."""
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return {"distinctId": address}
    return {"distinctId": address, "ip": address}


def _without_port(address: str) -> str:
    """`1.2.3.4:56` and `[::1]:56` without the port."""
    return re.sub(r"^\[(.*)\](:\d+)?$|^([^:]*):\d+$", lambda m: m[1] or m[3], address)


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
