"""auth_svc and user_svc as `up` runs them, in this process, on real parts."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import jwt
import pytest
from meshboard.auth.v1.account_service_pb2_grpc import AccountServiceStub
from meshboard.auth.v1.auth_service_pb2 import SignInRequest, SignInResponse, SignUpRequest, SignUpResponse
from meshboard.auth.v1.auth_service_pb2_grpc import AuthServiceStub
from meshboard.auth.v1.factor_service_pb2_grpc import FactorServiceStub
from meshboard.auth.v1.impersonation_service_pb2_grpc import ImpersonationServiceStub
from meshboard.auth.v1.internal_auth_service_pb2_grpc import InternalAuthServiceStub
from meshboard.auth.v1.service_account_service_pb2_grpc import ServiceAccountServiceStub
from meshboard.auth.v1.session_service_pb2_grpc import SessionServiceStub
from meshboard.user.v1.internal_user_service_pb2 import GetInvitationMailRequest
from meshboard.user.v1.internal_user_service_pb2_grpc import InternalUserServiceStub
from meshboard.user.v1.invitation_service_pb2 import AcceptInvitationRequest, CreateInvitationRequest
from meshboard.user.v1.invitation_service_pb2_grpc import InvitationServiceStub
from meshboard.user.v1.role_service_pb2_grpc import RoleServiceStub
from meshboard.user.v1.user_service_pb2_grpc import UserServiceStub
from meshboard.user.v1.workspace_service_pb2_grpc import WorkspaceServiceStub
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.auth_svc.__main__ import serve as serve_auth
from services.auth_svc.models import Account
from services.auth_svc.settings import AuthSettings
from services.chassis import db
from services.chassis.settings import Settings
from services.user_svc.__main__ import serve as serve_user
from tests import mailbox as mailboxes
from tests.harness import make_keys, make_settings, new_id, service_metadata
from tests.mailbox import Mailbox
from tests.parts import Parts, free_port

PASSWORD = "a long enough passphrase"
Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Services:
    """Both services and stubs of what they offer; `sessions` is the database of auth_svc."""

    auth_settings: AuthSettings
    user_settings: Settings
    keys: Path
    auth: AuthServiceStub
    own_sessions: SessionServiceStub
    factors: FactorServiceStub
    accounts: AccountServiceStub
    internal_auth: InternalAuthServiceStub
    service_accounts: ServiceAccountServiceStub
    impersonations: ImpersonationServiceStub
    users: UserServiceStub
    workspaces: WorkspaceServiceStub
    invitations: InvitationServiceStub
    internal_users: InternalUserServiceStub
    roles: RoleServiceStub
    sessions: async_sessionmaker[AsyncSession]
    user_sessions: async_sessionmaker[AsyncSession]

    async def sign_up(self, email: str = "", password: str = PASSWORD) -> SignUpResponse:
        """A new person, by default with an address of their own."""
        return await self.auth.SignUp(
            SignUpRequest(email=email or new_email(), password=password, display_name="Ada")
        )

    async def sign_in(self, email: str, password: str = PASSWORD) -> SignInResponse:
        """Another session of somebody."""
        return await self.auth.SignIn(SignInRequest(email=email, password=password))

    async def invite(self, workspace_id: str, email: str, metadata: Metadata, role: str = "viewer") -> str:
        """Invites an address in the name of whose metadata this is, and gives the token of the link."""
        request = CreateInvitationRequest(workspace_id=workspace_id, email=email, role=role)
        created = await self.invitations.CreateInvitation(request, metadata=metadata)
        mail = await self.internal_users.GetInvitationMail(
            GetInvitationMailRequest(
                workspace_id=workspace_id, invitation_id=created.invitation.invitation_id
            ),
            metadata=service_metadata(self.keys, "auth", "user"),
        )
        return mail.token

    async def admit(
        self, workspace_id: str, metadata: Metadata, user_id: str, token: str, role: str = "viewer"
    ) -> None:
        """Makes somebody with an account, whose access token this is, a member by an invitation."""
        async with self.sessions.begin() as session:
            account = await session.get_one(Account, user_id)
            account.verify_time = account.verify_time or datetime.now(UTC)
        invitation = await self.invite(workspace_id, account.email, metadata, role)
        await self.invitations.AcceptInvitation(
            AcceptInvitationRequest(token=invitation), metadata=bearer(token)
        )

    async def sign_up_when_user_svc_is_back(self, email: str) -> SignUpResponse:
        """Repeats a sign-up until auth_svc has noticed that user_svc is there again."""
        async with asyncio.timeout(20):
            while True:
                try:
                    return await self.sign_up(email)
                except grpc.aio.AioRpcError as failure:
                    if failure.code() is not grpc.StatusCode.UNAVAILABLE:
                        raise


def new_email() -> str:
    """An address that nobody has used."""
    return f"{new_id()}@example.org"


def claims_of(access_token: str) -> dict[str, Any]:
    """What an access token says, unverified."""
    claims: dict[str, Any] = jwt.decode(access_token, options={"verify_signature": False})
    return claims


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """The metadata of a call with this access token."""
    return (("authorization", f"Bearer {token}"),)


def from_elsewhere(token: str = "") -> tuple[tuple[str, str], ...]:
    """The metadata of a call from an address of its own, so that the failures of other tests do not count."""
    address = ".".join(str(number) for number in (10, *secrets.token_bytes(3)))
    return (("x-meshboard-address", address), *(bearer(token) if token else ()))


@asynccontextmanager
async def running(
    serve: Callable[[Any], Coroutine[Any, Any, None]], settings: Settings
) -> AsyncIterator[None]:
    """Runs a service until the block ends."""
    task = asyncio.create_task(serve(settings))
    try:
        async with asyncio.timeout(30), grpc.aio.insecure_channel(settings.listen) as channel:
            ready = asyncio.create_task(channel.channel_ready())
            await asyncio.wait([task, ready], return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                ready.cancel()
                task.result()
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def running_auth(settings: AuthSettings) -> AbstractAsyncContextManager[None]:
    """Runs auth_svc."""
    return running(serve_auth, settings)


async def make_both(parts: Parts, keys: Path, **more: Any) -> tuple[AuthSettings, Settings]:
    """Settings of the two services, which know each other's addresses."""
    ports = [free_port() for _ in range(4)]
    addresses = {"auth_address": f"127.0.0.1:{ports[0]}", "user_address": f"127.0.0.1:{ports[1]}"}
    auth = make_settings(
        AuthSettings,
        parts,
        keys,
        await parts.fresh_database("auth"),
        **addresses,
        listen=addresses["auth_address"],
        private_listen=f"127.0.0.1:{ports[2]}",
        **more,
    )
    user = make_settings(
        Settings,
        parts,
        keys,
        await parts.fresh_database("user"),
        **addresses,
        listen=addresses["user_address"],
        private_listen=f"127.0.0.1:{ports[3]}",
    )
    return auth, user


