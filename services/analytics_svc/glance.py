"""Looks at all events of a batch at once, by what they are serialized to: whether each of them surely is a good one.

To look at events one by one costs more than all else that is done with them, most of it for the Python objects that
stand for their fields and properties. Here the events are read as columns (event_columns.proto), and a bound is checked
by the longest value of a column.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import re2
from google.protobuf.struct_pb2 import Struct
from google.protobuf.unknown_fields import UnknownFieldSet
from meshboard.analytics.v1.event_columns_pb2 import BatchColumns, EventColumns, TimeColumns, WrittenEvents

DAY_SECONDS = 86_400
MAX_PROPERTIES = 200
MAX_PROPERTIES_BYTES = 65_536

# The bounds of refusal_of, which are of characters, kept in bytes.
_BYTES = {
    "event": 200,
    "distinct_id": 200,
    "insert_id": 200,
    "previous_id": 200,
    "ip": 45,
}
_LONG_BYTES = {"url": 4096, "referrer": 4096, "user_agent": 2048}

# A property, written: the key of the map's entry, its length, 1, the length of the name, the name, 2, the length of the
# value, the value. So many bytes at least, when it has a name.
_PROPERTY_BYTES = 7
# What is no longer than this is within the bounds of its properties and of its long texts.
_SHORT_BYTES = min(_PROPERTY_BYTES * MAX_PROPERTIES, MAX_PROPERTIES_BYTES, *_LONG_BYTES.values())
_LENGTH = rb"(?:[\x80-\xff]{0,3}[\x00-\x7f])"
# What is to be looked at more closely; it may stand in a good text as well. A name without characters, or of more than
# 127 bytes; a list or an object; a number whose exponent has all bits, which is infinite or none.
_DOUBTFUL = (
    rb"\x0a" + _LENGTH + rb"\x0a[\x00\x80-\xff]",
    rb"\x12" + _LENGTH + rb"[\x2a\x32]",
    rb"\x12\x09\x11[\x00-\xff]{6}[\xf0-\xff][\x7f\xff]",
)


def _options() -> re2.Options:
    options = re2.Options()
    options.encoding = re2.Options.Encoding.LATIN1  # for bytes
    return options


_doubtful = re2.compile(b"|".join(_DOUBTFUL), _options())


class Glance(NamedTuple):
    """The events of a batch, serialized, and their fields as columns.

    A column that has as many values as there are events has one of each, in their order: see `glance`.
    """

    events: Sequence[bytes]
    columns: EventColumns

    def is_good(self, now_seconds: int) -> bool:
        """Whether surely no event is to be refused, or to be changed. False says: look at them one by one."""
        columns, count = self.columns, len(self.events)
        is_short = _longest(self.events) <= _SHORT_BYTES
        return (
            len(columns.event) == count
            and len(columns.distinct_id) == count
            and all(_longest(getattr(columns, name)) <= most for name, most in _BYTES.items())
            and (
                is_short
                or all(_longest(getattr(columns, name)) <= most for name, most in _LONG_BYTES.items())
            )
            and _are_plausible(columns.time, now_seconds)
            and _are_plain(columns.properties, are_short=is_short)
            and not len(UnknownFieldSet(columns))
        )


def glance(batch: bytes) -> Glance:
    """Reads the events of a batch as columns.

    `batch` must have been serialized by protobuf: then each event has a field at most once, the fields are in the order
    of their numbers, and texts are UTF-8.
    """
    return Glance(WrittenEvents.FromString(batch).events, BatchColumns.FromString(batch).events)


def _longest(texts: Collection[bytes]) -> int:
    return max(map(len, texts), default=0)


def _are_plausible(times: Collection[bytes], now_seconds: int) -> bool:
    columns = TimeColumns.FromString(b"".join(times))
    return (
        min(columns.seconds, default=0) >= 0
        and max(columns.seconds, default=0) <= now_seconds + DAY_SECONDS
        and min(columns.nanos, default=0) >= 0
        and max(columns.nanos, default=0) < 1_000_000_000
    )


def _are_plain(properties: Collection[bytes], *, are_short: bool) -> bool:
    if not are_short:
        for one in properties:
            if len(one) >= _PROPERTY_BYTES * MAX_PROPERTIES and (
                len(one) > MAX_PROPERTIES_BYTES or len(Struct.FromString(one).fields) > MAX_PROPERTIES
            ):
                return False
    return _doubtful.search(b"".join(properties)) is None
