"""user_svc's servicers on a real server with all stages; tokens come from the test's own identity."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

import pytest
from meshboard.auth.v1.internal_auth_service_pb2 import GetVerifiedEmailRequest, GetVerifiedEmailResponse
from meshboard.user.v1.avatar_service_pb2_grpc import AvatarServiceStub, add_AvatarServiceServicer_to_server
from meshboard.user.v1.erasure_service_pb2_grpc import (
    ErasureServiceStub,
    add_ErasureServiceServicer_to_server,
)
from meshboard.user.v1.internal_user_service_pb2 import CreateUserRequest, GetInvitationMailRequest
from meshboard.user.v1.internal_user_service_pb2_grpc import (
    InternalUserServiceStub,
    add_InternalUserServiceServicer_to_server,
)
from meshboard.user.v1.invitation_pb2 import Invitation
from meshboard.user.v1.invitation_service_pb2 import AcceptInvitationRequest, CreateInvitationRequest
from meshboard.user.v1.invitation_service_pb2_grpc import (
    InvitationServiceStub,
    add_InvitationServiceServicer_to_server,
)
from meshboard.user.v1.profile_service_pb2_grpc import (
    ProfileServiceStub,
    add_ProfileServiceServicer_to_server,
)
from meshboard.user.v1.role_service_pb2_grpc import RoleServiceStub, add_RoleServiceServicer_to_server
from meshboard.user.v1.team_service_pb2_grpc import TeamServiceStub, add_TeamServiceServicer_to_server
from meshboard.user.v1.user_service_pb2 import GetMeResponse
from meshboard.user.v1.user_service_pb2_grpc import UserServiceStub, add_UserServiceServicer_to_server
from meshboard.user.v1.workspace_service_pb2 import AddMemberRequest
from meshboard.user.v1.workspace_service_pb2_grpc import (
    WorkspaceServiceStub,
    add_WorkspaceServiceServicer_to_server,
)
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import auth, db
from services.chassis.access import Access
from services.chassis.bus import Bus
from services.chassis.cache import Cache, CachedMessages
from services.chassis.paging import Pages
from services.chassis.rights import RightsCache
from services.chassis.search import Engine
from services.chassis.search_engines import engine_of
from services.chassis.server import contracts
from services.chassis.settings import Settings
from services.user_svc.avatars import AvatarServicer
from services.user_svc.erasures import ErasureServicer
from services.user_svc.internal_users import InternalUserServicer
from services.user_svc.invitations import Invitations, InvitationServicer
from services.user_svc.member_search import MemberSearch
from services.user_svc.models import User
from services.user_svc.permissions import catalogue
from services.user_svc.pictures import Pictures
from services.user_svc.profiles import ProfileServicer
from services.user_svc.rights import rights_of
from services.user_svc.roles import RoleServicer
from services.user_svc.teams import TeamServicer
from services.user_svc.users import UserServicer
from services.user_svc.workspaces import WorkspaceServicer
from tests.harness import ISSUER, Identity, make_settings, new_id, service_metadata, serving
from tests.parts import Parts
from tests.user_svc.people import People, running_people

if TYPE_CHECKING:
    from meshboard.auth.v1.internal_auth_service_pb2_grpc import InternalAuthServiceStub

Metadata = tuple[tuple[str, str], ...]
# The rounds of a race in its long form.
LONG = pytest.param(1000, marks=[pytest.mark.long, pytest.mark.timeout(3600)])


@dataclass(frozen=True)
class Person:
    """Somebody with a personal workspace; `metadata` is what their calls carry."""

    user_id: str
    workspace_id: str
    email: str
    metadata: Metadata


class Accounts:
    """Stands in for auth_svc: has an account for everybody, whose address is verified unless it is in `unverified`."""

    def __init__(self, sessions: async_sessionmaker[AsyncSession]) -> None:
        self._sessions = sessions
        self.unverified: set[str] = set()

    async def GetVerifiedEmail(self, request: GetVerifiedEmailRequest) -> GetVerifiedEmailResponse:
        """The address."""
        async with self._sessions() as session:
            email = (await session.get_one(User, request.user_id)).email
        return GetVerifiedEmailResponse(email="" if email in self.unverified else email)


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
    roles: RoleServiceStub
    invitations: InvitationServiceStub
    tokens: Invitations
    accounts: Accounts
    internal: InternalUserServiceStub
    profiles: ProfileServiceStub
    avatars: AvatarServiceStub
    erasures: ErasureServiceStub

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

    async def invite(self, owner: Person, email: str = "", **more: Any) -> Invitation:
        """An invitation to somebody new, or to this address."""
        request = CreateInvitationRequest(
            workspace_id=owner.workspace_id, email=email or f"{new_id()}@example.org", **more
        )
        return (await self.invitations.CreateInvitation(request, metadata=owner.metadata)).invitation

    async def token_of(self, invitation: Invitation) -> str:
        """The token in the link of an invitation."""
        request = GetInvitationMailRequest(
            workspace_id=invitation.workspace_id, invitation_id=invitation.invitation_id
        )
        return (await self.internal.GetInvitationMail(request, metadata=self.calling_as("auth"))).token

    async def join(self, owner: Person, role: str) -> Person:
        """Somebody new, who has signed up by an invitation to the owner's workspace."""
        invitation = await self.invite(owner, role=role)
        return await self.sign_up(invitation, await self.token_of(invitation))

    async def sign_up(self, invitation: Invitation, token: str) -> Person:
        """Somebody new with the address of an invitation, whose token this is."""
        user_id = new_id()
        await self.internal.CreateUser(
            CreateUserRequest(
                user_id=user_id,
                workspace_id=new_id(),
                email=invitation.email,
                display_name="Grace",
                invitation_token=token,
            ),
            metadata=self.calling_as("auth"),
        )
        metadata = (
            ("authorization", f"Bearer {self.identity.token(sub=user_id, wid=invitation.workspace_id)}"),
        )
        return Person(user_id, invitation.workspace_id, invitation.email, metadata)

    async def admit(self, owner: Person, person: Person, role: str = "viewer") -> None:
        """Makes somebody who is here already a member of the owner's workspace, by an invitation."""
        token = await self.token_of(await self.invite(owner, person.email, role=role))
        await self.invitations.AcceptInvitation(
            AcceptInvitationRequest(token=token), metadata=person.metadata
        )

    async def add(self, owner: Person, person: Person, role: str) -> None:
        """Makes somebody a member whom the owner meets elsewhere."""
        await self.workspaces.AddMember(
            AddMemberRequest(workspace_id=owner.workspace_id, user_id=person.user_id, role=role),
            metadata=owner.metadata,
        )

    async def acquaintance(self, owner: Person) -> Person:
        """Somebody new, whom the owner meets in another workspace."""
        person = await self.person()
        await self.admit(person, owner)
        return person


