"""What every process of the mesh has, with or without gRPC: a private HTTP port, and an end when it is told to stop."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import re
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from aiohttp import web

from services.chassis import telemetry

Check = Callable[[], Awaitable[bool]]

_MADV_DONTNEED = 4
_COLLECTED_OBJECTS = 10_000
_LIBRARY = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) .*\.so[.0-9]*$")


async def private_http(listen: str, ready: Check) -> web.AppRunner:
    """Serves /livez, /readyz and /metrics; `cleanup()` of the result ends it."""

    async def livez(_request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_request: web.Request) -> web.Response:
        try:
            async with asyncio.timeout(2):
                good = await ready()
        except TimeoutError:
            good = False
        return web.Response(text="ok\n" if good else "not ready\n", status=200 if good else 503)

    async def metrics(_request: web.Request) -> web.Response:
        return web.Response(body=telemetry.metrics(), content_type="text/plain", charset="utf-8")

    app = web.Application()
    app.router.add_get("/livez", livez)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    host, _, port = listen.rpartition(":")
    await web.TCPSite(runner, host, int(port), reuse_port=True).start()
    return runner


async def until_stopped(*work: Coroutine[Any, Any, None]) -> None:
    """Runs background work until SIGTERM or SIGINT; ends the process when a piece of work fails."""
    give_back_memory()
    leave_old_objects_alone()
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    tasks = [asyncio.create_task(piece) for piece in work]
    waiting: asyncio.Task[Any] = asyncio.create_task(stopped.wait())
    try:
        await asyncio.wait([waiting, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
                raise RuntimeError("background work ended by itself")
    finally:
        for task in [waiting, *tasks]:
            task.cancel()
        await asyncio.gather(waiting, *tasks, return_exceptions=True)


def leave_old_objects_alone() -> None:
    """Has the garbage collector pass over what is there now, and look less often: call it after the start.

    What is there is some hundred thousand objects of code and contracts that live as long as the process, and each look
    at all of them stops it for a tenth of a second. Almost all new ones end without the collector: to look after each
    700, as is the default, takes a fifth of the time of a process that sends to thousands of streams.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECTED_OBJECTS, 10, 10)


def give_back_memory() -> None:
    """Unmaps the pages of shared libraries that only loading them needed: call it after the start.

    They stay in the page cache, and come back from there when they are used (madvise(2), MADV_DONTNEED; Linux only).
    Only mappings that cannot be written and hold nothing but pages of the file are touched.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    mapping: tuple[int, int] | None = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := _LIBRARY.match(line):
            mapping = (int(found[1], 16), int(found[2], 16)) if "w" not in found[3] else None
        elif line.startswith("Anonymous:") and line.split()[1] != "0":
            mapping = None
        elif line.startswith("VmFlags:") and mapping is not None:
            begin, end = mapping
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)
            mapping = None
