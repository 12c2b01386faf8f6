"""Compiled queries against the oracle, on the real store; and what the compiler refuses."""

import math
import random
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import grpc
import pytest
import re2
from google.protobuf import json_format
from google.protobuf.struct_pb2 import Value
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from meshboard.analytics.v1.event_log_pb2 import LoggedBatch
from meshboard.analytics.v1.query_pb2 import (
    Breakdown,
    Column,
    Comparison,
    Filter,
    Measure,
    Order,
    Query,
    TimeRange,
)

from services.analytics_svc.compiler import Compiled, compile_query, earlier_range
from services.analytics_svc.event_store import EventStore, EventStoreError
from services.analytics_svc.queries import Limits
from services.analytics_svc.selection import resolve_range
from services.analytics_svc.tables import insert_events
from services.chassis.errors import Error
from tests.analytics_svc import oracle
from tests.analytics_svc.injections import INJECTIONS
from tests.analytics_svc.oracle import Row
from tests.harness import new_id

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
ZONES = [
    "",
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "Asia/Kolkata",
    "Australia/Lord_Howe",
    "America/Sao_Paulo",
]
# Around the changes of clocks in several of these zones, in 2015 to 2019.
MOMENTS = [1427590800, 1446339600, 1541300400, 1444492800, 1428163200, 1520719200, 1432055000]
ADDRESSES = [
    "",
    "https://shop.example/",
    "https://www.shop.example/a?utm_source=fb",
    "https://shop.example/?gclid=x",
]
REFERRED_FROM = [
    "",
    "https://www.google.de/",
    "https://blog.shop.example/b",
    "https://a.example/",
    "https://t.co/x",
]


def batch_of(workspace_id: str, source_id: str, rows: Iterable[Row], sequence: int = 1) -> bytes:
    """Rows as they stand in the log after the pipeline's work."""
    batch = LoggedBatch(workspace_id=workspace_id, source_id=source_id, sequence=sequence)
    batch.receive_time.FromDatetime(NOW)
    for position, row in enumerate(rows):
        event = batch.events.add(insert_id=f"{sequence}-{position}")
        for name, value in row.built_ins.items():
            if name == "is_robot":
                event.is_robot = value == "true"
            else:
                setattr(event, name, value)
        event.time.FromMilliseconds(row.time)
        event.properties.update(dict(row.properties))
    return batch.SerializeToString()


def random_rows(source_id: str, count: int, seed: int) -> list[Row]:
    """Events around changes of clocks, with properties of all kinds, some absent."""
    dice = random.Random(seed)
    rows = []
    for _ in range(count):
        properties: dict[str, str | float | bool] = {}
        if dice.random() < 0.8:
            properties["latency"] = dice.choice([0.0, 0.5, 1.25, 7.0, 404.0, -3.5, 100.0])
        if dice.random() < 0.7:
            properties["plan"] = dice.choice(
                ["pro", "free", "", "404", "it's", "a\\b", "trüe", "line\nbreak"]
            )
        if dice.random() < 0.5:
            mixed: list[str | float | bool] = ["404", 404.0, True, "true", 2.5]
            properties["mixed"] = dice.choice(mixed)
        built_ins = {
            "event": dice.choice(["view", "click", "buy"]),
            "distinct_id": f"u{dice.randrange(6)}",
            "browser": dice.choice(["Firefox", "Chrome", ""]),
            "is_robot": dice.choice(["true", "false"]),
            "url": dice.choice(ADDRESSES),
            "referrer": dice.choice(REFERRED_FROM),
        }
        time = dice.choice(MOMENTS) * 1000 + dice.randrange(-40 * 3_600_000, 40 * 3_600_000)
        if dice.random() < 0.3:
            time = (
                dice.choice(MOMENTS) * 1000 + dice.randrange(0, 4) * 1_800_000
            )  # exactly at borders and gaps
        rows.append(Row(source_id, time, built_ins, properties))
    return rows


