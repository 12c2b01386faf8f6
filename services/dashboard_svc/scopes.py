"""What a viewer looks at a dashboard with: what it has chosen, and what binds it whatever it chooses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from meshboard.analytics.v1.query_pb2 import Filter, TimeRange
from meshboard.dashboard.v1.dashboard_pb2 import Variable

from services.chassis import errors

# What is chosen in place of a default to have no value.
NOTHING = ""
LONGEST_SECONDS = 315_360_000
_LONGEST_DIGITS = 9

# The values of each variable, by its name.
Values = Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Scope:
    """Equal scopes are shown equal data, and share its computation.

    `choices` are the values of variables by name, sorted, of those that were chosen; `time_range` is a serialized
    TimeRange, empty for the dashboard's own; `filters` are serialized Filters that every query gets besides its own.
    """

    choices: tuple[tuple[str, tuple[str, ...]], ...] = ()
    time_range: bytes = b""
    filters: tuple[bytes, ...] = ()


def scope_of(
    variables: Sequence[Variable],
    choices: Sequence[str],
    time_range: TimeRange | None = None,
    filters: Sequence[Filter] = (),
) -> Scope:
    """The scope of a request. Raises INVALID_ARGUMENT: CHOICE_INVALID for what cannot be chosen."""
    known = {variable.name: variable for variable in variables}
    chosen: dict[str, list[str]] = {}
    for choice in choices:
        name, sign, value = choice.partition("=")
        if not sign or name not in known:
            raise _invalid(name, "no such variable, or no `=` behind its name")
        chosen.setdefault(name, []).append(value)
    for name, values in chosen.items():
        variable = known[name]
        if len(values) > 1 and not variable.multiple:
            raise _invalid(name, "only one value can be chosen")
        if values == [NOTHING]:
            continue
        options = {option.value for option in variable.list.options}
        if variable.HasField("list") and not options.issuperset(values):
            raise _invalid(name, "not one of its options")
        if variable.HasField("time_span"):
            span_of(name, values[0])
    return Scope(
        choices=tuple(sorted((name, tuple(values)) for name, values in chosen.items())),
        time_range=time_range.SerializeToString(deterministic=True) if time_range else b"",
        filters=tuple(filter_.SerializeToString(deterministic=True) for filter_ in filters),
    )


def values_of(variables: Iterable[Variable], scope: Scope) -> Values:
    """What each variable stands for: what was chosen, else its defaults; without a value it stands for nothing."""
    chosen = dict(scope.choices)
    values = {variable.name: chosen.get(variable.name, tuple(variable.defaults)) for variable in variables}
    return {name: () if value == (NOTHING,) else value for name, value in values.items()}


def span_of(name: str, text: str) -> TimeRange:
    """The stretch of time that was chosen for a variable. Raises INVALID_ARGUMENT: CHOICE_INVALID."""
    if text.isascii() and text.isdecimal() and 0 < len(text) <= _LONGEST_DIGITS:
        span = TimeRange(last_seconds=int(text))
    else:
        start, _, end = text.partition("/")
        span = TimeRange()
        try:
            span.start_time.FromJsonString(start)
            span.end_time.FromJsonString(end)
        except ValueError as error:
            raise _invalid(name, "it is neither seconds nor `start/end` in RFC 3339") from error
        if span.start_time.ToNanoseconds() > span.end_time.ToNanoseconds():
            raise _invalid(name, "it ends before it starts")
    if not 0 <= span.last_seconds <= LONGEST_SECONDS or span == TimeRange():
        raise _invalid(name, "it is not between a second and ten years")
    return span


def _invalid(name: str, why: str) -> errors.Error:
    return errors.invalid_argument(
        "CHOICE_INVALID", f"The choice for {name!r} does not fit: {why}.", field="choices", variable=name
    )
