from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf.struct_pb2 import Value
from google.protobuf.timestamp_pb2 import Timestamp
from meshboard.analytics.v1.insight_service_pb2 import EventSelector
from meshboard.analytics.v1.query_pb2 import Filter, Query, TimeRange
from meshboard.dashboard.v1 import dashboard_service_pb2 as pb
from meshboard.dashboard.v1.dashboard_pb2 import AnnotationQuery, DashboardContent, Settings, Variable

from services.chassis import errors
from services.dashboard_svc import definitions
from services.dashboard_svc.contents import FIELDS
from tests.dashboard_svc.boards import events, get, update
from tests.dashboard_svc.conftest import Mesh
from tests.harness import new_id, refused

TEXT = Variable.FreeText()
SPAN = Variable.TimeSpan()
INVALID, DENIED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED


def options(*values: str) -> Variable.OptionList:
    return Variable.OptionList(options=[Variable.Option(value=value) for value in values])


def values_of(source_id: str, *references: str) -> Variable.PropertyValues:
    filters = [Filter(property="event", values=[Value(string_value=each)]) for each in references]
    return Variable.PropertyValues(source_id=source_id, property="path", filters=filters)


GOOD = {
    "any text": [Variable(name="a", text=TEXT, defaults=["x"])],
    "several texts": [Variable(name="a", text=TEXT, defaults=["x", "y"], multiple=True)],
    "an option": [Variable(name="a", list=options("x", "y"), defaults=["y"])],
    "seconds": [Variable(name="a", time_span=SPAN, defaults=["86400"])],
    "two instants": [
        Variable(name="a", time_span=SPAN, defaults=["2026-01-01T00:00:00Z/2026-01-02T00:00:00+01:00"])
    ],
    "an earlier variable": [
        Variable(name="a", text=TEXT),
        Variable(name="b", property_values=values_of(new_id(), "$a")),
    ],
    "a plain dollar": [Variable(name="b", property_values=values_of(new_id(), "$$a", "$", "$A", "a$b"))],
}
BAD = {
    "a name twice": [Variable(name="a", text=TEXT), Variable(name="a", time_span=SPAN)],
    "two defaults of one": [Variable(name="a", text=TEXT, defaults=["x", "y"])],
    "a default that is no option": [Variable(name="a", list=options("x"), defaults=["y"])],
    "an option twice": [Variable(name="a", list=options("x", "x"))],
    "several spans": [Variable(name="a", time_span=SPAN, multiple=True)],
    "no span": [Variable(name="a", time_span=SPAN, defaults=["yesterday"])],
    "no time": [Variable(name="a", time_span=SPAN, defaults=["0"])],
    "more than ten years": [Variable(name="a", time_span=SPAN, defaults=["315360001"])],
    "a span that ends first": [
        Variable(name="a", time_span=SPAN, defaults=["2026-01-02T00:00:00Z/2026-01-01T00:00:00Z"])
    ],
    "itself": [Variable(name="a", property_values=values_of(new_id(), "$a"))],
    "a later variable": [
        Variable(name="b", property_values=values_of(new_id(), "$a")),
        Variable(name="a", text=TEXT),
    ],
    "no variable": [Variable(name="b", property_values=values_of(new_id(), "$nothing"))],
}


@pytest.mark.parametrize("variables", GOOD.values(), ids=GOOD)
def test_takes_variables(variables: list[Variable]) -> None:
    definitions.clean(DashboardContent(title="t", variables=variables), FIELDS)


@pytest.mark.parametrize("variables", BAD.values(), ids=BAD)
def test_refuses_variables(variables: list[Variable]) -> None:
    with pytest.raises(errors.Error) as failure:
        definitions.clean(DashboardContent(title="t", variables=variables), FIELDS)
    assert (failure.value.code, failure.value.reason) == (INVALID, "VARIABLE_INVALID")
    assert failure.value.metadata["variable"] in {variable.name for variable in variables}


@pytest.mark.parametrize(
    "content",
    [
        DashboardContent(title=" "),
        DashboardContent(title="t", tags=["a", " a"]),
        DashboardContent(title="t", tags=["\u202ea"]),
        DashboardContent(title="t", settings=Settings(time_zone="Mars/Olympus")),
        DashboardContent(
            title="t",
            settings=Settings(
                time_range=TimeRange(start_time=Timestamp(seconds=9), end_time=Timestamp(seconds=9))
            ),
        ),
        DashboardContent(title="t", variables=[Variable(name="a", title="x\u200bx", text=TEXT)]),
        DashboardContent(
            title="t", variables=[Variable(name="a", text=TEXT, defaults=["x" * 1000] * 100)] * 3
        ),
        DashboardContent(title="t", annotation_queries=[AnnotationQuery(title="\u2066x")]),
    ],
)
def test_refuses_other_nonsense(content: DashboardContent) -> None:
    for number, variable in enumerate(content.variables):
        variable.name, variable.multiple = f"v{number}", True
    with pytest.raises(errors.Error) as failure:
        definitions.clean(content, FIELDS)
    assert (failure.value.code, failure.value.reason) == (INVALID, "VALIDATION_FAILED")


def test_cleans_what_people_write() -> None:
    content = DashboardContent(title=" Shop  1 ", tags=["  sales "])
    definitions.clean(content, FIELDS)
    assert (content.title, list(content.tags)) == ("Shop 1", ["sales"])


