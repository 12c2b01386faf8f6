"""What each kind of widget shows, and what it cannot draw."""

from __future__ import annotations

import re
from itertools import pairwise
from urllib.parse import urlsplit

from google.protobuf.message import Message
from meshboard.analytics.v1.query_pb2 import Query
from meshboard.dashboard.v1.dashboard_pb2 import Display, Widget

from services.chassis import errors
from services.dashboard_svc.convert import CONTENT, copy_field

MAX_QUESTION_BYTES = 65_536
# The fields that say what a widget shows: each kind has one of them.
SUBJECTS = ("query", "funnel", "retention", "markdown", "custom")
# What a library widget says of the widgets that show it.
OF_THE_LIBRARY = ("title", "kind", *CONTENT)
_SUBJECT_OF = {
    Widget.FUNNEL: "funnel",
    Widget.RETENTION: "retention",
    Widget.TEXT: "markdown",
    Widget.CUSTOM: "custom",
}


def keep_to_kind(widget: Widget, wanted: set[str]) -> None:
    """Clears what the widget's kind does not show, but for the `wanted` fields: what is wrong with these is said."""
    for subject in SUBJECTS:
        if subject not in _subjects_of(widget.kind) and subject not in wanted:
            copy_field(Widget(), widget, subject)
    if widget.kind != Widget.NUMBER and widget.display.sparkline and "display" not in wanted:
        widget.display.ClearField("sparkline")


def subject_of(kind: Widget.Kind.ValueType) -> str:
    """The field that says what a widget of this kind shows."""
    return _SUBJECT_OF.get(kind, "query")


def _subjects_of(kind: Widget.Kind.ValueType) -> set[str]:
    """The fields that a widget of this kind may have: a CUSTOM has what it asks beside what that is made of."""
    return {"custom", "query"} if kind == Widget.CUSTOM else {subject_of(kind)}


def check_made(widget: Widget, changed: set[str], at: str) -> None:
    """Raises INVALID_ARGUMENT when a CUSTOM is to be given another query than its kind makes of its options."""
    if widget.kind == Widget.CUSTOM and "query" in changed and "custom" not in changed:
        raise errors.invalid_fields([(f"{at}query", "is what the kind makes of the options")])


def check(widget: Widget, at: str = "") -> None:
    """Raises INVALID_ARGUMENT when the widget lacks what its kind needs, or has what it does not.

    A widget that shows one of the library has nothing of what that one says.

    The reason is WIDGET_QUERY_UNFIT when the kind cannot draw what the query answers, else VALIDATION_FAILED. `at` is
    where in the request the widget is: `widget.`.
    """
    if widget.library_widget_id:
        _raise(_bare(widget) + _time(widget), at)
        return
    if not widget.kind:
        raise errors.invalid_fields([(f"{at}kind", "is not set")])
    _raise(_subjects(widget) + _display(widget.display, widget.kind) + _time(widget), at)
    if problem := _problem(widget.kind, widget.query):
        name = Widget.Kind.Name(widget.kind)
        raise errors.invalid_argument(
            "WIDGET_QUERY_UNFIT", f"A {name} {problem}.", field=f"{at}query", kind=name
        )


def _raise(violations: list[tuple[str, str]], at: str) -> None:
    if violations:
        raise errors.invalid_fields([(at + field, problem) for field, problem in violations])


def _bare(widget: Widget) -> list[tuple[str, str]]:
    given = {field.name for field, _ in widget.ListFields()} & set(OF_THE_LIBRARY)
    return [(field, "is what the library widget says") for field in sorted(given)]


def _subjects(widget: Widget) -> list[tuple[str, str]]:
    needed, name = subject_of(widget.kind), Widget.Kind.Name(widget.kind)
    fitting = _subjects_of(widget.kind)
    given = {field.name: value for field, value in widget.ListFields()}
    violations = []
    for subject in SUBJECTS:
        value = given.get(subject)
        if subject == needed and value is None:
            violations.append((subject, f"is not set, and a {name} shows it"))
        if subject not in fitting and value is not None:
            violations.append((subject, f"is not what a {name} shows"))
        if isinstance(value, Message) and value.ByteSize() > MAX_QUESTION_BYTES:
            violations.append((subject, f"is larger than {MAX_QUESTION_BYTES} bytes"))
    return violations


def _problem(kind: Widget.Kind.ValueType, query: Query) -> str:
    match kind:
        case Widget.TIMESERIES | Widget.STACKED if not query.granularity:
            return "needs a granularity"
        case Widget.STACKED if not query.breakdowns and len(query.measures) < 2:
            return "stacks groups or measures: it needs a breakdown, or a second measure"
        case Widget.HEATMAP if len(query.breakdowns) != (1 if query.granularity else 2):
            return "has two axes: it needs a granularity and one breakdown, or two breakdowns"
        case Widget.NUMBER | Widget.PIE if query.granularity:
            return "has no axis of time: leave the granularity out"
        case Widget.NUMBER if query.breakdowns:
            return "shows one number: leave the breakdowns out"
        case Widget.PIE if not query.breakdowns:
            return "needs a breakdown"
        case Widget.STACKED | Widget.HEATMAP | Widget.PIE if query.HasField("comparison"):
            return "cannot show two periods: leave the comparison out"
    return ""


def _time(widget: Widget) -> list[tuple[str, str]]:
    if widget.time_range_variable and widget.own_time_range:
        return [("time_range_variable", "the widget has its own time range: leave one of the two out")]
    return []


def _display(display: Display, kind: Widget.Kind.ValueType) -> list[tuple[str, str]]:
    violations = []
    if display.sparkline and kind != Widget.NUMBER:
        violations.append(("display.sparkline", "only a NUMBER has one"))
    if display.unit == Display.MONEY and not re.fullmatch(r"[A-Z]{3}", display.unit_text):
        violations.append(("display.unit_text", "is not an ISO 4217 code, such as EUR"))
    if display.unit == Display.CUSTOM_UNIT and not display.unit_text.strip():
        violations.append(("display.unit_text", "is not set"))
    if display.unit not in {Display.MONEY, Display.CUSTOM_UNIT} and display.unit_text:
        violations.append(("display.unit_text", "stands only with MONEY and CUSTOM_UNIT"))
    bounds = [getattr(threshold, "from") for threshold in display.thresholds]
    violations += [
        (f"display.thresholds[{index}].from", "is not greater than the one before it")
        for index, (before, after) in enumerate(pairwise(bounds), 1)
        if not after > before
    ]
    violations += [
        (f"display.links[{index}].url", problem)
        for index, link in enumerate(display.links)
        if (problem := _link_problem(link.url))
    ]
    return violations


def _link_problem(url: str) -> str:
    """What is wrong with a URL that the contract lets pass.

    Browsers read `\\` as `/`, and what stands before an `@` misleads people.
    """
    try:
        parts = urlsplit(url)
        host, user = parts.hostname, parts.username
    except ValueError:
        return "is not a URL"
    if parts.scheme == "mailto":
        return "" if "@" in parts.path else "has no address"
    if not host:
        return "has no host"
    if user is not None or "\\" in url:
        return "must have neither a user nor a backslash"
    return ""
