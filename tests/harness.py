"""What tests of one service stand on: keys, tokens and rights as the mesh would give them, and a real server.

`Identity` stands in for auth_svc and user_svc: it signs real access tokens and says what rights people have. The server
is the chassis' own, on port 0, with all stages.
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import grpc
import grpc.aio
import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from google.rpc import error_details_pb2, status_pb2
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from uuid_utils.compat import uuid7

from services.chassis import auth, errors
from services.chassis.access import Access, Credential
from services.chassis.resources import Resource
from services.chassis.rights import ROLES, Rights, RightsCache
from services.chassis.server import Register, Server
from services.chassis.settings import Settings
from tests.parts import Parts

ISSUER = "http://127.0.0.1:8080"
# A workspace that there is not. Its id is well-formed, for consumers of other tests meet events that name it too: the
# stream is that of the whole run.
NOWHERE = str(UUID(int=0))
S = TypeVar("S", bound=Settings)


def new_id() -> str:
    """A new UUIDv7."""
    return str(uuid7())


def make_keys(folder: Path) -> Path:
    """Fills a folder with the keys of the four services and a master key, as `up` does."""
    folder.mkdir(parents=True, exist_ok=True)
    for service in auth.SERVICES:
        key = ec.generate_private_key(ec.SECP256R1())
        (folder / f"{service}.key.pem").write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )
        (folder / f"{service}.pub.pem").write_bytes(
            key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        )
    (folder / "master.key").write_text(base64.b64encode(os.urandom(32)).decode())
    return folder


def make_settings(kind: type[S], parts: Parts, keys: Path, postgres_url: str, **more: Any) -> S:
    """Settings of a service under test: ports chosen by the system, the run's real servers."""
    values: dict[str, Any] = {
        "postgres_url": postgres_url,
        "redis_url": parts.redis_url,
        "nats_url": parts.nats_url,
        "listen": "127.0.0.1:0",
        "private_listen": "127.0.0.1:0",
        "keys_dir": keys,
        "master_key_file": keys / "master.key",
        "public_url": ISSUER,
    }
    return kind(**{**values, **more})


class Identity:
    """People, their tokens and their rights. `rights` is what user_svc would say; change it as you like."""

    def __init__(self, keys: Path) -> None:
        self.keys = keys
        self.key_id = "test-key"
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.rights: dict[tuple[str, str], Rights] = {}
        self.revoked: set[str] = set()
        # Whether announcements of changes arrive; without them nothing is remembered.
        self.fresh = False

    def member(self, role: str = "viewer", workspace_id: str = "", team_ids: Iterable[str] = ()) -> Member:
        """A new person with a role in a workspace (a new one by default)."""
        member = Member(self, new_id(), workspace_id or new_id())
        member.become(role, team_ids)
        return member

    def token(self, **claims: Any) -> str:
        """An access token with these claims; what is not given is valid, what is None is left out."""
        now = int(time.time())
        all_claims = {
            "iss": ISSUER,
            "aud": auth.AUDIENCE,
            "sub": new_id(),
            "sid": new_id(),
            "jti": new_id(),
            "client_id": "meshboard",
            "iat": now,
            "auth_time": now,
            "exp": now + 600,
            "amr": ["pwd"],
            "scope": auth.FULL_SCOPE,
            **claims,
        }
        kept = {name: value for name, value in all_claims.items() if value is not None}
        header = {"typ": auth.ACCESS_TOKEN_TYPE, "kid": self.key_id}
        return jwt.encode(kept, self.key, "ES256", headers=header)

    async def fetch_keys(self) -> auth.Keys:
        """The public keys, as auth_svc would give them."""
        return {self.key_id: self.key.public_key()}

    async def fetch_rights(self, user_id: str, workspace_id: str) -> Rights:
        """The rights, as user_svc would give them."""
        try:
            return self.rights[user_id, workspace_id]
        except KeyError:
            raise errors.not_found("WORKSPACE_NOT_FOUND", "There is no such workspace.") from None

    async def alive(self, session_id: str) -> bool:
        """Whether the session is alive, as auth_svc would say."""
        return session_id not in self.revoked

    async def list_revoked(self) -> set[str]:
        """The sessions that have ended, as auth_svc would list them."""
        return self.revoked

    def access(
        self,
        service: str,
        *,
        db: async_sessionmaker[AsyncSession] | None = None,
        resources: Iterable[Resource] = (),
        credentials: Mapping[str, Credential] | None = None,
    ) -> Access:
        """The access stage of a service that trusts this identity."""
        return Access(
            auth.TokenVerifier(ISSUER, self.fetch_keys),
            auth.ServiceTokens(service, self.keys),
            auth.Revocations(lambda: self.fresh, self.list_revoked, self.alive),
            RightsCache(self.fetch_rights, lambda: self.fresh),
            db=db,
            resources=resources,
            credentials=credentials,
        )


