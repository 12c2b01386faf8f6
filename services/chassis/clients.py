"""Calls to the other services: typed stubs whose every call carries a deadline, the service's token, the user's token
and the trace.

A failure arrives as `errors.Error`: what the peer told the caller is passed on, what says that the peer does not work
becomes UNAVAILABLE. Nothing is retried here; the gateway or the client does that, where it is safe.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar, cast

import grpc
import grpc.aio

from services.chassis import auth, errors, telemetry
from services.chassis.access import RIGHTS_VERSION_KEY, WORKSPACE_HEADER
from services.chassis.deadline import seconds_left

Stub = TypeVar("Stub")

DEFAULT_SECONDS = 5.0
MAX_MESSAGE_BYTES = 8 * 1024 * 1024
_OPTIONS = (
    ("grpc.max_receive_message_length", 4 * MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}'),
)


class Peer:
    """A connection to another service, made when the first call needs it."""

    def __init__(self, name: str, address: str, tokens: auth.ServiceTokens) -> None:
        self.name = name
        self._tokens = tokens
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)

    def stub(self, kind: Callable[[Any], Stub]) -> Stub:
        """A stub of one of the peer's services: `peer.stub(UserServiceStub)`. Its calls take `timeout` in seconds."""
        return kind(cast("grpc.aio.Channel", _PeerChannel(self)))

    async def close(self) -> None:
        """Ends the connection."""
        await self._channel.close()

    async def call(self, multicallable: Any, method: str, request: Any, timeout: float) -> Any:
        """Makes one unary call."""
        with telemetry.span(method.removeprefix("/"), "CLIENT", peer=self.name):
            try:
                return await multicallable(
                    request,
                    timeout=min(timeout, seconds_left()),
                    metadata=self._metadata(),
                    wait_for_ready=False,
                )
            except grpc.aio.AioRpcError as failure:
                raise errors.from_rpc(failure, self.name) from failure

    async def stream(
        self, multicallable: Any, method: str, request: Any, timeout: float
    ) -> AsyncIterator[Any]:
        """Makes one call that is answered by a stream, which is to be read to its end or closed."""
        with telemetry.span(method.removeprefix("/"), "CLIENT", peer=self.name):
            try:
                async for response in multicallable(
                    request,
                    timeout=min(timeout, seconds_left()),
                    metadata=self._metadata(),
                    wait_for_ready=False,
                ):
                    yield response
            except grpc.aio.AioRpcError as failure:
                raise errors.from_rpc(failure, self.name) from failure

    def raw(self) -> grpc.aio.Channel:
        """The channel below."""
        return self._channel

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        pairs = [(auth.SERVICE_TOKEN_KEY, self._tokens.issue(self.name))]
        caller = auth.caller()
        if caller.token:
            pairs.append(("authorization", f"Bearer {caller.token}"))
        if caller.rights:
            pairs.append((WORKSPACE_HEADER, caller.rights.workspace_id))
            pairs.append((RIGHTS_VERSION_KEY, str(caller.rights.version)))
        pairs.extend(telemetry.trace_headers().items())
        return tuple(pairs)


class _PeerChannel:
    """What a generated stub needs of a channel, with the peer's way of calling."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def unary_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        multicallable = self._peer.raw().unary_unary(method, *args, **kwargs)

        async def call(request: Any, *, timeout: float = DEFAULT_SECONDS) -> Any:
            return await self._peer.call(multicallable, method, request, timeout)

        return call

    def unary_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        multicallable = self._peer.raw().unary_stream(method, *args, **kwargs)

        def call(request: Any, *, timeout: float = DEFAULT_SECONDS) -> AsyncIterator[Any]:
            return self._peer.stream(multicallable, method, request, timeout)

        return call
