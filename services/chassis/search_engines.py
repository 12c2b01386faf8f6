"""The two engines of `search`: the service's own Postgres, and Elasticsearch when its address is set.

Both compare the words that `search` makes, and count alike: a word is worth the weight of the field that it was found
in, times how well it was found. What typing errors they forgive differs a little: Postgres compares trigrams,
Elasticsearch counts edits.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, delete, func, select, text, tuple_
from sqlalchemy.dialects.postgresql import ARRAY, insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.types import Text, Uuid

from services.chassis import times
from services.chassis.db import SearchDocumentRow, SearchIndexRow
from services.chassis.deadline import seconds_left
from services.chassis.search import (
    BEGINNING,
    SIMILAR,
    SIMILARITY,
    WHOLE,
    Away,
    Document,
    Engine,
    Index,
    Key,
    Place,
    Query,
    Within,
    may_be_similar,
)
from services.chassis.settings import Settings

if TYPE_CHECKING:
    from elasticsearch import AsyncElasticsearch

SEARCH_SECONDS = 5.0
WRITE_SECONDS = 30.0
# How long a removed document is remembered, so that a late writer cannot bring it back.
GONE_SECONDS = 3600


def engine_of(settings: Settings, db: async_sessionmaker[AsyncSession]) -> Engine:
    """The engine that the settings choose."""
    url = settings.elasticsearch_url.get_secret_value()
    return Elasticsearch(url, settings.elasticsearch_prefix) if url else Postgres(db)


# --- Postgres ---------------------------------------------------------------------------------------------


class Postgres:
    """Trigrams of the words in one GIN index; needs pg_trgm."""

    name = "postgres"

    def __init__(self, db: async_sessionmaker[AsyncSession]) -> None:
        self._db = db

    async def close(self) -> None:
        """As in Engine: the pool belongs to who has made it."""

    async def search(
        self, index: Index, query: Query, within: Within, after: Place | None, limit: int
    ) -> list[Place]:
        """As in Engine."""
        values: dict[str, Any] = {"index": index.name, "workspace_id": within.workspace_id, "limit": limit}
        conditions = [_found(query, values), *_reached(within, values)]
        statement = text(f"""
            SELECT score, document_id::text FROM (
                SELECT document_id, {_score(index, query)} AS score {_DOCUMENTS}
                  AND gone_time IS NULL AND {" AND ".join(conditions)}
            ) AS hits
            WHERE {_after(after, values)}
            ORDER BY score DESC, document_id DESC
            LIMIT :limit
        """)  # noqa: S608 - of constants and the names of parameters
        async with self._db() as session:
            # The index looks at what is as similar as this setting says.
            current = await session.execute(
                select(
                    SearchIndexRow.generation,
                    func.set_config("pg_trgm.strict_word_similarity_threshold", str(SIMILARITY), True),
                ).where(SearchIndexRow.index_name == index.name, SearchIndexRow.engine == self.name)
            )
            values["generation"] = generation = current.scalar_one_or_none()
            if generation is None:
                raise Away(f"the index {index.name} is not built yet")
            hits = await session.execute(statement.bindparams(*_typed(values)), values)
        return [(score, document_id) for score, document_id in hits]

    async def create(self, index: Index, generation: int) -> None:
        """As in Engine: a generation is there with its first document."""

    async def exists(self, index: Index, generation: int) -> bool:
        """As in Engine."""
        return True

    async def write(
        self, index: Index, generation: int, version: int, present: Sequence[Document], gone: Sequence[Key]
    ) -> None:
        """As in Engine."""
        same = {"index_name": index.name, "generation": generation, "version": version}
        rows: list[dict[str, Any]] = [
            {
                **same,
                "workspace_id": document.workspace_id,
                "document_id": document.document_id,
                "parent_id": document.parent_id,
                # A space around each word, so that a condition can tell where it begins and ends.
                "texts": (texts := [f" {document.words(field)} " for field in index.fields]),
                "words": "".join(texts),
                "gone_time": None,
            }
            for document in present
        ]
        rows += [
            {
                **same,
                "workspace_id": workspace_id,
                "document_id": document_id,
                "parent_id": None,
                "texts": [],
                "words": "",
                "gone_time": times.now(),
            }
            for workspace_id, document_id in gone
        ]
        if not rows:
            return
        # In one order for all, or two who write the same documents wait for each other.
        rows.sort(key=lambda row: (row["workspace_id"], row["document_id"]))
        # The rows are parameters of a statement for one: to compile one with all of them took a tenth of a second, in
        # which no call was served.
        statement = insert(SearchDocumentRow)
        new = statement.excluded
        async with self._db.begin() as session:
            await session.execute(
                statement.on_conflict_do_update(
                    constraint="search_documents_pkey",
                    set_={
                        "version": new.version,
                        "parent_id": new.parent_id,
                        "texts": new.texts,
                        "words": new.words,
                        "gone_time": new.gone_time,
                    },
                    where=SearchDocumentRow.version < new.version,
                ),
                rows,
            )

    async def switch(self, index: Index, generation: int) -> None:
        """As in Engine: the row in search_indexes is what searches look at."""

    async def sweep(self, index: Index, keep: Collection[int]) -> None:
        """As in Engine."""
        old = SearchDocumentRow.gone_time < func.now() - func.make_interval(0, 0, 0, 0, 0, 0, GONE_SECONDS)
        key = (SearchDocumentRow.generation, SearchDocumentRow.workspace_id, SearchDocumentRow.document_id)
        # Locked in the order of `write`, or this and an indexer that is behind wait for each other.
        swept = (
            select(*key)
            .where(
                SearchDocumentRow.index_name == index.name, SearchDocumentRow.generation.not_in(keep) | old
            )
            .order_by(*key)
            .with_for_update()
        )
        async with self._db.begin() as session:
            await session.execute(
                delete(SearchDocumentRow)
                .where(SearchDocumentRow.index_name == index.name, tuple_(*key).in_(swept))
                .execution_options(synchronize_session=False)
            )


_DOCUMENTS = """
    FROM search_documents
    WHERE index_name = :index AND generation = :generation AND workspace_id = :workspace_id
