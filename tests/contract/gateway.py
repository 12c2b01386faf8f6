"""A real Envoy with edge/envoy.yaml, and behind it a stand-in for the four services that tells what reached it."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import grpc.aio
from google.api import annotations_pb2
from google.protobuf import descriptor_pb2, message, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from jwt.algorithms import ECAlgorithm
from meshboard.options.v1 import access_pb2
from yarl import URL

from cli import envoy_config, parts
from cli.supervisor import Supervisor
from tests.harness import Identity
from tests.parts import free_port

DESCRIPTORS = descriptor_pb2.FileDescriptorSet.FromString(
    (envoy_config.REPOSITORY / "gen" / "descriptor.binpb").read_bytes()
)
POOL = DescriptorPool()
for _file in DESCRIPTORS.file:
    POOL.Add(_file)


@dataclass(frozen=True)
class Rpc:
    """An RPC of the contracts. `bindings` are its HTTP methods and path templates; `rule` is the access rule."""

    service: str
    name: str
    rule: str
    bindings: tuple[tuple[str, str], ...]
    streams: bool
    takes_stream: bool
    request: type[message.Message]
    response: type[message.Message]

    @property
    def path(self) -> str:
        return f"/{self.service}/{self.name}"

    @property
    def owner(self) -> str:
        """The service of the mesh that answers."""
        return self.service.split(".")[1]


def _rpcs() -> dict[str, Rpc]:
    found = {}
    for file in DESCRIPTORS.file:
        for service in file.service:
            for method in service.method:
                rule = method.options.Extensions[annotations_pb2.http]
                shape = POOL.FindMethodByName(f"{file.package}.{service.name}.{method.name}")
                rpc = Rpc(
                    service=f"{file.package}.{service.name}",
                    name=method.name,
                    rule=method.options.Extensions[access_pb2.access].WhichOneof("rule") or "",
                    bindings=tuple(
                        (verb.upper(), getattr(binding, verb))
                        for binding in (rule, *rule.additional_bindings)
                        if (verb := binding.WhichOneof("pattern"))
                    ),
                    streams=method.server_streaming,
                    takes_stream=method.client_streaming,
                    request=message_factory.GetMessageClass(shape.input_type),
                    response=message_factory.GetMessageClass(shape.output_type),
                )
                found[rpc.path] = rpc
    return found


RPCS = _rpcs()


@dataclass
class Arrival:
    """A call as it reached the stand-in."""

    path: str
    metadata: dict[str, str]
    request: Any
    seconds_left: float | None


Context = grpc.aio.ServicerContext[Any, Any]
Answer = Callable[[Context], Awaitable[Mapping[str, Any]]]


class StandIn(grpc.GenericRpcHandler):
    """Stands in for the four services: answers each RPC of the contracts, and remembers what arrived.

    It checks nothing, so that what is refused was refused by the gateway. `answers` maps an RPC's name to what makes
    its answer; the others answer with an empty message. A stream says `1`, and the rest when `go_on` is set.
    """

    def __init__(self, identity: Identity, ports: Mapping[str, int]) -> None:
        self.identity = identity
        self.ports = ports
        self.arrivals: list[Arrival] = []
        self.answers: dict[str, Answer] = {}
        self.go_on = asyncio.Event()
        self._servers: dict[str, grpc.aio.Server] = {}

    async def start(self, name: str) -> None:
        """Starts the server of one service."""
        server = grpc.aio.server(options=[("grpc.max_receive_message_length", 8 * 1024 * 1024)])
        server.add_generic_rpc_handlers((self,))
        checks = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        await checks.set("", health_pb2.HealthCheckResponse.SERVING)
        server.add_insecure_port(f"127.0.0.1:{self.ports[name]}")
        await server.start()
        self._servers[name] = server

    async def stop(self, name: str) -> None:
        """Stops the server of one service at once."""
        await self._servers.pop(name).stop(0)

    async def __aenter__(self) -> StandIn:
        for name in self.ports:
            await self.start(name)
        return self

    async def __aexit__(self, *_: object) -> None:
        for name in list(self._servers):
            await self.stop(name)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        rpc = RPCS.get(details.method)
        if rpc is None:
            return None
        metadata = {key: value for key, value in details.invocation_metadata or () if isinstance(value, str)}

        async def unary(request: Any, context: Context) -> message.Message:
            arrival = Arrival(rpc.path, metadata, request, context.time_remaining())
            self.arrivals.append(arrival)
            if rpc.name == "GetJwks":
                jwk = {**ECAlgorithm.to_jwk(self.identity.key.public_key(), as_dict=True), "use": "sig"}
                return rpc.response(keys=[{**jwk, "kid": self.identity.key_id, "alg": "ES256"}])
            answer = self.answers.get(rpc.name)
            return rpc.response(**await answer(context)) if answer else rpc.response()

        async def stream(request: Any, context: Context) -> AsyncIterator[message.Message]:
            self.arrivals.append(Arrival(rpc.path, metadata, request, context.time_remaining()))
            if answer := self.answers.get(rpc.name):
                await answer(context)
            yield rpc.response(cursor="1")
            await self.go_on.wait()
            yield rpc.response(cursor="2")

        async def exchange(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[message.Message]:
            async for request in requests:
                self.arrivals.append(Arrival(rpc.path, metadata, request, context.time_remaining()))
                yield rpc.response(position=request.position)

        read, write = rpc.request.FromString, rpc.response.SerializeToString
        if rpc.takes_stream:
            return grpc.stream_stream_rpc_method_handler(
                exchange, request_deserializer=read, response_serializer=write
            )
        if rpc.streams:
            return grpc.unary_stream_rpc_method_handler(
                stream, request_deserializer=read, response_serializer=write
            )
        return grpc.unary_unary_rpc_method_handler(
            unary, request_deserializer=read, response_serializer=write
        )


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Gateway:
    """A running gateway, the stand-in behind it, and an HTTP client."""

    port: int
    services: StandIn
    identity: Identity
    client: aiohttp.ClientSession
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def token(self, **claims: Any) -> str:
        """An access token for this gateway; see Identity.token."""
        return self.identity.token(**{"iss": self.url, **claims})

    def bearer(self, **claims: Any) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token(**claims)}"}

    @property
    def last(self) -> Arrival:
        """The caller's request that reached a service last; the gateway itself fetches keys now and then."""
        return next(a for a in reversed(self.services.arrivals) if "x-meshboard-address" in a.metadata)

    async def call(self, method: str, path: str, **options: Any) -> Reply:
        """Sends one HTTP request with the path as it is written; `options` are aiohttp's."""
        url = URL(f"{self.url}{path}", encoded=True)
        async with self.client.request(method, url, **options) as response:
            return Reply(response.status, response.headers, await response.read())

    def channel(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(f"127.0.0.1:{self.port}")


@asynccontextmanager
async def running(
    folder: Path,
    identity: Identity,
    *,
    otlp: str = "",
    limits: bool = False,
    change: Callable[[str], str] = lambda text: text,
) -> AsyncIterator[Gateway]:
    """Runs the gateway on free ports until it knows the keys, with its files in `folder`.

    `change` is applied to the text of its configuration.
    """
    port = free_ports(7)
    config = folder / "envoy.yaml"
    envoy_config.write(
        envoy_config.REPOSITORY / "edge" / "envoy.yaml",
        config,
        base_port=port,
        public_url=f"http://127.0.0.1:{port}",
        otlp=otlp,
        limits=limits,
    )
    config.write_text(change(config.read_text()))
    listens = tuple(("127.0.0.1", port + distance) for distance in range(3))
    envoy = parts.envoy(config, listens, port + 1, after=())
    ports = {name: port + 3 + index for index, name in enumerate(("auth", "user", "dashboard", "analytics"))}
    async with (
        StandIn(identity, ports) as services,
        Supervisor([envoy], folder),
        aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as client,
    ):
        gateway = Gateway(port, services, identity, client, folder / "logs" / "envoy.log")
        await until(lambda: _knows_keys(gateway))
        yield gateway


async def _knows_keys(gateway: Gateway) -> bool:
    return (await gateway.call("GET", "/v1/users/me", headers=gateway.bearer())).status == 200


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 20) -> None:
    """Waits until `condition` holds; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.05)


def free_ports(count: int) -> int:
    """Returns the first of `count` ports in a row that nobody listens on now."""
    while True:
        first = free_port()
        if first + count < 65536 and all(_is_free(first + distance) for distance in range(1, count)):
            return first


def _is_free(port: int) -> bool:
    with closing(socket.socket()) as listener:
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
