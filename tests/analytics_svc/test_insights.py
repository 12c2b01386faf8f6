"""Compiled funnels, retention, paths, lifecycles and cohorts against the oracle, on the real store."""

import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from meshboard.analytics.v1.cohort_pb2 import DISTINCT_ID, VISIT_ID, CohortCondition, CohortDefinition
from meshboard.analytics.v1.insight_service_pb2 import (
    EventSelector,
    FunnelExclusion,
    FunnelGroup,
    FunnelQuery,
    FunnelStep,
    LifecycleQuery,
    PathsQuery,
    Period,
    RetentionQuery,
)
from meshboard.analytics.v1.query_pb2 import Breakdown, Filter, Query, Result, TimeRange

from services.analytics_svc.compiler import Compiled, compile_query
from services.analytics_svc.event_store import EventStore
from services.analytics_svc.funnels import compile_funnel, read_funnel
from services.analytics_svc.lifecycle import compile_lifecycle, read_lifecycle
from services.analytics_svc.memberships import Memberships, _is_member, compile_preview
from services.analytics_svc.paths import compile_paths, read_paths
from services.analytics_svc.retention import compile_retention, read_retention
from services.analytics_svc.tables import insert_events
from tests.analytics_svc import oracle_insights
from tests.analytics_svc.oracle import Row
from tests.analytics_svc.oracle_insights import World
from tests.analytics_svc.test_compiler import batch_of
from tests.harness import new_id

# Around the end of summer time in Berlin and New York, and its beginning in São Paulo, where midnight is left out.
START = int(datetime(2018, 10, 1, 20, tzinfo=UTC).timestamp())
NOW = datetime(2018, 11, 28, 21, 30, tzinfo=UTC)
ZONES = ["", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "America/Sao_Paulo", "Pacific/Apia"]
DAY_SECONDS = 86_400
EXAMPLES = 40


def random_rows(source_id: str, seed: int) -> list[Row]:
    """Events of a few people in bursts, many of them at the same millisecond."""
    dice = random.Random(seed)
    rows = []
    for who in range(7):
        bursts = [dice.randrange(58 * DAY_SECONDS) for _ in range(4)]
        for _ in range(dice.randrange(6, 15)):
            time = dice.choice(bursts) + dice.choice([0, 0, 10, 60, 60, 120, 1799, 1800, 3600])
            properties: dict[str, str | float | bool] = {}
            if dice.random() < 0.7:
                plans: list[str | float | bool] = ["pro", "free", "it's", 404.0]
                properties["plan"] = dice.choice(plans)
            built_ins = {
                "event": dice.choice(["view", "view", "cart", "buy", "leave"]),
                "distinct_id": f"u{who}",
                "browser": dice.choice(["Firefox", "Chrome", ""]),
            }
            rows.append(Row(source_id, (START + time) * 1000 + dice.choice([0, 0, 1]), built_ins, properties))
    dice.shuffle(rows)
    return rows


class Sample:
    """Two sources of one workspace, a few cohorts, and what the oracle needs."""

    def __init__(self) -> None:
        self.workspace_id = new_id()
        self.source_ids = [new_id(), new_id()]
        self.rows = [
            row for i, source_id in enumerate(self.source_ids) for row in random_rows(source_id, seed=i)
        ]

    def world(self, cohorts: Sequence[CohortDefinition] = ()) -> World:
        """The cohorts have the ids that `cohort_id` gives to their places."""
        return World(self.rows, NOW, {cohort_id(i): cohort for i, cohort in enumerate(cohorts)})


def cohort_id(place: int) -> str:
    return f"00000000-0000-7000-8000-{place:012}"


def compiled_cohorts(cohorts: Sequence[CohortDefinition]) -> Memberships:
    return {cohort_id(i): partial(_is_member, cohort, NOW) for i, cohort in enumerate(cohorts)}


@pytest.fixture(scope="session")
async def sample(store: EventStore) -> Sample:
    made = Sample()
    for sequence, source_id in enumerate(made.source_ids, start=1):
        rows = [row for row in made.rows if row.source_id == source_id]
        batch = batch_of(made.workspace_id, source_id, rows, sequence)
        await insert_events(store, [batch], token=source_id)
        other = batch_of(new_id(), source_id, rows[:30], sequence)  # must not be counted
        await insert_events(store, [other], token=f"{source_id} of another workspace")
    return made


