"""Persons against a plain-Python oracle, on the real store; and through the pipeline, in the first query."""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

import pytest
from google.protobuf.json_format import ParseDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from meshboard.analytics.v1.event_columns_pb2 import WrittenBatch
from meshboard.analytics.v1.event_log_pb2 import LoggedBatch
from meshboard.analytics.v1.query_pb2 import Query

from services.analytics_svc.compiler import compile_query
from services.analytics_svc.event_store import EventStore, pieces
from services.analytics_svc.persons import NOBODY, Persons, links_of, unite
from services.analytics_svc.pipeline import written
from services.analytics_svc.tables import insert_events
from tests.analytics_svc.conftest import Analytics
from tests.harness import new_id

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
# (distinct_id, previous_id); an empty previous_id links nothing.
Said = tuple[str, str]

# Letters, so that groups meet; and what a text may hold that a format could stumble over.
ids = st.sampled_from(
    [*"abcdefghij", "it's", 'a"b', "tab\tand\nbreak", "back\\slash", "\0", "ü", "🙂" * 200, "null"]
)
said = st.tuples(ids, ids | st.just(""))


def people(events: Iterable[Said], more_links: Iterable[Said] = ()) -> dict[str, frozenset[str]]:
    """Whose each id is, as the set of all ids of that person: slow and obvious."""
    events = list(events)
    groups = {distinct_id: {distinct_id} for pair in [*events, *more_links] for distinct_id in pair}
    for pair in [*events, *more_links]:
        if "" in pair or NOBODY & set(pair):
            continue
        together = groups[pair[0]] | groups[pair[1]]
        for distinct_id in together:
            groups[distinct_id] = together
    return {distinct_id: frozenset(group) for distinct_id, group in groups.items()}


def batch_of(workspace_id: str, source_id: str, events: Iterable[Said], sequence: int) -> WrittenBatch:
    batch = LoggedBatch(workspace_id=workspace_id, source_id=source_id, sequence=sequence)
    batch.receive_time.FromDatetime(NOW)
    for position, (distinct_id, previous_id) in enumerate(events):
        event = batch.events.add(
            event="view",
            distinct_id=distinct_id,
            previous_id=previous_id,
            insert_id=f"{sequence}-{position}",
        )
        event.time.FromDatetime(NOW)
    return written(batch)


async def write(store: EventStore, persons: Persons, batches: Sequence[WrittenBatch], version: int) -> None:
    """What the pipeline does with a range; twice, as after a crash."""
    for _ in range(2):
        await persons.link(links_of(batches), version)
    token = f"{batches[0].source_id} {version}"
    await insert_events(store, [batch.SerializeToString() for batch in batches], token)


async def groups_in(store: EventStore, workspace_id: str, source_ids: list[str]) -> set[frozenset[str]]:
    """The distinct_ids of each person, as a query tells."""
    breakdowns = [{"property": "person_id"}, {"property": "distinct_id"}]
    query = ParseDict({"sourceIds": source_ids, "breakdowns": breakdowns, "limit": 50_000}, Query())
    compiled = compile_query(query, workspace_id, NOW)
    groups = defaultdict(set)
    for person_id, distinct_id, _ in (await store.query(compiled.sql, compiled.params)).rows:
        groups[person_id].add(distinct_id)
    return {frozenset(group) for group in groups.values()}


def expected(events: Iterable[Said], more_links: Iterable[Said] = ()) -> set[frozenset[str]]:
    """The same by the oracle: of the ids that have events."""
    events = list(events)
    seen = {distinct_id for distinct_id, _ in events}
    return {frozenset(group & seen) for group in people(events, more_links).values() if group & seen}


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    ranges=st.lists(st.lists(st.tuples(said, st.booleans()), min_size=1, max_size=12), min_size=1, max_size=4)
)
async def test_people_are_those_of_the_oracle(
    store: EventStore, ranges: list[list[tuple[Said, bool]]]
) -> None:
    """Ranges of events of two sources: chains, circles, merges of merges, and links before and after the events."""
    workspace_id, sources = new_id(), [new_id(), new_id()]
    persons = Persons(store)
    for version, events in enumerate(ranges, 1):
        split = [[pair for pair, second in events if second is which] for which in (False, True)]
        batches = [
            batch_of(workspace_id, source_id, pairs, version)
            for source_id, pairs in zip(sources, split, strict=True)
            if pairs
        ]
        await write(store, persons, batches, version)
    of_source = [
        [pair for events in ranges for pair, second in events if second is which] for which in (False, True)
    ]
    for source_id, pairs in zip(sources, of_source, strict=True):
        assert await groups_in(store, workspace_id, [source_id]) == expected(pairs)
    assert await groups_in(store, workspace_id, sources) == expected([*of_source[0], *of_source[1]])


@given(
    links=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=60),
)
def test_an_id_is_renamed_a_few_times_at_most(links: list[tuple[int, int]]) -> None:
    names = {number: number for number in range(31)}
    renamed = dict.fromkeys(names, 0)
    for one, other in links:
        joint = (names[one], names[other])
        sizes = {name: list(names.values()).count(name) for name in joint}
        new = unite([joint], sizes)
        for number, name in list(names.items()):
            if new.get(name, name) != name:
                names[number] = new[name]
                renamed[number] += 1
    assert max(renamed.values()) <= 5  # of 31 ids, by halves