class Sample:
    """Two sources of one workspace, and the rows in them."""

    def __init__(self) -> None:
        self.workspace_id = new_id()
        self.source_ids = [new_id(), new_id()]
        self.rows = random_rows(self.source_ids[0], 400, seed=1) + random_rows(
            self.source_ids[1], 150, seed=2
        )


@pytest.fixture(scope="session")
async def sample(store: EventStore) -> Sample:
    made = Sample()
    for source_id in made.source_ids:
        rows = [row for row in made.rows if row.source_id == source_id]
        await insert_events(store, [batch_of(made.workspace_id, source_id, rows)], token=source_id)
        other = [batch_of(new_id(), source_id, rows[:50])]  # the same source id elsewhere must not be counted
        await insert_events(store, other, token=f"{source_id} of another workspace")
    return made


async def run(store: EventStore, query: Query, workspace_id: str) -> list[list[Any]]:
    compiled = compile_query(query, workspace_id, NOW)
    rows = (await store.query(compiled.sql, compiled.params)).rows
    return rows[: compiled.limit]


names = st.sampled_from(
    [
        "event",
        "distinct_id",
        "browser",
        "is_robot",
        "referrer_name",
        "properties.latency",
        "properties.plan",
        "properties.mixed",
    ]
)
texts = st.sampled_from(
    ["direct", "Google", "view", "u1", "Fire", "", "404", "pro", "it's", "a\\b", "true", "line\nbreak", "e"]
)
numbers = st.sampled_from([0.0, 0.5, 404.0, 7.0, -3.5])
values = texts | numbers | st.booleans()
patterns = st.sampled_from(
    ["", "e", "^u[1-3]$", "^(pro|free)$", "(?i)FIRE", "n.b", "\\\\", "'", "^$", "[0-9]+", "r.e$", "^.{3,4}$"]
)


@st.composite
def filters(draw: st.DrawFn) -> Filter:
    operator = draw(st.sampled_from(Filter.Operator.values()))
    name = draw(names)
    made = Filter(property=name, operator=operator)
    if operator in {Filter.GREATER, Filter.GREATER_OR_EQUAL, Filter.LESS, Filter.LESS_OR_EQUAL}:
        made.property = draw(st.sampled_from(["properties.latency", "properties.mixed", "properties.none"]))
        chosen: list[Any] = [draw(numbers)]
    elif operator in {Filter.EXISTS, Filter.NOT_EXISTS}:
        chosen = []
    elif operator in {Filter.IN, Filter.NOT_IN}:
        chosen = draw(st.lists(values, min_size=1, max_size=3))
    elif operator in {Filter.MATCHES, Filter.NOT_MATCHES}:
        chosen = [draw(patterns)]
    else:
        chosen = [draw(values)]
    for value in chosen:
        json_format.ParseDict(value, made.values.add())
    return made


@st.composite
def measures(draw: st.DrawFn, index: int) -> Measure:
    aggregation = draw(st.sampled_from(Measure.Aggregation.values()))
    if aggregation in {Measure.AGGREGATION_UNSPECIFIED, Measure.COUNT, Measure.UNIQUE}:
        name = draw(st.sampled_from([""]) | names | st.just("visit_id"))
    else:
        name = draw(st.sampled_from(["properties.latency", "properties.mixed"]))
    conditions = draw(st.lists(filters(), max_size=1))
    return Measure(aggregation=aggregation, property=name, alias=f"m{index}", filters=conditions)


