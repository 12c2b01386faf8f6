import asyncio
import time
from uuid import uuid4

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from services.chassis.bus import Bus, BusError, Delivery, Outgoing, PullConsumer, Received, StreamState
from tests.conditions import eventually
from tests.parts import Parts


@pytest.fixture
async def stream(bus: Bus) -> str:
    """A stream of its own for the test; its subjects are `<name>.>`."""
    name = f"s{uuid4().hex}"
    await bus.ensure_stream(name, [f"{name}.>"])
    return name


async def span_of(bus: Bus, stream: str) -> tuple[int, int]:
    state = await bus.state(stream)
    return state.first, state.last


async def test_a_request_that_is_cancelled_as_it_is_answered_ends(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    tasks: list[asyncio.Task[StreamState]] = []

    async def answered_and_cancelled(self: Client, *_: object, **__: object) -> Msg:
        answer: asyncio.Future[Msg] = loop.create_future()
        loop.call_soon(answer.set_result, Msg(self, data=b'{"type": "", "config": {}, "state": {}}'))
        loop.call_soon(lambda: loop.call_soon(tasks[0].cancel))
        return await asyncio.wait_for(answer, 5)

    monkeypatch.setattr(Client, "request", answered_and_cancelled)
    tasks.append(asyncio.create_task(bus.state("DOMAIN")))
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]


async def restart_nats(parts: Parts) -> None:
    await parts.supervisor.stop("nats")
    await parts.supervisor.start("nats")


async def take(consumer: PullConsumer, count: int, seconds: float = 10) -> list[Delivery]:
    taken: list[Delivery] = []
    async with asyncio.timeout(seconds):
        while len(taken) < count:
            taken += await consumer.fetch(count - len(taken), timeout=1)
    return taken


async def test_published_is_stored_in_order(bus: Bus, stream: str) -> None:
    messages = [Outgoing(f"{stream}.a", bytes([n]), headers={"Number": str(n)}) for n in range(100)]
    assert await bus.publish_many(messages) == list(range(1, 101))
    assert await span_of(bus, stream) == (1, 100)
    consumer = await bus.pull(stream, "reader")
    taken = await take(consumer, 100)
    assert [message.payload for message in taken] == [message.payload for message in messages]
    assert [message.sequence for message in taken] == list(range(1, 101))
    assert taken[7].headers["Number"] == "7"
    assert taken[7].subject == f"{stream}.a"
    await consumer.close()


async def test_the_same_id_is_stored_once(bus: Bus, stream: str) -> None:
    first = await bus.publish(f"{stream}.a", b"1", message_id="x")
    assert await bus.publish(f"{stream}.a", b"1", message_id="x") == first
    assert await span_of(bus, stream) == (1, 1)


async def test_the_last_message_of_a_subject(bus: Bus, stream: str) -> None:
    assert await bus.last(stream, f"{stream}.a") is None
    await bus.publish(f"{stream}.a", b"1")
    await bus.publish(f"{stream}.a", b"2", headers={"Number": "2"})
    await bus.publish(f"{stream}.b", b"3")
    last = await bus.last(stream, f"{stream}.a")
    assert last is not None
    assert (last.sequence, last.payload, last.headers["Number"]) == (2, b"2", "2")


async def test_publish_without_a_stream_fails(bus: Bus) -> None:
    with pytest.raises(BusError):
        await bus.publish(f"nowhere.{uuid4().hex}", b"", timeout=0.3)


async def test_a_full_stream_refuses(bus: Bus) -> None:
    name = f"s{uuid4().hex}"
    await bus.ensure_stream(name, [f"{name}.>"], max_bytes=2000, discard_new=True)
    outcomes = await bus.publish_many([Outgoing(f"{name}.a", bytes(500))] * 5)
    assert [isinstance(outcome, int) for outcome in outcomes] == [True, True, True, False, False]
    assert isinstance(outcomes[4], BusError)


async def test_limits_of_a_stream_can_change(bus: Bus, stream: str) -> None:
    await bus.publish(f"{stream}.a", b"kept")
    await bus.ensure_stream(stream, [f"{stream}.>"], max_age_seconds=3600)
    assert await span_of(bus, stream) == (1, 1)


async def test_fetch_gives_what_is_there_at_once(bus: Bus, stream: str) -> None:
    consumer = await bus.pull(stream, "reader")
    waiting = asyncio.create_task(consumer.fetch(500, timeout=20))
    await bus.publish(f"{stream}.a", b"1")
    began = time.monotonic()
    assert [message.payload for message in await waiting] == [b"1"]
    assert time.monotonic() - began < 2
    assert await consumer.fetch(500, timeout=0.2) == []
    await consumer.close()


async def test_unanswered_and_refused_come_again(bus: Bus, stream: str) -> None:
    await bus.publish_many([Outgoing(f"{stream}.a", payload) for payload in (b"ack", b"nak", b"silence")])
    consumer = await bus.pull(stream, "reader", ack_wait_seconds=1)
    for message in await take(consumer, 3):
        if message.payload == b"ack":
            await message.ack()
        if message.payload == b"nak":
            await message.nak(0.1)
    again = await take(consumer, 2)
    assert {(message.payload, message.attempt) for message in again} == {(b"nak", 2), (b"silence", 2)}
    await consumer.close()


