"""grpc.aio in a process of its own, because it is begun once in each."""

import subprocess
import sys

from services.chassis.completions import Bell, _socketpair

SENDS_TO_A_HUNDRED = """
import asyncio, os, sys, threading
import grpc, grpc.aio
from services.chassis import completions

rings = []


class Counted(completions.Bell):
    def recv(self, *arguments):
        rings.append(super().recv(*arguments))
        return rings[-1]


async def numbers(request, context):
    for number in range(100):
        yield number.to_bytes(2, "big")


async def read(method):
    return [int.from_bytes(message, "big") async for message in method(b"")]


async def main():
    server = grpc.aio.server()
    handler = grpc.unary_stream_rpc_method_handler(numbers)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("s", {"m": handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    completions.let_gather()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        answers = await asyncio.gather(*(read(channel.unary_stream("/s/m")) for _ in range(100)))
    await server.stop(0)
    assert answers == [list(range(100))] * 100
    # Each message is at least one event at either end.
    assert len(rings) < sum(map(len, rings)) / 2 and sum(map(len, rings)) > 20_000, (len(rings), sum(map(len, rings)))
    if sys.platform == "linux":
        (poller,) = [thread for thread in threading.enumerate() if "_poll_wrapper" in thread.name]
        assert os.sched_getscheduler(poller.native_id) == os.SCHED_BATCH
        completions.let_gather(False)
        assert os.sched_getscheduler(poller.native_id) == os.SCHED_OTHER


completions.Bell = Counted
completions.hear_together()
asyncio.run(main())
"""


def test_one_ring_stands_for_all_that_have_come() -> None:
    bell, rope = _socketpair()
    with bell, rope:
        bell.setblocking(False)
        for _ in range(100):
            rope.send(b"1")
        assert isinstance(bell, Bell)
        assert bell.recv(1) == b"1" * 100


def test_many_events_are_heard_together_and_none_is_missed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SENDS_TO_A_HUNDRED], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
