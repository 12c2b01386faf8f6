"""Search: what a text means, what an index is, and pages of hits that are complete.

Texts and queries are folded to words here, in one place, so that every engine (`search_engines`) compares the same
words. Each word of a query must be found; a document's score is the sum of what its words are worth, an integer that
depends on nothing but the document and the query. So the order by score and id is the same on every page, whatever
else changes, and the hits of several services can be merged into one list.

Who may see a hit is decided twice: `Within` confines the query to what the caller reaches, so that pages are full at
once; and what is found is loaded from the owner's own tables by the SQL that also filters its lists, so that an index
which is behind shows nothing that it must not.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, Protocol, TypeVar

from services.chassis import errors
from services.chassis.paging import Page

MAX_WORDS = 20
MAX_WORD_LENGTH = 64
EXCERPT_LENGTH = 200
# How much a word is worth, times the weight of the field that it was found in.
WHOLE, BEGINNING, SIMILAR = 4, 3, 1
# Words of fewer letters, and those with digits, are found as they are or not at all.
MIN_SIMILAR_LENGTH = 3
# The share of the trigrams of two similar words that both have; as in Postgres (pg_trgm, strict_word_similarity).
SIMILARITY = 0.45

# Letters that are no other letter with an accent, and are typed as one all the same.
_PLAIN = str.maketrans(
    {"æ": "ae", "œ": "oe", "ø": "o", "đ": "d", "ð": "d", "ħ": "h", "ı": "i", "ł": "l", "þ": "th"}
)
# Scripts that put no space between words: there each character stands for itself.
_SPACELESS = ("CJK ", "HIRAGANA", "KATAKANA", "THAI", "LAO ", "KHMER", "MYANMAR")
# Letters and digits, and marks other than accents.
_OF_WORDS = {"Lu", "Ll", "Lt", "Lm", "Lo", "Mc", "Nd", "Nl", "No"}

Row = TypeVar("Row")
Place = tuple[int, str]


def words_of(text: str) -> list[str]:
    """The words of a text, as they are compared: without case, accents, width and punctuation."""
    return [word for word, _, _ in _spans(text)]


@lru_cache(maxsize=10_000)
def _folded(character: str) -> tuple[str, bool, bool]:
    """What is left of a character; whether it is a word by itself; whether it is a part of what stands before it."""
    category = unicodedata.category(character)
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", character).casefold())
    kept = "".join(
        c
        for c in decomposed.translate(_PLAIN)
        if (category == "So" and not c.isspace()) or unicodedata.category(c) in _OF_WORDS
    )
    alone = category == "So" or unicodedata.name(decomposed[:1] or " ", "").startswith(_SPACELESS)
    return kept, alone, category in {"Mn", "Me", "Cf"}


def _spans(text: str) -> Iterator[tuple[str, int, int]]:
    """The words with where they begin and end in the text."""
    word, begin, end = "", 0, 0
    for at, character in enumerate(text):
        kept, alone, joined = _folded(character)
        if joined:
            end = at + 1
            continue
        if word and (alone or not kept):
            yield word[:MAX_WORD_LENGTH], begin, end
            word = ""
        if alone and kept == character:
            yield kept, at, at + 1
        elif alone:  # one sign for several, such as the name of an era
            yield from ((part, at, at + 1) for part in words_of(kept))
        elif kept:
            begin = begin if word else at
            word, end = word + kept, at + 1
    if word:
        yield word[:MAX_WORD_LENGTH], begin, end


@dataclass(frozen=True, slots=True)
class Query:
    """Words that must all be found; the last one may be the beginning of a word."""

    words: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> Query:
        """Reads what somebody typed. Raises INVALID_ARGUMENT (SEARCH_QUERY_INVALID)."""
        *first, last = words_of(text) or [""]
        words = (*dict.fromkeys(word for word in first if word != last), last)
        if not last or len(words) > MAX_WORDS:
            raise errors.invalid_argument(
                "SEARCH_QUERY_INVALID", f"The query must have 1 to {MAX_WORDS} words.", field="query"
            )
        return cls(words)

    def is_last(self, word: str) -> bool:
        """Whether the word may be the beginning of one."""
        return word == self.words[-1]


def may_be_similar(word: str) -> bool:
    """Whether typing errors in the word are forgiven."""
    return len(word) >= MIN_SIMILAR_LENGTH and not any(c.isnumeric() for c in word)


@dataclass(frozen=True)
class Index:
    """What is searched: its name in the engine, and the fields with their weights, the weightiest first."""

    name: str
    fields: Mapping[str, int]


@dataclass(frozen=True)
class Document:
    """What an index knows of a row: `texts` by field, and what it lies in."""

    workspace_id: str
    document_id: str
    texts: Mapping[str, str]
    parent_id: str | None = None

    def words(self, field: str) -> str:
        """The words of a field, a space between two of them."""
        return " ".join(words_of(self.texts.get(field, "")))


@dataclass(frozen=True)
class Within:
    """What the caller reaches in a workspace: what lies in `parent_ids` (None: anywhere; a parent may be None), and
    beside it `allowed`; but not `denied`."""

    workspace_id: str
    parent_ids: Collection[str | None] | None = None
    allowed: Collection[str] = ()
    denied: Collection[str] = ()


class Engine(Protocol):
    """Keeps documents by generation of an index, and finds them. `Away` is raised while it does not answer."""

    name: str

    async def search(
        self, index: Index, query: Query, within: Within, after: Place | None, limit: int
    ) -> list[Place]:
        """The hits after a place, by score and id, both descending."""
        ...

    async def create(self, index: Index, generation: int) -> None:
        """Makes an empty generation."""
        ...

    async def exists(self, index: Index, generation: int) -> bool:
        """Whether the generation is there."""
        ...

    async def write(
        self, index: Index, generation: int, version: int, present: Sequence[Document], gone: Sequence[Key]
    ) -> None:
        """Puts and removes documents, those aside that it has in a newer version."""
        ...

    async def switch(self, index: Index, generation: int) -> None:
        """Has searches look at this generation from now on."""
        ...

    async def sweep(self, index: Index, keep: Collection[int]) -> None:
        """Drops all other generations, and what else is of no more use."""
        ...

    async def close(self) -> None:
        """Ends the connections."""
        ...


Key = tuple[str, str]  # workspace and document


class Away(Exception):
    """The engine does not answer, or does not have the index."""


@dataclass(frozen=True, slots=True)
class Found(Generic[Row]):
    """A hit with the row that it stands for."""

    score: int
    id: str
    row: Row


class Search:
    """Finds rows of one index."""

    def __init__(self, engine: Engine, index: Index) -> None:
        self._engine = engine
        self._index = index

    async def find(
        self,
        query: Query,
        within: Within,
        load: Callable[[list[str]], Awaitable[Mapping[str, Row]]],
        after: Place | None,
        limit: int,
    ) -> list[Found[Row]]:
        """The next `limit` hits; fewer only when there are no more.

        `load` gives the rows by id, those that the caller may see: the others are dropped, and replaced by what
        follows. Raises UNAVAILABLE while the engine is away.
        """
        found: list[Found[Row]] = []
        while len(found) < limit:
            wanted = limit - len(found)
            try:
                places = await self._engine.search(self._index, query, within, after, wanted)
            except Away as away:
                raise errors.unavailable("The search does not answer.") from away
            rows = await load([document_id for _, document_id in places]) if places else {}
            found += [Found(score, row_id, rows[row_id]) for score, row_id in places if row_id in rows]
            if len(places) < wanted:
                break
            after = places[-1]
        return found


def place_of(page: Page) -> Place | None:
    """Where the last page of hits ended."""
    if page.last is None:
        return None
    score, last_id = page.last
    return score, last_id


# --- what was found in a text -----------------------------------------------------------------------------


def highlight(query: Query, text: str) -> list[tuple[str, bool]]:
    """The text in pieces, each with whether it was found; empty when nothing was.

    Of a long text it is the part around the first find.
    """
    matched = [
        (begin, end)
        for word, begin, end in _spans(text)
        if any(_fits(query, wanted, word) for wanted in query.words)
    ]
    if not matched:
        return []
    start = max(0, matched[0][0] - EXCERPT_LENGTH // 4) if len(text) > EXCERPT_LENGTH else 0
    stop = max(start + EXCERPT_LENGTH, matched[0][1])
    pieces, at = [], start
    for begin, end in matched:
        if end > stop:
            break
        pieces += [(text[at:begin], False), (text[begin:end], True)]
        at = end
    pieces.append((text[at:stop], False))
    return [piece for piece in pieces if piece[0]]


def _fits(query: Query, wanted: str, word: str) -> bool:
    if word == wanted or (query.is_last(wanted) and word.startswith(wanted)):
        return True
    return may_be_similar(wanted) and (_share(wanted, word) >= SIMILARITY or _is_near(wanted, word))


def _share(wanted: str, word: str) -> float:
    ours, theirs = (
        {padded[i : i + 3] for i in range(len(padded) - 2)} for padded in (f"  {wanted} ", f"  {word} ")
    )
    return len(ours & theirs) / len(ours | theirs)


def _is_near(wanted: str, word: str) -> bool:
    """Within one edit for up to five letters, two for more, as Elasticsearch's fuzziness AUTO has it."""
    allowed = 1 if len(wanted) <= 5 else 2
    if abs(len(wanted) - len(word)) > allowed:
        return False
    # Optimal string alignment distance: two neighbours that have changed places count as one edit.
    before: list[int] = []
    above = list(range(len(word) + 1))
    for i, a in enumerate(wanted, 1):
        row = [i]
        for j, b in enumerate(word, 1):
            cost = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (a != b))
            if i > 1 and j > 1 and a == word[j - 2] and wanted[i - 2] == b:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, above = above, row
    return above[-1] <= allowed
