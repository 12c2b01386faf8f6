"""What a viewer looks at a dashboard with: what it has chosen, and what binds it whatever it chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshboard.analytics.v1.query_pb2 import Filter, TimeRange
from meshboard.dashboard.v1.dashboard_pb2 import Variable

from services.chassis import errors


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
        options = {option.value for option in variable.list.options}
        if variable.HasField("list") and not options.issuperset(values):
            raise _invalid(name, "not one of its options")
    return Scope(
        choices=tuple(sorted((name, tuple(values)) for name, values in chosen.items())),
        time_range=time_range.SerializeToString(deterministic=True) if time_range else b"",
        filters=tuple(filter_.SerializeToString(deterministic=True) for filter_ in filters),
    )


def _invalid(name: str, why: str) -> errors.Error:
    return errors.invalid_argument(
        "CHOICE_INVALID", f"The choice for {name!r} does not fit: {why}.", field="choices", variable=name
    )
