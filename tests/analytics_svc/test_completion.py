"""What is logged of a batch that is completed at once is what is logged of events that are completed one by one."""

from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from meshboard.analytics.v1.event_log_pb2 import LoggedBatch, LoggedEvent
from meshboard.analytics.v1.ingest_service_pb2 import Event, IngestRequest
from meshboard.analytics.v1.source_pb2 import Source

from services.analytics_svc.completion import Receipt, complete, completed
from services.analytics_svc.event_keys import keys_of
from services.analytics_svc.glance import glance
from services.analytics_svc.pipeline import enrich
from services.analytics_svc.user_agents import NEW_AT_ONCE, AgentFields
from tests.analytics_svc.test_ingest import NOW_SECONDS

RECEIVED = Timestamp(seconds=NOW_SECONDS, nanos=5_000_000)
FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"
GOOGLEBOT = "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)"

# What all events of a batch have, or none of them, so that most batches can be completed at once.
CHOICES = {
    "insert_id": st.text("aé1", min_size=1, max_size=5),
    "time": st.builds(Timestamp, seconds=st.integers(0, NOW_SECONDS), nanos=st.integers(0, 999)),
    "user_agent": st.sampled_from([FIREFOX, GOOGLEBOT, "curl/8", "é", "x" * 600]),
    "ip": st.sampled_from(["203.0.113.7", "::1", "", "é" * 45, "é" * 64]),
}


def place_of(address: str) -> bytes:
    return LoggedEvent(country="DE", city=address).SerializeToString() if address else b""


@st.composite
def batches(draw: st.DrawFn) -> list[Event]:
    names = draw(st.sets(st.sampled_from(list(CHOICES))))
    made = []
    for _ in range(draw(st.integers(1, 4))):
        event = Event(event="view", distinct_id="ada", url=draw(st.sampled_from(["", "https://a.example/é"])))
        event.previous_id = draw(st.sampled_from(["", "", "cookie"]))
        event.properties.update(draw(st.dictionaries(st.text("ab", min_size=1), st.floats(0, 1), max_size=2)))
        for name in names:
            value = draw(CHOICES[name])
            if isinstance(value, Timestamp):
                event.time.CopyFrom(value)
            else:
                setattr(event, name, value)
        made.append(event)
    return made


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(batches(), st.sampled_from(list(Source.Robots.values())), st.booleans())
@example([Event(event="e", distinct_id="d", user_agent=GOOGLEBOT)], Source.DROP, True)
def test_completes_at_once_what_it_would_one_by_one(
    events: list[Event], robots: Source.Robots.ValueType, knows_places: bool
) -> None:
    source = Source(source_id="s", robots=robots)
    places = place_of if knows_places else None
    request = IngestRequest(events=events)
    received = Receipt(RECEIVED, "198.51.100.1", places)
    made = completed(glance(request.SerializeToString()), source, received, AgentFields())
    complete(request, received)
    expected = LoggedBatch.FromString(request.SerializeToString())
    expected.robots = robots
    enrich(expected)
    is_mixed = any(
        len({bool(event.HasField("time") if name == "time" else getattr(event, name)) for event in events})
        > 1
        for name in CHOICES
    )
    has_unwanted = len(expected.events) < len(events)
    assert (made is None) == (is_mixed or has_unwanted)
    if made is None:
        return
    batch = LoggedBatch.FromString(made)
    assert batch.has_links == any(event.previous_id for event in events)
    assert b"".join(batch.keys) == keys_of("s", (event.insert_id.encode() for event in batch.events))
    assert len({event.insert_id for event in batch.events}) == len(
        {event.insert_id or index for index, event in enumerate(events)}
    )
    for event, other, sent in zip(batch.events, expected.events, events, strict=True):
        if not sent.insert_id:  # made up
            event.insert_id = other.insert_id
        assert event == other
        assert b"203.0.113.7" not in event.SerializeToString() or knows_places


def test_leaves_many_new_user_agents_to_the_pipeline() -> None:
    agents = AgentFields()

    def can(numbers: range) -> bool:
        events = [Event(event="view", distinct_id="ada", user_agent=f"agent {number}") for number in numbers]
        seen = glance(IngestRequest(events=events).SerializeToString())
        return completed(seen, Source(), Receipt(RECEIVED), agents) is not None

    assert not can(range(NEW_AT_ONCE + 1))
    assert can(range(NEW_AT_ONCE))
    assert can(range(2 * NEW_AT_ONCE))  # it knows the half of them
