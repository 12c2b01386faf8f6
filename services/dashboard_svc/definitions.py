"""What a dashboard says of itself beside its widgets: title, tags, variables, settings and annotation queries, checked.

Widgets, and what variables are to queries, are judged elsewhere: here is what can be told from the dashboard alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from zoneinfo import ZoneInfo

from google.protobuf.timestamp_pb2 import Timestamp
from meshboard.analytics.v1.query_pb2 import Breakdown, Filter, Query, TimeRange
from meshboard.dashboard.v1.dashboard_pb2 import AnnotationQuery, DashboardContent, Settings, Variable

from services.chassis import errors
from services.chassis.texts import clean_name
from services.chassis.times import time_of

MAX_BYTES = 256 << 10
MAX_SPAN_SECONDS = 315_360_000
# A value that stands for what was chosen for a variable; `$$` in front is a plain `$`.
REFERENCE = re.compile(r"\$([a-z][a-z0-9_]{0,31})")
# A variable in a text; what `$$` stands for is none.
IN_TEXT = re.compile(r"\$\$|\$\{([a-z][a-z0-9_]{0,31})\}")


def clean(content: DashboardContent, fields: Collection[str], prefix: str = "") -> None:
    """Cleans and checks these fields of a content; `prefix` stands before their names in errors.

    Raises INVALID_ARGUMENT: VALIDATION_FAILED, VARIABLE_INVALID.
    """
    if "title" in fields:
        content.title = clean_name(content.title, f"{prefix}title")
    if "tags" in fields:
        _clean_tags(content, f"{prefix}tags")
    if "variables" in fields:
        _clean_variables(content.variables, f"{prefix}variables")
    if "settings" in fields:
        _check_settings(content.settings, f"{prefix}settings")
    if "annotation_queries" in fields:
        for index, query in enumerate(content.annotation_queries):
            query.title = clean_name(query.title, f"{prefix}annotation_queries[{index}].title")
    size = sum(part.ByteSize() for part in (*content.variables, *content.annotation_queries))
    if size > MAX_BYTES:
        raise errors.invalid_fields([(f"{prefix}variables", f"have more than {MAX_BYTES} bytes")])


def questions_of(content: DashboardContent) -> dict[bytes, Query]:
    """What the variables and annotation queries ask of sources, as queries by their serialization.

    Conditions on variables are left out: what they compare with is chosen later.
    """
    queries = [
        values_question(variable) for variable in content.variables if variable.HasField("property_values")
    ]
    queries += map(marks_question, content.annotation_queries)
    return {query.SerializeToString(deterministic=True): query for query in queries}


def values_question(variable: Variable) -> Query:
    """What a variable with the values of a property asks."""
    values = variable.property_values
    return Query(
        source_ids=[values.source_id],
        breakdowns=[Breakdown(property=values.property)],
        filters=_settled(values.filters),
    )


def marks_question(query: AnnotationQuery) -> Query:
    """What an annotation query asks."""
    asked = Query(source_ids=[query.source_id], filters=_settled(query.selector.filters))
    if query.text_property:
        asked.breakdowns.add(property=query.text_property)
    return asked


def sources_of(content: DashboardContent) -> set[str]:
    """The sources that a content looks at, in lower case."""
    found = {source_id for query in questions_of(content).values() for source_id in query.source_ids}
    for widget in content.widgets:
        for query in (widget.query, widget.funnel, widget.retention):
            found.update(query.source_ids)
    return {source_id.lower() for source_id in found}


def references(filters: Iterable[Filter]) -> set[str]:
    """The names of the variables that the filters compare with."""
    return {
        match[1]
        for filter_ in filters
        for value in filter_.values
        if (match := REFERENCE.fullmatch(value.string_value))
    }


def _settled(filters: Iterable[Filter]) -> list[Filter]:
    return [filter_ for filter_ in filters if not references([filter_])]


def _clean_tags(content: DashboardContent, field: str) -> None:
    tags = [clean_name(tag, f"{field}[{index}]") for index, tag in enumerate(content.tags)]
    if len(set(tags)) < len(tags):
        raise errors.invalid_fields([(field, "has a tag twice")])
    content.tags[:] = tags


def _clean_variables(variables: Collection[Variable], field: str) -> None:
    names: set[str] = set()
    for index, variable in enumerate(variables):
        path = f"{field}[{index}]"
        if variable.name in names:
            raise _invalid(variable, path, "another one has its name")
        if variable.title:
            variable.title = clean_name(variable.title, f"{path}.title")
        if missing := references(variable.property_values.filters) - names:
            raise _invalid(variable, path, f"no variable {min(missing)!r} stands before it")
        if variable.HasField("list"):
            _check_options(variable, path)
        _check_defaults(variable, path)
        names.add(variable.name)


def _check_options(variable: Variable, path: str) -> None:
    for index, option in enumerate(variable.list.options):
        if option.title:
            option.title = clean_name(option.title, f"{path}.list.options[{index}].title")
    if len({option.value for option in variable.list.options}) < len(variable.list.options):
        raise _invalid(variable, path, "it has an option twice")


def _check_defaults(variable: Variable, path: str) -> None:
    defaults = variable.defaults
    if len(defaults) > 1 and not variable.multiple:
        raise _invalid(variable, path, "it has several defaults, but only one value can be chosen")
    if variable.HasField("list") and not {option.value for option in variable.list.options}.issuperset(
        defaults
    ):
        raise _invalid(variable, path, "a default is none of its options")
    if variable.HasField("time_span"):
        if variable.multiple:
            raise _invalid(variable, path, "only one stretch of time can be chosen")
        for default in defaults:
            if not is_time_span(default):
                raise _invalid(variable, path, "its default is no stretch of time")


def is_time_span(text: str) -> bool:
    """Whether a text says a stretch of time: seconds until now, at most ten years, or `start/end` in RFC 3339."""
    if re.fullmatch(r"[1-9][0-9]{0,8}", text):
        return int(text) <= MAX_SPAN_SECONDS
    start_time, end_time = Timestamp(), Timestamp()
    try:
        first, second = text.split("/")
        start_time.FromJsonString(first)
        end_time.FromJsonString(second)
    except ValueError:
        return False
    return start_time.ToNanoseconds() < end_time.ToNanoseconds()


def _check_settings(settings: Settings, field: str) -> None:
    if settings.time_zone:
        try:
            ZoneInfo(settings.time_zone)
        except (KeyError, ValueError, OSError):
            raise errors.invalid_fields([(f"{field}.time_zone", "is no time zone that is known")]) from None
    _check_time_range(settings.time_range, f"{field}.time_range")


def _check_time_range(time_range: TimeRange, field: str) -> None:
    if time_range.HasField("start_time") and time_range.HasField("end_time"):
        start_time = time_of(time_range.start_time, f"{field}.start_time")
        if start_time >= time_of(time_range.end_time, f"{field}.end_time"):
            raise errors.invalid_fields([(field, "ends before it starts")])


def _invalid(variable: Variable, path: str, why: str) -> errors.Error:
    return errors.invalid_argument(
        "VARIABLE_INVALID",
        f"The variable {variable.name!r} does not fit: {why}.",
        field=path,
        variable=variable.name,
    )
