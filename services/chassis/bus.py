"""NATS: messages that JetStream stores, and small ones that nobody stores. Nothing else imports nats.

Three ways to send: `publish` waits until JetStream has the message on disk; `emit` reaches whoever listens
now, or nobody; `beat` emits while its process lives, so that listeners notice when they have lost touch.
"""

import asyncio
import itertools
import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import nats.errors
import nats.js.errors
import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, DiscardPolicy, StorageType, StreamConfig
from prometheus_client import Gauge

from services.chassis import telemetry

log = structlog.get_logger(__name__)

DOMAIN = "DOMAIN"
DEAD_LETTERS = "DEAD_LETTERS"
BEAT_SECONDS = 0.5

_pending = Gauge(
    "meshboard_consumer_pending",
    "Stored messages that a consumer has not been brought yet.",
    ["stream", "service", "subject"],
    multiprocess_mode="mostrecent",
)
_unacknowledged = Gauge(
    "meshboard_consumer_unacknowledged",
    "Messages that a consumer was brought and has not acknowledged.",
    ["stream", "service", "subject"],
    multiprocess_mode="mostrecent",
)

_DAY = 86_400.0
_PULL_SECONDS = 30.0
_MEASURE_SECONDS = 15.0
_IDLE_HEARTBEAT_SECONDS = 3.0  # for each of a hundred consumers: a short one costs more than the messages

Headers = Mapping[str, str]


class BusError(Exception):
    """JetStream did not confirm: it is out of reach, or refuses. What was sent may be stored all the same."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message for a stream, which keeps one message of the same id within two minutes."""

    subject: str
    payload: bytes
    message_id: str = ""
    headers: Headers = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Received:
    """A message that was emitted."""

    subject: str
    payload: bytes
    headers: Headers


@dataclass(frozen=True, slots=True)
class Stored:
    """A message that a stream holds, at its place in it."""

    sequence: int
    payload: bytes
    headers: Headers


@dataclass(frozen=True, slots=True)
class StreamState:
    """What a stream holds: the messages of the sequences `first` to `last`, 1 to 0 when it is new, of `size` bytes.

    `create_time`, to a microsecond, is another one for another stream of the same name.
    """

    create_time: datetime
    first: int
    last: int
    size: int


class _Client(Client):
    """A client whose requests can be cancelled at any moment.

    nats-py waits by asyncio.wait_for, which before Python 3.12 keeps a cancellation to itself when the answer has come
    in the same round of the loop: who was to end went on for ever.
    """

    async def request(self, *args: Any, **kwargs: Any) -> Msg:
        task = asyncio.current_task()
        cancelled = task.cancelling() if task else 0
        message = await super().request(*args, **kwargs)
        if task and task.cancelling() > cancelled:
            raise asyncio.CancelledError
        return message