@st.composite
def formulas(draw: st.DrawFn, names: list[str], depth: int = 3) -> str:
    kind = draw(st.sampled_from(["name", "number", "operator", "function", "minus"] if depth else ["name"]))
    if kind == "name":
        name = draw(st.sampled_from(names))
        return name if "." not in name and draw(st.booleans()) else f'"{name}"'
    if kind == "number":
        return draw(st.sampled_from(["0", "1", "2.5", "100", "1e3"]))
    one = draw(formulas(names, depth - 1))
    if kind == "minus":
        return f"-{one}"
    other = draw(formulas(names, depth - 1))
    if kind == "operator":
        sql = f"{one}{draw(st.sampled_from([' + ', '-', '*', ' / ']))}{other}"
        return f"({sql})" if draw(st.booleans()) else sql
    function = draw(st.sampled_from(["abs", "round", "least", "greatest", "ifnull"]))
    return f"{function}({one})" if function in {"abs", "round"} else f"{function}({one}, {other})"


@st.composite
def queries(draw: st.DrawFn) -> Query:
    query = Query(time_zone=draw(st.sampled_from(ZONES)))
    query.granularity = draw(st.sampled_from(Query.Granularity.values()))
    for index in range(draw(st.integers(1, 3))):
        query.measures.append(draw(measures(index)))
    compared = draw(st.booleans())
    for index in range(draw(st.integers(0, 2))):
        query.measures[index % len(query.measures)].hidden = draw(st.booleans()) and index > 0
        known = [measure.alias for measure in query.measures]
        known += [f"previous_{name}" for name in known if name.startswith("m") and compared]
        query.measures.add(alias=f"f{index}", formula=draw(formulas(known)))
    query.breakdowns.extend(
        Breakdown(property=name) for name in draw(st.lists(names, max_size=2, unique=True))
    )
    query.filters.extend(draw(st.lists(filters(), max_size=2)))
    if draw(st.booleans()):
        query.any_of.add(filters=draw(st.lists(filters(), min_size=1, max_size=3)))
    if draw(st.booleans()) and query.breakdowns:
        query.top = draw(st.integers(1, 5))
        query.others = draw(st.booleans())
    if compared:
        query.comparison.period = draw(st.sampled_from(Comparison.Period.values()))
    if compared or draw(st.booleans()):
        longest = 72 if query.granularity == Query.MINUTE else 1500  # the oracle looks at every bucket
        start = draw(st.sampled_from(MOMENTS)) + draw(st.integers(-30, 30)) * 1800
        query.time_range.start_time.FromSeconds(start)
        query.time_range.end_time.FromSeconds(
            start + draw(st.integers(0, 72) | st.integers(0, longest)) * 1800
        )
        query.fill_gaps = bool(query.granularity) and draw(st.booleans())
    columns = (["time"] if query.granularity else []) + [b.property for b in query.breakdowns] + ["m0"]
    query.order_by.extend(
        Order(column=name, descending=draw(st.booleans()))
        for name in draw(st.lists(st.sampled_from(columns), max_size=2, unique=True))
    )
    query.limit = draw(st.sampled_from([0, 1, 7, 50_000]))
    return query


