"""Instants: timestamps of the contracts and datetimes of the tables, both in UTC."""

from __future__ import annotations

from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from services.chassis import errors


def now() -> datetime:
    """The present instant."""
    return datetime.now(UTC)


def timestamp_of(time: datetime) -> Timestamp:
    """The instant as a message."""
    timestamp = Timestamp()
    timestamp.FromDatetime(time)
    return timestamp


def time_of(timestamp: Timestamp, field: str) -> datetime:
    """The instant of a message, between the years 1 and 9999; raises INVALID_ARGUMENT naming the field."""
    try:
        return timestamp.ToDatetime(UTC)
    except (ValueError, OverflowError) as error:
        raise errors.invalid_fields([(field, "is not between the years 1 and 9999")]) from error
