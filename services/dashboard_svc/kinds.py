"""Which queries fit which kind of widget."""

from __future__ import annotations

from meshboard.analytics.v1.query_pb2 import Query
from meshboard.dashboard.v1.dashboard_pb2 import Widget

from services.chassis import errors

MAX_QUERY_BYTES = 65_536


def check_fit(kind: Widget.Kind.ValueType, query: Query) -> None:
    """Raises INVALID_ARGUMENT: WIDGET_QUERY_UNFIT when the kind cannot draw what the query answers."""
    if query.ByteSize() > MAX_QUERY_BYTES:
        raise errors.invalid_fields([("query", f"is larger than {MAX_QUERY_BYTES} bytes")])
    if problem := _problem(kind, query):
        name = Widget.Kind.Name(kind)
        raise errors.invalid_argument("WIDGET_QUERY_UNFIT", f"A {name} {problem}.", field="query", kind=name)


def _problem(kind: Widget.Kind.ValueType, query: Query) -> str:
    match kind:
        case Widget.TIMESERIES if not query.granularity:
            return "needs a granularity"
        case Widget.NUMBER | Widget.PIE if query.granularity:
            return "has no axis of time: leave the granularity out"
        case Widget.NUMBER if query.breakdowns:
            return "shows one number: leave the breakdowns out"
        case Widget.PIE if not query.breakdowns:
            return "needs a breakdown"
    return ""