# Of groups whose measures differ by no more, the order must be that of the engine too.
ALIKE_BUT_FOR_THE_LAST_BIT = Query(
    measures=[Measure(aggregation=Measure.P90, property="properties.latency", alias="m0")],
    breakdowns=[Breakdown(property="properties.plan"), Breakdown(property="distinct_id")],
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(query=queries(), sources=st.sampled_from([[0], [1], [0, 1]]))
@example(query=ALIKE_BUT_FOR_THE_LAST_BIT, sources=[0])
async def test_agrees_with_the_oracle(
    store: EventStore, sample: Sample, query: Query, sources: list[int]
) -> None:
    query.source_ids.extend(sample.source_ids[i] for i in sources)
    found = await run(store, query, sample.workspace_id)
    expected = oracle.answer(query, sample.rows)
    assert len(found) == len(expected)
    for found_row, expected_row in zip(found, expected, strict=True):
        assert list(map(_comparable, found_row)) == list(map(_comparable, expected_row))


def _comparable(cell: Any) -> Any:
    return round(cell, 9) if isinstance(cell, float) and math.isfinite(cell) else cell


def of_event_or_robot(condition: Filter) -> Filter:
    if condition.property.startswith("properties."):
        condition.property = "event"
        if condition.operator in {
            Filter.GREATER,
            Filter.GREATER_OR_EQUAL,
            Filter.LESS,
            Filter.LESS_OR_EQUAL,
        }:
            condition.operator = Filter.NOT_EQUAL
    elif condition.property != "event":
        condition.property = "is_robot"
    return condition


@st.composite
def counting_queries(draw: st.DrawFn) -> Query:
    """What the counts by quarters of an hour answer, and next to it: odd zones, minutes, short ranges."""
    query = draw(queries())
    query.time_zone = draw(st.sampled_from([*ZONES, "America/St_Johns"]))
    if query.HasField("time_range") and draw(st.booleans()):
        start = query.time_range.start_time.ToMilliseconds() - draw(st.integers(0, 7_200_000))
        query.time_range.start_time.FromMilliseconds(start)
        end = query.time_range.end_time.ToMilliseconds() + draw(st.integers(0, 7_200_000))
        query.time_range.end_time.FromMilliseconds(end)
    for measure in query.measures:
        if not measure.formula:
            measure.aggregation = draw(st.sampled_from([Measure.AGGREGATION_UNSPECIFIED, Measure.COUNT]))
            measure.property = draw(st.sampled_from(["", "event", "is_robot"]))
        for condition in measure.filters:
            of_event_or_robot(condition)
    for condition in query.filters:
        of_event_or_robot(condition)
    for one in query.any_of:
        for condition in one.filters:
            of_event_or_robot(condition)
    del query.order_by[:]
    if query.breakdowns:
        del query.breakdowns[:]
        some = draw(st.lists(st.sampled_from(["event", "is_robot"]), min_size=1, max_size=2, unique=True))
        query.breakdowns.extend(Breakdown(property=name) for name in some)
    return query


async def rows_of_counts(store: EventStore, compiled: Compiled) -> list[list[Any]]:
    """The rows, refused by the engine unless the counts are read, or nothing has to be read at all."""
    forced = {"force_optimize_projection_name": "quarters"}
    try:
        return (await store.query(compiled.sql, compiled.params, settings=forced)).rows
    except EventStoreError as error:
        if "the read selects no parts" not in str(error):
            raise
        return (await store.query(compiled.sql, compiled.params)).rows


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(query=counting_queries(), sources=st.sampled_from([[0], [1], [0, 1]]))
async def test_counts_by_quarters_of_an_hour_agree_with_the_events(
    store: EventStore, sample: Sample, query: Query, sources: list[int]
) -> None:
    query.source_ids.extend(sample.source_ids[i] for i in sources)
    compiled = compile_query(query, sample.workspace_id, NOW)
    raw = compile_query(query, sample.workspace_id, NOW, from_counts=False)
    span = query.time_range.end_time.ToMilliseconds() - query.time_range.start_time.ToMilliseconds()
    short = query.HasField("time_range") and span < 6 * 3_600_000
    counted = query.granularity != Query.MINUTE and query.time_zone != "America/St_Johns"
    assert (compiled.sql != raw.sql) == counted
    if counted and not short:
        found = await rows_of_counts(store, compiled)
    else:
        found = (await store.query(compiled.sql, compiled.params)).rows
    assert found == (await store.query(raw.sql, raw.params)).rows
    expected = oracle.answer(query, sample.rows)
    assert [list(map(_comparable, row)) for row in found[: compiled.limit]] == [
        list(map(_comparable, row)) for row in expected
    ]


async def test_visits_end_after_half_an_hour_and_may_begin_before_the_range(store: EventStore) -> None:
    workspace_id, source_id = new_id(), new_id()
    who = {"event": "view", "distinct_id": "a"}
    minutes = [0, 29, 58, 88, 88, 200]
    rows = [Row(source_id, 1_500_000_000_000 + minute * 60_000, who, {}) for minute in minutes]
    await insert_events(store, [batch_of(workspace_id, source_id, rows)], token=source_id)
    query = Query(source_ids=[source_id], breakdowns=[Breakdown(property="visit_id")])
    whole = await run(store, query, workspace_id)
    assert [count for _, count in whole] == [3, 2, 1]
    query.time_range.start_time.FromSeconds(1_500_000_000 + 58 * 60)
    query.time_range.end_time.FromSeconds(1_500_000_000 + 89 * 60)
    part = await run(store, query, workspace_id)
    assert sorted(part) == sorted([[whole[0][0], 1], [whole[1][0], 2]])


@pytest.mark.parametrize("fill_gaps", [False, True])
async def test_what_the_earlier_period_has_no_bucket_for_is_null(store: EventStore, fill_gaps: bool) -> None:
    """March has three days more than February; and February's are compared with the first of January's."""
    workspace_id, source_id = new_id(), new_id()
    days = range(int(datetime(2015, 1, 1, 12, tzinfo=UTC).timestamp()), 1_427_889_600, 86_400)
    rows = [
        Row(source_id, 1000 * day, {"event": "view", "distinct_id": f"u{number % 3}"}, {})
        for number, day in enumerate(days)
        for _ in range(1 + number % 4)
    ]
    await insert_events(store, [batch_of(workspace_id, source_id, rows)], token=source_id)
    query = Query(source_ids=[source_id], granularity=Query.DAY, fill_gaps=fill_gaps)
    query.comparison.period = Comparison.MONTH
    query.measures.add(alias="all")
    query.measures.add(alias="change", formula="all - previous_all")
    for month, missing in ((3, 3), (2, 0)):
        query.time_range.start_time.FromDatetime(datetime(2015, month, 1))  # noqa: DTZ001 - UTC
        query.time_range.end_time.FromDatetime(datetime(2015, month + 1, 1))  # noqa: DTZ001
        found = await run(store, query, workspace_id)
        assert found == oracle.answer(query, rows)
        assert len(found) == (31 if month == 3 else 28)
        assert [cells[2:] for cells in found].count([None, None]) == missing
        if missing:
            assert all(cells[2:] == [None, None] for cells in found[-missing:])


async def test_a_filled_bucket_that_no_earlier_one_stands_beside_is_null(store: EventStore) -> None:
    query = Query(source_ids=[new_id()], granularity=Query.DAY, fill_gaps=True, comparison=Comparison())
    query.comparison.period = Comparison.MONTH
    query.measures.add(alias="all")
    query.time_range.start_time.FromDatetime(datetime(2015, 3, 1))  # noqa: DTZ001 - UTC
    query.time_range.end_time.FromDatetime(datetime(2015, 4, 1))  # noqa: DTZ001
    found = await run(store, query, new_id())
    assert found == oracle.answer(query, [])
    assert [cells[1:] for cells in found] == [[0, 0]] * 28 + [[0, None]] * 3


def test_names_columns_by_default() -> None:
    query = Query(
        source_ids=[new_id()],
        granularity=Query.DAY,
        breakdowns=[Breakdown(property="path")],
        measures=[
            Measure(),
            Measure(aggregation=Measure.UNIQUE),
            Measure(aggregation=Measure.P95, property="properties.latency"),
            Measure(aggregation=Measure.COUNT, property="url", alias="with url"),
        ],
    )
    columns = [(c.name, Column.Type.Name(c.type)) for c in compile_query(query, new_id(), NOW).columns]
    assert columns == [
        ("time", "TIME"),
        ("path", "STRING"),
        ("count", "NUMBER"),
        ("unique_distinct_id", "NUMBER"),
        ("p95_properties.latency", "NUMBER"),
        ("with url", "NUMBER"),
    ]


def test_knows_the_nearest_properties() -> None:
    query = Query(source_ids=[new_id()], breakdowns=[Breakdown(property="refferer_host")])
    with pytest.raises(Error) as caught:
        compile_query(query, new_id(), NOW)
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "PROPERTY_UNKNOWN")
    assert caught.value.metadata["nearest"].split(", ")[0] == "referrer_host"
    assert caught.value.violations[0][0] == "query.breakdowns[0].property"


