"""Passwords, hashed off the event loop."""

import asyncio
import os
import platform
import re
import struct
import sys
import threading
import unicodedata
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from services.chassis import errors
from services.chassis.settings import PasswordSettings

T = TypeVar("T")

_NICE = 10
_NICE_BY_SLICE = 5
_SCHED_SETATTR = 314  # the number of the call on x86-64; the C library has it since glibc 2.41 only


class Passwords:
    """Hashes with argon2id in a few threads; a hash takes tens of milliseconds of a core and 19 MiB."""

    def __init__(self, settings: PasswordSettings) -> None:
        self._hasher = PasswordHasher(
            settings.password_passes, settings.password_memory_kib, settings.password_lanes
        )
        self._threads = ThreadPoolExecutor(settings.password_threads, "argon2", _yield_to_others)
        # A thread that has hashed waits for Python's lock, by default up to 5 ms each time; so do those behind it.
        sys.setswitchinterval(0.0005)
        self._room = settings.password_threads + settings.password_queue
        self._dummy = self._hasher.hash("nobody's password")

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
        loop = asyncio.get_running_loop()

        def done(_: Future[T]) -> None:
            loop.call_soon_threadsafe(self._leave)

        future = self._threads.submit(work)
        # The thread's future and not the caller's: who gives up waiting leaves its work behind.
        future.add_done_callback(done)
        return await asyncio.wrap_future(future)

    def _leave(self) -> None:
        self._room += 1


def _yield_to_others() -> None:
    """Has the calls of others go first where processors are short, without costing the hash its turn (Linux).

    A thread that asks for long slices is interrupted by every one that wakes and wants less at a time, and still gets
    its share (sched_setattr(2), Linux 6.12). Where that is not to be had, a higher nice value does what it can.
    """
    if sys.platform != "linux":
        return
    thread = threading.get_native_id()
    if platform.machine() == "x86_64":
        import ctypes  # noqa: PLC0415 - only here

        # struct sched_attr: size, policy (SCHED_OTHER), flags, nice, priority, slice in ns (100 ms is the most).
        wanted = struct.pack("=IIQiIQQQ", 48, 0, 0, _NICE_BY_SLICE, 0, 100_000_000, 0, 0)
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
