"""Load from outside the process that measures: h2load for one request over and over, a generator for many."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Literal

import aiohttp
import grpc.aio
import uvloop

LIMIT_SECONDS = 120.0  # of one load
CONNECTIONS = 4


class LoadFailedError(Exception):
    """Requests were answered otherwise than with success, or not in time."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests to one method.

    Attributes:
        protocol: `grpc` over HTTP/2, or `json` over HTTP/1.1.
        address: host and port.
        bodies: makes the requests' bodies, in the process that sends them, before time is taken; an empty one of
            `json` is a GET.
        concurrency: how many requests are under way at once.
        per_second: sends at this rate; 0: as fast as answers arrive.
        at_once: whether the generator runs whenever it wants to, where it may (Linux, SCHED_RR of sched(7)): for a few
            calls whose latencies are to hold no wait of the generator itself for a processor that all share.
    """

    protocol: Literal["grpc", "json"]
    address: str
    path: str
    headers: tuple[tuple[str, str], ...]
    bodies: Callable[[], Sequence[bytes]]
    concurrency: int
    per_second: float = 0
    at_once: bool = False


@dataclass(frozen=True)
class Sent:
    """What became of a load. Times are of time.monotonic(); latencies are seconds from sending to the answer, and
    empty when the generator does not tell."""

    requests: int
    began: float
    ended: float
    cpu_seconds: float
    latencies: tuple[float, ...] = ()

    @property
    def per_second(self) -> float:
        return self.requests / (self.ended - self.began)


# --- h2load ------------------------------------------------------------------------------------------------


def has_h2load() -> bool:
    """Says whether h2load is installed (Debian: nghttp2-client)."""
    return shutil.which("h2load") is not None


def h2load(load: Load, requests: int) -> Sent:
    """Sends the first body of `load` so many times. Raises LoadFailedError.

    h2load sees HTTP's status only: whether calls of gRPC succeeded must be seen elsewhere.
    """
    body = load.bodies()[0]
    connections = min(CONNECTIONS, load.concurrency) if load.protocol == "grpc" else load.concurrency
    options = ["-n", str(requests), "-c", str(connections), "-t", "1"]
    headers = list(load.headers)
    if load.protocol == "grpc":
        options += ["-m", str(load.concurrency // connections)]
        headers += [("content-type", "application/grpc"), ("te", "trailers")]
    else:
        options.append("--h1")
        headers.append(("content-type", "application/json"))
    # The token is visible to whoever lists processes: it is one of an account made for the bench, and soon expires.
    options += [word for name, value in headers for word in ("-H", f"{name}: {value}")]
    with tempfile.NamedTemporaryFile() as file:
        if load.protocol == "grpc":
            file.write(b"\0" + len(body).to_bytes(4, "big"))
        file.write(body)
        file.flush()
        if load.protocol == "grpc" or body:
            options += ["-d", file.name]
        before = _children_seconds()
        began = time.monotonic()
        shown = subprocess.run(
            ["h2load", *options, f"http://{load.address}{load.path}"],
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )
        cpu = _children_seconds() - before
    per_second = h2load_rate(shown.stdout, requests)
    return Sent(requests, began, began + requests / per_second, cpu)


def h2load_rate(output: str, requests: int) -> float:
    """Requests per second, from what h2load printed. Raises LoadFailedError unless all `requests` succeeded."""
    rate = re.search(r"^finished in \S+, ([\d.]+) req/s", output, re.MULTILINE)
    succeeded = re.search(r"^status codes: (\d+) 2xx", output, re.MULTILINE)
    if rate is None or succeeded is None or int(succeeded[1]) != requests:
        raise LoadFailedError(f"h2load: not all of {requests} requests succeeded:\n{output[-1000:]}")
    return float(rate[1])


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# --- the generator -----------------------------------------------------------------------------------------


class Generator:
    """A process that sends a load once: `with Generator(load) as it: it.start(); sent = it.wait()`.

    Entering returns when the bodies are made and the connections are open.
    """

    def __init__(self, load: Load) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy threads of gRPC
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_generate, args=(theirs, load), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Generator:
        self._receive()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.join(1)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def start(self) -> None:
        self._pipe.send("start")

    def wait(self) -> Sent:
        """What became of it. Raises LoadFailedError."""
        sent = self._receive()
        assert isinstance(sent, Sent)
        return sent

    def _receive(self) -> object:
        if not self._pipe.poll(LIMIT_SECONDS):
            raise LoadFailedError("The load generator does not answer.")
        try:
            answer: object = self._pipe.recv()
        except EOFError:
            raise LoadFailedError("The load generator ended.") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _generate(pipe: Connection, load: Load) -> None:
    with suppress(EOFError, KeyboardInterrupt, BrokenPipeError):  # the process that measures has gone
        try:
            if load.at_once and sys.platform == "linux":
                with suppress(OSError):  # only the administrator may
                    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
            uvloop.run(_send(pipe, load))
        except Exception as error:
            pipe.send(LoadFailedError(f"{load.protocol} {load.path}: {error!r}"))


async def _send(pipe: Connection, load: Load) -> None:
    bodies = load.bodies()
    connect = _connect_grpc if load.protocol == "grpc" else _connect_json
    call, close = await connect(load)
    try:
        pipe.send("ready")
        await asyncio.to_thread(pipe.recv)
        async with asyncio.timeout(LIMIT_SECONDS):
            pipe.send(await _drive(call, bodies, load.concurrency, load.per_second))
    finally:
        await close()


Call = Callable[[bytes], Awaitable[None]]


async def _drive(call: Call, bodies: Sequence[bytes], concurrency: int, per_second: float) -> Sent:
    waiting = deque(enumerate(bodies))
    latencies: list[float] = []
    spent = time.process_time()
    began = time.monotonic()

    async def caller() -> None:
        while waiting:
            number, body = waiting.popleft()
            due = began + number / per_second if per_second else 0.0
            if (early := due - time.monotonic()) > 0:
                await asyncio.sleep(early)
            # From when it was due: a caller that is held up must not hide how long others would have waited.
            sent = due or time.monotonic()
            await call(body)
            latencies.append(time.monotonic() - sent)

    async with asyncio.TaskGroup() as callers:
        for _ in range(concurrency):
            callers.create_task(caller())
    ended = time.monotonic()
    return Sent(len(bodies), began, ended, time.process_time() - spent, tuple(latencies))


async def _connect_grpc(load: Load) -> tuple[Call, Callable[[], Awaitable[None]]]:
    channels = [
        grpc.aio.insecure_channel(load.address, options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(min(CONNECTIONS, load.concurrency))
    ]
    for channel in channels:
        await channel.channel_ready()
    # Without serializers: bodies are bytes.
    methods: deque[grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]]
    methods = deque(channel.unary_unary(load.path) for channel in channels)

    async def call(body: bytes) -> None:
        methods.rotate()
        await methods[0](body, metadata=load.headers, timeout=LIMIT_SECONDS)

    async def close() -> None:
        for channel in channels:
            await channel.close()

    return call, close


async def _connect_json(load: Load) -> tuple[Call, Callable[[], Awaitable[None]]]:
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=load.concurrency),
        headers={"content-type": "application/json", **dict(load.headers)},
    )
    url = f"http://{load.address}{load.path}"

    async def call(body: bytes) -> None:
        request: Any = session.post(url, data=body) if body else session.get(url)
        async with request as response:
            answer = await response.read()
        if response.status != 200:
            raise LoadFailedError(f"{response.status} {answer[:500]!r}")

    return call, session.close