async def test_close_gives_back_what_was_not_fetched(bus: Bus, stream: str) -> None:
    await bus.publish_many([Outgoing(f"{stream}.a", b"")] * 10)
    first = await bus.pull(stream, "reader", ack_wait_seconds=600)
    (message,) = await take(first, 1)
    await message.ack()
    await first.close()
    second = await bus.pull(stream, "reader", ack_wait_seconds=600)
    assert sorted(message.sequence for message in await take(second, 9)) == list(range(2, 11))
    await second.close()


async def test_consumers_share_a_name(bus: Bus, stream: str) -> None:
    consumers = [await bus.pull(stream, "reader") for _ in range(2)]
    await bus.publish_many([Outgoing(f"{stream}.a", b"")] * 50)
    seen: list[int] = []

    async def read(consumer: PullConsumer) -> None:
        while len(seen) < 50:
            for message in await consumer.fetch(5, timeout=0.2):
                seen.append(message.sequence)
                await message.ack()

    async with asyncio.timeout(10):
        await asyncio.gather(*(read(consumer) for consumer in consumers))
    assert sorted(seen) == list(range(1, 51))
    for consumer in consumers:
        await consumer.close()


async def test_emitted_reaches_listeners(bus: Bus) -> None:
    subject = f"t.{uuid4().hex}"
    heard: list[Received] = []
    subscription = await bus.listen(f"{subject}.*", heard.append)
    assert await bus.emit(f"{subject}.a", b"1", {"Kind": "x"})
    await eventually(lambda: len(heard) == 1)
    assert heard[0] == Received(f"{subject}.a", b"1", {"Kind": "x"})
    await subscription.unsubscribe()


async def test_a_failing_listener_does_not_end_listening(bus: Bus) -> None:
    subject = f"t.{uuid4().hex}"
    heard: list[Received] = []

    def listen(message: Received) -> None:
        heard.append(message)
        raise ValueError("a fault of the listener")

    await bus.listen(subject, listen)
    for _ in range(3):
        await bus.emit(subject)
    await eventually(lambda: len(heard) == 3)


async def test_pulse_is_fresh_while_the_heart_beats(bus: Bus) -> None:
    subject = f"beat.{uuid4().hex}"
    pulse = await bus.pulse(subject)
    assert not pulse.fresh()
    heart = asyncio.create_task(bus.beat(subject))
    await eventually(pulse.fresh)
    heart.cancel()
    await eventually(lambda: not pulse.fresh(0.8), seconds=5)


async def test_a_restart_shows_only_as_a_delay(parts: Parts, bus: Bus, stream: str) -> None:
    gaps: list[bool] = []
    heard: list[Received] = []
    bus.on_gap(lambda: gaps.append(bus.connected))
    subject = f"t.{uuid4().hex}"
    await bus.listen(subject, heard.append)
    consumer = await bus.pull(stream, "reader")
    fetching = asyncio.create_task(consumer.fetch(10, timeout=60))
    await parts.supervisor.stop("nats")
    await eventually(lambda: not bus.connected)
    assert gaps == [False]
    assert not await bus.emit(subject)
    with pytest.raises(BusError):
        await bus.publish(f"{stream}.a", b"too short", timeout=0.2)
    publishing = asyncio.create_task(bus.publish(f"{stream}.a", b"patient", message_id="m", timeout=20))
    await parts.supervisor.start("nats")
    assert await publishing == 1
    (message,) = await fetching
    assert message.payload == b"patient"
    assert await bus.emit(subject)
    await eventually(lambda: len(heard) == 1)
    await consumer.close()


async def test_kill_while_publishing_loses_and_doubles_nothing(parts: Parts, bus: Bus, stream: str) -> None:
    done = asyncio.Event()
    acknowledged: list[str] = []

    async def publish(writer: int) -> None:
        number = 0
        while not done.is_set():
            number += 1
            message_id = f"{writer}.{number}"
            await bus.publish(f"{stream}.a", message_id.encode(), message_id=message_id, timeout=30)
            acknowledged.append(message_id)

    writers = [asyncio.create_task(publish(writer)) for writer in range(8)]
    await eventually(lambda: len(acknowledged) > 100)
    restarts = parts.supervisor.children["nats"].restarts
    parts.supervisor.kill("nats")
    await parts.supervisor.until_ready("nats", restarts=restarts + 1)
    before = len(acknowledged)
    await eventually(lambda: len(acknowledged) > before + 100)
    done.set()
    await asyncio.gather(*writers)
    consumer = await bus.pull(stream, "reader", max_ack_pending=100_000)
    stored = [message.payload.decode() for message in await take(consumer, len(acknowledged), seconds=30)]
    assert sorted(stored) == sorted(acknowledged)
    assert await consumer.fetch(1, timeout=0.2) == []
    await consumer.close()


async def test_streams_and_consumers_come_back_on_an_empty_server(bus: Bus, stream: str) -> None:
    consumer = await bus.pull(stream, "reader")
    fetching = asyncio.create_task(consumer.fetch(1, timeout=60))
    await asyncio.sleep(0)
    assert not consumer.remade
    before = (await bus.state(stream)).create_time
    await bus._jetstream.delete_stream(stream)
    await bus._on_reconnect()  # what the client calls when it finds a server again
    await bus.publish(f"{stream}.a", b"anew", timeout=10)
    (message,) = await fetching
    assert message.payload == b"anew"
    assert consumer.remade
    assert (await bus.state(stream)).create_time > before
    await consumer.close()


async def test_connect_says_that_nobody_answers() -> None:
    with pytest.raises(BusError, match="no NATS server"):
        await Bus.connect("nats://127.0.0.1:1", "test", timeout=0.5)
