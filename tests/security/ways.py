"""The ways into a mesh, each tried with an access token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import grpc
import grpc.aio
from meshboard.analytics.v1.source_service_pb2 import ListSourcesRequest
from meshboard.analytics.v1.source_service_pb2_grpc import SourceServiceStub
from meshboard.auth.v1.auth_service_pb2 import SignOutRequest
from meshboard.auth.v1.auth_service_pb2_grpc import AuthServiceStub
from meshboard.dashboard.v1.dashboard_service_pb2 import ListDashboardsRequest
from meshboard.dashboard.v1.dashboard_service_pb2_grpc import DashboardServiceStub
from meshboard.user.v1.user_service_pb2 import GetMeRequest
from meshboard.user.v1.user_service_pb2_grpc import UserServiceStub

from services.chassis.errors import DETAILS_KEY
from tests.conditions import eventually
from tests.harness import reason_of
from tests.mesh.people import Answer, Person
from tests.parts import Mesh
from tests.security.wire import exchange

ME = "/v1/users/me"
GATEWAY, AUTH = "gateway", "auth"


@dataclass(frozen=True)
class Ways:
    """`calls` are native gRPC, by where they arrive: at the gateway, or past it at a service.

    Mind that the call to auth_svc ends the session of a token that is accepted.
    """

    url: str
    http: aiohttp.ClientSession
    calls: Mapping[str, tuple[Any, Any]]

    async def with_header(self, token: str) -> Answer:
        """JSON, with the token in the header."""
        return await exchange(self.url, "GET", ME, f"Authorization: Bearer {token}")

    async def with_cookie(self, token: str) -> Answer:
        """JSON, with the token in the cookie."""
        return await exchange(self.url, "GET", ME, f"Cookie: theme=dark; mb_session={token}")

    async def from_browser(self, token: str) -> int:
        """The code of a call by gRPC-Web."""
        url = f"{self.url}/meshboard.user.v1.UserService/GetMe"
        headers = {"content-type": "application/grpc-web+proto", "authorization": f"Bearer {token}"}
        async with self.http.post(url, data=bytes(5), headers=headers) as response:
            body = await response.read()
            if status := response.headers.get("grpc-status"):
                return int(status)
        # The last frame holds the trailers.
        return int(body.rpartition(b"grpc-status:")[2].split(b"\r\n")[0])

    async def natively(self, name: str, token: str) -> tuple[grpc.StatusCode, str]:
        """The code and the reason of a gRPC call: of a method of that service, or through the gateway."""
        method, request = self.calls[name]
        try:
            await method(request, metadata=(("authorization", f"Bearer {token}"),), timeout=10)
        except grpc.aio.AioRpcError as failure:
            known = any(key == DETAILS_KEY for key, _ in failure.trailing_metadata() or ())
            return failure.code(), reason_of(failure) if known else ""
        return grpc.StatusCode.OK, ""


@asynccontextmanager
async def ways_into(mesh: Mesh) -> AsyncIterator[Ways]:
    """Opens all ways."""
    async with AsyncExitStack() as stack:

        async def channel(address: str) -> grpc.aio.Channel:
            return await stack.enter_async_context(grpc.aio.insecure_channel(address))

        calls = {
            GATEWAY: (
                UserServiceStub(await channel(mesh.gateway_url.removeprefix("http://"))).GetMe,
                GetMeRequest(),
            ),
            AUTH: (AuthServiceStub(await channel(mesh.address("auth"))).SignOut, SignOutRequest()),
            "user": (UserServiceStub(await channel(mesh.address("user"))).GetMe, GetMeRequest()),
            "dashboard": (
                DashboardServiceStub(await channel(mesh.address("dashboard"))).ListDashboards,
                ListDashboardsRequest(),
            ),
            "analytics": (
                SourceServiceStub(await channel(mesh.address("analytics"))).ListSources,
                ListSourcesRequest(),
            ),
        }
        http = await stack.enter_async_context(aiohttp.ClientSession())
        yield Ways(mesh.gateway_url, http, calls)


REVOKED = (grpc.StatusCode.UNAUTHENTICATED, "SESSION_REVOKED")
# Until a session's end is known everywhere, and what a busy machine adds to it.
KNOWN_SECONDS, SLACK_SECONDS = 2.0, 1.5


async def assert_ended(ways: Ways, person: Person) -> None:
    """Signs the person out while all ways are used and a stream is open; fails when one goes on for too long."""
    dashboard_id = await person.new_dashboard()
    token = person.headers["authorization"].removeprefix("Bearer ")

    async def answers(natively: Iterable[str]) -> list[object]:
        return [
            (await ways.with_header(token)).status,
            (await ways.with_cookie(token)).status,
            await ways.from_browser(token),
            *await asyncio.gather(*(ways.natively(way, token) for way in natively)),
        ]

    harmless = ways.calls.keys() - {AUTH}
    assert await answers(harmless) == [200, 200, 0, *[(grpc.StatusCode.OK, "")] * len(harmless)]
    refused = [401, 401, grpc.StatusCode.UNAUTHENTICATED.value[0], *[REVOKED] * len(ways.calls)]
    async with person.watch(dashboard_id) as watch:
        await watch.next()
        await person.post("/v1/auth:signOut", {})
        began = time.monotonic()

        async def all_refused() -> bool:
            return await answers(ways.calls) == refused

        _, end = await asyncio.gather(
            eventually(all_refused, KNOWN_SECONDS + SLACK_SECONDS),
            watch.next(KNOWN_SECONDS + SLACK_SECONDS),
        )
        assert end["end"] == {"reason": "SESSION_REVOKED"}
        assert time.monotonic() - began < KNOWN_SECONDS + SLACK_SECONDS
