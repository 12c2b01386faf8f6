from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.struct_pb2 import Value
from meshboard.analytics.v1.insight_service_pb2 import (
    EventSelector,
    FunnelExclusion,
    FunnelQuery,
    FunnelStep,
    RetentionQuery,
)
from meshboard.analytics.v1.query_pb2 import AnyOf, Filter, Measure, Query
from meshboard.dashboard.v1.dashboard_pb2 import Variable, Widget

from services.chassis import errors
from services.dashboard_svc.validation import check_variables, plain, variable_of

COUNTRY = Variable(name="country", text=Variable.FreeText())
WHEN = Variable(name="when", time_span=Variable.TimeSpan())


def filter_of(*values: str) -> Filter:
    return Filter(
        property="country", operator=Filter.GREATER, values=[Value(string_value=value) for value in values]
    )


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (["$country"], "country"),
        (["$a_1"], "a_1"),
        (["$country", "$country"], ""),
        (["$$country"], ""),
        (["$Country"], ""),
        (["$"], ""),
        (["x$country"], ""),
        (["$country "], ""),
        (["$country\n"], ""),
        ([f"${'a' * 33}"], ""),
        ([], ""),
    ],
)
def test_a_value_that_is_a_name_stands_for_a_variable(values: list[str], name: str) -> None:
    assert variable_of(filter_of(*values)) == name


# Every place that has filters.
@pytest.mark.parametrize(
    "widget",
    [
        {"query": Query(filters=[filter_of("$country")])},
        {"query": Query(any_of=[AnyOf(filters=[filter_of("DE"), filter_of("$country")])])},
        {"query": Query(measures=[Measure(), Measure(filters=[filter_of("$country")])])},
        {"funnel": FunnelQuery(filters=[filter_of("$country")])},
        {"funnel": FunnelQuery(steps=[FunnelStep(), FunnelStep(filters=[filter_of("$country")])])},
        {
            "funnel": FunnelQuery(
                exclusions=[FunnelExclusion(events=EventSelector(filters=[filter_of("$country")]))]
            )
        },
        {"retention": RetentionQuery(filters=[filter_of("$country")])},
        {"retention": RetentionQuery(start=EventSelector(filters=[filter_of("$country")]))},
        {"retention": RetentionQuery(returning=EventSelector(filters=[filter_of("$country")]))},
    ],
)
def test_variables_are_those_of_the_dashboard(widget: dict[str, Any]) -> None:
    check_variables(Widget(**widget), [COUNTRY])
    with pytest.raises(errors.Error) as refusal:
        check_variables(Widget(**widget), [WHEN])
    assert (refusal.value.reason, refusal.value.metadata) == ("VARIABLE_UNKNOWN", {"variable": "country"})
    ((_, question),) = widget.items()
    asked = plain(question)
    assert "$country" not in str(asked)
    assert "EXISTS" in str(asked)
    assert "$country" in str(question)


def test_a_time_range_comes_from_a_variable_of_that_kind() -> None:
    check_variables(Widget(time_range_variable="when"), [COUNTRY, WHEN])
    for name in ("country", "absent"):
        with pytest.raises(errors.Error) as refusal:
            check_variables(Widget(time_range_variable=name), [COUNTRY, WHEN])
        assert (refusal.value.reason, refusal.value.violations[0][0]) == (
            "VARIABLE_UNKNOWN",
            "time_range_variable",
        )
