"""The life of a gRPC service: workers, server, reflection, graceful end.

With several workers the process forks before any gRPC object exists, and SO_REUSEPORT spreads connections over them.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import structlog
import uvloop
from aiohttp import web
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from services.chassis import access, telemetry
from services.chassis.clients import MAX_MESSAGE_BYTES
from services.chassis.interceptor import Interceptor
from services.chassis.process import Check, private_http
from services.chassis.settings import S, Settings, load

log = structlog.get_logger(__name__)

DESCRIPTOR_FILE = Path(__file__).resolve().parents[2] / "gen" / "descriptor.binpb"
# Calls under way get this long when the process is told to stop.
GRACE_SECONDS = 5.0
_OPTIONS = (
    ("grpc.so_reuseport", 1),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", 4 * MAX_MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", 2000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
)

Register = Callable[[Any], None]


class _Names:
    """Stands in for a server to learn which services a registration adds."""

    def __init__(self) -> None:
        self.services: list[str] = []

    def add_generic_rpc_handlers(self, _handlers: object) -> None:
        """Ignored."""

    def add_registered_method_handlers(self, service: str, _handlers: object) -> None:
        """Notes the name."""
        self.services.append(service)


class _Generic:
    """Passes what is registered on to a server without a handler for each method by itself.

    grpc.aio waits for the next call of each such method, and looks at all of them for each call: a dozen microseconds
    for ten methods. The interceptor finds the handler of a method once, and remembers it.
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Passed on."""
        self._server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, _service: str, _handlers: object) -> None:
        """Ignored: the same methods are in the generic handlers."""


def rules_for(registrations: Iterable[Register]) -> dict[str, access.Rule]:
    """The access rules of the services that the registrations add. Raises MissingAccessError."""
    names = _Names()
    for register in registrations:
        register(names)
    pool = descriptor_pool.Default()
    return access.rules_of(pool.FindServiceByName(name) for name in names.services)


class Server:
    """A gRPC server with all stages, health, and reflection of the whole mesh, and its private HTTP port.

    `registrations` add servicers: `lambda server: add_UserServiceServicer_to_server(users, server)`. `ready` are checks
    of what the service needs. Raises MissingAccessError when a method has no access that this service can enforce.
    """

    def __init__(
        self,
        settings: Settings,
        registrations: Iterable[Register],
        who: access.Access,
        *,
        ready: Iterable[Check] = (),
    ) -> None:
        registrations = list(registrations)
        rules = rules_for(registrations)
        for rule in rules.values():
            who.check_rule(rule)
        self._interceptor = Interceptor(
            rules, who, max_calls=settings.max_calls, call_seconds=settings.call_seconds
        )
        self.draining = asyncio.Event()
        self._settings = settings
        self._ready = list(ready)
        self._grpc = grpc.aio.server(interceptors=[self._interceptor], options=_OPTIONS)
        generic = _Generic(self._grpc)
        for register in registrations:
            register(generic)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, cast("grpc.aio.Server", generic))
        self._services = sorted({path.split("/")[1] for path in rules})
        _add_reflection(generic)
        self._http: web.AppRunner | None = None
        self.port = 0

    async def start(self) -> None:
        """Listens on both addresses, and says SERVING."""
        self.port = self._grpc.add_insecure_port(self._settings.listen)
        await self._grpc.start()
        for name in ("", *self._services):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._http = await private_http(self._settings.private_listen, self._is_ready)

    def calls(self) -> int:
        """How many calls this process has admitted so far."""
        return self._interceptor.admitted.count

    async def stop(self) -> None:
        """Says NOT_SERVING, lets calls under way finish, and stops."""
        self.draining.set()
        await self._health.enter_graceful_shutdown()
        await self._grpc.stop(GRACE_SECONDS)
        if self._http:
            await self._http.cleanup()

    async def _is_ready(self) -> bool:
        if self.draining.is_set():
            return False
        return all([await check() for check in self._ready])


def contracts() -> descriptor_pb2.FileDescriptorSet:
    """The contracts of all services."""
    return descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTOR_FILE.read_bytes())


def _add_reflection(server: Any) -> None:
    """Reflection of the whole descriptor set, so that one address tells of every service."""
    pool = descriptor_pool.DescriptorPool()
    names = []
    for file in contracts().file:
        pool.Add(file)
        names += [f"{file.package}.{service.name}" for service in file.service]
    for module in (health_pb2, reflection_pb2):
        file = descriptor_pb2.FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(file)
        pool.Add(file)
    names += [health.SERVICE_NAME, reflection.SERVICE_NAME]
    reflection.enable_server_reflection(names, server, pool)


def main(service: str, kind: type[S], serve: Callable[[S], Coroutine[Any, Any, None]]) -> None:
    """Runs a service: settings, logs, workers. `serve(settings)` returns when the process is told to stop."""
    settings = load(kind)
    if settings.workers > 1:
        _fork(settings.workers)
    telemetry.start(service, level=settings.log_level, otlp_endpoint=settings.otlp_endpoint)
    try:
        uvloop.run(serve(settings))
    except access.MissingAccessError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error
    finally:
        telemetry.stop()


def _fork(workers: int) -> None:
    """Returns in each worker. The parent restarts workers that die, passes SIGTERM on, and ends with them."""
    children: set[int] = set()
    stopping = False

    def stop(number: int, _frame: object) -> None:
        nonlocal stopping
        stopping = True
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    parent = os.getpid()
    while True:
        while len(children) < workers and not stopping:
            child = os.fork()
            if child == 0:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                _die_with(parent)
                return
            children.add(child)
        if not children:
            sys.exit(0)
        with suppress(InterruptedError):
            ended, status = os.wait()
            children.discard(ended)
            telemetry.forget_worker(ended)
            if not stopping:
                print(f"worker {ended} ended with status {status}: starting another", file=sys.stderr)
                time.sleep(0.5)


def _die_with(parent: int) -> None:
    """Has the kernel end this worker when its parent dies (Linux; elsewhere the supervisor ends the group)."""
    if sys.platform != "linux":
        return
    import ctypes  # noqa: PLC0415 - only here

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(0)
