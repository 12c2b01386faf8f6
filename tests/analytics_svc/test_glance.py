"""What is seen of a whole batch at once is what is seen of each of its events."""

import struct
from typing import Any

import pytest
from google.protobuf.struct_pb2 import Value
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from meshboard.analytics.v1.event_log_pb2 import LoggedEvent
from meshboard.analytics.v1.ingest_service_pb2 import Event, IngestRequest

from services.analytics_svc.glance import glance
from services.analytics_svc.ingest import refusal_of, strip
from tests.analytics_svc.test_ingest import BAD, GOOD, NOW_SECONDS

SMALL = Event(event="view", distinct_id="ada")

lengths = st.sampled_from([0, 1, 2, 42, 50, 127, 128, 199, 200, 201, 4096, 4097])
texts = st.builds(lambda length, letter: letter * length, lengths, st.sampled_from("a*2é\n\x12\x11\0"))
short_texts = st.text(max_size=30)
numbers = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack("<d", bits.to_bytes(8, "little"))[0]),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, short_texts, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(short_texts, inner, max_size=3)),
    max_leaves=4,
)
times = st.builds(
    Timestamp,
    seconds=st.sampled_from([-1, 0, 1, NOW_SECONDS, NOW_SECONDS + 86_400, NOW_SECONDS + 86_401, 2**40]),
    nanos=st.sampled_from([-1, 0, 999_999_999, 1_000_000_000]),
)


@st.composite
def events(draw: st.DrawFn) -> Event:
    """An event, in most cases a good one but for one field."""
    event = Event(event="view", distinct_id="ada")
    for name in draw(st.lists(st.sampled_from([f.name for f in Event.DESCRIPTOR.fields]), max_size=2)):
        match name:
            case "properties":
                names = st.one_of(short_texts, texts.filter(lambda text: len(text) < 300))
                event.properties.update(draw(st.dictionaries(names, values, max_size=5)))
            case "time":
                event.time.CopyFrom(draw(times))
            case _:
                setattr(event, name, draw(st.one_of(short_texts, texts)))
    return event


def seen_good(*batch: Event) -> bool:
    return glance(IngestRequest(events=batch).SerializeToString()).is_good(NOW_SECONDS)


def is_good(event: Event) -> bool:
    """Whether refusal_of says nothing of it, and changes nothing in it."""
    copy = Event.FromString(event.SerializeToString())
    return refusal_of(copy, NOW_SECONDS) is None and copy == event


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(events(), min_size=1, max_size=4))
@example([SMALL, Event(event="view", distinct_id="ada", previous_id="x" * 201)])
def test_takes_none_for_good_that_is_not(batch: list[Event]) -> None:
    assert not seen_good(*batch) or all(map(is_good, batch))


@pytest.mark.parametrize("event", [event for bad in BAD.values() for event in bad])
def test_sees_the_bad_one_among_good_ones(event: Event) -> None:
    assert not seen_good(SMALL, event, SMALL)


@pytest.mark.parametrize("name", GOOD)
def test_sees_that_all_are_good(name: str) -> None:
    assert seen_good(GOOD[name], SMALL)


@pytest.mark.parametrize("value", [[], {}, [1], {"a": {"b": 1}}, ["x" * 60_000], float("-inf")])
@pytest.mark.parametrize("name", ["a", "n" * 127, "n" * 128])
def test_looks_closer_at_lists_objects_and_what_is_no_number(name: str, value: Any) -> None:
    event = Event(event="view", distinct_id="ada")
    event.properties.update({"one": 1, name: value, "other": "x"})
    assert not seen_good(event)


def test_a_name_without_a_value_is_good() -> None:
    event = Event(event="view", distinct_id="ada")
    event.properties.fields["none"].CopyFrom(Value())
    assert seen_good(event)
    event.properties.fields[""].CopyFrom(Value())
    assert not seen_good(event)


def test_an_event_that_says_a_field_twice_does_not_say_it_for_another() -> None:
    twice = SMALL.SerializeToString() * 2
    nameless = Event(distinct_id="ada").SerializeToString()
    framed = _framed(twice) + _framed(nameless)
    request = IngestRequest.FromString(framed)
    strip(request)
    assert not glance(request.SerializeToString()).is_good(NOW_SECONDS)


def test_sees_a_field_that_events_do_not_have() -> None:
    strange = SMALL.SerializeToString() + LoggedEvent(browser="Smuggler").SerializeToString()
    request = IngestRequest.FromString(_framed(SMALL.SerializeToString()) + _framed(strange))
    assert request.events[1] != SMALL
    assert not glance(request.SerializeToString()).is_good(NOW_SECONDS)
    strip(request)
    assert glance(request.SerializeToString()).is_good(NOW_SECONDS)


def test_passes_over_fields_that_requests_do_not_have() -> None:
    """A newer client may send them. Nothing of them is logged, and they are not taken for fields of the log."""
    for number in range(3, 15):
        for kind, value in ((2, b"\x02\xff\xff"), (0, b"\x01")):
            strange = bytes([number << 3 | kind]) + value
            request = IngestRequest.FromString(_framed(SMALL.SerializeToString()) + strange)
            seen = glance(request.SerializeToString())
            assert seen.is_good(NOW_SECONDS)
            assert list(seen.events) == [SMALL.SerializeToString()]


def _framed(event: bytes) -> bytes:
    """An event of an IngestRequest."""
    return b"\x12" + bytes([len(event)]) + event