async def run(store: EventStore, compiled: Compiled) -> Result:
    found = await store.query(compiled.sql, compiled.params)
    result = Result(columns=compiled.columns, truncated=len(found.rows) > compiled.limit)
    for row in found.rows[: compiled.limit]:
        assert len(row) == len(compiled.columns)
        result.rows.add().extend(row)
    return result


# Questions


def one_of(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


@st.composite
def filters(draw: st.DrawFn, *, with_cohorts: bool = True) -> Filter:
    if with_cohorts and draw(one_of(False, False, True)):
        return Filter(cohort_id=cohort_id(0), operator=draw(one_of(0, Filter.IN, Filter.NOT_IN)))
    name = draw(one_of("browser", "properties.plan", "event"))
    operator = draw(one_of(Filter.EQUAL, Filter.NOT_EQUAL, Filter.EXISTS, Filter.NOT_EXISTS, Filter.CONTAINS))
    made = Filter(property=name, operator=operator)
    if operator not in {Filter.EXISTS, Filter.NOT_EXISTS}:
        value: Any = draw(one_of("Firefox", "pro", "it's", 404.0, "view", "r"))
        json_format.ParseDict(value, made.values.add())
    return made


conditions = st.lists(filters(), max_size=1)


@st.composite
def selectors(draw: st.DrawFn, kind: Any = EventSelector) -> Any:
    event = draw(one_of("view", "view", "cart", "buy", "leave", ""))
    some = draw(one_of(True, False, False))
    return kind(event=event, filters=draw(conditions) if some else [])


@st.composite
def ranges(draw: st.DrawFn, *, needed: bool = False) -> TimeRange | None:
    kind = draw(one_of("ends", "last", "start") if needed else one_of("ends", "last", "start", ""))
    made = TimeRange()
    if kind == "last":
        made.last_seconds = draw(one_of(DAY_SECONDS, 30 * DAY_SECONDS, 57 * DAY_SECONDS))
    elif kind:
        start = START + draw(st.integers(-5, 50)) * DAY_SECONDS + draw(one_of(0, 3600, 43_200))
        made.start_time.FromSeconds(start)
        if kind == "ends":
            made.end_time.FromSeconds(
                start + draw(st.integers(0, 40)) * DAY_SECONDS + draw(one_of(0, 60, 7200))
            )
    return made if kind else None


@st.composite
def cohorts(draw: st.DrawFn) -> CohortDefinition:
    made = CohortDefinition(match=draw(one_of(*CohortDefinition.Match.values())))
    for _ in range(draw(st.integers(1, 3))):
        condition = made.conditions.add(negate=draw(st.booleans()))
        if draw(st.booleans()):
            condition.trait.filter.CopyFrom(draw(filters(with_cohorts=False)))
            continue
        behaviour = CohortCondition.Behaviour(
            event=draw(one_of("view", "buy", "")),
            filters=draw(st.lists(filters(with_cohorts=False), max_size=1)),
            time_range=draw(ranges()),
            min_count=draw(st.integers(0, 3)),
        )
        if draw(st.booleans()):
            behaviour.max_count = draw(st.integers(max(behaviour.min_count, 1), 4))
        condition.behaviour.CopyFrom(behaviour)
    return made


@st.composite
def funnels(draw: st.DrawFn) -> FunnelQuery:
    steps = draw(st.lists(selectors(FunnelStep), min_size=2, max_size=4))
    exclusions = []
    for _ in range(draw(one_of(0, 0, 1, 2))):
        after = draw(st.integers(1, len(steps) - 1))
        exclusions.append(
            FunnelExclusion(
                events=draw(selectors()),
                after_step=draw(one_of(after, 0)),
                before_step=draw(one_of(0, draw(st.integers(after + 1, len(steps))))),
            )
        )
    return FunnelQuery(
        time_range=draw(ranges()),
        actor=draw(one_of(0, DISTINCT_ID, VISIT_ID)),
        steps=steps,
        exclusions=exclusions,
        window_seconds=draw(one_of(0, 1, 60, 1800, 3600, 3 * DAY_SECONDS, 30 * DAY_SECONDS)),
        order=draw(one_of(*FunnelQuery.Order.values())),
        breakdowns=[
            Breakdown(property=name) for name in draw(one_of([], ["browser"], ["properties.plan", "event"]))
        ],
        filters=draw(conditions),
    )


@st.composite
def retentions(draw: st.DrawFn) -> RetentionQuery:
    return RetentionQuery(
        time_range=draw(ranges(needed=True)),
        time_zone=draw(one_of(*ZONES)),
        period=draw(one_of(*Period.values())),
        start=draw(one_of(None, draw(selectors()))),
        returning=draw(one_of(None, draw(selectors()))),
        entry=draw(one_of(*RetentionQuery.Entry.values())),
        period_count=draw(one_of(0, 1, 3, 40)),
        or_later=draw(st.booleans()),
        filters=draw(conditions),
    )


@st.composite
def lifecycles(draw: st.DrawFn) -> LifecycleQuery:
    return LifecycleQuery(
        time_range=draw(ranges(needed=True)),
        time_zone=draw(one_of(*ZONES)),
        period=draw(one_of(*Period.values())),
        events=draw(one_of(None, draw(selectors()))),
        filters=draw(conditions),
    )


@st.composite
def paths(draw: st.DrawFn) -> PathsQuery:
    nodes = one_of("", "", "view", "buy", "Firefox", "pro")
    return PathsQuery(
        time_range=draw(ranges()),
        actor=draw(one_of(0, DISTINCT_ID, VISIT_ID)),
        property=draw(one_of("", "event", "browser", "properties.plan")),
        filters=draw(conditions),
        gap_seconds=draw(one_of(0, 1, 60, 3600, 30 * DAY_SECONDS)),
        start_node=draw(nodes),
        end_node=draw(nodes),
        depth=draw(one_of(0, 1, 2, 3, 20)),
        limit=5000,
    )


def given_questions(questions: st.SearchStrategy[Any]) -> Callable[[Any], Any]:
    """Many questions, each of one or both of the sources, with a cohort that its filters may name."""

    def decorate(test: Any) -> Any:
        drawn = given(query=questions, cohort=cohorts(), sources=one_of([0], [1], [0, 1]))(test)
        return settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))(drawn)

    return decorate