def everything(source_id: str) -> dict[str, Any]:
    return {
        "tags": ["sales", "web"],
        "variables": [
            Variable(name="country", property_values=values_of(source_id)),
            Variable(name="span", time_span=SPAN, defaults=["3600"]),
        ],
        "settings": Settings(
            time_zone="Europe/Berlin", refresh_seconds=60, time_range=TimeRange(last_seconds=86_400)
        ),
        "annotation_queries": [
            AnnotationQuery(title="Releases", source_id=source_id, selector=EventSelector(event="release"))
        ],
        "name": "shop",
    }


async def test_keeps_all_that_is_said(mesh: Mesh) -> None:
    ann, source_id = mesh.identity.member("editor"), new_id()
    said = everything(source_id)
    made = await mesh.dashboards.CreateDashboard(
        pb.CreateDashboardRequest(title="Shop", **said), metadata=ann.metadata
    )
    got = await get(mesh, ann, made.dashboard.dashboard_id)
    assert got == made.dashboard
    assert {field: getattr(got, field) for field in said} == said
    one = await update(mesh, ann, got.dashboard_id, settings=Settings(refresh_seconds=5))
    assert one.settings == Settings(refresh_seconds=5)
    assert list(one.variables) == said["variables"]
    two = await update(mesh, ann, got.dashboard_id, variables=[], tags=["x"], name="")
    assert (list(two.variables), list(two.tags), two.name) == ([], ["x"], "")
    assert list(two.annotation_queries) == said["annotation_queries"]
    none = await update(mesh, ann, got.dashboard_id, settings=None)
    assert not none.HasField("settings")
    assert await get(mesh, ann, got.dashboard_id) == none


async def test_asks_analytics_about_new_sources_alone(mesh: Mesh) -> None:
    ann, source_id = mesh.identity.member("editor"), new_id()
    said = everything(source_id)
    made = await mesh.dashboards.CreateDashboard(
        pb.CreateDashboardRequest(title="Shop", **said), metadata=ann.metadata
    )
    dashboard_id = made.dashboard.dashboard_id
    asked = [query for query, _ in mesh.analytics.validated]
    assert {tuple(query.source_ids) for query in asked} == {(source_id,)}
    assert [[each.property for each in query.breakdowns] for query in asked if query.breakdowns] == [["path"]]
    mesh.analytics.refused = errors.permission_denied("PERMISSION_MISSING", "No.")
    # What is there stays, also for who may not query its source.
    await update(mesh, ann, dashboard_id, variables=[*said["variables"], Variable(name="more", text=TEXT)])
    other = AnnotationQuery(title="Other", source_id=new_id(), selector=EventSelector(event="e"))
    for fields in (
        {"annotation_queries": [other]},
        {"variables": [Variable(name="v", property_values=values_of(new_id()))]},
    ):
        assert await refused(update(mesh, ann, dashboard_id, **fields)) == (DENIED, "PERMISSION_MISSING")
        request = pb.CreateDashboardRequest(title="Second", **fields)
        assert await refused(mesh.dashboards.CreateDashboard(request, metadata=ann.metadata)) == (
            DENIED,
            "PERMISSION_MISSING",
        )
    assert await events(mesh, ann) == ["DashboardCreated", "DashboardUpdated"]


async def test_what_was_taken_away_meanwhile_is_not_put_back_unasked(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    known, new = (Variable(name=name, property_values=values_of(new_id())) for name in "ab")
    dashboard_id = (await mesh.dashboard(ann)).dashboard_id
    await update(mesh, ann, dashboard_id, variables=[known])

    async def take_away() -> None:
        mesh.analytics.meanwhile = None
        await update(mesh, ann, dashboard_id, variables=[])

    mesh.analytics.meanwhile = take_away
    call = update(mesh, ann, dashboard_id, variables=[known, new])
    assert await refused(call) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    assert not (await get(mesh, ann, dashboard_id)).variables


async def test_a_name_is_unique_in_its_workspace(mesh: Mesh) -> None:
    ann, bob = mesh.identity.member("editor"), mesh.identity.member("editor")
    request = pb.CreateDashboardRequest(title="Shop", name="shop", request_id="once")
    first = await mesh.dashboards.CreateDashboard(request, metadata=ann.metadata)
    again = await mesh.dashboards.CreateDashboard(request, metadata=ann.metadata)
    assert again.dashboard.dashboard_id == first.dashboard.dashboard_id
    await mesh.dashboards.CreateDashboard(request, metadata=bob.metadata)
    request.request_id = "twice"
    taken = grpc.StatusCode.ALREADY_EXISTS, "DASHBOARD_NAME_TAKEN"
    assert await refused(mesh.dashboards.CreateDashboard(request, metadata=ann.metadata)) == taken
    other = await mesh.dashboard(ann)
    assert await refused(update(mesh, ann, other.dashboard_id, name="shop")) == taken
    for name in ("Shop", "-shop", "s" * 101, "a b"):
        assert await refused(update(mesh, ann, other.dashboard_id, name=name)) == (
            INVALID,
            "VALIDATION_FAILED",
        )


def test_finds_the_sources_of_everything() -> None:
    ids = [new_id() for _ in range(3)]
    content = DashboardContent(
        variables=[Variable(name="a", property_values=values_of(ids[0].upper()))],
        annotation_queries=[AnnotationQuery(title="t", source_id=ids[1])],
    )
    content.widgets.add().query.CopyFrom(Query(source_ids=[ids[2]]))
    assert definitions.sources_of(content) == set(ids)
