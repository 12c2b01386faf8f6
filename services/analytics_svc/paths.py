"""Paths: which ways are taken from one event, or one page, to the next."""
# ruff: noqa: S608 - this is where SQL is put together, of expressions written here

from datetime import datetime

from meshboard.analytics.v1.insight_service_pb2 import PathsQuery, PathsResult
from meshboard.analytics.v1.query_pb2 import Result

from services.analytics_svc.actors import ORDER, actor_of, time_of
from services.analytics_svc.compiler import Compiled, cells_of, compiled
from services.analytics_svc.memberships import Memberships
from services.analytics_svc.selection import Selection, resolve_range

DEFAULT_GAP_SECONDS = 1800
DEFAULT_DEPTH = 5
DEFAULT_LIMIT = 100

# What a row is about.
_ALL, _NODE, _LINK = 2, 1, 0


def compile_paths(query: PathsQuery, workspace_id: str, now: datetime, cohorts: Memberships) -> Compiled:
    """A row for all paths, one for each node and one for each link: which of these it is, place, node, next node, and
    numbers of paths, of actors, of exits, and of seconds.

    Raises INVALID_ARGUMENT (QUERY_INVALID, PROPERTY_UNKNOWN), naming the field.
    """
    start, end = resolve_range(query.time_range, now)
    events = Selection(workspace_id, query.source_ids, start, end, cohorts=cohorts)
    node = events.property(query.property or "event", "query.property")
    conditions = [node.exists, *events.filters(query.filters, "query.filters")]
    actor = actor_of(events, query.actor, "query.actor")
    gap = events.bind((query.gap_seconds or DEFAULT_GAP_SECONDS) * 1000, "Int64")
    depth, limit = query.depth or DEFAULT_DEPTH, query.limit or DEFAULT_LIMIT
    # An event of a path is (its time, its node).
    runs = f"""
        SELECT who, arrayFilter((e, before, i) -> i = 1 OR e.2 != before.2,
            run, arrayPushFront(arrayPopBack(run), run[1]), arrayEnumerate(run)) AS path
        FROM (
            SELECT who, arrayZip(arrayMap(o -> {time_of("o")}, arraySort(orders)),
                arraySort((e, o) -> o, nodes, orders)) AS events
            FROM (
                SELECT reinterpretAsUInt128(sipHash128(actor)) AS who,
                    groupArray({ORDER}) AS orders, groupArray({node.text}) AS nodes
                FROM (SELECT *, {actor} AS actor FROM {events.rows()} WHERE {" AND ".join(conditions)})
                GROUP BY actor
            )
        )
        ARRAY JOIN arraySplit((e, before) -> e.1 - before.1 >= {gap},
            events, arrayPushFront(arrayPopBack(events), events[1])) AS run
    """
    if query.start_node:
        begins = f"arrayFirstIndex(e -> e.2 = {events.bind(query.start_node, 'String')}, path)"
        runs = f"SELECT who, arraySlice(path, {begins}) AS path FROM ({runs}) WHERE {begins} > 0"
    if query.end_node:
        after = "i > 1 AND" if query.start_node else ""
        ends = (
            f"arrayFirstIndex((e, i) -> {after} e.2 = {events.bind(query.end_node, 'String')},"
            " path, arrayEnumerate(path))"
        )
        runs = f"SELECT who, arraySlice(path, 1, {ends}) AS path FROM ({runs}) WHERE {ends} > 0"
        part, place = (
            f"arraySlice(path, greatest(1, toInt64(length(path)) - {depth - 1}))",
            f"i + {depth} - length(part)",
        )
    else:
        part, place = f"arraySlice(path, 1, {depth})", "i"
    # Whether there is a next node, and whether the path ends here; neither is so where it goes on beyond `depth`.
    sql = f"""
        SELECT multiIf(grouping(place) = 1, {_ALL}, grouping(next) = 1, {_NODE}, {_LINK}) AS about,
            place, node, next, if(about = {_ALL}, countIf(is_first), count()) AS paths, uniqExact(who) AS actors,
            countIf(is_exit) AS exits, ifNotFinite(avg(seconds), 0)
        FROM (
            SELECT who, {place} AS place, part[i].2 AS node, i = 1 AS is_first,
                i < length(part) AS has_next, if(has_next, part[i + 1].2, '') AS next,
                if(has_next, (part[i + 1].1 - part[i].1) / 1000, 0) AS seconds,
                NOT has_next AND {"1" if query.end_node else "length(path) = length(part)"} AS is_exit
            FROM (SELECT who, path, {part} AS part FROM ({runs}))
            ARRAY JOIN arrayEnumerate(part) AS i
        )
        GROUP BY GROUPING SETS ((), (place, node), (place, node, next, has_next))
        HAVING about != {_LINK} OR has_next
        ORDER BY about DESC, paths DESC, place, node, next
        LIMIT {limit + 1} BY about
    """
    columns = ("about", "place", "node", "next", "paths", "actors", "exits", "seconds")
    return compiled(sql, events, columns, 2 * limit + 3)


def read_paths(query: PathsQuery, found: Result) -> PathsResult:
    """The answer, of the rows of `compile_paths`."""
    result = PathsResult(watermark=found.watermark, cached=found.cached)
    limit = query.limit or DEFAULT_LIMIT
    for about, step, node, target, paths, actors, exits, seconds in map(cells_of, found.rows):
        if about == _ALL:
            result.path_count, result.actor_count = int(paths), int(actors)
        elif about == _NODE:
            result.nodes.add(step=int(step), node=node, count=int(paths), exit_count=int(exits))
        else:
            result.links.add(
                step=int(step),
                source=node,
                target=target,
                count=int(paths),
                actor_count=int(actors),
                average_seconds=seconds,
            )
    result.truncated = len(result.nodes) > limit or len(result.links) > limit
    del result.nodes[limit:], result.links[limit:]
    return result