async def test_a_group_is_named_by_one_of_its_ids_and_across_sources_by_none(store: EventStore) -> None:
    workspace_id, source_id, other_id = new_id(), new_id(), new_id()
    batch = batch_of(workspace_id, source_id, [("ada", "cookie 1"), ("ada", "cookie 2"), ("alone", "")], 1)
    await write(store, Persons(store), [batch], 1)
    by_person = [{"property": "person_id"}]

    async def names(source_ids: list[str]) -> set[str]:
        compiled = compile_query(
            ParseDict({"sourceIds": source_ids, "breakdowns": by_person}, Query()), workspace_id, NOW
        )
        return {row[0] for row in (await store.query(compiled.sql, compiled.params)).rows}

    assert await names([source_id]) == {"ada", "alone"}
    across = await names([source_id, other_id])
    assert "alone" in across
    (opaque,) = across - {"alone"}
    assert len(bytes.fromhex(opaque)) == 16


async def test_one_source_is_not_misled_by_another_and_no_workspace_by_another(store: EventStore) -> None:
    workspace_id, source_id, misleading_id = new_id(), new_id(), new_id()
    persons = Persons(store)
    await write(store, persons, [batch_of(workspace_id, source_id, [("a", ""), ("b", "")], 1)], 1)
    await write(store, persons, [batch_of(workspace_id, misleading_id, [("a", "b")], 2)], 2)
    await write(store, persons, [batch_of(new_id(), source_id, [("a", "b")], 3)], 3)
    apart = {frozenset("a"), frozenset("b")}
    assert await groups_in(store, workspace_id, [source_id]) == apart
    assert await groups_in(store, workspace_id, [source_id, misleading_id]) == {frozenset("ab")}
    assert await groups_in(store, workspace_id, [source_id, new_id()]) == {frozenset("ab")}


async def test_many_links_of_long_ids_in_one_range(store: EventStore) -> None:
    workspace_id, source_id = new_id(), new_id()
    dice = random.Random(3)
    pairs = [(f"{'🙂' * 190} {n}", f"{'🙂' * 190} {dice.randrange(2_000)}") for n in range(2_000)]
    await write(store, Persons(store), [batch_of(workspace_id, source_id, pairs, 1)], 1)
    assert len(await groups_in(store, workspace_id, [source_id])) == len(expected(pairs))


def test_pieces_have_all_and_each_has_room() -> None:
    texts = [f"{'🙂' * 200} {n}" for n in range(1_000)]
    made = list(pieces(texts))
    assert [text for piece in made for text in piece] == texts
    assert all(sum(len(text.encode()) for text in piece) * 3 < 1 << 18 for piece in made)
    assert list(pieces([])) == []


async def test_people_are_counted_in_the_first_query_that_sees_the_event(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    both = [
        {"aggregation": "COUNT"},
        {"aggregation": "UNIQUE"},
        {"aggregation": "UNIQUE", "property": "person_id"},
    ]
    await analytics.send(key, [{"distinctId": "phone"}, {"distinctId": "laptop"}, {"distinctId": "bob"}])
    await analytics.until_count(member, source, 3)
    assert (await analytics.ask(member, source, measures=both))["rows"] == [[3.0, 3.0, 3.0]]
    # Backwards in time: what was counted before is one person's now.
    for count, link in enumerate([("ada", "phone"), ("ada", "laptop")], 4):
        await analytics.send(key, [{"event": "identify", "distinctId": link[0], "previousId": link[1]}])
        seen = [0.0]
        while seen[0] < count:
            (seen,) = (await analytics.ask(member, source, measures=both))["rows"]
        assert seen == [count, 4.0, 3.0 if count == 4 else 2.0]
    filters = [{"property": "person_id", "values": ["ada"]}]
    visits = [{"aggregation": "COUNT"}, {"aggregation": "UNIQUE", "property": "visit_id"}]
    result = await analytics.ask(member, source, filters=filters, measures=visits)
    assert result["rows"] == [[4.0, 3.0]]


async def test_answers_over_several_sources_follow_the_links_of_a_third(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    (one, one_key), (two, two_key), (three, three_key) = [await analytics.source(member) for _ in range(3)]
    await analytics.send(one_key, [{"distinctId": "a"}])
    await analytics.send(two_key, [{"distinctId": "b"}])
    await analytics.until_count(member, one, 1)
    await analytics.until_count(member, two, 1)
    question = {
        "sourceIds": [one.source_id, two.source_id],
        "measures": [{"aggregation": "UNIQUE", "property": "person_id"}],
    }
    assert (await analytics.ask(member, one, **question))["rows"] == [[2.0]]
    await analytics.send(three_key, [{"distinctId": "a", "previousId": "b"}])
    await analytics.until_count(member, three, 1)
    assert (await analytics.ask(member, one, **question))["rows"] == [[1.0]]


@pytest.mark.parametrize("distinct_id", ["null", "Undefined", " ", '"anonymous"', "[object Object]"])
def test_nobody_is_linked_to_nobody(distinct_id: str) -> None:
    assert (
        links_of([batch_of(new_id(), new_id(), [(distinct_id, "a"), ("a", distinct_id), ("a", "a")], 1)])
        == []
    )
