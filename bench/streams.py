"""A client that holds thousands of streams of one gRPC method, and costs little beside the server that it measures.

It speaks as much HTTP/2 (RFC 9113) as that takes, in a process of its own: a real client would spend more on each
message than the server does.
"""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import multiprocessing.connection
import struct
import time
from array import array
from dataclasses import dataclass, field
from functools import partial

STREAMS_A_CONNECTION = 500
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_WINDOW = 2**31 - 1


@dataclass
class Seen:
    """What the streams were sent; times by the monotonic clock, in the order of arrival.

    Attributes:
        messages: each different message, by a digest.
        arrivals: when it arrived at each stream that it arrived at.
        ends: when streams ended.
    """

    messages: dict[bytes, bytes] = field(default_factory=dict)
    arrivals: dict[bytes, array[float]] = field(default_factory=dict)
    ends: array[float] = field(default_factory=lambda: array("d"))
    opened: int = 0

    @property
    def received(self) -> int:
        """How many messages arrived."""
        return sum(map(len, self.arrivals.values()))


class Client:
    """The streams, in a process of their own."""

    def __init__(
        self, address: str, path: str, headers: dict[str, str], request: bytes, streams: int
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(
            target=_main, args=(other, address, path, headers, request, streams), daemon=True
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """The process."""
        assert self._process.pid is not None
        return self._process.pid

    def open(self) -> None:
        """Returns when each stream has had its first message."""
        self._pipe.recv()

    def take(self) -> Seen:
        """What has arrived since the last time."""
        self._pipe.send("take")
        seen: Seen = self._pipe.recv()
        return seen

    def close(self) -> None:
        """Ends the process, and with it the streams."""
        self._pipe.close()
        self._process.join(10)
        self._process.kill()


def _main(
    pipe: multiprocessing.connection.Connection,
    address: str,
    path: str,
    headers: dict[str, str],
    request: bytes,
    streams: int,
) -> None:
    asyncio.run(_hold(pipe, address, path, headers, request, streams))


async def _hold(
    pipe: multiprocessing.connection.Connection,
    address: str,
    path: str,
    headers: dict[str, str],
    request: bytes,
    streams: int,
) -> None:
    loop, seen = asyncio.get_running_loop(), Seen()
    host, _, port = address.partition(":")
    connections = []
    for first in range(0, streams, STREAMS_A_CONNECTION):
        count = min(STREAMS_A_CONNECTION, streams - first)
        made = partial(_Connection, seen, address, path, headers, request, count)
        _, connection = await loop.create_connection(made, host, int(port))
        connections.append(connection)
    await asyncio.gather(*(connection.all_open for connection in connections))
    pipe.send("open")
    asked = asyncio.Event()
    loop.add_reader(pipe.fileno(), asked.set)
    while True:
        await asked.wait()
        asked.clear()
        if not pipe.poll():
            continue
        try:
            pipe.recv()
        except EOFError:
            return
        taken = Seen(seen.messages, seen.arrivals, seen.ends, seen.opened)
        seen.messages, seen.arrivals, seen.ends = {}, {}, array("d")
        pipe.send(taken)


class _Connection(asyncio.Protocol):
    """One connection and its streams, opened a few at a time."""

    def __init__(
        self, seen: Seen, address: str, path: str, headers: dict[str, str], request: bytes, count: int
    ) -> None:
        self.all_open: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._seen = seen
        self._head = b"".join(
            _header(name, value)
            for name, value in (
                (":method", "POST"),
                (":scheme", "http"),
                (":path", path),
                (":authority", address),
                ("content-type", "application/grpc"),
                ("te", "trailers"),
                *headers.items(),
            )
        )
        self._body = b"\0" + struct.pack(">I", len(request)) + request
        self._left = count
        self._next_id = 1
        self._waiting: set[int] = set()  # for their first message
        self._rest = bytearray()  # of a frame
        self._parts: dict[int, bytearray] = {}  # of messages, by stream

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greets."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        settings = struct.pack(">HI", 4, _WINDOW)  # SETTINGS_INITIAL_WINDOW_SIZE
        grown = struct.pack(">I", _WINDOW - 65_535)
        transport.write(_PREFACE + _frame(_SETTINGS, 0, 0, settings) + _frame(_WINDOW_UPDATE, 0, 0, grown))
        self._open()

    def connection_lost(self, exc: Exception | None) -> None:
        """Notes the ends of all streams."""
        if not self.all_open.done():
            self.all_open.set_exception(ConnectionError("the server has closed the connection"))
        self._seen.ends.extend(time.monotonic() for _ in self._parts)

    def _open(self) -> None:
        while self._left and len(self._waiting) < 50:
            stream_id = self._next_id
            self._next_id += 2
            self._left -= 1
            self._waiting.add(stream_id)
            self._parts[stream_id] = bytearray()
            self._transport.write(
                _frame(_HEADERS, _END_HEADERS, stream_id, self._head)
                + _frame(_DATA, _END_STREAM, stream_id, self._body)
            )
        if not self._waiting and not self.all_open.done():
            self.all_open.set_result(None)

    def data_received(self, data: bytes) -> None:
        """Reads frames."""
        now = time.monotonic()
        rest = self._rest
        rest += data
        at = 0
        while len(rest) - at >= 9:
            length = int.from_bytes(rest[at : at + 3], "big")
            if len(rest) - at < 9 + length:
                break
            kind, flags = rest[at + 3], rest[at + 4]
            stream_id = int.from_bytes(rest[at + 5 : at + 9], "big")
            self._take(kind, flags, stream_id, rest[at + 9 : at + 9 + length], now)
            at += 9 + length
        del rest[:at]

    def _take(self, kind: int, flags: int, stream_id: int, payload: bytearray, now: float) -> None:
        if kind == _DATA:
            self._take_data(stream_id, payload, now)
        elif kind == _SETTINGS and not flags & _ACK:
            self._transport.write(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self._transport.write(_frame(_PING, _ACK, 0, bytes(payload)))
        ended = kind == _RESET or (kind in {_DATA, _HEADERS} and flags & _END_STREAM)
        if ended and self._parts.pop(stream_id, None) is not None:
            self._seen.ends.append(now)
            self._arrived(stream_id)

    def _take_data(self, stream_id: int, payload: bytearray, now: float) -> None:
        part = self._parts[stream_id]
        part += payload
        while len(part) >= 5 and len(part) >= 5 + (size := int.from_bytes(part[1:5], "big")):
            message = bytes(part[5 : 5 + size])
            del part[: 5 + size]
            key = hashlib.blake2b(message, digest_size=8).digest()
            if key not in self._seen.messages:
                self._seen.messages[key], self._seen.arrivals[key] = message, array("d")
            self._seen.arrivals[key].append(now)
            self._arrived(stream_id)

    def _arrived(self, stream_id: int) -> None:
        if stream_id in self._waiting:
            self._waiting.discard(stream_id)
            self._seen.opened += 1
            self._open()


def _frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream_id) + payload


def _header(name: str, value: str) -> bytes:
    """A header as HPACK has it without tables and without Huffman's code (RFC 7541, 6.2.2)."""
    return b"\0" + _text(name) + _text(value)


def _text(text: str) -> bytes:
    data = text.encode()
    if len(data) < 127:
        return bytes([len(data)]) + data
    rest, length = len(data) - 127, bytearray([127])
    while rest > 127:
        length.append(rest & 127 | 128)
        rest >>= 7
    length.append(rest)
    return bytes(length) + data