@asynccontextmanager
async def connected(auth: AuthSettings, user: Settings, keys: Path) -> AsyncIterator[Services]:
    """Stubs and databases of two services."""
    sessions, user_sessions = db.connect(auth.postgres_url), db.connect(user.postgres_url)
    async with (
        grpc.aio.insecure_channel(auth.listen) as auth_channel,
        grpc.aio.insecure_channel(user.listen) as user_channel,
    ):
        yield Services(
            auth_settings=auth,
            user_settings=user,
            keys=keys,
            auth=AuthServiceStub(auth_channel),
            own_sessions=SessionServiceStub(auth_channel),
            factors=FactorServiceStub(auth_channel),
            accounts=AccountServiceStub(auth_channel),
            internal_auth=InternalAuthServiceStub(auth_channel),
            service_accounts=ServiceAccountServiceStub(auth_channel),
            impersonations=ImpersonationServiceStub(auth_channel),
            users=UserServiceStub(user_channel),
            workspaces=WorkspaceServiceStub(user_channel),
            invitations=InvitationServiceStub(user_channel),
            internal_users=InternalUserServiceStub(user_channel),
            roles=RoleServiceStub(user_channel),
            sessions=sessions,
            user_sessions=user_sessions,
        )
    await db.engine(sessions).dispose()
    await db.engine(user_sessions).dispose()


@pytest.fixture(scope="session")
async def mailbox() -> AsyncIterator[Mailbox]:
    """Where the mails of `services` arrive."""
    mailbox = mailboxes.new_mailbox()
    async with mailboxes.serving(mailbox):
        yield mailbox


@pytest.fixture(scope="session")
async def services(
    parts: Parts, tmp_path_factory: pytest.TempPathFactory, mailbox: Mailbox
) -> AsyncIterator[Services]:
    """Both services, shared by the tests of a run."""
    keys = make_keys(tmp_path_factory.mktemp("auth-keys"))
    auth, user = await make_both(parts, keys, smtp_url=mailbox.url)
    async with (
        running(serve_user, user),
        running_auth(auth),
        connected(auth, user, keys) as both,
    ):
        yield both


@pytest.fixture
async def settings(parts: Parts, tmp_path: Path) -> AuthSettings:
    """Settings with a database and keys of their own, for what needs no service."""
    url = await parts.fresh_database("auth")
    await db.migrate(url, "services.auth_svc")
    return make_settings(AuthSettings, parts, make_keys(tmp_path / "keys"), url)


@pytest.fixture
async def sessions(settings: AuthSettings) -> AsyncIterator[async_sessionmaker[AsyncSession]]:
    """The database of `settings`."""
    pool = db.connect(settings.postgres_url)
    yield pool
    await db.engine(pool).dispose()
