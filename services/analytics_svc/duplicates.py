"""Drops events that were there before: same source and `insert_id` within 7 days of receipt.

A filter in memory says "surely new" of nearly all; the rest is looked up in the store. The filter is built from the
store at the start, so that nothing that counts is kept in this process or in Redis.

It is a Bloom filter (Bloom 1970) in its blocked form (Putze, Sanders and Singler 2007): all bits of a key are in one
64-bit word, so that a look-up is one read. With 24 bits of space a key, one in 1,000 is looked up in vain.
"""

import asyncio
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import structlog
import xxhash
from meshboard.analytics.v1.event_log_pb2 import LoggedBatch

from services.analytics_svc.event_store import EventStore, pieces

log = structlog.get_logger(__name__)

WINDOW = timedelta(days=7)
CAPACITY = 1 << 20
_BITS_PER_KEY = 24
_BITS_SET = 5  # by a key, six bits of which each stand for one of a word's
_PLACE_SHIFT = 6 * _BITS_SET
_AT_ONCE = 50_000

Keys = npt.NDArray[np.uint64]


class SeenKeys:
    """Keys that have been added, and a few that have not. Grows by doubling; a key is a 64-bit hash."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._parts: list[Keys] = []
        self._begun: list[float] = []
        self._grow(capacity)

    def add(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Adds keys; says of each whether it may have been there, be it among these. False is certain."""
        masks = np.zeros(len(keys), np.uint64)
        for number in range(_BITS_SET):
            masks |= np.uint64(1) << (keys >> (6 * number) & 63)
        places = keys >> _PLACE_SHIFT
        seen = np.ones(len(keys), np.bool_)
        seen[np.unique(keys, return_index=True)[1]] = False  # the first of equal ones
        for words in self._parts:
            seen |= words[places % len(words)] & masks == masks
        new = np.flatnonzero(~seen)
        while len(new):
            if not self._room:
                self._grow(2 * self._capacity)
            some, new = new[: self._room], new[self._room :]
            words = self._parts[-1]
            np.bitwise_or.at(words, places[some] % len(words), masks[some])
            self._room -= len(some)
        return seen

    def forget(self, seconds: float) -> None:
        """Frees what holds only keys that were added longer ago."""
        while len(self._begun) > 1 and self._begun[1] < time.monotonic() - seconds:
            del self._parts[0], self._begun[0]

    def _grow(self, capacity: int) -> None:
        self._capacity = self._room = capacity
        self._parts.append(np.zeros(capacity * _BITS_PER_KEY // 64, np.uint64))
        self._begun.append(time.monotonic())


def key_of(source_id: str, insert_id: str) -> int:
    """The same as xxh3(concat(source_id, insert_id)) in the store.

    Who makes keys collide has theirs looked up, which costs what a repeated event costs; they count all the same.
    """
    return xxhash.xxh3_64_intdigest((source_id + insert_id).encode())


class _Place(NamedTuple):
    """Where an event is: the number of its batch, and its number there."""

    batch: int
    event: int


class Duplicates:
    """Knows the events of the last 7 days."""

    def __init__(self, store: EventStore) -> None:
        self._store = store
        self._seen = SeenKeys()

    async def remember(self, now: datetime) -> None:
        """Fills the filter from the store. Raises UnavailableError or EventStoreError."""
        start, count = time.monotonic(), 0
        # A day at a time, to bound the memory; the last bound is open, for what came meanwhile.
        bounds = [now - timedelta(days=days) for days in range(WINDOW.days + 1, -1, -1)]
        for begin, end in zip(bounds, [*bounds[1:-1], now + WINDOW], strict=False):
            stored = await self._store.scan(
                "SELECT xxh3(concat(toString(source_id), insert_id)) FROM events"
                " WHERE receive_time >= fromUnixTimestamp64Milli({begin:Int64}, 'UTC')"
                " AND receive_time < fromUnixTimestamp64Milli({end:Int64}, 'UTC') FORMAT RowBinary",
                {"begin": int(begin.timestamp() * 1000), "end": int(end.timestamp() * 1000)},
            )
            keys = np.frombuffer(stored, np.uint64)
            count += len(keys)
            for some in range(0, len(keys), _AT_ONCE):
                self._seen.add(keys[some : some + _AT_ONCE])
                await asyncio.sleep(0)  # lets others run, such as the private HTTP port
        log.info("duplicates_remembered", events=count, seconds=round(time.monotonic() - start, 2))

    def suspects(self, batch: LoggedBatch) -> list[int]:
        """The places of events that may have been there before; the others are surely new. Call it once for a batch."""
        source_id = batch.source_id
        keys = np.array([key_of(source_id, event.insert_id) for event in batch.events], np.uint64)
        suspects: list[int] = np.flatnonzero(self._seen.add(keys)).tolist()
        return suspects

    async def drop(self, batches: Sequence[LoggedBatch], suspected: Sequence[Sequence[int]]) -> int:
        """Removes the events that were there before, in the store or in these batches; says how many.

        `suspected` has the suspects of each batch; all that was before them is in the store. Raises UnavailableError or
        EventStoreError, having removed nothing: call it again.
        """
        self._seen.forget(WINDOW.total_seconds())
        suspects = [_Place(number, index) for number, places in enumerate(suspected) for index in places]
        if not suspects:
            return 0
        wanted = {_identity(batches, place) for place in suspects}
        concerned = [batch for batch, places in zip(batches, suspected, strict=True) if places]
        stored = await self._stored(concerned, wanted)
        # The first of several equal ones in these batches stays, unless it is in the store.
        first: dict[tuple[str, str], _Place] = {}
        for number, batch in enumerate(batches):
            for index, event in enumerate(batch.events):
                identity = (batch.source_id, event.insert_id)
                if identity in wanted:
                    first.setdefault(identity, _Place(number, index))
        dropped = 0
        received = [batch.receive_time.ToDatetime() for batch in batches]
        for place in reversed(suspects):
            identity = _identity(batches, place)
            known = identity in stored and received[place.batch] - stored[identity] < WINDOW
            if known or first[identity] != place:
                del batches[place.batch].events[place.event]
                dropped += 1
        return dropped

    async def _stored(
        self, batches: Sequence[LoggedBatch], wanted: set[tuple[str, str]]
    ) -> dict[tuple[str, str], datetime]:
        """When those of the wanted that are in the store were received last, in UTC without a zone."""
        since = min(batch.receive_time.ToDatetime() for batch in batches) - WINDOW
        found: dict[tuple[str, str], datetime] = {}
        insert_ids = sorted({insert_id for _, insert_id in wanted})
        for some in pieces(insert_ids):
            rows = await self._store.query(
                "SELECT toString(source_id), insert_id, max(receive_time) FROM events"
                " WHERE workspace_id IN {workspaces:Array(UUID)} AND source_id IN {sources:Array(UUID)}"
                " AND insert_id IN {insert_ids:Array(String)} AND receive_time >= {since:DateTime64(3, 'UTC')}"
                " GROUP BY source_id, insert_id",
                {
                    "workspaces": sorted({batch.workspace_id for batch in batches}),
                    "sources": sorted({batch.source_id for batch in batches}),
                    "insert_ids": some,
                    "since": since.isoformat(" ", "milliseconds"),
                },
            )
            for source_id, insert_id, received in rows.rows:
                found[source_id, insert_id] = datetime.fromisoformat(received)
        return found


def _identity(batches: Sequence[LoggedBatch], place: _Place) -> tuple[str, str]:
    batch = batches[place.batch]
    return batch.source_id, batch.events[place.event].insert_id
