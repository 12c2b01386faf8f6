"""Search with either engine: what is found, in which order, by whom; and that the index becomes as the tables are."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text

from services.chassis import errors
from services.chassis.indexing import RebuildRuns
from services.chassis.search import MAX_WORDS, Document, Query, Within, highlight, words_of
from services.chassis.search_engines import Elasticsearch
from tests.chassis.library import THINGS, Library, running_library
from tests.conditions import eventually
from tests.elasticsearch import ON_ELASTICSEARCH, Elastic
from tests.harness import Identity, new_id
from tests.parts import Parts


@pytest.fixture(scope="session")
async def library(parts: Parts, identity: Identity, search_engine: str) -> AsyncIterator[Library]:
    async with running_library(parts, identity.keys, search_engine) as library:
        yield library


@pytest.fixture
def workspace_id() -> str:
    return new_id()


# --- words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("Traffic by country", ["traffic", "by", "country"]),
        ("Zürich, Straße", ["zurich", "strasse"]),
        ("Zu\u0308rich", ["zurich"]),
        ("ＦＵＬＬ　ｗｉｄｔｈ", ["full", "width"]),
        ("Łódź Ærø", ["lodz", "aero"]),
        ("ada@example.org", ["ada", "example", "org"]),
        ("İstanbul", ["istanbul"]),
        ("مَرْحَبًا", ["مرحبا"]),
        ("שָׁלוֹם", ["שלום"]),
        ("की बिक्री", ["की", "बिकरी"]),
        ("東京タワー", ["東", "京", "タ", "ワ", "ー"]),
        ("🚀 launch ✅", ["🚀", "launch", "✅"]),
        ("\u202egro.elpmaxe\u202c", ["gro", "elpmaxe"]),
        ("pay\u200bpal", ["paypal"]),
        ("раураl", ["раураl"]),
        ("100% _of\\ it's", ["100", "of", "it", "s"]),
        ("", []),
        (" \t\n%_*?!\u200b\u0301", []),
    ],
)
def test_words_are_what_people_mean(written: str, words: list[str]):
    assert words_of(written) == words


@given(st.text())
def test_folding_again_changes_nothing(written: str):
    words = words_of(written)
    assert words_of(" ".join(words)) == words
    assert not {"%", "_", "\\", " "} & set("".join(words))


@pytest.mark.parametrize(
    "query",
    ["", "   ", "%%%", "***", "\u202e\u200b", "~!@#$^&*()", "a b " + "c d e f g h i j k l m n o p q r s t u"],
)
def test_a_query_without_words_or_with_too_many_is_refused(query: str):
    with pytest.raises(errors.Error) as refusal:
        Query.of(query)
    assert refusal.value.code == grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.value.reason == "SEARCH_QUERY_INVALID"


def test_a_repeated_word_counts_once():
    assert Query.of("new new sales NEW").words == ("sales", "new")
    assert len(Query.of("a " * 100).words) == 1 < MAX_WORDS


# --- highlights -------------------------------------------------------------------------------------------


def marked(query: str, written: str) -> str:
    return "".join(f"[{piece}]" if found else piece for piece, found in highlight(Query.of(query), written))


@pytest.mark.parametrize(
    ("query", "written", "shown"),
    [
        ("country", "Traffic by Country!", "Traffic by [Country]!"),
        ("by traf", "Traffic by country", "[Traffic] [by] country"),
        ("zurich", "In Zu\u0308rich only", "In [Zu\u0308rich] only"),
        ("trafic", "Traffic", "[Traffic]"),
        ("slaes", "Sales", "[Sales]"),
        ("京", "東京", "東[京]"),
        ("b", '<b>bold</b> & "b"', '<[b]>[bold]</[b]> & "[b]"'),
        ("revenue", "Traffic", ""),
        ("sales", "", ""),
    ],
)
def test_what_was_found_is_marked(query: str, written: str, shown: str):
    assert marked(query, written) == shown


@given(st.text(max_size=200), st.text(max_size=200))
def test_pieces_are_the_text_as_it_was_written(written: str, query: str):
    if words_of(query) and len(set(words_of(query))) <= MAX_WORDS:
        assert "".join(piece for piece, _ in highlight(Query.of(query), written)) in ("", written)


def test_of_a_long_text_the_part_with_the_find_is_shown():
    written = "lorem " * 200 + "the needle " + "ipsum " * 200
    pieces = highlight(Query.of("needle"), written)
    assert ("needle", True) in pieces
    shown = "".join(piece for piece, _ in pieces)
    assert shown in written
    assert len(shown) <= 200


# --- what is found ----------------------------------------------------------------------------------------


async def test_the_better_a_word_is_found_the_higher_it_stands(library: Library, workspace_id: str):
    titles = ["Trafic", "Daily traffic", "Trafficking", "Countries"]
    for title in titles:
        await library.put(workspace_id, title, "about traffic" if title == "Countries" else "")
    await library.settled()
    assert await library.titles(workspace_id, "traffic") == [
        "Daily traffic",  # whole, in the title
        "Trafficking",  # the beginning of a word
        "Countries",  # whole, in the body
        "Trafic",  # nearly
    ]


async def test_equal_hits_stand_from_the_newest_to_the_oldest(library: Library, workspace_id: str):
    ids = [await library.put(workspace_id, "Sales") for _ in range(5)]
    await library.settled()
    found = await library.find(workspace_id, "sales")
    assert [hit.id for hit in found] == sorted(ids, reverse=True)
    assert {hit.score for hit in found} == {12}


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("sales germany", True),
        ("germany SALES", True),
        ("sales ger", True),
        ("ger sales", False),  # only the last word may be the beginning of one
        ("sales france", False),
        ("salse", True),  # forgiven: neighbours that changed places, …
        ("germny", True),  # a letter missing,
        ("gerrmany", True),  # one too many,
        ("germani", True),  # another one
        ("2024", True),
        ("2025", False),  # numbers are meant as they are
        ("quarterly", True),
        ("zürich", True),
        ("ZURICH", True),
        ("東京", True),
        ("🚀", True),
        ("🛸", False),
        ("مرحبا", True),
    ],
)
async def test_each_word_has_to_be_found(library: Library, workspace_id: str, query: str, *, found: bool):
    await library.put(workspace_id, "Sales in Germany 2024 🚀", "Quarterly, from Zürich and 東京. مَرْحَبًا")
    await library.put(workspace_id, "Something else")
    await library.settled()
    titles = await library.titles(workspace_id, query)
    if query == "salse" and not isinstance(library.engine, Elasticsearch):
        return  # trigrams do not forgive this one in so short a word
    assert titles == (["Sales in Germany 2024 🚀"] if found else [])


NASTY = [
    "' OR 1=1 --",
    '"; DROP TABLE things; --',
    "100%",
    "a\\",
    "$1 :word_0 %(x)s {x} %s",
    "title:* OR body:[* TO *]",
    '/.*/ AND NOT (x)^9~2 && || + - ! { } [ ] " ~ * ? : \\ /',
    "_id:1 _exists_:title",
    "x\x00y",
    "a" * 200,
    "é" * 200,
    "\u0301" * 50 + "a",
    "\u202e\u2066abc\u2069",
    "👨‍👩‍👧‍👦 👍🏽 🇩🇪",
]


@pytest.mark.parametrize("query", NASTY)
async def test_what_means_something_to_an_engine_is_a_text(library: Library, workspace_id: str, query: str):
    await library.put(workspace_id, "Innocent bystander")
    thing_id = await library.put(workspace_id, f"zzz {query.replace(chr(0), ' ')}")
    await library.settled()
    assert [hit.id for hit in await library.find(workspace_id, query)] == [thing_id]


async def test_signs_that_mean_any_text_elsewhere_are_nothing(library: Library, workspace_id: str):
    await library.put(workspace_id, "Innocent bystander")
    for query in ("%", "_____", "\\", "*", "?", ".*", "\ud7ff\uffff\U0010ffff"):
        with pytest.raises(errors.Error) as refusal:
            await library.find(workspace_id, query)
        assert refusal.value.reason == "SEARCH_QUERY_INVALID"


async def test_any_text_can_be_searched_for(library: Library, workspace_id: str):
    await library.put(workspace_id, "Innocent bystander")
    await library.settled()
    chance = random.Random(4)
    for _ in range(60):
        query = "".join(
            chr(chance.choice([chance.randrange(32, 127), chance.randrange(32, 0x2FFF)])) for _ in range(30)
        )
        if words_of(query) and len(words_of(query)) <= MAX_WORDS:
            assert await library.titles(workspace_id, query) == []


# --- by whom, and on pages --------------------------------------------------------------------------------


async def test_a_workspace_finds_nothing_of_another(library: Library, workspace_id: str):
    await library.put(workspace_id, "Secret plans")
    other = new_id()
    await library.put(other, "Other plans")
    await library.settled()
    assert await library.titles(other, "plans") == ["Other plans"]
    assert await library.titles(new_id(), "plans") == []
    everything = Within(
        other, parent_ids=[None], allowed=[hit.id for hit in await library.find(workspace_id, "plans")]
    )
    assert [hit.row for hit in await library.find(other, "plans", within=everything)] == ["Other plans"]


WORDS = ("alpha", "beta", "gamma", "delta")


@pytest.mark.parametrize("seed", range(4))
async def test_the_pages_together_are_what_a_look_at_each_allows(
    library: Library, workspace_id: str, seed: int
):
    chance = random.Random(seed)
    parents = [None, *(new_id() for _ in range(4))]
    things: dict[str, tuple[str, str | None]] = {}
    for _ in range(60):
        title, parent_id = " ".join(chance.sample(WORDS, chance.randint(1, 3))), chance.choice(parents)
        things[await library.put(workspace_id, title, parent_id=parent_id)] = title, parent_id
    await library.settled()
    for _ in range(8):
        reached = chance.choice([None, chance.sample(parents, chance.randint(0, 4))])
        exceptions = chance.sample(sorted(things), 12)
        allowed, denied = exceptions[:6], exceptions[6:]
        hidden = chance.sample(sorted(things), chance.choice([0, 15]))
        word, size = chance.choice(WORDS), chance.randint(1, 9)
        within = Within(workspace_id, reached, allowed, denied)
        expected = {
            thing_id
            for thing_id, (title, parent_id) in things.items()
            if word in title.split()
            and (reached is None or parent_id in reached or thing_id in allowed)
            and thing_id not in denied
            and thing_id not in hidden
        }
        found, after = [], None
        while page := await library.find(
            workspace_id, word, within=within, after=after, limit=size, hidden=hidden
        ):
            found += page
            after = (page[-1].score, page[-1].id)
            assert len(page) == size or len(found) == len(expected), "a page is full, or the last one"
        assert len(found) == len({hit.id for hit in found})
        assert {hit.id for hit in found} == expected
        assert [(hit.score, hit.id) for hit in found] == sorted(
            ((hit.score, hit.id) for hit in found), reverse=True
        )


async def test_pages_neither_repeat_nor_miss_what_stays_while_other_things_change(
    library: Library, workspace_id: str
):
    ids = [await library.put(workspace_id, "Stays") for _ in range(20)]
    await library.settled()
    found, after = [], None
    while page := await library.find(workspace_id, "stays", after=after, limit=3):
        found += [hit.id for hit in page]
        after = (page[-1].score, page[-1].id)
        await library.put(workspace_id, "Stays too")
        await library.put(workspace_id, "Rambling stays", thing_id=new_id())
        await library.settled()
        if len(found) > len(ids) + 20:
            break
    assert [thing_id for thing_id in found if thing_id in set(ids)] == sorted(ids, reverse=True)
    assert len(found) == len(set(found))


async def test_scores_do_not_depend_on_what_else_is_there(library: Library, workspace_id: str):
    thing_id = await library.put(workspace_id, "Weekly signups", "by plan")
    await library.settled()
    (alone,) = await library.find(workspace_id, "signups plan")
    for _ in range(30):
        await library.put(workspace_id, "signups signups plan")
    await library.settled()
    scores = {hit.id: hit.score for hit in await library.find(workspace_id, "signups plan")}
    assert scores[thing_id] == alone.score == 16


# --- how the index follows --------------------------------------------------------------------------------


async def test_changes_and_deletions_are_followed(library: Library, workspace_id: str):
    thing_id = await library.put(workspace_id, "Before")
    await library.settled()
    await library.put(workspace_id, "After", thing_id=thing_id)
    await library.settled()
    assert await library.titles(workspace_id, "before") == []
    assert await library.titles(workspace_id, "after") == ["After"]
    await library.remove(thing_id)
    await library.settled()
    assert f"{workspace_id}/{thing_id}" not in await library.content()


async def test_a_late_writer_brings_nothing_back(library: Library, workspace_id: str):
    thing_id = await library.put(workspace_id, "Present")
    gone_id = await library.put(workspace_id, "Gone")
    await library.settled()
    await library.remove(gone_id)
    await library.settled()
    late = [
        Document(workspace_id, thing_id, {"title": "Past"}),
        Document(workspace_id, gone_id, {"title": "Gone"}),
    ]
    await library.write(1, late)
    await library.write(1, [], [(workspace_id, thing_id)])
    indexed = await library.content()
    assert indexed[f"{workspace_id}/{thing_id}"] == ["present", ""]
    assert f"{workspace_id}/{gone_id}" not in indexed


@pytest.mark.parametrize(
    "rounds", [3, pytest.param(100, marks=[pytest.mark.long, pytest.mark.timeout(3600)])]
)
async def test_a_rebuild_beside_writers_converges(library: Library, workspace_id: str, rounds: int):
    chance = random.Random(7)
    steady = {await library.put(workspace_id, f"Steady thing {number}") for number in range(150)}
    alive = [await library.put(workspace_id, f"Passing thing {number}") for number in range(150)]
    await library.settled()
    stop = asyncio.Event()
    missed: list[set[str]] = []

    async def write() -> None:
        while not stop.is_set():
            if chance.random() < 0.3 and len(alive) > 50:
                await library.remove(alive.pop(chance.randrange(len(alive))))
            elif chance.random() < 0.5:
                thing_id = chance.choice(alive)
                await library.put(workspace_id, f"Changed thing {chance.random()}", thing_id=thing_id)
            else:
                alive.append(await library.put(workspace_id, "New thing"))
            await asyncio.sleep(0)

    async def look() -> None:
        while not stop.is_set():
            # What nobody touches is there all the time, while the new generation is filled.
            if missing := steady ^ {hit.id for hit in await library.find(workspace_id, "steady")}:
                missed.append(missing)
            await asyncio.sleep(0.01)

    tasks = [asyncio.create_task(write()) for _ in range(3)] + [asyncio.create_task(look())]
    progress: list[tuple[int, int]] = []
    try:
        for _ in range(rounds):
            await library.indexer().rebuild(lambda done, total: progress.append((done, total)))
    finally:
        stop.set()
        await asyncio.gather(*tasks)
    await library.settled()
    assert await library.content() == await library.expected()
    assert not missed, "searches went on with the index that was"
    assert progress[0][0] == 0
    assert all(done <= total for done, total in progress)


async def test_a_rebuild_mends_what_was_lost(library: Library, workspace_id: str):
    thing_id = await library.put(workspace_id, "Precious")
    await library.settled()
    async with library.db() as session:
        generation = await session.scalar(text("SELECT generation FROM search_indexes"))
    await library.engine.write(THINGS, generation, 2**40, [], [(workspace_id, thing_id)])
    assert f"{workspace_id}/{thing_id}" not in await library.content()
    await library.indexer().rebuild()
    assert await library.content() == await library.expected()


async def test_one_rebuild_at_a_time(library: Library):
    outcomes = await asyncio.gather(*(library.indexer().rebuild() for _ in range(4)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes].count(RebuildRuns) == 3, outcomes
    assert await library.content() == await library.expected()


async def test_a_rebuild_that_died_holds_nobody_up(library: Library, workspace_id: str):
    async with library.db.begin() as session:
        await session.execute(text("UPDATE search_indexes SET next_generation = 999999999"))
        # Of the connection that holds the indexer's lock, so that one begins anew.
        await session.execute(
            text("""
                SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                WHERE application_name = 'meshboard indexer of things' AND datname = current_database()
            """)
        )
    await library.put(workspace_id, "Later")

    async def found() -> bool:
        return await library.titles(workspace_id, "later") == ["Later"]

    await eventually(found, 60)


async def test_another_indexer_takes_over(library: Library, workspace_id: str):
    another = asyncio.create_task(library.indexer().run())
    try:
        for round_ in range(3):
            async with library.db.begin() as session:
                await session.execute(
                    text("""
                        SELECT pg_terminate_backend(pid) FROM pg_locks JOIN pg_stat_activity USING (pid)
                        WHERE locktype = 'advisory' AND granted AND datname = current_database()
                          AND application_name = 'meshboard indexer of things'
                    """)
                )
            await library.put(workspace_id, f"Round {round_}")
            await library.settled()
    finally:
        another.cancel()
        await asyncio.gather(another, return_exceptions=True)
    assert await library.content() == await library.expected()


# --- an engine that is away -------------------------------------------------------------------------------


@pytest.fixture(params=[pytest.param("elasticsearch", marks=ON_ELASTICSEARCH)])
def elastic(request: pytest.FixtureRequest) -> Elastic:
    """Elasticsearch, to be stopped."""
    server: Elastic = request.getfixturevalue("elasticsearch")
    return server


async def test_while_the_engine_is_away_the_queue_waits(
    parts: Parts, identity: Identity, elastic: Elastic, workspace_id: str
):
    async with running_library(parts, identity.keys, elastic.url) as library:
        removed = await library.put(workspace_id, "Removed meanwhile")
        await library.settled()
        await elastic.supervisor.stop("elasticsearch")
        try:
            with pytest.raises(errors.Error) as refusal:
                await library.find(workspace_id, "anything")
            assert refusal.value.code == grpc.StatusCode.UNAVAILABLE
            assert refusal.value.reason == "DEPENDENCY_UNAVAILABLE"
            await library.put(workspace_id, "Written meanwhile")
            await library.remove(removed)
        finally:
            await elastic.supervisor.start("elasticsearch")
        await library.settled(120)
        assert await library.content() == await library.expected()
        assert await library.titles(workspace_id, "meanwhile") == ["Written meanwhile"]


async def test_an_index_that_was_lost_is_built_anew(
    parts: Parts, identity: Identity, elastic: Elastic, workspace_id: str
):
    async with running_library(parts, identity.keys, elastic.url) as library:
        await library.put(workspace_id, "Kept in Postgres")
        await library.settled()
        engine = library.engine
        assert isinstance(engine, Elasticsearch)
        async with engine.answering(10) as client:
            for name in await client.indices.get(index=f"{engine.alias(THINGS)}-*"):
                await client.indices.delete(index=name)
        with pytest.raises(errors.Error) as refusal:
            await library.find(workspace_id, "kept")
        assert refusal.value.code == grpc.StatusCode.UNAVAILABLE
        await library.put(workspace_id, "Kept too")

        async def whole() -> bool:
            try:
                return await library.titles(workspace_id, "kept") == ["Kept too", "Kept in Postgres"]
            except errors.Error:
                return False

        await eventually(whole, 60)
