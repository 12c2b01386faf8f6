"""Drops events that were there before: same source and `insert_id` within 7 days of receipt.

A filter in memory says "surely new" of nearly all; the rest is looked up in the store. The filter is built from the
store at the start, so that nothing that counts is kept in this process or in Redis.

It is a Bloom filter (Bloom 1970) in a blocked form (Putze, Sanders and Singler 2007): the bits of a key are in two
64-bit words, one of each half, so that a look-up is two reads. With 32 bits of space a key, one in 70,000 is looked up
in vain when the filter is full, and one in a million when it is half full. A look-up costs the store tens of
milliseconds, so that an insert of 20,000 events should seldom need one.
"""

import asyncio
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import structlog
from meshboard.analytics.v1.event_columns_pb2 import WrittenBatch
from meshboard.analytics.v1.event_log_pb2 import LoggedEvent

from services.analytics_svc.event_store import EventStore, pieces

log = structlog.get_logger(__name__)

WINDOW = timedelta(days=7)
CAPACITY = 1 << 20
_BITS_PER_KEY = 32
_BITS_SET = 5  # by a key in each half, six bits of which each stand for one of a word's
# Odd numbers that spread the bits of a key, one for each half (Knuth: multiplicative hashing).
_SPREAD = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)
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
        masks = [_masks(keys, half) for half in (0, 1)]
        places = [(keys * np.uint64(spread)) >> 32 for spread in _SPREAD]
        seen = np.ones(len(keys), np.bool_)
        seen[np.unique(keys, return_index=True)[1]] = False  # the first of equal ones
        for part in self._parts:
            found = np.ones(len(keys), np.bool_)
            for words, mask, place in zip(part, masks, places, strict=True):
                found &= words[place * np.uint64(len(words)) >> 32] & mask == mask
            seen |= found
        new = np.flatnonzero(~seen)
        while len(new):
            if not self._room:
                self._grow(2 * self._capacity)
            some, new = new[: self._room], new[self._room :]
            for words, mask, place in zip(self._parts[-1], masks, places, strict=True):
                np.bitwise_or.at(words, place[some] * np.uint64(len(words)) >> 32, mask[some])
            self._room -= len(some)
        return seen

    def forget(self, seconds: float) -> None:
        """Frees what holds only keys that were added longer ago."""
        while len(self._begun) > 1 and self._begun[1] < time.monotonic() - seconds:
            del self._parts[0], self._begun[0]

    def _grow(self, capacity: int) -> None:
        self._capacity = self._room = capacity
        self._parts.append(np.zeros((2, capacity * _BITS_PER_KEY // 128), np.uint64))
        self._begun.append(time.monotonic())


def _masks(keys: Keys, half: int) -> Keys:
    """The bits of each key in its word of a half."""
    masks = np.zeros(len(keys), np.uint64)
    for number in range(half * _BITS_SET, (half + 1) * _BITS_SET):
        masks |= np.uint64(1) << (keys >> (6 * number) & 63)
    return masks


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

    def suspects(self, batch: WrittenBatch) -> list[int]:
        """The places of events that may have been there before; the others are surely new. Call it once for a batch."""
        suspects: list[int] = np.flatnonzero(self._seen.add(_keys(batch))).tolist()
        return suspects

    async def drop(self, batches: Sequence[WrittenBatch], suspected: Sequence[Sequence[int]]) -> int:
        """Removes the events that were there before, in the store or in these batches; says how many.

        `suspected` has the suspects of each batch; all that was before them is in the store. Raises UnavailableError or
        EventStoreError, having removed nothing: call it again.
        """
        self._seen.forget(WINDOW.total_seconds())
        suspects = [_Place(number, index) for number, places in enumerate(suspected) for index in places]
        if not suspects:
            return 0
        keys = [_keys(batch) for batch in batches]
        wanted_keys = np.unique([keys[place.batch][place.event] for place in suspects])
        # What has the key of a suspect is it, or another one of the same id, or hardly ever neither.
        looked_at = [
            _Place(number, index)
            for number in range(len(batches))
            for index in np.flatnonzero(np.isin(keys[number], wanted_keys)).tolist()
        ]
        identities = {place: _identity(batches, place) for place in looked_at}
        concerned = [batch for batch, places in zip(batches, suspected, strict=True) if places]
        stored = await self._stored(concerned, {identities[place] for place in suspects})
        # The first of several equal ones in these batches stays, unless it is in the store.
        first: dict[tuple[str, str], _Place] = {}
        for place, identity in identities.items():
            first.setdefault(identity, place)
        dropped = 0
        received = [batch.receive_time.ToDatetime() for batch in batches]
        gone: dict[int, list[int]] = {}
        for place in suspects:
            identity = identities[place]
            known = identity in stored and received[place.batch] - stored[identity] < WINDOW
            if known or first[identity] != place:
                gone.setdefault(place.batch, []).append(place.event)
                dropped += 1
        for number, places in gone.items():
            _remove(batches[number], places)
        return dropped

    async def _stored(
        self, batches: Sequence[WrittenBatch], wanted: set[tuple[str, str]]
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


def _keys(batch: WrittenBatch) -> Keys:
    return np.frombuffer(b"".join(batch.keys), "<u8").astype(np.uint64, copy=False)


def _identity(batches: Sequence[WrittenBatch], place: _Place) -> tuple[str, str]:
    batch = batches[place.batch]
    return batch.source_id, LoggedEvent.FromString(batch.events[place.event]).insert_id


def _remove(batch: WrittenBatch, places: Sequence[int]) -> None:
    keys = np.delete(_keys(batch), places)
    gone = set(places)
    batch.events[:] = [event for index, event in enumerate(batch.events) if index not in gone]
    batch.keys[:] = [keys.astype("<u8", copy=False).tobytes()]
