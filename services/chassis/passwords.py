"""Passwords, hashed off the event loop."""

import asyncio
import ctypes
import os
import platform
import re
import struct
import sys
import threading
import time
import unicodedata
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from services.chassis import errors
from services.chassis.settings import PasswordSettings

T = TypeVar("T")

_NICE = 15
_SCHED_SETATTR = 314  # the number of the call on x86-64; the C library has it since glibc 2.41 only
# What is taken for other calls beside hashes: so many in so short a time. Who looks less often begins anew.
_OTHERS = 3
_LOOK_SECONDS = 0.25
_STALE_SECONDS = 1.0


class Passwords:
    """Hashes with argon2id in a few threads; a hash takes tens of milliseconds of a core and 19 MiB."""

    def __init__(self, settings: PasswordSettings) -> None:
        self._hasher = PasswordHasher(
            settings.password_passes, settings.password_memory_kib, settings.password_lanes
        )
        self._sharing = _Sharing(settings.password_threads)
        self._threads = ThreadPoolExecutor(settings.password_threads, "argon2", self._begin_thread)
        # A thread that has hashed waits for Python's lock, by default up to 5 ms each time; so do those behind it.
        sys.setswitchinterval(0.0005)
        self._most = self._room = settings.password_threads + settings.password_queue
        self._dummy = self._hasher.hash("nobody's password")

    def mind_calls(self, calls: Callable[[], int], tell: Callable[[bool], None]) -> None:
        """Has hashes hold up other calls less, at the price of fewer hashes, where that is needed.

        `calls` says how many calls have come to this process so far, those that ask for a hash included. `tell` is told
        when processors become short (True), and when that is over.
        """
        self._sharing.calls, self._sharing.tell = calls, tell

    async def hash(self, password: str) -> str:
        """The hash to store, with its parameters. Raises RESOURCE_EXHAUSTED (OVERLOADED)."""
        return await self._run(lambda: self._hasher.hash(normalized(password)))

    async def verify(self, password_hash: str | None, password: str) -> bool:
        """Whether the password is the hashed one; without a hash no, after the same work.

        Raises RESOURCE_EXHAUSTED (OVERLOADED).
        """
        return await self._run(lambda: self._matches(password_hash or self._dummy, password)) and bool(
            password_hash
        )

    def is_outdated(self, password_hash: str) -> bool:
        """Whether the hash was made with other parameters than those of now."""
        return self._hasher.check_needs_rehash(password_hash)

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown(cancel_futures=True)

    def _matches(self, password_hash: str, password: str) -> bool:
        try:
            return self._hasher.verify(password_hash, normalized(password))
        except (VerificationError, InvalidHashError):
            return False

    async def _run(self, work: Callable[[], T]) -> T:
        if self._room <= 0:
            raise errors.resource_exhausted(
                "OVERLOADED", "Too many passwords wait to be checked.", retry_seconds=1
            )
        self._room -= 1
        self._sharing.look()
        loop = asyncio.get_running_loop()

        def done(_: Future[T]) -> None:
            loop.call_soon_threadsafe(self._leave)

        future = self._threads.submit(work)
        # The thread's future and not the caller's: who gives up waiting leaves its work behind.
        future.add_done_callback(done)
        return await asyncio.wrap_future(future)

    def _leave(self) -> None:
        self._room += 1
        if self._room == self._most:
            self._sharing.end()

    def _begin_thread(self) -> None:
        self._sharing.thread = threading.get_native_id()
        _yield_to_others()


class _Sharing:
    """Has hashes and the event loop share a processor while other calls come, where there are two (Linux).

    A hash that runs all the time on one of two processors makes the kernel take both for busy, so that it looks for no
    place for whoever wakes: all else waits for the other one, behind each other, although the hash would make way at
    once. On the loop's own processor the hash makes way for the loop, and the other one is idle in between. That costs
    a tenth of the hashes, so not while nobody else calls.

    Attributes:
        calls: how many calls have come so far.
        tell: is told when they begin to share it, and when they cease to.
        thread: the kernel's number of the thread that hashes, once there is one.
    """

    def __init__(self, threads: int) -> None:
        self._processors = os.sched_getaffinity(0) if sys.platform == "linux" and threads == 1 else set()
        self.calls: Callable[[], int] = lambda: 0
        self.tell: Callable[[bool], None] = lambda _shared: None
        self.thread: int | None = None
        self._shared = False
        self._hashes = 0
        self._others = 0
        self._looked = 0.0

    def look(self) -> None:
        """Decides about the hash that is about to be asked for, in the thread of the loop."""
        self._hashes += 1
        if len(self._processors) != 2 or (since := time.monotonic() - self._looked) < _LOOK_SECONDS:
            return
        others = self.calls() - self._hashes
        self._place(shared=since < _STALE_SECONDS and others - self._others >= _OTHERS)
        self._others, self._looked = others, time.monotonic()

    def end(self) -> None:
        """Says that no hash is under way any more."""
        self._place(shared=False)

    def _place(self, *, shared: bool) -> None:
        if sys.platform != "linux" or shared == self._shared:
            return
        # The thread of the loop, and by inheritance that of the hash if it is still to come.
        threads = [0] if self.thread is None else [0, self.thread]
        where = {ctypes.CDLL(None).sched_getcpu()} if shared else self._processors
        # Before it is tried: what has been done to one thread only is taken back all the same.
        self._shared = shared
        self.tell(shared)
        # A container may forbid it, or not tell where we are; all works without.
        with suppress(OSError, ValueError):
            for thread in threads:
                os.sched_setaffinity(thread, where)


def _yield_to_others() -> None:
    """Has the calls of others go first where processors are short, without costing the hash its turn (Linux).

    A thread that asks for long slices is interrupted by every one that wakes and wants less at a time, and still gets
    its share (sched_setattr(2), Linux 6.12), which its nice value makes small. Without such slices that value does what
    it can.
    """
    if sys.platform != "linux":
        return
    thread = threading.get_native_id()
    if platform.machine() == "x86_64":
        # struct sched_attr: size, policy (SCHED_OTHER), flags, nice, priority, slice in ns (100 ms is the most).
        wanted = struct.pack("=IIQiIQQQ", 48, 0, 0, _NICE, 0, 100_000_000, 0, 0)
        if _has_slices() and ctypes.CDLL(None).syscall(_SCHED_SETATTR, thread, wanted, 0) == 0:
            return
    os.setpriority(os.PRIO_PROCESS, thread, _NICE)


def _has_slices() -> bool:
    """Whether the kernel heeds slices of ordinary threads; older ones take the call and do not."""
    version = re.match(r"(\d+)\.(\d+)", platform.release())
    return version is not None and (int(version[1]), int(version[2])) >= (6, 12)


def normalized(password: str) -> str:
    """One spelling for each password (RFC 8265, section 4.2: NFC)."""
    return unicodedata.normalize("NFC", password)
