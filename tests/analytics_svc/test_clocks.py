"""Clocks of senders that are wrong, found out by the time of sending."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st
from meshboard.analytics.v1.compat_service_pb2 import CompatMessage, SendBatchRequest, SendTrackRequest
from meshboard.analytics.v1.ingest_service_pb2 import Event, IngestRequest, IngestStreamRequest

from services.analytics_svc.ingest import TRAVEL_SECONDS, correct_times
from services.analytics_svc.write_keys import HEADER
from tests.analytics_svc.conftest import Analytics
from tests.analytics_svc.test_compat import basic

SECOND = 1_000_000_000
NOW = 1_795_856_400 * SECOND
RECEIVED = Timestamp()
RECEIVED.FromNanoseconds(NOW)


def corrected(time: int, send_time: int) -> int:
    """The time of an event, in nanoseconds, after it was sent at `send_time` and received at NOW."""
    request = IngestRequest(events=[Event()])
    request.events[0].time.FromNanoseconds(time)
    request.send_time.FromNanoseconds(send_time)
    correct_times(request, RECEIVED)
    return request.events[0].time.ToNanoseconds()


@given(
    age=st.integers(0, 10**9 * SECOND),
    error=st.integers(-(10**9) * SECOND, 10**9 * SECOND),
    travel=st.integers(0, TRAVEL_SECONDS * SECOND),
)
def test_a_time_is_off_by_no_more_than_the_way_and_what_is_let_pass(
    age: int, error: int, travel: int
) -> None:
    happened = NOW - travel - age
    found = corrected(happened + error, NOW - travel + error)
    assert abs(found - happened) <= TRAVEL_SECONDS * SECOND + travel


@pytest.mark.parametrize("seconds", [-TRAVEL_SECONDS, -1, 0, 1, TRAVEL_SECONDS])
def test_what_lies_on_the_way_is_no_error(seconds: int) -> None:
    assert corrected(NOW - 60 * SECOND, NOW - seconds * SECOND) == NOW - 60 * SECOND


def test_a_clock_that_is_wrong_by_an_hour() -> None:
    hour = 3600 * SECOND
    assert corrected(NOW - hour, NOW - hour) == NOW
    assert corrected(NOW + hour - SECOND, NOW + hour) == NOW - SECOND


def test_times_that_are_none_are_left_alone() -> None:
    for seconds in (-(1 << 62), 1 << 62):
        request = IngestRequest(
            events=[Event(time=Timestamp(seconds=5))], send_time=Timestamp(seconds=seconds)
        )
        correct_times(request, RECEIVED)
        assert request.events[0].time.seconds == 5
        request = IngestRequest(
            events=[Event(time=Timestamp(seconds=seconds))], send_time=Timestamp(seconds=5)
        )
        correct_times(request, RECEIVED)
        assert request.events[0].time.seconds == seconds


def test_events_without_a_time_get_none() -> None:
    request = IngestRequest(events=[Event()], send_time=Timestamp(seconds=5))
    correct_times(request, RECEIVED)
    assert not request.events[0].HasField("time")


async def test_every_way_in_corrects(analytics: Analytics) -> None:
    """Events of five minutes ago, by a clock that is ten years ahead: without correction they are refused."""
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    wrong = datetime.now(UTC) + timedelta(days=3650)
    time, send_time = Timestamp(), Timestamp()
    time.FromDatetime(wrong - timedelta(minutes=5))
    send_time.FromDatetime(wrong)
    body: dict[str, Any] = {
        "events": [Event(event="e", distinct_id="ada", time=time)],
        "send_time": send_time,
    }
    message = {
        "type": "track",
        "event": "e",
        "userId": "ada",
        "timestamp": time.ToJsonString(),
        "sentAt": send_time.ToJsonString(),
    }
    batch = ParseDict(
        {"batch": [message], "sentAt": message["sentAt"]}, SendBatchRequest(), ignore_unknown_fields=True
    )
    alone = SendTrackRequest(message=ParseDict(message, CompatMessage()))
    metadata = ((HEADER, key),)
    assert not (await analytics.ingest.Ingest(IngestRequest(**body), metadata=metadata)).refused
    stream = analytics.ingest.IngestStream(iter([IngestStreamRequest(**body)]), metadata=metadata)
    assert [list(answer.refused) async for answer in stream] == [[]]
    assert not (await analytics.compat.SendBatch(batch, metadata=basic(key))).refused
    assert (await analytics.compat.SendTrack(alone, metadata=basic(key))).success
    await analytics.until_count(member, source, 4)
    window = {
        "startTime": (datetime.now(UTC) - timedelta(minutes=7)).isoformat(),
        "endTime": (datetime.now(UTC) - timedelta(minutes=3)).isoformat(),
    }
    assert (await analytics.ask(member, source, timeRange=window))["rows"] == [[4.0]]
