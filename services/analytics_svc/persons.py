"""Persons: which ids are one person's, by what events say in `previous_id`.

Events are never rewritten. Links make groups of ids, and the event store has a table that gives each linked id its
person: the name of its group. A query that says `person_id` joins the table; an id that is not in it is a person of its
own.

A link counts in two scopes: its source, for queries of one source; and its workspace, for queries of several. So who
may query one source learns nothing of what another one knows, and cannot be misled by it. In the scope of a source a
group is named by one of its ids; in that of a workspace by a hash, because the id may be of a source that the caller
may not query.

When two groups meet, the larger one keeps its name (of two equal ones that of `distinct_id`), so that an id is renamed
at most log2(n) times, whatever the order of the links: union by size (Tarjan 1975, "Efficiency of a Good But Not Linear
Set Union Algorithm").
"""

import json
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple, TypeVar

from meshboard.analytics.v1.event_columns_pb2 import WrittenBatch
from meshboard.analytics.v1.event_log_pb2 import LoggedEvent

from services.analytics_svc.event_store import EventStore, Value, pieces

T = TypeVar("T")

_TABLE = """
CREATE TABLE IF NOT EXISTS persons %s(
    workspace_id UUID,
    scope_id UUID,
    distinct_id String,
    person_id String,
    version UInt64,
    INDEX person_ids person_id TYPE bloom_filter(0.001)
)
ENGINE = %s
ORDER BY (workspace_id, scope_id, distinct_id)
SETTINGS fsync_after_insert = 1, fsync_part_directory = 1
"""


def persons_table(cluster: str) -> str:
    """The statement that makes the table. On a cluster each server has all of it, for the join with its own events."""
    if not cluster:
        return _TABLE % ("", "ReplacingMergeTree(version)")
    path = "'/clickhouse/tables/{database}/persons', '{shard}-{replica}'"
    return _TABLE % (f"ON CLUSTER '{cluster}' ", f"ReplicatedReplacingMergeTree({path}, version)")


_INSERT = (
    "INSERT INTO persons (workspace_id, scope_id, distinct_id, person_id, version) FORMAT JSONCompactEachRow"
)
# One insert is one part: a query sees all of it or nothing.
_ONE_BLOCK: Mapping[str, Value] = {
    "max_insert_threads": 1,
    "input_format_parallel_parsing": 0,
    "max_insert_block_size": 10_000_000,
    "min_insert_block_size_rows": 10_000_000,
    "min_insert_block_size_bytes": 1 << 30,
}

# What applications send where they know nobody: linked, it would make one person of all their users.
NOBODY = frozenset(
    {
        "00000000-0000-0000-0000-000000000000",
        "[object object]",
        "anonymous",
        "distinct_id",
        "false",
        "guest",
        "nan",
        "nil",
        "none",
        "not_authenticated",
        "null",
        "true",
        "undefined",
        "unknown",
    }
)


class Scope(NamedTuple):
    """Where a link counts: in a source, or in the workspace, whose id `scope_id` is then."""

    workspace_id: str
    scope_id: str

    def name(self, distinct_id: str) -> str:
        """The name of a group that begins with this id."""
        if self.scope_id != self.workspace_id:
            return distinct_id
        return blake2b(f"{self.workspace_id}{distinct_id}".encode(), digest_size=16).hexdigest()


class Link(NamedTuple):
    """Two ids of one person."""

    scope: Scope
    distinct_id: str
    previous_id: str


class _Group(NamedTuple):
    scope: Scope
    person_id: str


def links_of(batches: Iterable[WrittenBatch]) -> list[Link]:
    """The links that events make, each once, in order."""
    links: dict[Link, None] = {}
    for batch in batches:
        if not batch.has_links:
            continue
        scopes = [Scope(batch.workspace_id, scope_id) for scope_id in (batch.source_id, batch.workspace_id)]
        for event in map(LoggedEvent.FromString, batch.events):
            if previous_id := event.previous_id:
                distinct_id = event.distinct_id
                if previous_id != distinct_id and not (_is_nobody(previous_id) or _is_nobody(distinct_id)):
                    links.update(dict.fromkeys(Link(scope, distinct_id, previous_id) for scope in scopes))
    return list(links)


def _is_nobody(distinct_id: str) -> bool:
    text = distinct_id.strip(" \t\r\n\"'").lower()
    return not text or text in NOBODY


