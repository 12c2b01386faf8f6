"""InternalQueryService on the real store: many questions in a call, by the dashboard's right."""

from datetime import UTC, datetime, timedelta
from typing import Any
from unittest.mock import ANY

import grpc
import grpc.aio
import pytest
from google.protobuf.json_format import ParseDict
from meshboard.analytics.v1.internal_query_service_pb2 import (
    CheckWidgetQueriesRequest,
    RecallWidgetAnswersRequest,
    RunWidgetQueriesRequest,
    WidgetAnswer,
    WidgetQuestion,
)
from meshboard.analytics.v1.source_pb2 import Source

from services.analytics_svc.queries import Limits, Queries
from services.analytics_svc.widget_queries import InternalQueryServicer
from services.chassis import errors
from tests.analytics_svc.conftest import Analytics
from tests.analytics_svc.test_sources import refusal
from tests.harness import Member, new_id, service_metadata

RANGE = {"timeRange": {"startTime": "2026-01-01T00:00:00Z", "endTime": "2030-01-01T00:00:00Z"}}
COUNT: dict[str, Any] = {"query": RANGE}
FUNNEL: dict[str, Any] = {"funnel": {"steps": [{"event": "view"}, {"event": "buy", "title": "Bought"}]}}
RETENTION: dict[str, Any] = {"retention": {**RANGE, "period": "WEEK"}}


def question(source: Source, asked: dict[str, Any], known_version: bytes = b"") -> WidgetQuestion:
    """A question about a source, as JSON has it."""
    ((kind, query),) = asked.items()
    made = ParseDict({kind: {"sourceIds": [source.source_id], **query}}, WidgetQuestion())
    made.known_version = known_version
    return made


async def run(
    analytics: Analytics, workspace_id: str, questions: list[WidgetQuestion], **call: Any
) -> list[WidgetAnswer]:
    """The answers, in the order of the questions."""
    request = RunWidgetQueriesRequest(workspace_id=workspace_id, questions=questions)
    call.setdefault("metadata", service_metadata(analytics.identity.keys, "dashboard", "analytics"))
    arriving = analytics.internal.RunWidgetQueries(request, **call)
    answers = [one async for response in arriving for one in response.answers]
    assert sorted(one.index for one in answers) == list(range(len(questions)))
    return sorted(answers, key=lambda one: one.index)


def reasons(answers: list[WidgetAnswer]) -> list[str]:
    """Why there is no answer, "" where there is one."""
    return [errors.from_status(one.error).reason if one.HasField("error") else "" for one in answers]


async def shop(analytics: Analytics) -> tuple[Member, Source, str]:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    await analytics.send(key, [{}, {"distinctId": "bob"}, {"event": "buy"}])
    await analytics.until_count(member, source, 3)
    return member, source, key


async def test_answers_each_kind_of_question(analytics: Analytics) -> None:
    member, source, _ = await shop(analytics)
    questions = [question(source, asked) for asked in (COUNT, FUNNEL, RETENTION)]
    counted, funnel, retention = await run(analytics, member.workspace_id, questions)
    assert [list(row) for row in counted.result.rows] == [[3.0]]
    assert [(step.title, step.count) for step in funnel.funnel.total.steps] == [("view", 2), ("Bought", 1)]
    assert sum(row.size for row in retention.retention.rows) == 2
    assert len({one.version for one in (counted, funnel, retention)}) == 3


async def test_says_that_an_answer_is_the_present_one_until_events_come(analytics: Analytics) -> None:
    member, source, key = await shop(analytics)
    kinds = (COUNT, FUNNEL, RETENTION)
    first = await run(analytics, member.workspace_id, [question(source, asked) for asked in kinds])

    async def again() -> list[WidgetAnswer]:
        known = [question(source, asked, one.version) for asked, one in zip(kinds, first, strict=True)]
        return await run(analytics, member.workspace_id, known)

    second = await again()
    assert [one.WhichOneof("answer") for one in second] == ["unchanged"] * 3
    assert [one.version for one in second] == [one.version for one in first]
    await analytics.send(key, [{"distinctId": "cyd"}])
    await analytics.until_count(member, source, 4)
    third = await again()
    assert [one.WhichOneof("answer") for one in third] == ["result", "funnel", "retention"]
    assert all(one.version != other.version for one, other in zip(third, first, strict=True))
    assert [list(row) for row in third[0].result.rows] == [[4.0]]


