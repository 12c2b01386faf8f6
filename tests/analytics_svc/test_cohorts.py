"""Cohorts: saved, listed, changed, deleted, previewed, and used in filters."""

from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.json_format import ParseDict
from meshboard.analytics.v1.cohort_pb2 import Cohort, CohortDefinition
from meshboard.analytics.v1.cohort_service_pb2 import (
    CreateCohortRequest,
    DeleteCohortRequest,
    GetCohortRequest,
    ListCohortsRequest,
    PreviewCohortRequest,
    PreviewCohortResponse,
    UpdateCohortRequest,
)
from meshboard.analytics.v1.internal_query_service_pb2 import RunWidgetQueriesRequest, WidgetQuestion
from meshboard.analytics.v1.query_pb2 import Filter, Query
from meshboard.analytics.v1.query_service_pb2 import ValidateQueryRequest
from meshboard.analytics.v1.source_pb2 import Source

from services.chassis.rights import ROLES
from tests.analytics_svc.conftest import Analytics
from tests.analytics_svc.test_sources import announced, refusal
from tests.harness import Member, new_id, service_metadata

BUYERS = {"conditions": [{"behaviour": {"event": "buy"}}]}


async def create(
    analytics: Analytics, member: Member, definition: dict[str, Any] | None = None, **more: Any
) -> Cohort:
    """A new cohort of the member."""
    request = ParseDict(
        {"title": "Buyers", "definition": definition or BUYERS, **more}, CreateCohortRequest()
    )
    response = await analytics.cohorts.CreateCohort(request, metadata=member.metadata)
    return response.cohort


async def update(analytics: Analytics, member: Member, cohort: Cohort, *paths: str) -> Cohort:
    request = UpdateCohortRequest(cohort=cohort, update_mask=FieldMask(paths=paths))
    response = await analytics.cohorts.UpdateCohort(request, metadata=member.metadata)
    return response.cohort


async def preview(
    analytics: Analytics, member: Member, source: Source, definition: dict[str, Any]
) -> PreviewCohortResponse:
    request = PreviewCohortRequest(
        source_ids=[source.source_id], definition=ParseDict(definition, CohortDefinition())
    )
    response: PreviewCohortResponse = await analytics.cohorts.PreviewCohort(request, metadata=member.metadata)
    return response


async def shop(analytics: Analytics) -> tuple[Member, Source]:
    """A source where ada has bought twice, bob once, and eve has only looked."""
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    events: list[dict[str, Any]] = [
        {"event": "view", "distinctId": "eve", "time": "2015-03-01T12:00:00Z", "properties": {"plan": "pro"}},
        {"event": "buy", "distinctId": "bob", "time": "2015-03-02T12:00:00Z", "properties": {"plan": "pro"}},
        {
            "event": "view",
            "distinctId": "bob",
            "time": "2015-03-03T12:00:00Z",
            "properties": {"plan": "free"},
        },
        {"event": "buy", "distinctId": "ada", "time": "2015-03-04T12:00:00Z"},
        {"event": "buy", "distinctId": "ada", "time": "2015-03-05T12:00:00Z"},
    ]
    await analytics.send(key, events)
    await analytics.until_count(member, source, len(events))
    return member, source