REFUSED = {
    "measures[0].property": Query(measures=[Measure(aggregation=Measure.SUM, property="url")]),
    "measures[1].alias": Query(measures=[Measure(), Measure()]),
    "order_by[0].column": Query(order_by=[Order(column="nosuch")]),
    "fill_gaps": Query(fill_gaps=True),
    "filters[0].values": Query(filters=[Filter(property="url")]),
    "filters[0].property": Query(
        filters=[Filter(property="url", operator=Filter.LESS, values=[Value(number_value=1)])]
    ),
    "measures[1].formula": Query(
        measures=[Measure(), Measure(formula="1", alias="a", aggregation=Measure.SUM)]
    ),
    "measures[0].alias": Query(measures=[Measure(formula="1")]),
    "measures": Query(measures=[Measure(hidden=True)]),
    "top": Query(top=3),
    "others": Query(others=True, breakdowns=[Breakdown(property="url")]),
    "comparison": Query(comparison=Comparison()),
    "breakdowns": Query(breakdowns=[Breakdown(property="url"), Breakdown(property="url")]),
}


@pytest.mark.parametrize("path", REFUSED)
def test_refuses_what_does_not_fit_together(path: str) -> None:
    query = REFUSED[path]
    query.source_ids.append(new_id())
    with pytest.raises(Error) as caught:
        compile_query(query, new_id(), NOW)
    assert caught.value.reason == "QUERY_INVALID"
    assert caught.value.violations[0][0] == f"query.{path}"