class Bus:
    """One connection, which comes back by itself for ever, also to a server that has lost its streams."""

    def __init__(self, client: Client, name: str, replicas: int) -> None:
        self._client = client
        self._name = name
        self._replicas = replicas
        self._jetstream = client.jetstream(timeout=5)
        self._streams: dict[str, StreamConfig] = {}
        self._connected = asyncio.Event()
        self._ack_inbox = ""
        self._ack_tokens = itertools.count()
        self._acks: dict[str, asyncio.Future[int]] = {}
        self._gap_callbacks: list[Callable[[], None]] = []
        self._restoring: asyncio.Task[None] | None = None
        self._consumers: set[PullConsumer] = set()
        self._measuring: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, url: str, name: str, *, replicas: int = 1, timeout: float = 30) -> "Bus":
        """Connects within `timeout` seconds (else BusError) and makes the streams DOMAIN and DEAD_LETTERS.

        `url` may list the servers of a cluster, separated by commas; `replicas` is then 3. `name` is what the
        server's monitoring shows.
        """
        client = _Client()
        bus = cls(client, name, replicas)
        try:
            async with asyncio.timeout(timeout):
                await client.connect(
                    servers=url.split(","),
                    name=name,
                    connect_timeout=2,
                    reconnect_time_wait=0.2,  # type: ignore[arg-type]  # typed int, but given to sleep()
                    max_reconnect_attempts=-1,
                    ping_interval=2,
                    max_outstanding_pings=2,
                    drain_timeout=5,
                    error_cb=bus._on_error,
                    disconnected_cb=bus._on_disconnect,
                    reconnected_cb=bus._on_reconnect,
                )
                bus._connected.set()
                bus._ack_inbox = client.new_inbox()
                await client.subscribe(f"{bus._ack_inbox}.*", cb=bus._on_ack)
                await bus.ensure_stream(DOMAIN, ["meshboard.>"], max_age_seconds=7 * _DAY)
                await bus.ensure_stream(DEAD_LETTERS, ["dead.>"], max_age_seconds=90 * _DAY)
        except (TimeoutError, OSError, nats.errors.Error) as error:
            await client.close()
            raise BusError(f"no NATS server with JetStream answers: {error}") from error
        return bus

    async def until_connected(self) -> None:
        """Returns when the server is in reach."""
        await self._connected.wait()

    @property
    def connected(self) -> bool:
        """Whether the server is in reach, as far as is known."""
        return self._connected.is_set()

    async def close(self) -> None:
        """Sends what is buffered, lets callbacks finish, and disconnects."""
        for task in (self._restoring, self._measuring):
            if task is not None:
                task.cancel()
        try:
            await self._client.drain()
        except nats.errors.Error:
            await self._client.close()
        self._connected.clear()
        self._fail_acks()

    # Streams

    async def ensure_stream(
        self,
        name: str,
        subjects: Sequence[str],
        *,
        max_age_seconds: float = 0,
        max_bytes: int = -1,
        duplicate_window_seconds: float = 120,
        discard_new: bool = False,
    ) -> None:
        """Makes the stream, on disk, or changes its limits to these (0 and -1: none). Raises BusError.

        A full stream drops its oldest messages; with `discard_new` it refuses new ones.
        """
        config = StreamConfig(
            name=name,
            subjects=list(subjects),
            storage=StorageType.FILE,
            num_replicas=self._replicas,
            max_age=max_age_seconds,
            max_bytes=max_bytes,
            duplicate_window=duplicate_window_seconds,
            discard=DiscardPolicy.NEW if discard_new else DiscardPolicy.OLD,
        )
        self._streams[name] = config
        try:
            await self._ensure(config)
        except nats.errors.Error as error:
            raise BusError(f"stream {name}: {error}") from error

    async def state(self, stream: str) -> StreamState:
        """Looks at a stream. Raises BusError."""
        try:
            info = await self._jetstream.stream_info(stream)
        except nats.errors.Error as error:
            raise BusError(f"stream {stream}: {error}") from error
        assert info.created is not None
        return StreamState(info.created, max(info.state.first_seq, 1), info.state.last_seq, info.state.bytes)

    async def trim(self, stream: str, sequence: int) -> None:
        """Removes what a stream holds before `sequence`. Raises BusError."""
        try:
            await self._jetstream.purge_stream(stream, seq=sequence)
        except nats.errors.Error as error:
            raise BusError(f"stream {stream}: {error}") from error

    async def _ensure(self, config: StreamConfig) -> None:
        try:
            await self._jetstream.add_stream(config)
        except nats.js.errors.BadRequestError:  # it exists, with other settings
            await self._jetstream.update_stream(config)

    # Stored messages

    async def last(self, stream: str, subject: str) -> Stored | None:
        """Gives the newest message of a subject that the stream holds, if any. Raises BusError."""
        try:
            message = await self._jetstream.get_last_msg(stream, subject)
        except nats.js.errors.NotFoundError:
            return None
        except nats.errors.Error as error:
            raise BusError(f"stream {stream}: {error}") from error
        return Stored(message.seq or 0, message.data or b"", message.headers or {})

    async def publish(
        self,
        subject: str,
        payload: bytes,
        *,
        message_id: str = "",
        headers: Headers | None = None,
        timeout: float = 5,
    ) -> int:
        """Stores a message, and gives its sequence in the stream when it is on disk. Raises BusError.

        With a `message_id` it is sent again when the connection breaks, for `timeout` seconds: a restart of
        the server shows only as a delay.
        """
        sent_headers = dict(headers or {})
        if message_id:
            sent_headers["Nats-Msg-Id"] = message_id
        with telemetry.span("nats publish", "PRODUCER", carrier=sent_headers, subject=subject):
            sent_headers.update(telemetry.trace_headers())
            return await self._store(subject, payload, sent_headers, timeout)

    async def _store(self, subject: str, payload: bytes, headers: dict[str, str], timeout: float) -> int:
        token = str(next(self._ack_tokens))
        try:
            async with asyncio.timeout(timeout):
                while True:
                    # Not while disconnected: the client would send it later, long after it was reported lost.
                    await self._connected.wait()
                    ack: asyncio.Future[int] = asyncio.get_running_loop().create_future()
                    self._acks[token] = ack
                    try:
                        await self._client.publish(
                            subject, payload, reply=f"{self._ack_inbox}.{token}", headers=headers or None
                        )
                        return await ack
                    except ConnectionError:
                        if "Nats-Msg-Id" not in headers:
                            raise
                    except nats.js.errors.NoStreamResponseError:
                        await asyncio.sleep(0.1)  # JetStream is starting, or the stream is being made again
        except TimeoutError as error:
            raise BusError(f"not confirmed within {timeout} s") from error
        except (ConnectionError, nats.errors.Error) as error:
            raise BusError(f"not confirmed: {error}") from error
        finally:
            self._acks.pop(token, None)

    async def publish_many(
        self, messages: Sequence[Outgoing], *, timeout: float = 5
    ) -> list[int | BaseException]:
        """Stores messages in this order, without waiting in between; a sequence or a BusError for each."""
        return await asyncio.gather(
            *(
                self.publish(
                    message.subject,
                    message.payload,
                    message_id=message.message_id,
                    headers=message.headers,
                    timeout=timeout,
                )
                for message in messages
            ),
            return_exceptions=True,
        )

    async def pull(
        self,
        stream: str,
        durable: str,
        *,
        subject: str = ">",
        ack_wait_seconds: float = 30,
        max_ack_pending: int = 1000,
        inactive_seconds: float = 0,
        start_sequence: int = 0,
        acks: bool = True,
    ) -> "PullConsumer":
        """Makes or changes a durable consumer, shared by all who use its name, from the stream's beginning.

        Deliveries are unlimited: who gives up on a message says so with `ack`. A consumer that nobody uses
        for `inactive_seconds` is forgotten. One with a `start_sequence` begins there; one without `acks`
        brings each message once, in order, except what is lost with a connection: who uses it keeps its own
        place. Raises BusError.
        """
        config = ConsumerConfig(
            name=durable,
            durable_name=durable,
            filter_subject=subject,
            deliver_policy=DeliverPolicy.BY_START_SEQUENCE if start_sequence else DeliverPolicy.ALL,
            opt_start_seq=start_sequence or None,
            ack_policy=AckPolicy.EXPLICIT if acks else AckPolicy.NONE,
            ack_wait=ack_wait_seconds if acks else None,
            max_deliver=-1,
            max_ack_pending=max_ack_pending if acks else None,
            inactive_threshold=inactive_seconds or None,
        )
        consumer = PullConsumer(self, self._client, stream, config)
        await consumer.start()
        self._consumers.add(consumer)
        if self._measuring is None:
            self._measuring = asyncio.create_task(self._measure())
        return consumer

    def forget_consumer(self, consumer: "PullConsumer") -> None:
        """Called by a consumer that is closed."""
        self._consumers.discard(consumer)

    async def _measure(self) -> None:
        while True:
            for consumer in list(self._consumers):
                await self._measure_consumer(consumer.stream, consumer.config)
            await asyncio.sleep(_MEASURE_SECONDS)

    async def _measure_consumer(self, stream: str, config: ConsumerConfig) -> None:
        try:
            info = await self._jetstream.consumer_info(stream, config.name or "")
        except nats.errors.Error as error:
            log.debug("consumer_not_measured", consumer=config.name, error=str(error))
            return
        labels = (stream, self._name, config.filter_subject or "")
        _pending.labels(*labels).set(info.num_pending or 0)
        _unacknowledged.labels(*labels).set(info.num_ack_pending or 0)

    async def ensure_consumer(self, stream: str, config: ConsumerConfig) -> None:
        """Makes a consumer, or changes it to `config`. Raises BusError."""
        try:
            await self._jetstream.add_consumer(stream, config)
        except nats.errors.Error as error:
            raise BusError(f"consumer {config.name} of {stream}: {error}") from error

    # Messages that nobody stores

    async def emit(self, subject: str, payload: bytes = b"", headers: Headers | None = None) -> bool:
        """Sends to whoever listens now; says whether the server was in reach. Never waits for it."""
        if not self._connected.is_set():
            return False
        try:
            sent_headers = {**telemetry.trace_headers(), **(headers or {})}
            await self._client.publish(subject, payload, headers=sent_headers or None)
        except nats.errors.Error as error:
            log.warning("emit_failed", subject=subject, error=str(error))
            return False
        return True

    async def listen(self, subject: str, callback: Callable[[Received], None]) -> Subscription:
        """Calls `callback` for each message sent on `subject` (wildcards: `*`, `>`), stored or not.

        `unsubscribe()` of the result ends it. Messages may be missed: see `on_gap`.
        """

        async def receive(message: Msg) -> None:
            callback(Received(message.subject, message.data, message.headers or {}))

        return await self._client.subscribe(subject, cb=receive)

    def on_gap(self, callback: Callable[[], None]) -> None:
        """Has `callback` called whenever listeners may have missed messages, if only for an instant."""
        self._gap_callbacks.append(callback)

    async def beat(self, subject: str) -> None:
        """Emits a heartbeat twice a second until it is cancelled."""
        while True:
            await self.emit(subject)
            await asyncio.sleep(BEAT_SECONDS)

    async def pulse(self, subject: str) -> "Pulse":
        """Follows the heartbeats on `subject`."""
        pulse = Pulse()
        await self.listen(subject, pulse.beat)
        return pulse

    # Called by the client

    async def _on_ack(self, message: Msg) -> None:
        ack = self._acks.get(message.subject.rpartition(".")[2])
        if ack is None or ack.done():
            return
        if message.headers and message.headers.get("Status") == "503":
            ack.set_exception(nats.js.errors.NoStreamResponseError())
            return
        answer = json.loads(message.data)
        if "error" in answer:
            ack.set_exception(nats.js.errors.APIError.from_error(answer["error"]))
        else:
            ack.set_result(answer["seq"])

    async def _on_error(self, error: Exception) -> None:
        log.warning("nats_error", error=str(error))
        if isinstance(error, nats.errors.SlowConsumerError):
            self._report_gap()

    async def _on_disconnect(self) -> None:
        self._connected.clear()
        self._fail_acks()
        self._report_gap()

    async def _on_reconnect(self) -> None:
        log.info("nats_reconnected")
        self._connected.set()
        if self._restoring is not None:
            self._restoring.cancel()
        self._restoring = asyncio.create_task(self._restore_streams())

    async def _restore_streams(self) -> None:
        for config in list(self._streams.values()):
            while True:
                try:
                    await self._ensure(config)
                    break
                except nats.errors.Error as error:
                    log.warning("stream_not_ready", stream=config.name, error=str(error))
                    await asyncio.sleep(0.5)

    def _fail_acks(self) -> None:
        for ack in self._acks.values():
            if not ack.done():
                ack.set_exception(ConnectionError("the connection to NATS broke"))

    def _report_gap(self) -> None:
        for callback in self._gap_callbacks:
            callback()


