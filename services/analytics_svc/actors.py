"""Whose events they are, which are meant, and their order: what all questions about one after the other share."""

from typing import Protocol

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer
from meshboard.analytics.v1.cohort_pb2 import DISTINCT_ID, PERSON_ID, VISIT_ID, Actor
from meshboard.analytics.v1.query_pb2 import Filter

from services.analytics_svc.selection import Selection

_PROPERTIES = {DISTINCT_ID: "distinct_id", PERSON_ID: "person_id", VISIT_ID: "visit_id"}

# A number that sorts events: by time, at one millisecond by when they were received; a batch has at most 5,000. Arrays
# of numbers are built and sorted in a fifth of the time that arrays of tuples take.
ORDER = "(bitShiftLeft(toUInt128(toUnixTimestamp64Milli(time)), 64) + bitShiftLeft(toUInt128(sequence), 16) + position)"


class Selector(Protocol):
    """Which events are meant: an EventSelector, a step of a funnel, what a cohort has done."""

    event: str

    @property
    def filters(self) -> RepeatedCompositeFieldContainer[Filter]:
        """Conditions on them."""


def time_of(order: str) -> str:
    """SQL of the time, in milliseconds since 1970, of an event with this ORDER."""
    return f"toInt64(bitShiftRight({order}, 64))"


def actor_of(events: Selection, actor: Actor.ValueType, path: str) -> str:
    """SQL of who did an event."""
    return events.property(_PROPERTIES[actor or DISTINCT_ID], path).text


def matching(events: Selection, selector: Selector, path: str) -> str:
    """SQL, 0 or 1: whether an event is one of those that are meant."""
    conditions = events.filters(selector.filters, f"{path}.filters")
    if selector.event:
        conditions.insert(0, f"event = {events.bind(selector.event, 'String')}")
    return f"({' AND '.join(conditions) or '1'})"