"""


def _found(query: Query, values: dict[str, Any]) -> str:
    """SQL: each word is somewhere in the document. Words have no character that means something to LIKE."""
    conditions = []
    for number, word in enumerate(query.words):
        beginning = query.is_last(word)
        values[f"whole_{number}"] = f"% {word} %"
        ways = [f"words LIKE :whole_{number}"]
        if beginning:
            values[f"beginning_{number}"] = f"% {word}%"
            ways.append(f"words LIKE :beginning_{number}")
        if may_be_similar(word):
            values[f"word_{number}"] = word
            ways.append(f":word_{number} <<% words")
        conditions.append(f"({' OR '.join(ways)})")
    return " AND ".join(conditions)


def _score(index: Index, query: Query) -> str:
    """SQL: the sum of what each word is worth at its best."""
    worths = []
    for number, word in enumerate(query.words):
        ways = []
        for place, weight in enumerate(index.fields.values(), 1):
            ways.append((WHOLE * weight, f"texts[{place}] LIKE :whole_{number}"))
            if query.is_last(word):
                ways.append((BEGINNING * weight, f"texts[{place}] LIKE :beginning_{number}"))
            if may_be_similar(word):
                ways.append((SIMILAR * weight, f":word_{number} <<% texts[{place}]"))
        ways.sort(key=lambda way: (-way[0], "<<%" in way[1]))  # the cheaper one first
        worths.append(f"CASE {' '.join(f'WHEN {way} THEN {worth}' for worth, way in ways)} ELSE 0 END")
    return " + ".join(worths)


def _reached(within: Within, values: dict[str, Any]) -> list[str]:
    conditions: list[str] = []
    if within.parent_ids is not None:
        values["parent_ids"] = [parent_id for parent_id in within.parent_ids if parent_id]
        values["allowed"] = list(within.allowed)
        ways = ["parent_id = ANY(:parent_ids)", "document_id = ANY(:allowed)"]
        if None in within.parent_ids:
            ways.append("parent_id IS NULL")
        conditions.append(f"({' OR '.join(ways)})")
    if within.denied:
        values["denied"] = list(within.denied)
        conditions.append("document_id <> ALL(:denied)")
    return conditions


def _after(after: Place | None, values: dict[str, Any]) -> str:
    if after is None:
        return "true"
    values["after_score"], values["after_id"] = after
    return "(score, document_id) < (:after_score, :after_id)"


def _typed(values: dict[str, Any]) -> list[Any]:
    ids = Uuid(as_uuid=False)
    types = {"workspace_id": ids, "after_id": ids}
    types |= {name: ARRAY(ids) for name in ("parent_ids", "allowed", "denied")}  # type: ignore[misc]
    return [
        bindparam(name, type_=types.get(name) or (Text() if isinstance(value, str) else None))
        for name, value in values.items()
    ]


# --- Elasticsearch ----------------------------------------------------------------------------------------


class Elasticsearch:
    """An index for each generation, `<prefix>-<index>-<generation>`, behind the alias `<prefix>-<index>`.

    Documents come as words that are compared as they are: the engine analyses nothing.
    """

    name = "elasticsearch"

    def __init__(self, url: str, prefix: str) -> None:
        self._url = url
        self._prefix = prefix
        self._made: AsyncElasticsearch | None = None

    async def close(self) -> None:
        """Ends the connections."""
        if self._made is not None:
            await self._made.close()

    async def search(
        self, index: Index, query: Query, within: Within, after: Place | None, limit: int
    ) -> list[Place]:
        """As in Engine."""
        async with self.answering(SEARCH_SECONDS) as client:
            found = await client.search(
                index=self.alias(index),
                routing=within.workspace_id,
                query=_query(index, query, within),
                sort=[{"_score": "desc"}, {"document_id": "desc"}],
                search_after=list(after) if after else None,
                size=limit,
                source=False,
                track_total_hits=False,
                allow_partial_search_results=False,
            )
        return [(round(hit["sort"][0]), hit["sort"][1]) for hit in found["hits"]["hits"]]

    async def create(self, index: Index, generation: int) -> None:
        """As in Engine."""
        keyword = {"type": "keyword"}
        words = {"type": "text", "analyzer": "whitespace", "norms": False, "index_options": "docs"}
        async with self.answering(WRITE_SECONDS) as client:
            await client.indices.create(
                index=self._generation(index, generation),
                # Documents are written by this name: it keeps them from making an index that was lost, and without its
                # mappings.
                aliases={self._writes(index, generation): {"is_write_index": True}},
                settings={
                    # Set, so that an index which nobody has searched for a while is refreshed all the same.
                    "refresh_interval": "500ms",
                    "gc_deletes": f"{GONE_SECONDS}s",
                    # What a caller may see one by one stands in the query.
                    "max_terms_count": 1_000_000,
                },
                mappings={
                    "dynamic": "strict",
                    "properties": {
                        "workspace_id": keyword,
                        "document_id": keyword,
                        "parent_id": keyword,
                        "texts": {"properties": dict.fromkeys(index.fields, words)},
                    },
                },
            )

    async def exists(self, index: Index, generation: int) -> bool:
        """As in Engine."""
        async with self.answering(SEARCH_SECONDS) as client:
            alias = await client.indices.exists_alias(
                name=self.alias(index), index=self._generation(index, generation)
            )
            return bool(alias) and bool(
                await client.indices.exists_alias(name=self._writes(index, generation))
            )

    async def write(
        self, index: Index, generation: int, version: int, present: Sequence[Document], gone: Sequence[Key]
    ) -> None:
        """As in Engine."""
        operations: list[dict[str, Any]] = []
        same = {"version": version, "version_type": "external"}
        for document in present:
            workspace_id, document_id = document.workspace_id, document.document_id
            which = {"_id": f"{workspace_id}/{document_id}", "routing": workspace_id, **same}
            content: dict[str, Any] = {
                "workspace_id": workspace_id,
                "document_id": document_id,
                "texts": {field: document.words(field) for field in index.fields},
            }
            if document.parent_id:
                content["parent_id"] = document.parent_id
            operations += [{"index": which}, content]
        for workspace_id, document_id in gone:
            which = {"_id": f"{workspace_id}/{document_id}", "routing": workspace_id, **same}
            operations.append({"delete": which})
        if not operations:
            return
        async with self.answering(WRITE_SECONDS) as client:
            done = await client.bulk(
                index=self._writes(index, generation), operations=operations, require_alias=True
            )
        # 409: it has a newer version; 404: of what was to be removed there was nothing.
        failures = [
            item
            for outcome in done["items"]
            for kind, item in outcome.items()
            if item["status"] >= 300
            and item["status"] != 409
            and not (kind == "delete" and "error" not in item)
        ]
        if failures:
            raise Away(
                f"{len(failures)} documents of {index.name} were refused: {failures[0]['error']['type']}"
            )

    async def switch(self, index: Index, generation: int) -> None:
        """As in Engine."""
        alias, target = self.alias(index), self._generation(index, generation)
        async with self.answering(WRITE_SECONDS) as client:
            await client.indices.refresh(index=target)
            await client.indices.update_aliases(
                actions=[
                    {"remove": {"index": f"{alias}-*", "alias": alias, "must_exist": False}},
                    {"add": {"index": target, "alias": alias}},
                ]
            )

    async def sweep(self, index: Index, keep: Collection[int]) -> None:
        """As in Engine."""
        kept = {self._generation(index, generation) for generation in keep}
        async with self.answering(WRITE_SECONDS) as client:
            there = await client.indices.get(index=f"{self.alias(index)}-*", features="settings")
            for name in there.keys() - kept:
                await client.indices.delete(index=name, ignore_unavailable=True)

    def alias(self, index: Index) -> str:
        """The name by which the index is searched."""
        return f"{self._prefix}-{index.name}"

    def _generation(self, index: Index, generation: int) -> str:
        return f"{self.alias(index)}-{generation}"

    def _writes(self, index: Index, generation: int) -> str:
        return f"{self._generation(index, generation)}-writes"

    @asynccontextmanager
    async def answering(self, seconds: float) -> AsyncIterator[AsyncElasticsearch]:
        """The client, for calls that end within these seconds and the call's own deadline. Raises Away."""
        # Imported here: 40 MB that most meshes do without.
        import elasticsearch  # noqa: PLC0415

        if self._made is None:
            self._made = elasticsearch.AsyncElasticsearch(
                self._url, max_retries=0, retry_on_timeout=False, sniff_on_start=False
            )
        try:
            yield self._made.options(request_timeout=max(0.05, min(seconds, seconds_left())))
        except elasticsearch.NotFoundError as error:
            raise Away("Elasticsearch does not have the index") from error
        except elasticsearch.TransportError as error:
            raise Away("Elasticsearch does not answer") from error
        except elasticsearch.ApiError as error:
            if error.status_code < 500 and error.status_code != 429:
                raise
            raise Away(f"Elasticsearch answers {error.status_code}") from error