async def test_recalls_what_needs_no_store_and_leaves_out_the_rest(analytics: Analytics) -> None:
    member, source, key = await shop(analytics)

    async def recall(*questions: WidgetQuestion) -> dict[int, str]:
        request = RecallWidgetAnswersRequest(workspace_id=member.workspace_id, questions=questions)
        metadata = service_metadata(analytics.identity.keys, "dashboard", "analytics")
        answers = (await analytics.internal.RecallWidgetAnswers(request, metadata=metadata)).answers
        return {one.index: str(one.WhichOneof("answer")) for one in answers}

    assert await recall(question(source, COUNT), question(Source(source_id=new_id()), COUNT)) == {1: "error"}
    counted, _ = await run(
        analytics, member.workspace_id, [question(source, asked) for asked in (COUNT, FUNNEL)]
    )
    known = [
        question(source, COUNT, counted.version),
        question(source, RETENTION),
        question(source, FUNNEL),
    ]
    assert await recall(*known) == {0: "unchanged", 2: "funnel"}
    await analytics.send(key, [{"distinctId": "cyd"}])
    await analytics.until_count(member, source, 4)
    assert await recall(*known) == {}


async def test_a_recall_leaves_out_what_has_no_room(
    analytics: Analytics, monkeypatch: pytest.MonkeyPatch
) -> None:
    member, source, _key = await shop(analytics)
    questions = [question(source, {"query": {"measures": [{"alias": f"m{number}"}]}}) for number in range(5)]
    servicer = InternalQueryServicer(
        Queries(analytics.db, analytics.store, lambda: datetime.now(UTC), Limits(seconds=60))
    )
    asked = RunWidgetQueriesRequest(workspace_id=member.workspace_id, questions=questions)
    async for _ in servicer.RunWidgetQueries(asked, ANY):
        pass
    monkeypatch.setattr("services.analytics_svc.widget_queries._MESSAGE_BYTES", 100)
    request = RecallWidgetAnswersRequest(workspace_id=member.workspace_id, questions=questions)
    answers = (await servicer.RecallWidgetAnswers(request, ANY)).answers
    assert 0 < len(answers) < 5
    assert [one.index for one in answers] == list(range(len(answers)))


async def test_a_version_is_of_its_question(analytics: Analytics) -> None:
    member, source, _ = await shop(analytics)
    (funnel,) = await run(analytics, member.workspace_id, [question(source, FUNNEL)])
    other = {"funnel": {"steps": [{"event": "view", "title": "Seen"}, {"event": "buy"}]}}
    (renamed,) = await run(analytics, member.workspace_id, [question(source, other, funnel.version)])
    assert [step.title for step in renamed.funnel.total.steps] == ["Seen", "buy"]


async def test_events_of_other_sources_count_where_persons_do(analytics: Analytics) -> None:
    member, source, _ = await shop(analytics)
    other, key = await analytics.source(member)
    await analytics.send(key, [{}])
    await analytics.until_count(member, other, 1)
    both = [source.source_id, other.source_id]
    asked = {"query": {"sourceIds": both, "breakdowns": [{"property": "person_id"}]}}
    (first,) = await run(analytics, member.workspace_id, [question(source, asked)])
    third, key = await analytics.source(member)
    await analytics.send(key, [{}])
    await analytics.until_count(member, third, 1)
    (second,) = await run(analytics, member.workspace_id, [question(source, asked, first.version)])
    assert second.WhichOneof("answer") == "result"


async def test_a_question_that_fails_takes_no_other_with_it(analytics: Analytics) -> None:
    member, source, _ = await shop(analytics)
    stranger, _ = await analytics.source(analytics.identity.member("editor"))
    questions = [
        question(source, {"query": {"breakdowns": [{"property": "pth"}]}}),
        question(stranger, COUNT),
        question(Source(source_id=new_id()), FUNNEL),
        question(source, {"query": {"filters": [{"cohortId": new_id()}]}}),
        question(source, {"retention": {"timeRange": {"endTime": "2020-01-01T00:00:00Z"}}}),
        question(source, COUNT),
    ]
    answers = await run(analytics, member.workspace_id, questions)
    expected = [
        "PROPERTY_UNKNOWN",
        "SOURCE_NOT_FOUND",
        "SOURCE_NOT_FOUND",
        "COHORT_NOT_FOUND",
        "QUERY_INVALID",
    ]
    assert reasons(answers) == [*expected, ""]
    assert reasons(await run(analytics, new_id(), [question(source, COUNT)])) == ["SOURCE_NOT_FOUND"]

    request = CheckWidgetQueriesRequest(workspace_id=member.workspace_id, questions=questions)
    checked = await analytics.internal.CheckWidgetQueries(
        request, metadata=service_metadata(analytics.identity.keys, "dashboard", "analytics")
    )
    assert [errors.from_status(one).reason for one in checked.problems[:5]] == expected
    assert checked.problems[5].code == 0
    assert list(checked.absent_source_ids) == sorted([stranger.source_id, questions[2].funnel.source_ids[0]])


