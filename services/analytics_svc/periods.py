"""Periods of the calendar: days, weeks from Monday and months of a time zone, numbered one after the other."""

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

from meshboard.analytics.v1.insight_service_pb2 import DAY, MONTH, WEEK, Period
from meshboard.analytics.v1.query_pb2 import TimeRange

from services.analytics_svc.selection import Selection, invalid, resolve_range

MAX_PERIODS = 400

_EPOCH = date(1970, 1, 1)  # a Thursday: three days later than its Monday
_LOCAL_DAY = "toInt32(toDate32(time, {zone:String}))"

# The number of the period that `time` is in; `zone` is bound by `Selection.bind_zone`.
NUMBERS = {
    DAY: _LOCAL_DAY,
    WEEK: f"intDiv({_LOCAL_DAY} + 3, 7)",
    MONTH: "toInt32(toYear(toTimeZone(time, {zone:String})) * 12 + toMonth(toTimeZone(time, {zone:String})) - 1)",
}


@dataclass(frozen=True, slots=True)
class Periods:
    """The periods that a range touches, `first` to `last`; `end` is that of the range in milliseconds since 1970."""

    kind: Period.ValueType
    zone: ZoneInfo
    first: int
    last: int
    end: int

    def __len__(self) -> int:
        return self.last - self.first + 1

    @property
    def number(self) -> str:
        """SQL of the number of the period that an event is in."""
        return NUMBERS[self.kind]

    def start(self, number: int) -> datetime:
        """The first instant of a period."""
        if self.kind == MONTH:
            day = date(number // 12, number % 12 + 1, 1)
        else:
            day = _EPOCH + timedelta(days=number if self.kind == DAY else number * 7 - 3)
        # Where clocks jump over midnight, this is the instant of the jump.
        return datetime(day.year, day.month, day.day, tzinfo=self.zone).astimezone(UTC)

    def start_milliseconds(self, number: int) -> int:
        """The first instant of a period, in milliseconds since 1970."""
        return int(self.start(number).timestamp()) * 1000

    def number_at(self, time: datetime) -> int:
        """The number of the period that an instant is in."""
        return _number(self.kind, time.astimezone(self.zone).date())


def touched(time_range: TimeRange, kind: Period.ValueType, time_zone: str, now: datetime) -> Periods:
    """The periods that a range touches; the zone is a known one. Raises INVALID_ARGUMENT (QUERY_INVALID)."""
    start, end = resolve_range(time_range, now)
    if start is None:
        invalid("query.time_range", "The range needs a start.")
    if end is None:
        end = until_now(now)
    kind, zone = kind or DAY, ZoneInfo(time_zone or "UTC")
    first = _number(kind, _local_day(start, zone))
    last = _number(kind, _local_day(max(end - 1, start), zone))
    if last - first >= MAX_PERIODS:
        invalid("query.time_range", f"The range has more than {MAX_PERIODS} periods.")
    return Periods(kind, zone, first, last, end)


def until_now(now: datetime) -> int:
    """The end of a range that has none, in milliseconds since 1970: now, to the minute that answers are shared for."""
    end = resolve_range(TimeRange(last_seconds=60 * 3600), now)[1]
    assert end is not None, "it is one that slides"
    return end


def periods_of(
    events: Selection, time_range: TimeRange, kind: Period.ValueType, time_zone: str, now: datetime
) -> Periods:
    """The same, with the zone bound. Raises INVALID_ARGUMENT (TIME_ZONE_UNKNOWN), too."""
    events.bind_zone(time_zone)
    return touched(time_range, kind, time_zone, now)


def _local_day(milliseconds: int, zone: ZoneInfo) -> date:
    # Events are between 1970 and 2100.
    seconds = min(max(milliseconds, 0), 4_102_444_800_000) // 1000
    return datetime.fromtimestamp(seconds, zone).date()


def _number(kind: Period.ValueType, day: date) -> int:
    if kind == MONTH:
        return day.year * 12 + day.month - 1
    days = (day - _EPOCH).days
    return days if kind == DAY else (days + 3) // 7