async def test_keeps_what_was_said(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    made = await create(analytics, member, description="Who has bought", requestId="once")
    assert (made.title, made.description, made.workspace_id) == (
        "Buyers",
        "Who has bought",
        member.workspace_id,
    )
    assert made.definition.conditions[0].behaviour.event == "buy"
    assert await create(analytics, member, description="another", requestId="once") == made
    found = await analytics.cohorts.GetCohort(
        GetCohortRequest(cohort_id=made.cohort_id), metadata=member.metadata
    )
    assert found.cohort == made
    assert await announced(analytics, member.workspace_id) == ["CohortCreated"]


async def test_lists_pages_of_the_workspace_alone(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    await create(analytics, analytics.identity.member("editor"))
    made = [(await create(analytics, member, title=str(i))).cohort_id for i in range(3)]
    found: list[str] = []
    page_token = ""
    while True:
        page = await analytics.cohorts.ListCohorts(
            ListCohortsRequest(page_size=2, page_token=page_token), metadata=member.metadata
        )
        found += [cohort.cohort_id for cohort in page.cohorts]
        if not (page_token := page.next_page_token):
            break
    assert found == made[::-1]


async def test_changes_what_the_mask_names(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    made = await create(analytics, member)
    other = ParseDict({"conditions": [{"behaviour": {"event": "view"}}]}, CohortDefinition())
    wanted = Cohort(cohort_id=made.cohort_id, title="Lookers", definition=other, etag=made.etag)
    changed = await update(analytics, member, wanted, "title")
    assert (changed.title, changed.definition) == ("Lookers", made.definition)
    assert changed.etag != made.etag
    assert await refusal(update(analytics, member, wanted, "title")) == (
        grpc.StatusCode.ABORTED,
        "ETAG_MISMATCH",
    )
    wanted.ClearField("etag")
    changed = await update(analytics, member, wanted, "definition")
    assert changed.definition == other
    assert await announced(analytics, member.workspace_id) == [
        "CohortCreated",
        "CohortUpdated",
        "CohortUpdated",
    ]


@pytest.mark.parametrize(
    ("cohort", "paths", "reason"),
    [
        (Cohort(title="x"), ["etag"], "UPDATE_MASK_INVALID"),
        (Cohort(), ["title"], "VALIDATION_FAILED"),
        (Cohort(), ["definition"], "VALIDATION_FAILED"),
    ],
)
async def test_refuses_senseless_changes(
    analytics: Analytics, cohort: Cohort, paths: list[str], reason: str
) -> None:
    member = analytics.identity.member("editor")
    wanted = Cohort(cohort_id=(await create(analytics, member)).cohort_id)
    wanted.MergeFrom(cohort)
    call = update(analytics, member, wanted, *paths)
    assert await refusal(call) == (grpc.StatusCode.INVALID_ARGUMENT, reason)


async def test_what_is_deleted_is_absent(analytics: Analytics) -> None:
    member, source = await shop(analytics)
    made = await create(analytics, member)
    by = {"filters": [{"cohortId": made.cohort_id.upper()}]}
    assert (await analytics.ask(member, source, **by))["rows"] == [[4.0]]
    request = DeleteCohortRequest(cohort_id=made.cohort_id)
    await analytics.cohorts.DeleteCohort(request, metadata=member.metadata)
    absent = (grpc.StatusCode.NOT_FOUND, "COHORT_NOT_FOUND")
    assert await refusal(analytics.cohorts.DeleteCohort(request, metadata=member.metadata)) == absent
    assert await refusal(analytics.ask(member, source, **by)) == absent
    assert await refusal(update(analytics, member, made, "title")) == absent
    assert (await announced(analytics, member.workspace_id))[-1] == "CohortDeleted"


async def test_cohorts_of_other_workspaces_are_absent(analytics: Analytics) -> None:
    member, source = await shop(analytics)
    made = await create(analytics, analytics.identity.member("owner"))
    absent = (grpc.StatusCode.NOT_FOUND, "COHORT_NOT_FOUND")
    for call in (
        analytics.cohorts.GetCohort(GetCohortRequest(cohort_id=made.cohort_id), metadata=member.metadata),
        analytics.cohorts.DeleteCohort(
            DeleteCohortRequest(cohort_id=made.cohort_id), metadata=member.metadata
        ),
        update(analytics, member, Cohort(cohort_id=made.cohort_id, title="mine"), "title"),
        analytics.ask(member, source, filters=[{"cohortId": made.cohort_id}]),
    ):
        assert await refusal(call) == absent


async def test_viewers_use_them_and_editors_make_them(analytics: Analytics) -> None:
    member, source = await shop(analytics)
    made = await create(analytics, member)
    viewer = analytics.identity.member("viewer", member.workspace_id)
    by = {"filters": [{"cohortId": made.cohort_id}]}
    assert (await analytics.ask(viewer, source, **by))["rows"] == [[4.0]]
    assert await refusal(create(analytics, viewer)) == (
        grpc.StatusCode.PERMISSION_DENIED,
        "PERMISSION_MISSING",
    )


async def test_who_may_not_see_cohorts_cannot_filter_by_them(
    analytics: Analytics, monkeypatch: pytest.MonkeyPatch
) -> None:
    member, source = await shop(analytics)
    made = await create(analytics, member)
    monkeypatch.setitem(ROLES, "analyst", frozenset({"sources.view", "sources.query"}))
    analyst = analytics.identity.member("analyst", member.workspace_id)
    assert (await analytics.ask(analyst, source))["rows"] == [[5.0]]
    absent = (grpc.StatusCode.NOT_FOUND, "COHORT_NOT_FOUND")
    by = Query(source_ids=[source.source_id], filters=[Filter(cohort_id=made.cohort_id)])
    for call in (
        analytics.ask(analyst, source, filters=[{"cohortId": made.cohort_id}]),
        analytics.ask(analyst, source, measures=[{"filters": [{"cohortId": made.cohort_id}]}]),
        analytics.queries.ValidateQuery(ValidateQueryRequest(query=by), metadata=analyst.metadata),
    ):
        assert await refusal(call) == absent


async def test_dashboards_filter_by_their_own_right(analytics: Analytics) -> None:
    member, source = await shop(analytics)
    made = await create(analytics, member)
    query = Query(source_ids=[source.source_id], filters=[Filter(cohort_id=made.cohort_id)])
    request = RunWidgetQueriesRequest(
        workspace_id=member.workspace_id, questions=[WidgetQuestion(query=query)]
    )
    metadata = service_metadata(analytics.identity.keys, "dashboard", "analytics")
    answers = [one async for one in analytics.internal.RunWidgetQueries(request, metadata=metadata)]
    assert [list(row) for row in answers[0].answers[0].result.rows] == [[4.0]]


async def test_a_change_is_seen_by_the_next_query(analytics: Analytics) -> None:
    member, source = await shop(analytics)
    made = await create(analytics, member)
    by = {"filters": [{"cohortId": made.cohort_id}], "measures": [{"aggregation": "UNIQUE"}]}
    assert (await analytics.ask(member, source, **by))["rows"] == [[2.0]]
    made.definition.conditions[0].behaviour.min_count = 2
    await update(analytics, member, made, "definition")
    assert (await analytics.ask(member, source, **by))["rows"] == [[1.0]]


async def test_a_preview_names_the_latest(analytics: Analytics) -> None:
    member, source = await shop(analytics)
    found = await preview(analytics, member, source, BUYERS)
    assert (found.member_count, found.actor_count) == (2, 3)
    assert [(m.actor_id, m.event_count) for m in found.members] == [("ada", 2), ("bob", 2)]
    assert found.members[1].first_time.ToJsonString() == "2015-03-02T12:00:00Z"
    assert found.members[1].last_time.ToJsonString() == "2015-03-03T12:00:00Z"
    assert not found.cached
    assert (await preview(analytics, member, source, BUYERS)).cached


WHO: list[tuple[dict[str, Any], set[str]]] = [
    ({"conditions": [{"behaviour": {"event": "buy", "minCount": 2}}]}, {"ada"}),
    ({"conditions": [{"behaviour": {"event": "buy", "maxCount": 1}}]}, {"bob"}),
    ({"conditions": [{"behaviour": {"event": "buy"}, "negate": True}]}, {"eve"}),
    (
        {"conditions": [{"behaviour": {"event": "buy", "timeRange": {"endTime": "2015-03-04T12:00:00Z"}}}]},
        {"bob"},
    ),
    ({"conditions": [{"behaviour": {"event": "buy", "timeRange": {"lastSeconds": 3600}}}]}, set()),
    # Bob had the plan, but the last thing that is said of him is another.
    ({"conditions": [{"trait": {"filter": {"property": "properties.plan", "values": ["pro"]}}}]}, {"eve"}),
    (
        {
            "conditions": [
                {
                    "trait": {
                        "filter": {"property": "properties.plan", "operator": "NOT_EQUAL", "values": ["pro"]}
                    }
                }
            ]
        },
        {"ada", "bob"},
    ),
    (
        {
            "match": "ANY",
            "conditions": [
                {"behaviour": {"event": "buy", "minCount": 2}},
                {"trait": {"filter": {"property": "properties.plan", "values": ["pro"]}}},
            ],
        },
        {"ada", "eve"},
    ),
]


@pytest.mark.parametrize(("definition", "expected"), WHO)
async def test_says_who_is_in_it(
    analytics: Analytics, definition: dict[str, Any], expected: set[str]
) -> None:
    member, source = await shop(analytics)
    found = await preview(analytics, member, source, definition)
    assert {one.actor_id for one in found.members} == expected
    assert found.member_count == len(expected)


SENSELESS: list[tuple[dict[str, Any], str]] = [
    ({"conditions": []}, "VALIDATION_FAILED"),
    ({"conditions": [{"negate": True}]}, "VALIDATION_FAILED"),
    ({"actor": "VISIT_ID", **BUYERS}, "VALIDATION_FAILED"),
    ({"conditions": [{"behaviour": {"minCount": 3, "maxCount": 2}}]}, "VALIDATION_FAILED"),
    ({"conditions": [{"behaviour": {"filters": [{"property": "pth"}]}}]}, "PROPERTY_UNKNOWN"),
    ({"conditions": [{"behaviour": {"filters": [{"cohortId": new_id()}]}}]}, "QUERY_INVALID"),
    ({"conditions": [{"trait": {"filter": {"cohortId": new_id()}}}]}, "QUERY_INVALID"),
    ({"conditions": [{"trait": {"filter": {"property": "visit_id", "values": ["x"]}}}]}, "QUERY_INVALID"),
    ({"conditions": [{"behaviour": {"filters": [{"property": "url"}]}}]}, "QUERY_INVALID"),
    (
        {
            "conditions": [
                {
                    "behaviour": {
                        "filters": [{"property": "url", "operator": "IN", "values": ["x" * 999] * 70}]
                    }
                }
            ]
        },
        "QUERY_INVALID",
    ),
]


@pytest.mark.parametrize(("definition", "reason"), SENSELESS)
async def test_refuses_senseless_definitions(
    analytics: Analytics, definition: dict[str, Any], reason: str
) -> None:
    member = analytics.identity.member("editor")
    source, _ = await analytics.source(member)
    wrong = (grpc.StatusCode.INVALID_ARGUMENT, reason)
    assert await refusal(create(analytics, member, definition)) == wrong
    assert await refusal(preview(analytics, member, source, definition)) == wrong


async def test_refuses_conditions_on_cohorts_that_make_no_sense(analytics: Analytics) -> None:
    member, source = await shop(analytics)
    made = await create(analytics, member)
    for more in ({"operator": "CONTAINS"}, {"operator": "IN", "values": ["x"]}):
        call = analytics.ask(member, source, filters=[{"cohortId": made.cohort_id, **more}])
        assert await refusal(call) == (grpc.StatusCode.INVALID_ARGUMENT, "QUERY_INVALID")
    both = analytics.ask(member, source, filters=[{"cohortId": made.cohort_id, "property": "url"}])
    assert await refusal(both) == (grpc.StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")


async def test_texts_cannot_become_sql(analytics: Analytics) -> None:
    member, source = await shop(analytics)
    evil = "'; DROP TABLE events; -- \\' {p0:String} `"
    definition = {
        "conditions": [
            {"behaviour": {"event": evil, "filters": [{"property": f"properties.{evil}", "values": [evil]}]}},
            {
                "trait": {
                    "filter": {"property": f"properties.{evil}", "operator": "CONTAINS", "values": [evil]}
                }
            },
        ]
    }
    made = await create(analytics, member, definition, title=evil)
    assert (await preview(analytics, member, source, definition)).member_count == 0
    by = {"filters": [{"cohortId": made.cohort_id, "operator": "NOT_IN"}]}
    assert (await analytics.ask(member, source, **by))["rows"] == [[5.0]]