class Pulse:
    """Knows when the last heartbeat came."""

    def __init__(self) -> None:
        self._last = float("-inf")

    def beat(self, _message: Received | None = None) -> None:
        """Notes a heartbeat."""
        self._last = time.monotonic()

    def fresh(self, max_age: float = 2.0) -> bool:
        """Whether a heartbeat came within the last `max_age` seconds."""
        return time.monotonic() - self._last <= max_age


@dataclass(frozen=True, slots=True)
class Delivery:
    """A stored message in the hands of a consumer, until it answers or `ack_wait_seconds` have passed.

    `sequence` is the message's place in the stream, `attempt` counts deliveries from 1. The answers are not
    confirmed: a lost one means one more delivery.
    """

    subject: str
    payload: bytes
    headers: Headers
    sequence: int
    attempt: int
    store_time: datetime
    _client: Client
    _reply: str

    async def ack(self) -> None:
        """Done: do not deliver again."""
        await self._answer(b"+ACK")

    async def nak(self, delay: float = 0) -> None:
        """Failed: deliver again after `delay` seconds."""
        await self._answer(b'-NAK {"delay": %d}' % int(delay * 1e9) if delay else b"-NAK")

    async def extend(self) -> None:
        """Still at work: count `ack_wait_seconds` from now."""
        await self._answer(b"+WPI")

    async def _answer(self, answer: bytes) -> None:
        try:
            await self._client.publish(self._reply, answer)
        except nats.errors.Error as error:
            log.warning("answer_failed", subject=self.subject, sequence=self.sequence, error=str(error))


