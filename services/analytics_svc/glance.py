"""Looks at all events of a batch at once, by what they are serialized to: whether each of them surely is a good one.

To look at events one by one costs more than all else that is done with them, most of it for the Python objects that
stand for their fields and properties. Here the events are read as columns (event_columns.proto), and a bound is checked
by the longest value of a column.
"""

from collections.abc import Collection
from typing import NamedTuple

import re2
from google.protobuf.struct_pb2 import Struct
from meshboard.analytics.v1.event_columns_pb2 import EventColumns, TimeColumns, WrittenBatch

DAY_SECONDS = 86_400
MAX_PROPERTIES = 200
MAX_PROPERTIES_BYTES = 65_536

# The bounds of refusal_of, which are of characters, kept in bytes.
_BYTES = {
    "event": 200,
    "distinct_id": 200,
    "insert_id": 200,
    "url": 4096,
    "referrer": 4096,
    "user_agent": 2048,
    "previous_id": 200,
    "ip": 45,
}

# A property, written: the key of the map's entry, its length, 1, the length of the name, the name, 2, the length of the
# value, the value. So many bytes at least, when it has a name.
_PROPERTY_BYTES = 7
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


class Seen(NamedTuple):
    """What was seen of a batch. False says that it has to be looked at event by event."""

    is_good: bool = False  # no event is to be refused, or to be changed
    is_whole: bool = False  # each event has a time and an `insert_id`, and none an address


def glance(batch: bytes, count: int, now_seconds: int) -> Seen:
    """Looks at the `count` events of a batch.

    `batch` must have been serialized by protobuf, without fields that the contract does not know: then each event has a
    field at most once, and texts are UTF-8.
    """
    columns = EventColumns.FromString(b"".join(WrittenBatch.FromString(batch).events))
    is_good = (
        len(columns.event) == count
        and len(columns.distinct_id) == count
        and all(_longest(getattr(columns, name)) <= most for name, most in _BYTES.items())
        and _are_plausible(columns.time, now_seconds)
        and _are_plain(columns.properties)
    )
    is_whole = len(columns.insert_id) == count and len(columns.time) == count and not columns.ip
    return Seen(is_good, is_good and is_whole)


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


def _are_plain(properties: Collection[bytes]) -> bool:
    for one in properties:
        if len(one) >= _PROPERTY_BYTES * MAX_PROPERTIES and (
            len(one) > MAX_PROPERTIES_BYTES or len(Struct.FromString(one).fields) > MAX_PROPERTIES
        ):
            return False
    return _doubtful.search(b"".join(properties)) is None
