"""user_svc and auth_svc as `up` runs them, on parts of their own: here events find the ones that they are meant for."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
from google.protobuf.message import Message
from meshboard.auth.v1.account_service_pb2 import ResetPasswordRequest
from meshboard.auth.v1.auth_service_pb2 import SignInResponse, SignUpResponse
from meshboard.auth.v1.internal_account_service_pb2_grpc import InternalAccountServiceStub
from meshboard.user.v1.avatar_service_pb2_grpc import AvatarServiceStub
from meshboard.user.v1.erasure_service_pb2 import Erasure, GetErasureRequest
from meshboard.user.v1.erasure_service_pb2_grpc import ErasureServiceStub
from meshboard.user.v1.events_pb2 import UserErasureRequested
from meshboard.user.v1.internal_user_service_pb2_grpc import InternalUserServiceStub
from meshboard.user.v1.managed_user_service_pb2 import CreateManagedUserRequest
from meshboard.user.v1.managed_user_service_pb2_grpc import ManagedUserServiceStub
from meshboard.user.v1.profile_service_pb2_grpc import ProfileServiceStub
from meshboard.user.v1.workspace_pb2 import Member
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import db
from services.chassis.bus import Bus
from services.chassis.erasures import erase_grants, erasing
from services.chassis.inbox import Handler, consume
from services.chassis.outbox import Relay
from services.user_svc.__main__ import serve as serve_user
from tests import mailbox as mailboxes
from tests.auth_svc.conftest import (
    PASSWORD,
    Services,
    bearer,
    connected,
    make_both,
    new_email,
    running,
    running_auth,
)
from tests.conditions import eventually
from tests.harness import make_keys, service_metadata
from tests.mailbox import Mailbox
from tests.parts import Parts
from tests.parts import running as running_parts

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class People:
    """Both services. `others` are the databases of the two that only answer erasures here."""

    parts: Parts
    services: Services
    mailbox: Mailbox
    others: Mapping[str, async_sessionmaker[AsyncSession]]
    managed: ManagedUserServiceStub
    erasures: ErasureServiceStub
    profiles: ProfileServiceStub
    avatars: AvatarServiceStub
    internal_users: InternalUserServiceStub
    internal_accounts: InternalAccountServiceStub

    async def sign_up(self, email: str = "") -> SignUpResponse:
        """Somebody new, with a personal workspace."""
        return await self.services.sign_up(email)

    async def make(
        self, admin: SignUpResponse | SignInResponse, role: str = "viewer", email: str = "", **more: Any
    ) -> Member:
        """A user that the admin's workspace manages."""
        request = CreateManagedUserRequest(
            workspace_id=more.pop("workspace_id", admin.workspace.workspace_id),
            email=email or new_email(),
            display_name=more.pop("display_name", "Grace"),
            role=role,
            **more,
        )
        response = await self.managed.CreateManagedUser(request, metadata=bearer(admin.access_token))
        return response.member

    async def choose_password(self, email: str) -> SignInResponse:
        """Opens the first mail to a managed user, and signs in."""
        token = await self.mailbox.token(email, "reset-password")
        await self.services.accounts.ResetPassword(
            ResetPasswordRequest(token=token, new_password=PASSWORD), metadata=from_elsewhere()
        )
        return await self.services.sign_in(email)

    def calling_as(self, service: str, callee: str) -> Metadata:
        """The metadata of a call between services."""
        return service_metadata(self.services.keys, service, callee)

    async def erasure(self, begun: Erasure, token: str) -> Erasure:
        """How far an erasure is."""
        request = GetErasureRequest(erasure_id=begun.erasure_id, erasure_token=token)
        return (await self.erasures.GetErasure(request)).erasure

    async def until_done(self, begun: Erasure, token: str) -> Erasure:
        """The erasure when it is done."""
        found: list[Erasure] = []

        async def done() -> bool:
            found[:] = [await self.erasure(begun, token)]
            return found[0].state == Erasure.DONE

        await eventually(done)
        return found[0]


def from_elsewhere() -> Metadata:
    """The metadata of a call from an address of its own."""
    return (("x-meshboard-address", ".".join(str(number) for number in (10, *secrets.token_bytes(3)))),)


@asynccontextmanager
async def answering(parts: Parts, service: str, url: str) -> AsyncIterator[None]:
    """What `service` does about erasures, as its process does it."""
    sessions, bus = db.connect(url), await Bus.connect(parts.nats_url, service)
    handlers: dict[type[Message], Handler] = {UserErasureRequested: erasing(service, erase_grants)}
    tasks = [
        asyncio.create_task(Relay(url, bus, service).run()),
        asyncio.create_task(consume(bus, sessions, service, handlers)),
    ]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await bus.close()
        await db.engine(sessions).dispose()


@asynccontextmanager
async def running_people(folder: Path) -> AsyncIterator[People]:
    """Runs both services and their parts until the block ends; the other two do not answer yet."""
    mailbox = mailboxes.new_mailbox()
    async with AsyncExitStack() as stack:
        parts = await stack.enter_async_context(running_parts(folder))
        await stack.enter_async_context(mailboxes.serving(mailbox))
        keys = make_keys(folder / "keys")
        auth, user = await make_both(parts, keys, smtp_url=mailbox.url)
        await stack.enter_async_context(running(serve_user, user))
        await stack.enter_async_context(running_auth(auth))
        services = await stack.enter_async_context(connected(auth, user, keys))
        others = {}
        for service in ("dashboard", "analytics"):
            url = parts.postgres_url(service)
            await db.migrate(url, f"services.{service}_svc")
            others[service] = db.connect(url)
            stack.push_async_callback(db.engine(others[service]).dispose)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(user.listen))
        auth_channel = await stack.enter_async_context(grpc.aio.insecure_channel(auth.listen))
        yield People(
            parts=parts,
            services=services,
            mailbox=mailbox,
            others=others,
            managed=ManagedUserServiceStub(channel),
            erasures=ErasureServiceStub(channel),
            profiles=ProfileServiceStub(channel),
            avatars=AvatarServiceStub(channel),
            internal_users=InternalUserServiceStub(channel),
            internal_accounts=InternalAccountServiceStub(auth_channel),
        )