class Persons:
    """Keeps the table. One process does at a time."""

    def __init__(self, store: EventStore) -> None:
        self._store = store

    async def link(self, links: Sequence[Link], version: int) -> None:
        """Writes what the links change, all of it or nothing; linking again changes nothing.

        `version` grows from range to range of the log. Raises UnavailableError or EventStoreError: call it again.
        """
        if not links:
            return
        stored = await self._stored(links)
        new: dict[tuple[Scope, str], _Group] = {}
        joints = []
        for link in links:
            ends = []
            for key in ((link.scope, link.distinct_id), (link.scope, link.previous_id)):
                if (group := stored.get(key)) is None:
                    group = new[key] = _Group(link.scope, link.scope.name(key[1]))
                ends.append(group)
            if ends[0] != ends[1]:
                joints.append((ends[0], ends[1]))
        if not joints:
            return
        groups = {group for joint in joints for group in joint}
        old = groups.difference(new.values())
        names = unite(joints, dict.fromkeys(groups, 1) | await self._sizes(old))
        rows = [(distinct_id, names[group]) for (_, distinct_id), group in new.items()]
        renamed = {group: names[group] for group in old if names[group] != group}
        rows += [(distinct_id, renamed[group]) for distinct_id, group in await self._members(renamed)]
        data = "\n".join(
            json.dumps([*group.scope, distinct_id, group.person_id, version]) for distinct_id, group in rows
        )
        await self._store.insert(_INSERT, data.encode(), token="", settings=_ONE_BLOCK)

    async def _stored(self, links: Sequence[Link]) -> dict[tuple[Scope, str], _Group]:
        """The groups of those ids that have one."""
        ids = {distinct_id for link in links for distinct_id in (link.distinct_id, link.previous_id)}
        rows = self._rows("distinct_id, person_id", "distinct_id", ids, {link.scope for link in links})
        return {
            (scope, distinct_id): _Group(scope, person_id) async for scope, (distinct_id, person_id) in rows
        }

    async def _members(self, groups: Collection[_Group]) -> list[tuple[str, _Group]]:
        rows = self._rows("distinct_id, person_id", "person_id", *_parts(groups))
        return [
            (distinct_id, group)
            async for scope, (distinct_id, person_id) in rows
            if (group := _Group(scope, person_id)) in groups
        ]

    async def _sizes(self, groups: Collection[_Group]) -> dict[_Group, int]:
        rows = self._rows("person_id, count()", "person_id", *_parts(groups), group_by="person_id")
        return {
            group: count
            async for scope, (person_id, count) in rows
            if (group := _Group(scope, person_id)) in groups
        }

    async def _rows(
        self, columns: str, key: str, values: Iterable[str], scopes: Collection[Scope], group_by: str = ""
    ) -> AsyncIterator[tuple[Scope, list[Any]]]:
        """Rows of these scopes, and of others that have their ids in common."""
        if not scopes:
            return
        workspace_ids, scope_ids = (sorted(set(ids)) for ids in zip(*scopes, strict=True))
        for some in pieces(sorted(values)):
            found = await self._store.query(
                f"SELECT toString(workspace_id), toString(scope_id), {columns}"  # noqa: S608 - of texts written here
                " FROM persons FINAL"
                " WHERE workspace_id IN {workspaces:Array(UUID)} AND scope_id IN {scopes:Array(UUID)}"
                f" AND {key} IN {{values:Array(String)}}"
                + (f" GROUP BY workspace_id, scope_id, {group_by}" if group_by else ""),
                {"workspaces": workspace_ids, "scopes": scope_ids, "values": some},
            )
            for workspace_id, scope_id, *cells in found.rows:
                yield Scope(workspace_id, scope_id), cells


async def unlink(store: EventStore, deleted: Collection[tuple[str, str]]) -> set[str]:
    """Removes what deleted sources, by workspace and source id, have said of persons, and gives the workspaces.

    In the scope of a workspace the ids go that no other source has linked; what such an id has joined stays joined.
    Raises UnavailableError or EventStoreError.
    """
    if not deleted:
        return set()
    source_ids = sorted(source_id for _, source_id in deleted)
    found: set[str] = set()
    for some in pieces(source_ids):
        linked = await store.query(
            "SELECT DISTINCT toString(workspace_id) FROM persons"
            " WHERE workspace_id IN {workspaces:Array(UUID)} AND scope_id IN {sources:Array(UUID)}",
            {"workspaces": sorted({workspace_id for workspace_id, _ in deleted}), "sources": some},
        )
        workspace_ids = sorted(workspace_id for (workspace_id,) in linked.rows)
        if workspace_ids:
            await store.execute(
                "ALTER TABLE persons DELETE WHERE workspace_id IN {workspaces:Array(UUID)} AND ("
                " scope_id IN {sources:Array(UUID)} OR scope_id = workspace_id AND (workspace_id, distinct_id) NOT IN ("
                " SELECT workspace_id, distinct_id FROM persons WHERE workspace_id IN {workspaces:Array(UUID)}"
                " AND scope_id != workspace_id AND scope_id NOT IN {sources:Array(UUID)}))"
                " SETTINGS mutations_sync = 1",
                {"workspaces": workspace_ids, "sources": some},
                timeout=300,
            )
            found.update(workspace_ids)
    return found


def unite(joints: Iterable[tuple[T, T]], sizes: dict[T, int]) -> dict[T, T]:
    """What each of the groups in `sizes` belongs to when those of each joint have met, one joint after the other."""
    parents: dict[T, T] = {}

    def find(group: T) -> T:
        while (parent := parents.get(group)) is not None:
            if (above := parents.get(parent)) is not None:
                parents[group] = above
            group = parent
        return group

    for one, other in joints:
        larger, smaller = find(one), find(other)
        if larger == smaller:
            continue
        if sizes[larger] < sizes[smaller]:
            larger, smaller = smaller, larger
        parents[smaller] = larger
        sizes[larger] += sizes[smaller]
    return {group: find(group) for group in sizes}


def _parts(groups: Iterable[_Group]) -> tuple[set[str], set[Scope]]:
    return {group.person_id for group in groups}, {group.scope for group in groups}