# The answers


@given_questions(funnels())
async def test_funnels_agree_with_the_oracle(
    store: EventStore, sample: Sample, query: FunnelQuery, cohort: CohortDefinition, sources: list[int]
) -> None:
    query.source_ids.extend(sample.source_ids[i] for i in sources)
    compiled = compile_funnel(query, sample.workspace_id, NOW, compiled_cohorts([cohort]))
    result = read_funnel(query, await run(store, compiled))
    expected = oracle_insights.funnel(query, sample.world([cohort]))
    _same_group(result.total, expected.pop(None))
    found = [(tuple(group.values), group) for group in result.groups]
    order = [(-expected[key][0][0], key) for key, _ in found]
    assert order == sorted(order)
    assert len(found) == len(expected)
    for key, group in found:
        _same_group(group, expected[key])


def _same_group(group: FunnelGroup, expected: list[Any]) -> None:
    found: list[Any] = [
        (
            step.count,
            step.average_seconds if step.HasField("average_seconds") else None,
            step.median_seconds if step.HasField("median_seconds") else None,
            step.median_seconds_from_start if step.HasField("median_seconds_from_start") else None,
        )
        for step in group.steps
    ]
    for one, other in zip(found, expected[:-1], strict=True):
        assert one == pytest.approx(other)
    first = found[0][0]
    for k, step in enumerate(group.steps):
        before = found[max(k - 1, 0)][0]
        assert step.HasField("conversion") is (first > 0)
        assert step.conversion == (step.count / first if first else 0)
        assert step.HasField("step_conversion") is (before > 0)
        assert step.step_conversion == (step.count / before if before else 0)
    assert [bucket.count for bucket in group.conversion_times] == expected[-1]