class PullConsumer:
    """Fetches messages of a durable consumer. One task uses it at a time.

    A request to the server stays open across calls of `fetch`, so that a message arrives the moment it is
    stored. (nats-py's own fetch waits for a full batch or the timeout, with a task for each message.)
    """

    def __init__(self, bus: Bus, client: Client, stream: str, config: ConsumerConfig) -> None:
        self._bus = bus
        self._client = client
        self.stream = stream
        self.config = config
        self._next = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{config.name}"
        self._inbox = client.new_inbox()
        self._subscription: Subscription | None = None
        self._request = 0  # number of the open request, the last token of its inbox
        self._expected = 0  # messages that the open request can still bring
        self._missing = False  # the server does not know the consumer
        self.remade = False  # it was missing, and begins where it began at first, perhaps of another stream
        self._heard = 0.0
        self._arrived = asyncio.Event()
        self._deliveries: deque[Delivery] = deque()

    async def start(self) -> None:
        """Makes the consumer on the server. Raises BusError."""
        await self._bus.ensure_consumer(self.stream, self.config)
        self._subscription = await self._client.subscribe(f"{self._inbox}.*", cb=self._receive)
        self._bus.on_gap(self._forget_request)

    async def fetch(self, batch: int, timeout: float) -> list[Delivery]:
        """Gives 1 to `batch` messages as soon as there are any, or [] after `timeout` seconds."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while not self._deliveries and loop.time() < deadline:
            self._arrived.clear()
            patience = min(deadline, loop.time() + 2 * _IDLE_HEARTBEAT_SECONDS)
            try:
                async with asyncio.timeout_at(patience):
                    if self._expected <= 0:
                        await self._ask(batch)
                    await self._arrived.wait()
            except TimeoutError:
                if loop.time() - self._heard >= 2 * _IDLE_HEARTBEAT_SECONDS:
                    self._forget_request()
        return [self._deliveries.popleft() for _ in range(min(batch, len(self._deliveries)))]

    async def close(self) -> None:
        """Stops, and gives back what was brought but not fetched."""
        self._bus.forget_consumer(self)
        if self._subscription is not None and self._bus.connected:
            await self._subscription.unsubscribe()
        while self._deliveries:
            await self._deliveries.popleft().nak()

    async def _ask(self, batch: int) -> None:
        await self._bus.until_connected()
        if self._missing:
            try:
                await self._bus.ensure_consumer(self.stream, self.config)
            except BusError as error:
                log.warning("consumer_not_ready", consumer=self.config.name, error=str(error))
                await asyncio.sleep(0.2)
                return
            self._missing, self.remade = False, True
        self._request += 1
        self._expected = batch
        self._heard = asyncio.get_running_loop().time()
        request = {
            "batch": batch,
            "expires": int(_PULL_SECONDS * 1e9),
            "idle_heartbeat": int(_IDLE_HEARTBEAT_SECONDS * 1e9),
        }
        try:
            await self._client.publish(
                self._next, json.dumps(request).encode(), reply=f"{self._inbox}.{self._request}"
            )
        except nats.errors.Error as error:
            log.warning("pull_failed", consumer=self.config.name, error=str(error))
            self._expected = 0
            await asyncio.sleep(0.2)

    async def _receive(self, message: Msg) -> None:
        self._heard = asyncio.get_running_loop().time()
        headers = message.headers or {}
        status = headers.get("Status")
        if status is None:
            metadata = message.metadata
            self._deliveries.append(
                Delivery(
                    message.subject,
                    message.data,
                    headers,
                    metadata.sequence.stream,
                    metadata.num_delivered,
                    metadata.timestamp,
                    self._client,
                    message.reply,
                )
            )
            self._expected -= 1
        elif status == "100" or message.subject != f"{self._inbox}.{self._request}":
            return  # an idle heartbeat, or the end of an earlier request
        else:
            # 408: expired. 409: consumer deleted, server shutting down, and the like. 503, 404: no consumer.
            self._missing = status != "408"
            self._expected = 0
        self._arrived.set()

    def _forget_request(self) -> None:
        self._expected = 0
        self._arrived.set()
