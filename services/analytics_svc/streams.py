"""A stream of batches of events: several are under way at once, and each is acknowledged in its turn."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, NamedTuple

from meshboard.analytics.v1.ingest_service_pb2 import (
    IngestRequest,
    IngestResponse,
    IngestStreamRequest,
    IngestStreamResponse,
)

from services.chassis import errors

# What a stream may have under way before its sender has to wait: so many batches, or fewer large ones. So the memory of
# a stream is bounded, and small batches still share the log's publishes.
MAX_UNDER_WAY = 32
BYTES_EACH = 256 << 10
RECHECK_SECONDS = 1.0


class _Batch(NamedTuple):
    """A batch under way."""

    position: int
    shares: int
    taken: asyncio.Task[IngestResponse]


async def acknowledged(
    requests: AsyncIterator[IngestStreamRequest],
    take: Callable[[IngestRequest], Coroutine[Any, Any, IngestResponse]],
    recheck: Callable[[], Awaitable[None]],
) -> AsyncIterator[IngestStreamResponse]:
    """Takes the batches of `requests`, and acknowledges them in order.

    When one fails, or may not be sent any more (`recheck` raises), those before it are acknowledged first.
    """
    batches: asyncio.Queue[_Batch | None] = asyncio.Queue()
    room = asyncio.Semaphore(MAX_UNDER_WAY)
    tasks: set[asyncio.Task[IngestResponse]] = set()

    async def read() -> None:
        position, next_check = -1, time.monotonic() + RECHECK_SECONDS
        try:
            async for request in requests:
                if request.position <= position:
                    raise errors.invalid_argument(
                        "POSITION_INVALID",
                        f"position: must be greater than {position}, that of the batch before",
                        field="position",
                    )
                position = request.position
                shares = min(1 + request.ByteSize() // BYTES_EACH, MAX_UNDER_WAY)
                for _ in range(shares):
                    await room.acquire()
                if time.monotonic() >= next_check:
                    await recheck()
                    next_check = time.monotonic() + RECHECK_SECONDS
                task = asyncio.create_task(take(batch_of(request)))
                tasks.add(task)
                batches.put_nowait(_Batch(position, shares, task))
        finally:
            batches.put_nowait(None)

    reader = asyncio.create_task(read())
    total = 0
    try:
        while (batch := await batches.get()) is not None:
            answer = await batch.taken
            tasks.discard(batch.taken)
            for _ in range(batch.shares):
                room.release()
            total += answer.accepted_count
            yield IngestStreamResponse(
                position=batch.position,
                accepted_count=answer.accepted_count,
                refused=answer.refused,
                total_accepted_count=total,
                dropped_count=answer.dropped_count,
            )
        await reader  # for what it failed with
    finally:
        for task in (reader, *tasks):
            task.cancel()
        await asyncio.gather(reader, *tasks, return_exceptions=True)


def batch_of(request: IngestStreamRequest) -> IngestRequest:
    """The batch by itself; events get the `insert_id` that they would get if it came again."""
    if request.stream_id:
        for index, event in enumerate(request.events):
            if not event.insert_id:
                event.insert_id = f"{request.stream_id}-{request.position}-{index}"
    batch = IngestRequest(events=request.events)
    if request.HasField("send_time"):
        batch.send_time.CopyFrom(request.send_time)
    return batch
