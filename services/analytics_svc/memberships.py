"""Who is in a cohort: its definition becomes SQL over the sources of the query that uses it."""
# ruff: noqa: S608 - this is where SQL is put together, of expressions written here

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import partial
from uuid import UUID

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from meshboard.analytics.v1.cohort_pb2 import CohortCondition, CohortDefinition
from meshboard.analytics.v1.query_pb2 import Filter
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.analytics_svc.actors import actor_of, matching
from services.analytics_svc.compiler import Compiled, compiled
from services.analytics_svc.models import Cohort
from services.analytics_svc.selection import Selection, invalid, resolve_range
from services.chassis import auth, errors

Memberships = Mapping[str, Callable[[Selection], str]]

MAX_DEFINITION_BYTES = 64 << 10  # it travels in domain events, and in every query that uses it
SAMPLE_SIZE = 20


def named_in(question: Message) -> set[str]:
    """The ids of the cohorts that the filters anywhere in a message name."""
    if isinstance(question, Filter):
        return {str(UUID(question.cohort_id))} if question.cohort_id else set()
    found: set[str] = set()
    for field, value in question.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for each in value if field.is_repeated else [value]:
                found |= named_in(each)
    return found


def check_visible(question: Message) -> None:
    """Raises NOT_FOUND (COHORT_NOT_FOUND) when a filter names a cohort and the caller may see none."""
    if not auth.caller().may("cohorts.view"):
        for cohort_id in named_in(question):
            raise absent(cohort_id)


def absent(cohort_id: str) -> errors.Error:
    """What is said of a cohort that is not there, or that the caller may not see."""
    return errors.not_found("COHORT_NOT_FOUND", "There is no such cohort.", cohort_id=cohort_id)


async def memberships(
    db: async_sessionmaker[AsyncSession], workspace_id: str, cohort_ids: Iterable[str], now: datetime
) -> Memberships:
    """What `Selection` needs to know of the cohorts. Raises NOT_FOUND (COHORT_NOT_FOUND)."""
    wanted = sorted(cohort_ids)
    if not wanted:
        return {}
    async with db() as session:
        rows = await session.execute(
            select(Cohort.cohort_id, Cohort.definition).where(
                Cohort.workspace_id == workspace_id, Cohort.cohort_id.in_(wanted)
            )
        )
    found = {
        row.cohort_id: partial(_is_member, CohortDefinition.FromString(row.definition), now) for row in rows
    }
    for cohort_id in wanted:
        if cohort_id not in found:
            raise absent(cohort_id)
    return found


def _is_member(definition: CohortDefinition, now: datetime, events: Selection) -> str:
    members = Selection(events.workspace_id, events.source_ids, None, None, params=events.params)
    sql = _Definition(definition, members, now, "definition").members()
    events.cohorts_look_beyond |= members.looks_beyond_sources
    return f"({actor_of(events, definition.actor, 'definition.actor')} IN ({sql}))"


def check_definition(definition: CohortDefinition, now: datetime, path: str = "definition") -> None:
    """Raises INVALID_ARGUMENT (QUERY_INVALID, PROPERTY_UNKNOWN), naming the field, when it cannot be computed."""
    if definition.ByteSize() > MAX_DEFINITION_BYTES:
        invalid(path, f"The definition is larger than {MAX_DEFINITION_BYTES >> 10} KiB.")
    nowhere = "00000000-0000-0000-0000-000000000000"
    _Definition(definition, Selection(nowhere, [nowhere], None, None), now, path).members()


def compile_preview(
    definition: CohortDefinition, workspace_id: str, source_ids: Iterable[str], now: datetime
) -> Compiled:
    """One row: how many members there are, how many actors, and the members with the newest events, as
    [-last, actor, first, count] with times in milliseconds. Raises as `check_definition` does."""
    check_definition(definition, now)
    events = Selection(workspace_id, list(source_ids), None, None)
    sql = _Definition(definition, events, now, "definition").preview()
    return compiled(sql, events, ("member_count", "actor_count", "members"), 1)


class _Definition:
    def __init__(self, definition: CohortDefinition, events: Selection, now: datetime, path: str) -> None:
        self._events = events
        self._now = now
        self._actor = actor_of(events, definition.actor, f"{path}.actor")
        # Events that no condition can do without; None: each of an actor's events may count, by its mere being there.
        self._needed: list[str] | None = []
        met = [
            self._condition(condition, f"{path}.conditions[{index}]")
            for index, condition in enumerate(definition.conditions)
        ]
        self._met = f"({(' OR ' if definition.match == CohortDefinition.ANY else ' AND ').join(met)})"
        if events.uses_visits:
            invalid(path, "Who is in a cohort does not depend on visits.")

    def members(self) -> str:
        """A SELECT of the actors in it."""
        where = f"WHERE {' OR '.join(self._needed)}" if self._needed else ""
        return f"SELECT {self._actor} FROM {self._events.rows()} {where} GROUP BY {self._actor} HAVING {self._met}"

    def preview(self) -> str:
        """A SELECT of one row about them."""
        first, last = "toUnixTimestamp64Milli(min(time))", "toUnixTimestamp64Milli(max(time))"
        return f"""
            SELECT countIf(is_member), count(), groupArraySortedIf({SAMPLE_SIZE})(about, is_member)
            FROM (
                SELECT {self._met} AS is_member, (-{last}, {self._actor}, {first}, count()) AS about
                FROM {self._events.rows()} GROUP BY {self._actor}
            )
        """

    def _condition(self, condition: CohortCondition, path: str) -> str:
        if condition.HasField("trait"):
            sql = self._trait(condition.trait, f"{path}.trait")
        else:
            sql = self._behaviour(condition.behaviour, f"{path}.behaviour")
        if condition.negate:
            self._needed = None
            return f"NOT {sql}"
        return sql

    def _behaviour(self, behaviour: CohortCondition.Behaviour, path: str) -> str:
        events = self._events
        done = [matching(events, behaviour, path)]
        start, end = resolve_range(behaviour.time_range, self._now)
        if start is not None:
            done.append(f"time >= {events.instant(start)}")
        if end is not None:
            done.append(f"time < {events.instant(end)}")
        condition = f"({' AND '.join(done)})"
        if self._needed is not None:
            self._needed.append(condition)
        least = events.bind(behaviour.min_count or 1, "UInt32")
        sql = f"countIf({condition}) >= {least}"
        if behaviour.max_count:
            sql += f" AND countIf({condition}) <= {events.bind(behaviour.max_count, 'UInt32')}"
        return f"({sql})"

    def _trait(self, trait: CohortCondition.Trait, path: str) -> str:
        if trait.filter.cohort_id:
            invalid(f"{path}.filter.cohort_id", "A cohort is not described by another.")
        self._needed = None
        return f"({self._events.latest(trait.filter, f'{path}.filter')})"
