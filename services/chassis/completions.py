"""What grpc.aio's own thread tells the event loop, heard together.

For each event of its core, such as a message that has been written, that thread puts the event in a queue and a byte in
a socket. The loop reads one byte in a round and then all events. So bytes pile up wherever many events come in one
round; when the socket is full the thread waits, one event comes in a round, and the answers to a service's own calls
wait behind the messages that it sends to thousands of streams.
"""

import os
import socket
import sys
import threading
from contextlib import suppress
from types import SimpleNamespace

from grpc._cython import cygrpc  # type: ignore[attr-defined]  # not for others, hence without types

_BYTES = 1 << 16


class Bell(socket.socket):
    """The end of the pair that the loop reads: one ring stands for all that have come.

    Nothing is missed: an event is in the queue before its byte is here, and the queue is emptied after each ring.
    """

    def recv(self, _bufsize: int, flags: int = 0, /) -> bytes:
        return super().recv(_BYTES, flags)


def _socketpair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    return Bell(fileno=ours.detach()), theirs


def hear_together() -> None:
    """Has this process do so. To be called before anything of grpc.aio is made."""
    cygrpc.socket = SimpleNamespace(**{**vars(socket), "socketpair": _socketpair})


def let_gather(gathers: bool = True) -> None:
    """Has grpc.aio's thread interrupt nobody when it wakes (Linux, SCHED_BATCH of sched(7)); it keeps its share.

    Where processors are idle it runs at once, as before. Where they are short it wakes for several events and not for
    each, which saves a third of what a message to a stream costs, and a twentieth of a call among many. To be called
    once grpc.aio has been begun. Without `gathers` it interrupts others as any thread does.
    """
    if sys.platform != "linux":
        return
    policy = os.SCHED_BATCH if gathers else os.SCHED_OTHER
    for thread in threading.enumerate():
        if "_poll_wrapper" in thread.name and thread.native_id:
            with suppress(OSError):  # a container may forbid it, and all works without
                os.sched_setscheduler(thread.native_id, policy, os.sched_param(0))
