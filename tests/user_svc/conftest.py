"""user_svc's servicers on a real server with all stages; tokens come from the test's own identity."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest
from meshboard.user.v1.internal_user_service_pb2 import CreateUserRequest
from meshboard.user.v1.internal_user_service_pb2_grpc import (
    InternalUserServiceStub,
    add_InternalUserServiceServicer_to_server,
)
from meshboard.user.v1.team_service_pb2_grpc import TeamServiceStub, add_TeamServiceServicer_to_server
from meshboard.user.v1.user_service_pb2 import GetMeResponse
from meshboard.user.v1.user_service_pb2_grpc import UserServiceStub, add_UserServiceServicer_to_server
from meshboard.user.v1.workspace_service_pb2 import AddMemberRequest
from meshboard.user.v1.workspace_service_pb2_grpc import (
    WorkspaceServiceStub,
    add_WorkspaceServiceServicer_to_server,
)
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import auth, db
from services.chassis.access import Access
from services.chassis.bus import Bus
from services.chassis.cache import Cache, CachedMessages
from services.chassis.paging import Pages
from services.chassis.rights import RightsCache
from services.chassis.search import Engine
from services.chassis.search_engines import engine_of
from services.chassis.settings import Settings
from services.user_svc.internal_users import InternalUserServicer
from services.user_svc.member_search import MemberSearch
from services.user_svc.rights import rights_of
from services.user_svc.teams import TeamServicer
from services.user_svc.users import UserServicer
from services.user_svc.workspaces import WorkspaceServicer
from tests.harness import ISSUER, Identity, make_settings, new_id, service_metadata, serving
from tests.parts import Parts

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Person:
    """Somebody with a personal workspace; `metadata` is what their calls carry."""

    user_id: str
    workspace_id: str
    email: str
    metadata: Metadata


@dataclass(frozen=True)
class UserSvc:
    """Stubs of user_svc, and its database."""

    url: str
    sessions: async_sessionmaker[AsyncSession]
    engine: Engine
    bus: Bus
    identity: Identity
    users: UserServiceStub
    workspaces: WorkspaceServiceStub
    teams: TeamServiceStub
    internal: InternalUserServiceStub

    def calling_as(self, service: str) -> Metadata:
        """The metadata of a call that another service makes."""
        return service_metadata(self.identity.keys, service, "user")

    async def person(self) -> Person:
        """Somebody new, who is the owner of a personal workspace."""
        user_id, workspace_id = new_id(), new_id()
        email = f"{user_id}@example.org"
        await self.internal.CreateUser(
            CreateUserRequest(user_id=user_id, workspace_id=workspace_id, email=email, display_name="Grace"),
            metadata=self.calling_as("auth"),
        )
        token = self.identity.token(sub=user_id, wid=workspace_id)
        return Person(user_id, workspace_id, email, (("authorization", f"Bearer {token}"),))

    async def join(self, owner: Person, role: str) -> Person:
        """Somebody new, whom the owner has made a member of the owner's workspace, and whose token is for it."""
        person = await self.person()
        await self.workspaces.AddMember(
            AddMemberRequest(workspace_id=owner.workspace_id, user_id=person.user_id, role=role),
            metadata=owner.metadata,
        )
        token = self.identity.token(sub=person.user_id, wid=owner.workspace_id)
        return Person(
            person.user_id, owner.workspace_id, person.email, (("authorization", f"Bearer {token}"),)
        )


def now() -> datetime:
    """The time."""
    return datetime.now(UTC)


@asynccontextmanager
async def running_svc(parts: Parts, identity: Identity, **more: Any) -> AsyncIterator[UserSvc]:
    """user_svc with a database of its own; `more` are settings."""
    url = await parts.fresh_database("user")
    await db.migrate(url, "services.user_svc")
    settings = make_settings(Settings, parts, identity.keys, url, **more)
    sessions = db.connect(url)
    bus = await Bus.connect(parts.nats_url, "test")
    cache = await Cache.connect(parts.redis_url, bus, "user")
    fetch_rights = rights_of(sessions)
    access = Access(
        auth.TokenVerifier(ISSUER, identity.fetch_keys),
        auth.ServiceTokens("user", identity.keys),
        auth.Revocations(lambda: False, identity.list_revoked, identity.alive),
        RightsCache(fetch_rights, lambda: False),
    )
    pages = Pages(settings.derived_key("page tokens"))
    me = CachedMessages(cache, "me", GetMeResponse)
    engine = engine_of(settings, sessions)
    members = MemberSearch(sessions, engine)
    users = UserServicer(sessions, me, now, pages, members)
    workspaces = WorkspaceServicer(sessions, pages, now, new_id)
    teams = TeamServicer(sessions, pages, now, new_id)
    internal_users = InternalUserServicer(sessions, fetch_rights, me, now, members)
    registrations = [
        lambda server: add_UserServiceServicer_to_server(users, server),
        lambda server: add_WorkspaceServiceServicer_to_server(workspaces, server),
        lambda server: add_TeamServiceServicer_to_server(teams, server),
        lambda server: add_InternalUserServiceServicer_to_server(internal_users, server),
    ]
    async with serving(settings, registrations, access) as (channel, _):
        yield UserSvc(
            url=url,
            sessions=sessions,
            engine=engine,
            bus=bus,
            identity=identity,
            users=UserServiceStub(channel),
            workspaces=WorkspaceServiceStub(channel),
            teams=TeamServiceStub(channel),
            internal=InternalUserServiceStub(channel),
        )
    await engine.close()
    await cache.close()
    await bus.close()
    await db.engine(sessions).dispose()


@pytest.fixture(scope="session")
async def svc(parts: Parts, identity: Identity) -> AsyncIterator[UserSvc]:
    async with running_svc(parts, identity) as svc:
        yield svc


@pytest.fixture
async def owner(svc: UserSvc) -> Person:
    return await svc.person()