def test_refuses_an_unknown_time_zone() -> None:
    with pytest.raises(Error) as caught:
        compile_query(Query(source_ids=[new_id()], time_zone="Europe/Berln"), new_id(), NOW)
    assert (caught.value.reason, caught.value.metadata["nearest"].split(", ")[0]) == (
        "TIME_ZONE_UNKNOWN",
        "Europe/Berlin",
    )


def test_last_seconds_hold_the_present_and_move_in_steps() -> None:
    now = datetime(2026, 1, 1, 12, 0, 0, 250_000, tzinfo=UTC)
    start, end = resolve_range(TimeRange(last_seconds=60), now)
    assert start is not None
    assert end is not None
    assert end - start == 60_000
    assert end == int(now.timestamp()) * 1000 + 1000
    later = now.replace(second=20)
    assert resolve_range(TimeRange(last_seconds=86_400), now) == resolve_range(
        TimeRange(last_seconds=86_400), later
    )


def everywhere(text: str, source_ids: list[str]) -> Query:
    """A query with the text in every field that takes any text and leads to an answer."""
    query = Query(source_ids=source_ids, granularity=Query.DAY, top=3, others=True)
    query.time_range.start_time.FromSeconds(MOMENTS[0])
    query.time_range.end_time.FromSeconds(MOMENTS[0] + 86_400)
    query.comparison.period = Comparison.WEEK
    query.breakdowns.add(property=f"properties.{text}")
    query.measures.add(alias=text, hidden=True)
    query.measures.add(aggregation=Measure.SUM, property=f"properties.{text}", alias=f"sum {text}")
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    query.measures.add(alias=f"formula {text}", formula=f'"{quoted}" + 1')
    query.order_by.add(column=f"formula {text}")
    for operator in set(Filter.Operator.values()) - set(_NUMERIC) - {Filter.EXISTS, Filter.NOT_EXISTS}:
        matched = re2.escape(text) if operator in {Filter.MATCHES, Filter.NOT_MATCHES} else text
        condition = Filter(property=f"properties.{text}", operator=operator)
        condition.values.add().string_value = matched
        query.measures.add(alias=f"{operator} {text}", filters=[condition])
        query.any_of.add(filters=[condition, Filter(property="event", operator=Filter.EXISTS)])
    return query