@given_questions(retentions())
async def test_retention_agrees_with_the_oracle(
    store: EventStore, sample: Sample, query: RetentionQuery, cohort: CohortDefinition, sources: list[int]
) -> None:
    query.source_ids.extend(sample.source_ids[i] for i in sources)
    compiled, periods = compile_retention(query, sample.workspace_id, NOW, compiled_cohorts([cohort]))
    result = read_retention(query, periods, await run(store, compiled), NOW)
    expected = oracle_insights.retention(query, sample.world([cohort]))
    found = [
        (
            row.start_time.ToDatetime(UTC),
            row.size,
            [(cell.count, cell.complete) for cell in row.cells],
        )
        for row in result.rows
    ]
    assert found == expected
    for n, average in enumerate(result.averages):
        over = [(size, cells[n][0]) for _, size, cells in expected if n < len(cells) and cells[n][1]]
        assert (average.size, average.count) == (sum(s for s, _ in over), sum(c for _, c in over))
        assert average.HasField("ratio") is (average.size > 0)


@given_questions(lifecycles())
async def test_lifecycles_agree_with_the_oracle(
    store: EventStore, sample: Sample, query: LifecycleQuery, cohort: CohortDefinition, sources: list[int]
) -> None:
    query.source_ids.extend(sample.source_ids[i] for i in sources)
    compiled, periods = compile_lifecycle(query, sample.workspace_id, NOW, compiled_cohorts([cohort]))
    result = read_lifecycle(periods, await run(store, compiled), NOW)
    found = [
        (
            row.start_time.ToDatetime(UTC),
            row.new_count,
            row.returning_count,
            row.resurrected_count,
            row.dormant_count,
        )
        for row in result.rows
    ]
    assert found == oracle_insights.lifecycle(query, sample.world([cohort]))


@given_questions(paths())
async def test_paths_agree_with_the_oracle(
    store: EventStore, sample: Sample, query: PathsQuery, cohort: CohortDefinition, sources: list[int]
) -> None:
    query.source_ids.extend(sample.source_ids[i] for i in sources)
    compiled = compile_paths(query, sample.workspace_id, NOW, compiled_cohorts([cohort]))
    result = read_paths(query, await run(store, compiled))
    expected = oracle_insights.paths(query, sample.world([cohort]))
    assert (result.path_count, result.actor_count) == (expected.paths, expected.actors)
    assert {(n.step, n.node): (n.count, n.exit_count) for n in result.nodes} == expected.nodes
    found = {(w.step, w.source, w.target): (w.count, w.actor_count, w.average_seconds) for w in result.links}
    assert found == {key: pytest.approx(value) for key, value in expected.links.items()}
    for counts in ([n.count for n in result.nodes], [w.count for w in result.links]):
        assert counts == sorted(counts, reverse=True)
    assert not result.truncated


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(cohort=cohorts(), sources=one_of([0], [1], [0, 1]), negated=st.booleans())
async def test_cohorts_agree_with_the_oracle(
    store: EventStore, sample: Sample, cohort: CohortDefinition, sources: list[int], negated: bool
) -> None:
    source_ids = [sample.source_ids[i] for i in sources]
    scope = sample.world([cohort]).of(source_ids)
    members = oracle_insights.members(cohort, scope)
    found = await run(store, compile_preview(cohort, sample.workspace_id, source_ids, NOW))
    assert found.rows[0][0] == len(members)
    assert found.rows[0][1] == len({row.built_ins["distinct_id"] for row in scope.rows})
    times = [
        (-max(row.time for row in rows), who, min(row.time for row in rows), len(rows))
        for who, rows in scope.actors(scope.rows, 0).items()
        if who in members
    ]
    assert [tuple(about) for about in found.rows[0][2]] == sorted(times)  # type: ignore[union-attr, arg-type]
    query = Query(source_ids=source_ids, breakdowns=[Breakdown(property="distinct_id")])
    query.filters.add(cohort_id=cohort_id(0), operator=Filter.NOT_IN if negated else Filter.IN)
    rows = (await run(store, compile_query(query, sample.workspace_id, NOW, compiled_cohorts([cohort])))).rows
    everyone = {row.built_ins["distinct_id"] for row in scope.rows}
    assert {row[0] for row in rows} == (everyone - members if negated else members)
