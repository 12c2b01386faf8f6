"""What is logged of a batch that is completed at once is what is logged of events that are completed one by one."""

from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from meshboard.analytics.v1.event_log_pb2 import LoggedBatch, LoggedEvent
from meshboard.analytics.v1.ingest_service_pb2 import Event, IngestRequest
from meshboard.analytics.v1.source_pb2 import Source

from services.analytics_svc.completion import Receipt, completed
from services.analytics_svc.event_keys import keys_of
from services.analytics_svc.glance import glance
from services.analytics_svc.pipeline import enrich
from services.analytics_svc.user_agents import AgentFields
from tests.analytics_svc.test_ingest import NOW_SECONDS

RECEIVED = Timestamp(seconds=NOW_SECONDS, nanos=5_000_000)
FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"
GOOGLEBOT = "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)"

TEXTS = {
    "insert_id": st.text("aé1", max_size=5),
    "user_agent": st.sampled_from(["", FIREFOX, GOOGLEBOT, "curl/8", "é", "x" * 600]),
    "ip": st.sampled_from(["", "203.0.113.7", "::1", "é" * 45, "é" * 64]),
    "previous_id": st.sampled_from(["", "cookie"]),
    "url": st.sampled_from(["", "https://shop.example/é"]),
}
TIMES = st.builds(Timestamp, seconds=st.integers(0, NOW_SECONDS), nanos=st.integers(0, 999))


def place_of(address: str) -> bytes:
    return LoggedEvent(country="DE", city=address[:5]).SerializeToString() if address else b""


@st.composite
def events(draw: st.DrawFn) -> Event:
    event = Event(event="view", distinct_id="ada", time=draw(st.none() | TIMES))
    event.properties.update(draw(st.dictionaries(st.text("ab", min_size=1), st.floats(0, 1), max_size=2)))
    for name, values in TEXTS.items():
        setattr(event, name, draw(values))
    return event


def logged(request: IngestRequest, source: Source, receipt: Receipt, agents: AgentFields) -> LoggedBatch:
    seen = glance(request.SerializeToString())
    return LoggedBatch.FromString(completed(request, seen, source, receipt, agents))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(events(), max_size=4), st.sampled_from(Source.Robots.values()), st.booleans())
@example([Event(event="e", distinct_id="d", user_agent=GOOGLEBOT)], Source.DROP, True)
@example([Event(event="e", distinct_id="d", user_agent=GOOGLEBOT)], Source.KEEP, False)
def test_completes_at_once_what_it_would_one_by_one(
    sent: list[Event], robots: Source.Robots.ValueType, knows_places: bool
) -> None:
    receipt = Receipt(RECEIVED, "198.51.100.1", place_of if knows_places else None)
    batch = logged(IngestRequest(events=sent), Source(source_id="s", robots=robots), receipt, AgentFields())
    expected = LoggedBatch.FromString(IngestRequest(events=sent).SerializeToString())
    for event, logged_event, sent_event in zip(expected.events, batch.events, sent, strict=True):
        event.insert_id = event.insert_id or logged_event.insert_id
        if not event.HasField("time"):
            event.time.CopyFrom(RECEIVED)
        if knows_places:
            event.MergeFromString(place_of(sent_event.ip or "198.51.100.1"))
        event.DiscardUnknownFields()  # the address
    assert all(event.insert_id for event in batch.events)
    made_up = {
        event.insert_id for event, other in zip(batch.events, sent, strict=True) if not other.insert_id
    }
    assert len(made_up) == sum(not event.insert_id for event in sent)
    if batch.keys:
        assert b"".join(batch.keys) == keys_of("s", (event.insert_id.encode() for event in batch.events))
        assert batch.has_links == any(event.previous_id for event in sent)
        expected.robots = robots
        enrich(expected)
    else:
        assert robots == Source.DROP
        assert any(event.user_agent in {GOOGLEBOT, "curl/8"} for event in sent)
    assert list(batch.events) == list(expected.events)


def test_leaves_many_new_user_agents_to_the_pipeline() -> None:
    agents = AgentFields(new_at_once=5)

    def is_left(numbers: range) -> bool:
        sent = [Event(event="view", distinct_id="ada", user_agent=f"agent {number}") for number in numbers]
        return not logged(IngestRequest(events=sent), Source(), Receipt(RECEIVED), agents).keys

    assert is_left(range(11))
    assert is_left(range(11))
    assert not is_left(range(15))  # each time it learns five
