"""Bad input at the whole mesh: refused clearly, without harm to what comes beside it, and in bounded memory."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest
from google.protobuf.struct_pb2 import Value
from meshboard.analytics.v1.ingest_service_pb2 import Event, IngestRequest, IngestResponse

from tests.conditions import eventually
from tests.harness import reason_of
from tests.mesh.people import Answer, Person
from tests.parts import Mesh

pytestmark = pytest.mark.xdist_group("mesh")

MIB = 1 << 20
GROWTH_BYTES = 160 * MIB
PATH = "/meshboard.analytics.v1.IngestService/Ingest"


def body(properties: str = "{}", *, more: str = "") -> bytes:
    """A batch of one event, written by hand."""
    return f'{{"events":[{{"event":"e","distinctId":"d","properties":{properties}{more}}}]}}'.encode()


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + "1" + closing * depth


# What the gateway cannot read is refused whole.
MALFORMED = {
    "cut off": body()[:-3],
    "no JSON": b"event=e",
    "something behind": body() + b"x",
    "a list": b"[]",
    "null": b"null",
    "a byte order mark": b"\xef\xbb\xbf" + body(),
    "not a number": body('{"x":NaN}'),
    "no double": body('{"x":1e999}'),
    "5,000 digits": body(f'{{"x":{"9" * 5000}}}'),
    "invalid UTF-8": body('{"x":"?"}').replace(b"?", b"\xff\xfe"),
    "half a surrogate": body('{"x":"\\ud800"}'),
    "100,000 lists": body(f'{{"x":{nested(100_000)}}}'),
    "100,000 objects": body(nested(100_000, '{"x":', "}")),
    "100,000 lists where nobody looks": body(more=f',"unknown":{nested(100_000)}'),
    "deeper than protobuf goes": body(f'{{"x":{nested(60)}}}'),
    "year 0": body(more=',"time":"0000-01-01T00:00:00Z"'),
    "year 10000": body(more=',"time":"10000-01-01T00:00:00Z"'),
    "no time": body(more=',"time":"yesterday"'),
    "a number for a text": body(more=',"url":5'),
}
# What can be read is judged event by event.
REFUSED = {
    "year 1": (body(more=',"time":"0001-01-01T00:00:00Z"'), "TIME_INVALID"),
    "year 9999": (body(more=',"time":"9999-12-31T23:59:59.999999999Z"'), "TIME_INVALID"),
    "10,000 properties": (body(json.dumps({f"p{i}": i for i in range(10_000)})), "PROPERTIES_INVALID"),
    "a text of 1 MiB": (body(json.dumps({"x": "y" * MIB})), "PROPERTIES_INVALID"),
    "a name of 1 MiB": (body(json.dumps({"y" * MIB: 1})), "PROPERTIES_INVALID"),
    "an id of 1 MiB": (body(more=f',"insertId":"{"y" * MIB}"'), "INSERT_ID_INVALID"),
}
PACKED = {
    "no gzip": (b"nothing of the kind", "VALIDATION_FAILED"),  # nothing is left of it
    "gzip cut off": (gzip.compress(body())[:-12], "REQUEST_MALFORMED"),
    "JSON cut off": (gzip.compress(body()[:-1]), "REQUEST_MALFORMED"),
    "broken JSON": (gzip.compress(body('{"x":NaN}')), "REQUEST_MALFORMED"),
}


async def ingest(person: Person, key: str, data: bytes, **headers: str) -> Answer:
    async def chunks() -> AsyncIterator[bytes]:  # aiohttp warns of large bytes
        yield data

    return await person.call("POST", "/v1/events:ingest", chunks(), **{"x-write-key": key, **headers})


@asynccontextmanager
async def bounded(mesh: Mesh) -> AsyncIterator[None]:
    """Fails when the gateway or the service has grown by more than GROWTH_BYTES at any time in between."""
    processes = [psutil.Process(mesh.supervisor.pid(name)) for name in ("envoy", "analytics_svc")]
    before = [process.memory_info().rss for process in processes]
    peaks = list(before)

    async def watch() -> None:
        while True:
            for index, process in enumerate(processes):
                peaks[index] = max(peaks[index], process.memory_info().rss)
            await asyncio.sleep(0.01)

    watching = asyncio.create_task(watch())
    yield
    watching.cancel()
    grown = [peak - start for peak, start in zip(peaks, before, strict=True)]
    assert max(grown) < GROWTH_BYTES, [size // MIB for size in grown]


@pytest.mark.parametrize("name", MALFORMED)
async def test_what_cannot_be_read_is_refused(ann: Person, name: str):
    _, key = await ann.new_source()
    answer = await ingest(ann, key, MALFORMED[name])
    assert (answer.status, answer.reason) == (400, "REQUEST_MALFORMED")


@pytest.mark.parametrize("name", REFUSED)
async def test_what_breaks_a_rule_is_refused_by_itself(ann: Person, name: str):
    source_id, key = await ann.new_source()
    data, reason = REFUSED[name]
    good = b'{"events":[{"event":"good","distinctId":"d"},'
    answer = await ingest(ann, key, data.replace(b'{"events":[', good, 1))
    assert answer.status == 200, answer
    assert answer.body["acceptedCount"] == 1
    assert [(r["index"], r["reason"]) for r in answer.body["refused"]] == [(1, reason)]
    await until_counted(ann, source_id, 1)


@pytest.mark.parametrize("name", PACKED)
async def test_what_cannot_be_unpacked_is_refused(ann: Person, name: str):
    _, key = await ann.new_source()
    data, reason = PACKED[name]
    answer = await ingest(ann, key, data, **{"content-encoding": "gzip"})
    assert (answer.status, answer.reason) == (400, reason)


async def test_bombs_are_refused_in_bounded_memory(mesh: Mesh, ann: Person):
    source_id, key = await ann.new_source()
    packer = zlib.compressobj(wbits=31)
    zeros = b"0" * MIB
    bomb = b"".join([packer.compress(body()[:-3] + b',"x":"')] + [packer.compress(zeros) for _ in range(512)])
    bomb += packer.flush()
    assert len(bomb) < MIB

    async def explode() -> None:
        answer = await ingest(ann, key, bomb, **{"content-encoding": "gzip"})
        assert (answer.status, answer.reason) == (413, "BODY_TOO_LARGE")

    async def beside() -> None:
        await ann.send(key, {"event": "good", "distinctId": "d"})

    async with bounded(mesh):
        await asyncio.gather(*(explode() for _ in range(8)), *(beside() for _ in range(20)))
    await until_counted(ann, source_id, 20)


async def test_malformed_bodies_harm_nothing_beside_them(mesh: Mesh, ann: Person):
    source_id, key = await ann.new_source()
    worst = [*MALFORMED.values(), *(data for data, _ in REFUSED.values())]

    async def attack() -> None:
        for data in worst:
            assert (await ingest(ann, key, data)).status in {200, 400}

    async def beside() -> None:
        for _ in range(20):
            await ann.send(key, {"event": "good", "distinctId": "d"})

    async with bounded(mesh):
        await asyncio.gather(*(attack() for _ in range(4)), *(beside() for _ in range(4)))
    await until_counted(ann, source_id, 80)


async def natively(
    channel: grpc.aio.Channel, key: str, data: bytes, compression: grpc.Compression | None = None
) -> IngestResponse:
    call: Any = channel.unary_unary(PATH)
    return IngestResponse.FromString(
        await call(data, metadata=(("x-write-key", key),), compression=compression, timeout=60)
    )


@pytest.mark.parametrize("way", ["gateway", "service"])
async def test_bad_input_by_grpc(mesh: Mesh, ann: Person, way: str):
    source_id, key = await ann.new_source()
    address = mesh.gateway_url.removeprefix("http://") if way == "gateway" else mesh.address("analytics")
    deep = Value()
    innermost = deep
    for _ in range(60):
        innermost = innermost.list_value.values.add()
    event = Event(event="good", distinct_id="d")
    event.properties.fields["x"].number_value = 1
    good = IngestRequest(events=[event]).SerializeToString()
    unreadable = [
        b"\xff" * 100,
        good[:-1],
        good.replace(b"good", b"\xff\xfe\xff\xfe"),
        # Deeper than it can be written: the length of each level around the next.
        _wrapped(200_000),
    ]
    infinite = Event(event="e", distinct_id="d")
    infinite.properties.fields["x"].number_value = float("nan")
    options = [("grpc.max_send_message_length", -1)]
    async with bounded(mesh), grpc.aio.insecure_channel(address, options=options) as channel:
        for data in unreadable:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await natively(channel, key, data)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert reason_of(caught.value) == "REQUEST_MALFORMED"
        for data, compression in (
            (bytes(9 * MIB), grpc.Compression.NoCompression),
            (bytes(512 * MIB), grpc.Compression.Gzip),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await natively(channel, key, data, compression)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        answer = await natively(channel, key, IngestRequest(events=[event, infinite]).SerializeToString())
        assert (answer.accepted_count, answer.refused[0].reason) == (1, "PROPERTIES_INVALID")
    await until_counted(ann, source_id, 1)


def _wrapped(depth: int) -> bytes:
    """An unknown field of groups within groups."""
    return b"\x7b" * depth + b"\x7c" * depth


async def until_counted(person: Person, source_id: str, count: int) -> None:
    """Returns when so many events are visible, and no more."""

    async def rows() -> Any:
        return (await person.run_query(sourceIds=[source_id], measures=[{"aggregation": "COUNT"}]))["rows"]

    async def counted() -> bool:
        return bool((await rows())[0][0] >= count)

    await eventually(counted)
    assert await rows() == [[count]]