@contextmanager
def statements_of(svc: UserSvc) -> Iterator[list[str]]:
    """The SQL statements that user_svc makes in the block, without those that fix the transaction."""
    statements: list[str] = []

    def count(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    engine = db.engine(svc.sessions).sync_engine
    event.listen(engine, "before_cursor_execute", count)
    try:
        yield statements
    finally:
        event.remove(engine, "before_cursor_execute", count)


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
    roles = RoleServicer(sessions, pages, catalogue(contracts()), now)
    tokens = Invitations(settings.derived_keys("invitations"), now)
    accounts = Accounts(sessions)
    invitations = InvitationServicer(
        sessions, tokens, cast("InternalAuthServiceStub", accounts), pages, now, new_id
    )
    internal_users = InternalUserServicer(sessions, fetch_rights, me, tokens, now, members)
    profiles = ProfileServicer(sessions, me, now)
    pictures = Pictures()
    avatars = AvatarServicer(sessions, pictures, me, now)
    erasures = ErasureServicer(sessions, me, now, new_id)
    registrations = [
        lambda server: add_UserServiceServicer_to_server(users, server),
        lambda server: add_WorkspaceServiceServicer_to_server(workspaces, server),
        lambda server: add_TeamServiceServicer_to_server(teams, server),
        lambda server: add_RoleServiceServicer_to_server(roles, server),
        lambda server: add_InvitationServiceServicer_to_server(invitations, server),
        lambda server: add_InternalUserServiceServicer_to_server(internal_users, server),
        lambda server: add_ProfileServiceServicer_to_server(profiles, server),
        lambda server: add_AvatarServiceServicer_to_server(avatars, server),
        lambda server: add_ErasureServiceServicer_to_server(erasures, server),
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
            roles=RoleServiceStub(channel),
            invitations=InvitationServiceStub(channel),
            tokens=tokens,
            accounts=accounts,
            internal=InternalUserServiceStub(channel),
            profiles=ProfileServiceStub(channel),
            avatars=AvatarServiceStub(channel),
            erasures=ErasureServiceStub(channel),
        )
    pictures.close()
    await engine.close()
    await cache.close()
    await bus.close()
    await db.engine(sessions).dispose()


@pytest.fixture(scope="session")
async def people(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[People]:
    """Both services, with events. Mark the module with xdist_group("people"): one worker then runs them."""
    async with running_people(tmp_path_factory.mktemp("people")) as both:
        yield both


@pytest.fixture
async def svc(parts: Parts, identity: Identity) -> AsyncIterator[UserSvc]:
    async with running_svc(parts, identity) as svc:
        yield svc


@pytest.fixture
async def owner(svc: UserSvc) -> Person:
    return await svc.person()