async def test_answers_for_dashboard_svc_alone(analytics: Analytics) -> None:
    member, source, _ = await shop(analytics)
    for metadata in (member.metadata, service_metadata(analytics.identity.keys, "user", "analytics")):
        denied = (grpc.StatusCode.PERMISSION_DENIED, "CALLER_NOT_ALLOWED")
        running = run(analytics, member.workspace_id, [question(source, COUNT)], metadata=metadata)
        assert await refusal(running) == denied
        request = CheckWidgetQueriesRequest(
            workspace_id=member.workspace_id, questions=[question(source, COUNT)]
        )
        assert await refusal(analytics.internal.CheckWidgetQueries(request, metadata=metadata)) == denied


async def test_the_contract_bounds_the_questions(analytics: Analytics) -> None:
    member, source, _ = await shop(analytics)
    for questions in ([], [question(source, COUNT)] * 201, [WidgetQuestion()]):
        assert await refusal(run(analytics, member.workspace_id, questions)) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "VALIDATION_FAILED",
        )
    bad = question(source, {"query": {"limit": -1}})
    for _ in range(2):  # what was refused is not taken for valid the next time
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await run(analytics, member.workspace_id, [question(source, COUNT), bad])
        assert "questions[1].query.limit" in str(errors.from_rpc(refused.value, "analytics").message)
    await run(analytics, member.workspace_id, [question(source, COUNT)])
    with pytest.raises(grpc.aio.AioRpcError) as refused:  # also of a question that is known
        await run(analytics, member.workspace_id, [question(source, COUNT, bytes(65))])
    assert "questions[0].known_version" in str(errors.from_rpc(refused.value, "analytics").message)


async def test_many_questions_pass_the_lane_of_the_workspace(analytics: Analytics) -> None:
    member, source, _ = await shop(analytics)
    questions = [
        question(source, {"query": {"measures": [{"alias": f"m{number}"}]}}) for number in range(200)
    ]
    answers = await run(analytics, member.workspace_id, questions)
    assert [one.result.columns[0].name for one in answers] == [f"m{number}" for number in range(200)]


async def test_ranges_until_now_move_by_the_minute(analytics: Analytics) -> None:
    member, source, _ = await shop(analytics)
    clock = [datetime(2027, 1, 1, 12, 0, 1, tzinfo=UTC)]
    servicer = InternalQueryServicer(
        Queries(analytics.db, analytics.store, lambda: clock[0], Limits(seconds=60))
    )
    sliding = {"timeRange": {"lastSeconds": 86_400 * 365}}
    without_end = {"retention": {"timeRange": {"startTime": "2026-01-01T00:00:00Z"}, "period": "MONTH"}}
    kinds = ({"query": sliding}, {"funnel": {**FUNNEL["funnel"], **sliding}}, without_end)
    request = RunWidgetQueriesRequest(
        workspace_id=member.workspace_id, questions=[question(source, asked) for asked in kinds]
    )

    async def versions() -> dict[int, bytes]:
        return {
            one.index: one.version
            async for response in servicer.RunWidgetQueries(request, ANY)
            for one in response.answers
        }

    first = await versions()
    clock[0] += timedelta(seconds=58)
    assert await versions() == first
    clock[0] += timedelta(seconds=2)
    later = await versions()
    assert all(later[index] != first[index] for index in first)


async def test_what_is_over_goes_by_the_clock(analytics: Analytics) -> None:
    member, source, _ = await shop(analytics)
    clock = [datetime(2027, 1, 31, 23, 59, 59, tzinfo=UTC)]
    servicer = InternalQueryServicer(
        Queries(analytics.db, analytics.store, lambda: clock[0], Limits(seconds=60))
    )
    whole = {"startTime": "2026-11-01T00:00:00Z", "endTime": "2027-03-01T00:00:00Z"}
    asked = question(source, {"retention": {"timeRange": whole, "period": "MONTH"}})

    async def ask() -> WidgetAnswer:
        request = RunWidgetQueriesRequest(workspace_id=member.workspace_id, questions=[asked])
        return (await anext(servicer.RunWidgetQueries(request, ANY))).answers[0]

    before = await ask()
    clock[0] += timedelta(seconds=1)
    asked.known_version = before.version
    after = await ask()
    assert len(after.retention.rows[0].cells) == len(before.retention.rows[0].cells) + 1