_NUMERIC = (Filter.GREATER, Filter.GREATER_OR_EQUAL, Filter.LESS, Filter.LESS_OR_EQUAL)


async def test_values_cannot_become_sql(store: EventStore, sample: Sample) -> None:
    """The statement is the same whatever the texts are, and every one of them is taken as a text."""
    assert len(INJECTIONS) >= 200
    harmless = compile_query(everywhere("name", sample.source_ids), sample.workspace_id, NOW)
    for text in INJECTIONS:
        compiled = compile_query(everywhere(text, sample.source_ids), sample.workspace_id, NOW)
        assert compiled.sql == harmless.sql
        assert compiled.columns[1].name == f"properties.{text}"


@pytest.mark.parametrize("text", INJECTIONS[::7])
async def test_the_store_takes_any_text_as_text(store: EventStore, text: str) -> None:
    workspace_id, source_id = new_id(), new_id()
    rows = [
        Row(source_id, MOMENTS[0] * 1000, {"event": text, "distinct_id": text}, {text: text, "other": "x"}),
        Row(source_id, MOMENTS[0] * 1000 + 1, {"event": "view", "distinct_id": "a"}, {"other": "x"}),
    ]
    await insert_events(store, [batch_of(workspace_id, source_id, rows)], token=source_id)
    query = Query(source_ids=[source_id], breakdowns=[Breakdown(property=f"properties.{text}")])
    query.filters.add(property="event").values.add().string_value = text
    assert await run(store, query, workspace_id) == [[text, 1]]
    whole = everywhere(text, [source_id])
    assert await run(store, whole, workspace_id) == oracle.answer(whole, rows)
    assert (await store.query("SELECT count() > 0 FROM events")).rows == [[1]]


@pytest.mark.parametrize("text", INJECTIONS[::3])
def test_names_and_zones_are_of_a_list(text: str) -> None:
    for query, reasons in (
        (Query(breakdowns=[Breakdown(property=text or "x")]), {"PROPERTY_UNKNOWN"}),
        (Query(measures=[Measure(property=text)]), {"PROPERTY_UNKNOWN"}),
        (Query(filters=[Filter(property=text)]), {"PROPERTY_UNKNOWN"}),
        (Query(time_zone=text), {"TIME_ZONE_UNKNOWN"}),
        (Query(order_by=[Order(column=text)]), {"QUERY_INVALID"}),
        (Query(measures=[Measure(alias="a", formula=text)]), {"FORMULA_INVALID"}),
    ):
        query.source_ids.append(new_id())
        with pytest.raises(Error) as caught:
            compile_query(query, new_id(), NOW)
        assert caught.value.reason in reasons


def test_refuses_more_values_than_a_statement_can_have() -> None:
    query = Query(source_ids=[new_id()])
    for _ in range(2):
        condition = query.filters.add(property="url", operator=Filter.IN)
        for _ in range(1000):
            condition.values.add().string_value = "x" * 200
    with pytest.raises(Error) as caught:
        compile_query(query, new_id(), NOW)
    assert caught.value.reason == "QUERY_INVALID"


@pytest.mark.parametrize("pattern", ["(", "a**", "x" * 1001, "(?=x)", "(?:(?:a{1,1000}){1,1000})", "\\"])
def test_refuses_patterns_that_the_store_cannot_read(pattern: str) -> None:
    query = Query(source_ids=[new_id()])
    query.filters.add(property="url", operator=Filter.MATCHES).values.add().string_value = pattern
    with pytest.raises(Error) as caught:
        compile_query(query, new_id(), NOW)
    assert (caught.value.reason, caught.value.violations[0][0]) == (
        "PATTERN_INVALID",
        "query.filters[0].values[0]",
    )


