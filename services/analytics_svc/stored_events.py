"""Single events as they stand in the store: the SQL that finds them, and their way from rows to messages."""
# ruff: noqa: S608 - SQL is put together of expressions written here and in `selection`, and of placeholders

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from google.protobuf.json_format import ParseDict
from meshboard.analytics.v1.event_service_pb2 import StoredEvent
from meshboard.analytics.v1.query_pb2 import Filter

from services.analytics_svc.channels import COLUMNS
from services.analytics_svc.selection import BUILT_INS, Selection

# A message may have 4 MiB; an event, as it is measured here, becomes larger on its way.
MAX_BYTES = 2 << 20

# What is no column of the table, or has a field of its own.
_ELSEWHERE = {"event", "distinct_id", "visit_id", "person_id", *COLUMNS}
_OTHERS = tuple(name for name in BUILT_INS if name not in _ELSEWHERE)
_COLUMNS = (
    "toString(source_id)",
    "event",
    "distinct_id",
    "insert_id",
    "toUnixTimestamp64Milli(time)",
    "toUnixTimestamp64Milli(receive_time)",
    "strings",
    "numbers",
    "previous_id",
    "sequence",
    "position",
    *(BUILT_INS[name] for name in _OTHERS),
)
_SIZE = "byteSize(distinct_id, insert_id, previous_id, url, referrer, user_agent, strings, numbers) + 500"


class Wanted(Protocol):
    """The part of a request that says which events."""

    @property
    def events(self) -> Sequence[str]: ...
    @property
    def distinct_id(self) -> str: ...
    @property
    def filters(self) -> Iterable[Filter]: ...


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the store."""

    cells: list[Any]

    @property
    def place(self) -> list[Any]:
        """What ORDER sorts by: time in milliseconds, sequence, position, source, insert id."""
        source_id, _, _, insert_id, time, *_ = self.cells
        return [time, self.cells[9], self.cells[10], source_id, insert_id]

    @property
    def found(self) -> int:
        """How many events were found, of which this is one."""
        return int(self.cells[-1])

    def message(self) -> StoredEvent:
        """The event of the contract."""
        source_id, event, distinct_id, insert_id, time, receive_time, strings, numbers, previous_id = (
            self.cells[:9]
        )
        message = StoredEvent(
            source_id=source_id,
            event=event,
            distinct_id=distinct_id,
            insert_id=insert_id,
            previous_id=previous_id,
            built_ins={name: v for name, v in zip(_OTHERS, self.cells[11:-1], strict=True) if v},
        )
        message.time.FromMilliseconds(time)
        message.receive_time.FromMilliseconds(receive_time)
        ParseDict({**strings, **numbers}, message.properties)
        return message


def conditions_of(events: Selection, wanted: Wanted) -> list[str]:
    """SQL conditions. Raises INVALID_ARGUMENT naming the field."""
    conditions = events.filters(wanted.filters, "filters")
    if wanted.events:
        conditions.append(f"event IN {events.bind(list(wanted.events), 'Array(String)')}")
    if wanted.distinct_id:
        conditions.append(f"distinct_id = {events.bind(wanted.distinct_id, 'String')}")
    return conditions


def select(events: Selection, conditions: Sequence[str], order: str, limit: int, *, count_all: bool) -> str:
    """SQL of at most `limit` events and MAX_BYTES, at least one if there is any.

    `found` of each is how many events there are: all of them, or without `count_all` at most one more than the limit.
    """
    where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
    found = f"(SELECT count() FROM {events.rows()} {where})" if count_all else "count() OVER ()"
    return f"""
        SELECT {", ".join(_COLUMNS)}, found_
        FROM (
            SELECT *, {found} AS found_,
                sum(size_) OVER (ORDER BY {order} ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW) AS total_
            FROM (
                SELECT *, {_SIZE} AS size_ FROM {events.rows()} {where} ORDER BY {order} LIMIT {limit + 1}
            )
        )
        WHERE total_ - size_ < {MAX_BYTES}
        ORDER BY {order} LIMIT {limit}
    """