def _query(index: Index, query: Query, within: Within) -> dict[str, Any]:
    reached: list[dict[str, Any]] = [{"term": {"workspace_id": within.workspace_id}}]
    if within.parent_ids is not None:
        ways: list[dict[str, Any]] = [
            {"terms": {"parent_id": [parent_id for parent_id in within.parent_ids if parent_id]}},
            {"terms": {"document_id": list(within.allowed)}},
        ]
        if None in within.parent_ids:
            ways.append({"bool": {"must_not": {"exists": {"field": "parent_id"}}}})
        reached.append({"bool": {"should": ways, "minimum_should_match": 1}})
    return {
        "bool": {
            "filter": reached,
            "must_not": [{"terms": {"document_id": list(within.denied)}}] if within.denied else [],
            "must": [_word(index, query, word) for word in query.words],
        }
    }


def _word(index: Index, query: Query, word: str) -> dict[str, Any]:
    ways: list[tuple[int, dict[str, Any]]] = []
    for field, weight in index.fields.items():
        path = f"texts.{field}"
        ways.append((WHOLE * weight, {"term": {path: word}}))
        if query.is_last(word):
            ways.append((BEGINNING * weight, {"prefix": {path: word}}))
        if may_be_similar(word):
            ways.append((SIMILAR * weight, {"fuzzy": {path: {"value": word, "fuzziness": "AUTO"}}}))
    # A constant for each way: what else is in the index does not change a score.
    return {
        "dis_max": {"queries": [{"constant_score": {"filter": way, "boost": worth}} for worth, way in ways]}
    }