class Member:
    """A person in a workspace; `metadata` is what their calls carry."""

    def __init__(self, identity: Identity, user_id: str, workspace_id: str) -> None:
        self.identity = identity
        self.user_id = user_id
        self.workspace_id = workspace_id
        self.session_id = new_id()
        self.token = identity.token(sub=user_id, wid=workspace_id, sid=self.session_id)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata of this person's calls."""
        return (("authorization", f"Bearer {self.token}"),)

    def become(self, role: str, team_ids: Iterable[str] = ()) -> None:
        """Gives the person a role and teams."""
        key = (self.user_id, self.workspace_id)
        version = self.identity.rights[key].version + 1 if key in self.identity.rights else 1
        self.identity.rights[key] = Rights(*key, role, ROLES[role], frozenset(team_ids), version)

    def sign_out(self) -> None:
        """Ends the person's session."""
        self.identity.revoked.add(self.session_id)


@asynccontextmanager
async def serving(
    settings: Settings, registrations: Iterable[Register], access: Access
) -> AsyncIterator[tuple[grpc.aio.Channel, Server]]:
    """Runs a server with all stages, and a channel to it."""
    server = Server(settings, registrations, access)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield channel, server
    finally:
        await server.stop()


def service_metadata(keys: Path, service: str, audience: str) -> tuple[tuple[str, str], ...]:
    """The metadata of a call that one service makes to another."""
    return ((auth.SERVICE_TOKEN_KEY, auth.ServiceTokens(service, keys).issue(audience)),)


def reason_of(failure: grpc.aio.AioRpcError) -> str:
    """The reason of an error; fails when it has not exactly one ErrorInfo."""
    details = [
        detail for detail in status_of(failure).details if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR)
    ]
    assert len(details) == 1, f"{len(details)} ErrorInfo in {failure}"
    info = error_details_pb2.ErrorInfo.FromString(details[0].value)
    assert info.domain == errors.DOMAIN
    return str(info.reason)


async def outcome(call: Awaitable[object]) -> tuple[grpc.StatusCode, str]:
    """The code and the reason with which a call ends, for conditions that are waited for; `""` when it is answered."""
    try:
        await call
    except grpc.aio.AioRpcError as failure:
        return failure.code(), reason_of(failure)
    return grpc.StatusCode.OK, ""


async def refused(call: Awaitable[object]) -> tuple[grpc.StatusCode, str]:
    """The code and the reason with which a call fails; fails when it does not."""
    try:
        answer = await call
    except grpc.aio.AioRpcError as failure:
        return failure.code(), reason_of(failure)
    raise AssertionError(f"not refused: {answer}")


def status_of(failure: grpc.aio.AioRpcError) -> status_pb2.Status:
    """The google.rpc.Status of an error."""
    for key, value in failure.trailing_metadata() or ():
        if key == errors.DETAILS_KEY:
            assert isinstance(value, bytes)
            return status_pb2.Status.FromString(value)
    raise AssertionError(f"no status details in {failure!r}")