def large(source_ids: list[str], conditions: int) -> Query:
    """A query with all that there is, and with so many of the costliest conditions at each place."""
    condition = Filter(property="properties.mixed", operator=Filter.IN)
    condition.values.add().number_value = 404
    query = Query(source_ids=source_ids, granularity=Query.DAY, fill_gaps=True, top=1000, others=True)
    query.time_range.start_time.FromSeconds(MOMENTS[0])
    query.time_range.end_time.FromSeconds(MOMENTS[0] + 864_000)
    query.comparison.period = Comparison.YEAR
    query.breakdowns.extend(
        Breakdown(property=name)
        for name in ("event", "visit_id", "properties.plan", "browser", "properties.mixed")
    )
    query.filters.extend([condition] * conditions)
    for _ in range(conditions // 4):
        query.any_of.add(filters=[condition] * conditions)
    for number in range(10):
        some = [condition] * (conditions // 4)
        query.measures.add(
            aggregation=Measure.P95, property="properties.latency", alias=f"m{number}", filters=some
        )
        names = [f"m{i}" for i in range(number + 1)] + [f"f{i}" for i in range(number)]
        query.measures.add(alias=f"f{number}", formula=" + ".join(names))
    return query


async def test_a_large_query_runs(store: EventStore, sample: Sample) -> None:
    compiled = compile_query(large(sample.source_ids, 4), sample.workspace_id, NOW)
    settings = Limits().settings
    assert (await store.query(compiled.sql, compiled.params, settings=settings, timeout=300)).rows


def test_refuses_a_query_that_would_take_long_to_plan() -> None:
    with pytest.raises(Error) as caught:
        compile_query(large([new_id()], 20), new_id(), NOW)
    assert (caught.value.reason, caught.value.violations[0][0]) == ("QUERY_INVALID", "query")


def test_pairs_periods_by_the_calendar() -> None:
    def earlier(period: "Comparison.Period.ValueType", start: str, end: str, zone: str) -> tuple[str, str]:
        query = Query(time_zone=zone, comparison=Comparison(period=period))
        first_, last_ = (int(datetime.fromisoformat(text).timestamp() * 1000) for text in (start, end))
        found = earlier_range(query, first_, last_)
        assert found == oracle.earlier_range(query, first_, last_, ZoneInfo(zone))
        first, last = (
            datetime.fromtimestamp(instant / 1000, ZoneInfo(zone)).isoformat() for instant in found
        )
        return first, last

    berlin = "Europe/Berlin"
    march = ("2026-03-01T00:00:00+01:00", "2026-04-01T00:00:00+02:00")
    assert earlier(Comparison.MONTH, *march, berlin) == ("2026-02-01T00:00:00+01:00", march[0])
    assert earlier(Comparison.YEAR, *march, berlin) == (
        "2025-03-01T00:00:00+01:00",
        "2025-04-01T00:00:00+02:00",
    )
    # Thirty-one days by the clock, though one of them has 23 hours.
    assert earlier(Comparison.PREVIOUS, *march, berlin) == ("2026-01-29T00:00:00+01:00", march[0])
    assert earlier(Comparison.MONTH, "2026-03-31T12:00:00+00:00", "2026-05-31T12:00:00+00:00", "UTC") == (
        "2026-02-28T12:00:00+00:00",
        "2026-04-30T12:00:00+00:00",
    )


def test_the_last_seconds_are_compared_with_as_many() -> None:
    query = Query(time_zone="Europe/Berlin", comparison=Comparison())
    query.time_range.last_seconds = 86_400
    start, end = resolve_range(query.time_range, datetime(2026, 3, 29, 12, tzinfo=UTC))
    assert start is not None
    assert end is not None
    assert earlier_range(query, start, end) == (start - 86_400_000, start)
