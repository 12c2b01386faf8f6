"""The baseline of reads: what grpc.aio does by itself, without an interceptor, for the same bytes."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

import grpc
import grpc.aio
import uvloop
from meshboard.user.v1.user_service_pb2 import GetMeRequest, GetMeResponse


@dataclass(frozen=True)
class Echo:
    """A running echo server."""

    address: str
    pid: int


@contextmanager
def running(answer: bytes) -> Iterator[Echo]:
    """Serves GetMe in a process of its own: each call gets the GetMeResponse that `answer` is when serialized."""
    context = multiprocessing.get_context("spawn")  # a fork would copy threads of gRPC
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, answer), daemon=True)
    process.start()
    theirs.close()
    try:
        port = ours.recv()
        assert process.pid is not None
        yield Echo(f"127.0.0.1:{port}", process.pid)
    finally:
        ours.close()
        process.join(2)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(pipe: Connection, answer: bytes) -> None:
    uvloop.run(_serve_until_closed(pipe, answer))


async def _serve_until_closed(pipe: Connection, answer: bytes) -> None:
    response = GetMeResponse.FromString(answer)

    async def get_me(_request: GetMeRequest, _context: object) -> GetMeResponse:
        return response

    # Parses each request and serializes each answer, as any servicer does, and no more.
    handler = grpc.unary_unary_rpc_method_handler(
        get_me, GetMeRequest.FromString, GetMeResponse.SerializeToString
    )
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("meshboard.user.v1.UserService", {"GetMe": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    pipe.send(port)
    await asyncio.to_thread(pipe.poll, None)  # True when the other end is closed
    await server.stop(0)
