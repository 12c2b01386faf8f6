from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from meshboard.analytics.v1.query_pb2 import Filter, Result, TimeRange
from meshboard.dashboard.v1 import variable_service_pb2 as pb
from meshboard.dashboard.v1.dashboard_pb2 import Dashboard

from services.chassis import errors
from services.dashboard_svc.scopes import Scope, scope_of
from services.dashboard_svc.variables import values_to_choose
from tests.dashboard_svc.conftest import Mesh
from tests.harness import new_id, refused


def board(source_id: str) -> Dashboard:
    """A dashboard on which a city depends on a country."""

    def values(name: str, *filters: dict[str, Any]) -> dict[str, Any]:
        return {"sourceId": source_id, "property": name, "filters": filters}

    of_country = {"property": "country", "operator": "EQUAL", "values": ["$country"]}
    variables = [
        {"name": "country", "propertyValues": values("country"), "multiple": True},
        {"name": "city", "propertyValues": {**values("city", of_country), "limit": 7}},
        {"name": "early", "propertyValues": values("city", {**of_country, "values": ["$late"]})},
        {"name": "late", "text": {}},
        {"name": "plan", "list": {"options": [{"value": "f", "title": "Free"}, {"value": "paid"}]}},
    ]
    dashboard = {"workspaceId": new_id(), "dashboardId": new_id(), "variables": variables}
    return ParseDict({**dashboard, "settings": {"timeRange": {"lastSeconds": 60}}}, Dashboard())


def counted(**counts: int) -> Result:
    rows = [[name, count] for name, count in counts.items()]
    return ParseDict({"columns": [{"name": "city"}, {"name": "count"}], "rows": rows}, Result())


async def test_values_of_a_property_depend_on_what_stands_before(mesh: Mesh) -> None:
    source_id = new_id()
    dashboard = board(source_id)
    mesh.analytics.results[source_id] = ParseDict({"rows": [["Bonn", 2], ["", 9], ["Ulm", 5]]}, Result())
    lock = Filter(property="host")
    lock.values.add(string_value="example.org")
    scope = scope_of(dashboard.variables, ["country=de", "country=at", "city=Ulm"], filters=[lock])
    found = await values_to_choose(mesh.answers, dashboard, "city", scope, "u.l")
    assert [(one.value, one.title, one.event_count) for one in found] == [
        ("Ulm", "Ulm", 5),
        ("Bonn", "Bonn", 2),
    ]
    query = mesh.analytics.asked[-1].query
    assert (query.limit, query.time_range.last_seconds) == (7, 60)
    assert [
        (one.property, Filter.Operator.Name(one.operator), [value.string_value for value in one.values])
        for one in query.filters
    ] == [
        ("city", "EXISTS", []),
        ("city", "MATCHES", [r"(?i)^u\.l"]),
        ("country", "IN", ["de", "at"]),
        ("host", "OPERATOR_UNSPECIFIED", ["example.org"]),
    ]
    await values_to_choose(
        mesh.answers, dashboard, "city", Scope(time_range=TimeRange(last_seconds=5).SerializeToString())
    )
    query = mesh.analytics.asked[-1].query
    assert ([one.property for one in query.filters], query.time_range.last_seconds) == (["city"], 5)


async def test_what_stands_behind_cannot_be_named(mesh: Mesh) -> None:
    with pytest.raises(errors.Error) as refusal:
        await values_to_choose(mesh.answers, board(new_id()), "early", Scope())
    assert refusal.value.reason == "VARIABLE_UNKNOWN"


async def test_lists_have_their_options_and_texts_nothing(mesh: Mesh) -> None:
    dashboard = board(new_id())
    found = await values_to_choose(mesh.answers, dashboard, "plan", Scope())
    assert [(one.value, one.title) for one in found] == [("f", "Free"), ("paid", "paid")]
    assert [one.value for one in await values_to_choose(mesh.answers, dashboard, "plan", Scope(), "fR")] == [
        "f"
    ]
    assert await values_to_choose(mesh.answers, dashboard, "late", Scope()) == []
    assert mesh.analytics.calls == 0


async def test_says_why_there_are_no_values(mesh: Mesh) -> None:
    source_id = new_id()
    mesh.analytics.failures[source_id] = errors.not_found("SOURCE_NOT_FOUND", "There is no such source.")
    with pytest.raises(errors.Error) as refusal:
        await values_to_choose(mesh.answers, board(source_id), "country", Scope())
    assert refusal.value.reason == "SOURCE_NOT_FOUND"


async def test_is_for_who_sees_the_dashboard(mesh: Mesh) -> None:
    ann, stranger = mesh.identity.member("editor"), mesh.identity.member("owner")
    dashboard = await mesh.dashboard(ann)
    request = pb.ListVariableValuesRequest(dashboard_id=dashboard.dashboard_id, name="country")
    for member, reason in ((ann, "VARIABLE_NOT_FOUND"), (stranger, "DASHBOARD_NOT_FOUND")):
        call = mesh.variables.ListVariableValues(request, metadata=member.metadata)
        assert await refused(call) == (grpc.StatusCode.NOT_FOUND, reason)
