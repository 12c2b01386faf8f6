"""Ranges of time: which of the store's events are read for them."""

import re
import struct
from importlib import resources
from uuid import UUID

from services.analytics_svc.event_store import EventStore
from services.analytics_svc.selection import ODD_ZONES, Selection
from tests.harness import new_id

DAY_MS = 86_400_000


async def test_a_short_range_reads_what_it_has(store: EventStore) -> None:
    # Behind all others in the order of the table, so that none of theirs is read with it.
    workspace_id, source_id = str(UUID(int=2**128 - 1)), new_id()
    await store.execute(
        "INSERT INTO events (workspace_id, source_id, event, time, receive_time)"
        " SELECT {w:UUID}, {s:UUID}, ['view', 'buy', 'click'][number % 3 + 1],"
        " fromUnixTimestamp64Milli(number * 86400, 'UTC'), '2026-11-10' FROM numbers(100000)",
        {"w": workspace_id, "s": source_id},
    )
    for start, end in ((40 * DAY_MS + 1, 40 * DAY_MS + 3_600_000), (99 * DAY_MS, None), (None, DAY_MS)):
        events = Selection(workspace_id, [source_id], start, end)
        sql = f"SELECT countIf(event != '') FROM {events.rows()}"
        # What the engine remembers of conditions would hide what it has to read.
        found = await store.query(sql, events.params, settings={"use_query_condition_cache": 0})
        expected = len(range(start or 0, end or 100 * DAY_MS, 86_400))
        assert abs(found.rows[0][0] - expected) <= 1
        assert found.rows_read < 35_000


def test_knows_where_clocks_do_not_stand_at_quarters_of_an_hour() -> None:
    zones = resources.files("tzdata").joinpath("zones").read_text().split()
    assert {zone for zone in zones if _is_odd(zone)} == ODD_ZONES


def _is_odd(zone: str) -> bool:
    """By the zone's file (RFC 9636): its instants and offsets since 1970, and the rule for what comes after."""
    *folders, name = zone.split("/")
    data = resources.files(".".join(["tzdata.zoneinfo", *folders])).joinpath(name).read_bytes()
    one = _header(data, 0)
    second = 44 + _length(one, 4)
    counts = _header(data, second)
    _, _, _, time_count, type_count, _ = counts
    place = second + 44
    times = struct.unpack_from(f">{time_count}q", data, place)
    kinds = struct.unpack_from(f">{time_count}B", data, place + 8 * time_count)
    offsets = [
        struct.unpack_from(">l", data, place + 9 * time_count + 6 * number)[0] for number in range(type_count)
    ]
    rule = data[second + 44 + _length(counts, 8) :].decode().strip()
    later = [(time, kind) for time, kind in zip(times, kinds, strict=True) if time > 0]
    before = [kind for time, kind in zip(times, kinds, strict=True) if time <= 0] or [0]
    odd_offset = any(offsets[kind] % 900 for kind in [before[-1], *(kind for _, kind in later)])
    odd_rule = any(int(minutes) % 15 for minutes in re.findall(r":(\d\d)", rule))
    return odd_offset or odd_rule or any(time % 900 for time, _ in later)


def _header(data: bytes, place: int) -> tuple[int, ...]:
    assert data[place : place + 4] == b"TZif"
    return struct.unpack_from(">6l", data, place + 20)


def _length(counts: tuple[int, ...], time_bytes: int) -> int:
    ut_count, standard_count, leap_count, time_count, type_count, name_bytes = counts
    return (
        time_count * (time_bytes + 1)
        + type_count * 6
        + name_bytes
        + leap_count * (time_bytes + 4)
        + standard_count
        + ut_count
    )
