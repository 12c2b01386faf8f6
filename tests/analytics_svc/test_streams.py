"""Streams of batches: acknowledged in order, gone on with after a break, and ended with their key."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from typing import Any

import grpc
import grpc.aio
import pytest
from meshboard.analytics.v1.ingest_service_pb2 import (
    Event,
    IngestRequest,
    IngestResponse,
    IngestStreamRequest,
    IngestStreamResponse,
)
from meshboard.analytics.v1.source_service_pb2 import RotateWriteKeyRequest

from services.analytics_svc.streams import BYTES_EACH, MAX_UNDER_WAY, acknowledged
from services.chassis import errors
from services.chassis.bus import BusError
from tests.analytics_svc.conftest import Analytics
from tests.conditions import eventually
from tests.harness import reason_of

KEY = "x-write-key"


def batch(position: int, *, events: int = 1, stream_id: str = "", name: str = "view") -> IngestStreamRequest:
    return IngestStreamRequest(
        position=position,
        stream_id=stream_id,
        events=[Event(event=name, distinct_id="ada") for _ in range(events)],
    )


async def acknowledgements(
    analytics: Analytics, key: str, requests: Iterable[IngestStreamRequest]
) -> list[IngestStreamResponse]:
    call = analytics.ingest.IngestStream(iter(requests), metadata=((KEY, key),))
    return [answer async for answer in call]


async def failing(answers: AsyncIterable[Any]) -> tuple[list[Any], Exception]:
    """What a stream gives before it fails, and what it fails with."""
    given = []
    try:
        async for answer in answers:
            given.append(answer)  # noqa: PERF401 - what was given counts also when it fails
    except (grpc.aio.AioRpcError, errors.Error) as failure:
        return given, failure
    raise AssertionError("it did not fail")


def told(failure: Exception) -> tuple[grpc.StatusCode, str]:
    assert isinstance(failure, grpc.aio.AioRpcError)
    return failure.code(), reason_of(failure)


async def test_each_batch_is_acknowledged_in_order(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    requests = [batch(place, events=place % 3 + 1) for place in range(0, 300, 10)]
    answers = await acknowledgements(analytics, key, requests)
    assert [a.position for a in answers] == list(range(0, 300, 10))
    assert [a.accepted_count for a in answers] == [len(r.events) for r in requests]
    assert answers[-1].total_accepted_count == sum(len(r.events) for r in requests)
    await analytics.until_count(member, source, answers[-1].total_accepted_count)


async def test_refused_events_are_told_with_their_batch(analytics: Analytics) -> None:
    _, key = await analytics.source(analytics.identity.member("editor"))
    bad = batch(2, events=3)
    bad.events[1].event = ""
    answers = await acknowledgements(analytics, key, [batch(1), bad, batch(3)])
    assert [(a.position, a.accepted_count, len(a.refused)) for a in answers] == [
        (1, 1, 0),
        (2, 2, 1),
        (3, 1, 0),
    ]
    assert (answers[1].refused[0].index, answers[1].refused[0].reason) == (1, "EVENT_NAME_INVALID")


async def test_the_rest_after_a_break_counts_once(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    requests = [batch(place, events=3, stream_id="file-1") for place in range(20)]
    call = analytics.ingest.IngestStream(iter(requests), metadata=((KEY, key),))
    answers = aiter(call)
    acknowledged_last = [(await anext(answers)).position for _ in range(5)][-1]
    call.cancel()  # some of what comes behind is on disk, and the sender does not know of it
    rest = await acknowledgements(analytics, key, requests[acknowledged_last + 1 :])
    assert [a.position for a in rest] == list(range(acknowledged_last + 1, 20))
    await acknowledgements(analytics, key, requests)
    await acknowledgements(analytics, key, [batch(1, stream_id="file-2")])
    await analytics.until_count(member, source, 61)


async def test_positions_rise(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    call = analytics.ingest.IngestStream(iter([batch(1), batch(5), batch(5)]), metadata=((KEY, key),))
    given, failure = await failing(call)
    assert told(failure) == (grpc.StatusCode.INVALID_ARGUMENT, "POSITION_INVALID")
    assert [answer.position for answer in given] == [1, 5], "what came before is acknowledged"
    await analytics.until_count(member, source, 2)


@pytest.mark.parametrize("later", [False, True])
async def test_each_request_is_validated(analytics: Analytics, later: bool) -> None:
    _, key = await analytics.source(analytics.identity.member("editor"))
    requests = [batch(1)] * later + [batch(2, events=0)]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await acknowledgements(analytics, key, requests)
    assert (caught.value.code(), reason_of(caught.value)) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "VALIDATION_FAILED",
    )


async def test_a_request_that_cannot_be_read_ends_the_stream(analytics: Analytics) -> None:
    _, key = await analytics.source(analytics.identity.member("editor"))
    method: Any = analytics.channel.stream_stream("/meshboard.analytics.v1.IngestService/IngestStream")
    requests = [batch(1).SerializeToString(), b"\xff"]
    given, failure = await failing(method(iter(requests), metadata=((KEY, key),)))
    assert [IngestStreamResponse.FromString(answer).position for answer in given] == [1]
    assert told(failure) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_MALFORMED")


@pytest.mark.parametrize("requests", [[], [batch(1)]])
async def test_needs_a_key(analytics: Analytics, requests: list[IngestStreamRequest]) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await acknowledgements(analytics, "mbw_wrong", requests)
    expected = "WRITE_KEY_INVALID" if requests else "VALIDATION_FAILED"
    assert reason_of(caught.value) == expected


async def test_the_key_can_stand_in_the_first_batch(analytics: Analytics) -> None:
    _, key = await analytics.source(analytics.identity.member("editor"))
    first = batch(1)
    first.write_key = key
    call = analytics.ingest.IngestStream(iter([first, batch(2)]))
    assert [a.position async for a in call] == [1, 2]


async def test_a_stream_ends_with_its_key(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)
    call = analytics.ingest.IngestStream(metadata=((KEY, key),))
    await call.write(batch(1))
    first = await call.read()
    assert isinstance(first, IngestStreamResponse)
    assert first.position == 1
    await analytics.sources.RotateWriteKey(
        RotateWriteKeyRequest(source_id=source.source_id), metadata=member.metadata
    )
    position = 1

    async def ended() -> bool:
        nonlocal position
        position += 1
        await call.write(batch(position))
        return await call.read() is grpc.aio.EOF

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await eventually(ended)
    assert reason_of(caught.value) == "WRITE_KEY_INVALID"


class Slow:
    """Takes batches when it is told to."""

    def __init__(self) -> None:
        self.under_way = 0
        self.most = 0
        self.taken = 0
        self.gate = asyncio.Event()

    async def __call__(self, request: IngestRequest) -> IngestResponse:
        self.taken += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await self.gate.wait()
            return IngestResponse(accepted_count=len(request.events))
        finally:
            self.under_way -= 1


async def allowed() -> None:
    """Nothing has changed."""


async def stream_of(count: int) -> AsyncIterator[IngestStreamRequest]:
    for place in range(count):
        yield batch(place)


async def test_few_batches_are_under_way_at_once() -> None:
    slow = Slow()
    answers = acknowledged(stream_of(50), slow, allowed)
    first = asyncio.ensure_future(anext(answers))

    async def full() -> bool:
        return slow.under_way == MAX_UNDER_WAY

    await eventually(full)
    slow.gate.set()
    positions = [(await first).position, *[a.position async for a in answers]]
    assert positions == list(range(50))
    assert slow.most == MAX_UNDER_WAY


async def test_fewer_large_batches_are_under_way_at_once() -> None:
    async def large() -> AsyncIterator[IngestStreamRequest]:
        for place in range(9):
            request = batch(place)
            request.events[0].url = "u" * (BYTES_EACH * MAX_UNDER_WAY // 4)
            yield request

    slow = Slow()
    answers = acknowledged(large(), slow, allowed)
    first = asyncio.ensure_future(anext(answers))

    async def full() -> bool:
        return slow.under_way == 3

    await eventually(full)
    slow.gate.set()
    assert [(await first).position, *[a.position async for a in answers]] == list(range(9))
    assert slow.most == 3


async def test_who_goes_away_leaves_nothing_behind() -> None:
    slow = Slow()
    answers: Any = acknowledged(stream_of(50), slow, allowed)
    first = asyncio.ensure_future(anext(answers))

    async def full() -> bool:
        return slow.under_way == MAX_UNDER_WAY

    await eventually(full)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert slow.under_way == 0


async def test_what_came_before_a_failure_is_acknowledged() -> None:
    async def take(request: IngestRequest) -> IngestResponse:
        if request.events[0].insert_id == "s-2-0":
            raise errors.unavailable("The event log takes no events now.") from BusError()
        return IngestResponse(accepted_count=1)

    async def requests() -> AsyncIterator[IngestStreamRequest]:
        for place in range(4):
            yield batch(place, stream_id="s")

    given, failure = await failing(acknowledged(requests(), take, allowed))
    assert isinstance(failure, errors.Error)
    assert failure.reason == "DEPENDENCY_UNAVAILABLE"
    assert [answer.position for answer in given] == [0, 1]
