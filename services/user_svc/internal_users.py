"""What other services ask about people."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import grpc.aio
from meshboard.user.v1 import events_pb2
from meshboard.user.v1.internal_user_service_pb2 import (
    CheckInvitationRequest,
    CheckInvitationResponse,
    CheckSubjectsRequest,
    CheckSubjectsResponse,
    CreateUserRequest,
    CreateUserResponse,
    GetInvitationMailRequest,
    GetInvitationMailResponse,
    GetRightsRequest,
    GetRightsResponse,
    GetSignInRequest,
    GetSignInResponse,
    GetTeamsOfUserRequest,
    GetTeamsOfUserResponse,
    MemberHit,
    PutServiceUserRequest,
    PutServiceUserResponse,
    RemoveServiceUserRequest,
    RemoveServiceUserResponse,
    SearchMembersRequest,
    SearchMembersResponse,
)
from meshboard.user.v1.internal_user_service_pb2_grpc import InternalUserServiceServicer
from meshboard.user.v1.user_service_pb2 import GetMeResponse
from sqlalchemy import delete, exists, func, or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import errors, outbox
from services.chassis.cache import CachedMessages
from services.chassis.db import fetch_at_once
from services.chassis.rights import Fetch
from services.chassis.times import timestamp_of
from services.user_svc.convert import member_to_pb, rights_to_pb, team_to_pb, user_to_pb, workspace_to_pb
from services.user_svc.invitations import Invitations, invalid
from services.user_svc.member_search import MemberSearch
from services.user_svc.models import (
    ERASING,
    SERVICE_ACCOUNT,
    Invitation,
    Member,
    Team,
    TeamMember,
    User,
    Workspace,
)
from services.user_svc.rights import announce_rights, lock_rights
from services.user_svc.roles import OWNER, owner_role_reserved, require_role
from services.user_svc.users import user_not_found
from services.user_svc.workspaces import add_workspace

Context = grpc.aio.ServicerContext[Any, Any]

# As text, for the driver itself: it is on the way of each sign-in. UUIDv7s sort by time: without a wanted workspace the
# oldest one comes first.
_SIGN_IN = """
    SELECT users.user_id::text, display_name, email, kind, state, managing_workspace_id::text, avatar_version,
        users.version, users.create_time, users.update_time,
        workspaces.workspace_id::text, title, require_second_factor, default_role, allowed_email_domains,
        workspaces.version, workspaces.create_time, workspaces.update_time
    FROM users LEFT JOIN members USING (user_id) LEFT JOIN workspaces USING (workspace_id)
    WHERE user_id = $1 ORDER BY workspaces.workspace_id <> $2, workspaces.workspace_id LIMIT 1
"""
_OF_USER = (
    "user_id",
    "display_name",
    "email",
    "kind",
    "state",
    "managing_workspace_id",
    "avatar_version",
    "version",
    "create_time",
    "update_time",
)
_OF_WORKSPACE = (
    "workspace_id",
    "title",
    "require_second_factor",
    "default_role",
    "allowed_email_domains",
    "version",
    "create_time",
    "update_time",
)


@dataclass(frozen=True)
class InternalUserServicer(InternalUserServiceServicer):
    """Answers the other services from the tables, without a cache: they have their own. `me` is that of GetMe."""

    db: async_sessionmaker[AsyncSession]
    fetch_rights: Fetch
    me: CachedMessages[GetMeResponse]
    invitations: Invitations
    now: Callable[[], datetime]
    members: MemberSearch

    async def CreateUser(self, request: CreateUserRequest, context: Context) -> CreateUserResponse:
        now = self.now()
        async with self.db.begin() as session:
            user = await session.scalar(
                insert(User)
                .values(
                    user_id=request.user_id,
                    display_name=request.display_name,
                    email=request.email,
                    create_time=now,
                    update_time=now,
                )
                .on_conflict_do_nothing()
                .returning(User)
            )
            if user is None:
                user = await session.get(User, request.user_id)
                if user is None or user.email != request.email:
                    raise _ids_taken()
            else:
                outbox.add(session, events_pb2.UserCreated(user=user_to_pb(user)))
            if request.invitation_token:
                workspace, _ = await self.invitations.accept(
                    session, request.invitation_token, user, request.email
                )
            else:
                workspace = await self._own_workspace(session, user, request)
        return CreateUserResponse(user=user_to_pb(user), workspace=workspace_to_pb(workspace))

    async def _own_workspace(
        self, session: AsyncSession, user: User, request: CreateUserRequest
    ) -> Workspace:
        """The personal workspace, which an earlier call may have made under the same id."""
        elsewhere = exists().where(
            Workspace.creator_id == user.user_id, Workspace.workspace_id != request.workspace_id
        )
        if await session.scalar(select(elsewhere)):
            raise _ids_taken()
        title = f"{request.display_name}'s workspace"[:100]
        workspace = await add_workspace(session, user, request.workspace_id, title=title, now=self.now())
        if workspace is None:
            workspace = await session.get(Workspace, request.workspace_id)
        if workspace is None or workspace.creator_id != user.user_id:
            raise _ids_taken()
        return workspace

    async def PutServiceUser(
        self, request: PutServiceUserRequest, context: Context
    ) -> PutServiceUserResponse:
        now = self.now()
        async with self.db.begin() as session:
            await lock_rights(session, request.workspace_id)
            user = await session.get(User, request.user_id, with_for_update=True)
            if user is None:
                user = await self._add_service_user(session, request, now)
            elif user.kind != SERVICE_ACCOUNT:
                raise _ids_taken()
            elif not await session.get(Member, (request.workspace_id, request.user_id)):
                raise errors.not_found("MEMBER_NOT_FOUND", "The service account is no member any more.")
            elif user.display_name != request.display_name:
                user.display_name, user.update_time = request.display_name, now
                user.version += 1
                outbox.add(session, events_pb2.UserUpdated(user=user_to_pb(user)))
        await self.me.invalidate(user.user_id)
        return PutServiceUserResponse(user=user_to_pb(user))

    async def _add_service_user(
        self, session: AsyncSession, request: PutServiceUserRequest, now: datetime
    ) -> User:
        await require_role(session, request.workspace_id, request.role)
        if request.role == OWNER:
            raise owner_role_reserved()
        user = User(
            user_id=request.user_id,
            display_name=request.display_name,
            email="",
            kind=SERVICE_ACCOUNT,
            version=1,
            create_time=now,
            update_time=now,
        )
        session.add(user)
        await session.flush()
        member = Member(
            workspace_id=request.workspace_id, user_id=user.user_id, role=request.role, create_time=now
        )
        session.add(member)
        await session.flush()
        outbox.add(session, events_pb2.UserCreated(user=user_to_pb(user)))
        added = events_pb2.MemberAdded(member=member_to_pb(member, user))
        outbox.add(session, added, workspace_id=request.workspace_id)
        await announce_rights(session, request.workspace_id)
        return user

    async def RemoveServiceUser(
        self, request: RemoveServiceUserRequest, context: Context
    ) -> RemoveServiceUserResponse:
        async with self.db.begin() as session:
            user = await session.get(User, request.user_id)
            if user is None or user.kind != SERVICE_ACCOUNT:
                return RemoveServiceUserResponse()
            if await session.get(Workspace, request.workspace_id) is None:
                return RemoveServiceUserResponse()
            await lock_rights(session, request.workspace_id)
            removed = await session.scalar(
                delete(Member)
                .where(Member.workspace_id == request.workspace_id, Member.user_id == request.user_id)
                .returning(Member.user_id)
            )
            if removed is not None:
                event = events_pb2.MemberRemoved(workspace_id=request.workspace_id, user_id=request.user_id)
                outbox.add(session, event, workspace_id=request.workspace_id)
                await announce_rights(session, request.workspace_id)
        return RemoveServiceUserResponse()

    async def GetSignIn(self, request: GetSignInRequest, context: Context) -> GetSignInResponse:
        found = await fetch_at_once(self.db, _SIGN_IN, request.user_id, request.workspace_id or None)
        if not found:
            raise user_not_found(request.user_id)
        of_user, of_workspace = found[0][: len(_OF_USER)], found[0][len(_OF_USER) :]
        user = User(**dict(zip(_OF_USER, of_user, strict=True)))
        workspace = Workspace(**dict(zip(_OF_WORKSPACE, of_workspace, strict=True)))
        if user.state == ERASING:
            raise user_not_found(request.user_id)
        return GetSignInResponse(
            user=user_to_pb(user), workspace=workspace_to_pb(workspace) if workspace.workspace_id else None
        )

    async def GetRights(self, request: GetRightsRequest, context: Context) -> GetRightsResponse:
        rights = await self.fetch_rights(request.user_id.lower(), request.workspace_id.lower())
        return GetRightsResponse(rights=rights_to_pb(rights))

    async def GetTeamsOfUser(
        self, request: GetTeamsOfUserRequest, context: Context
    ) -> GetTeamsOfUserResponse:
        direct = select(TeamMember.team_id).where(
            TeamMember.workspace_id == request.workspace_id,
            TeamMember.user_id == request.user_id,
            or_(TeamMember.expire_time.is_(None), TeamMember.expire_time > func.now()),
        )
        of_workspace = select(Team.team_id, Team.parent_team_id).where(
            Team.workspace_id == request.workspace_id
        )
        above = of_workspace.where(Team.team_id.in_(direct)).cte(recursive=True)
        above = above.union(of_workspace.where(Team.team_id == above.c.parent_team_id))
        async with self.db() as session:
            teams = await session.scalars(
                select(Team).where(
                    Team.workspace_id == request.workspace_id, Team.team_id.in_(select(above.c.team_id))
                )
            )
            direct_team_ids = await session.scalars(direct)
        return GetTeamsOfUserResponse(teams=map(team_to_pb, teams), direct_team_ids=direct_team_ids)

    async def CheckSubjects(self, request: CheckSubjectsRequest, context: Context) -> CheckSubjectsResponse:
        async with self.db() as session:
            user_ids = await session.scalars(
                select(Member.user_id).where(
                    Member.workspace_id == request.workspace_id, Member.user_id.in_(request.user_ids)
                )
            )
            team_ids = await session.scalars(
                select(Team.team_id).where(
                    Team.workspace_id == request.workspace_id, Team.team_id.in_(request.team_ids)
                )
            )
        return CheckSubjectsResponse(user_ids=user_ids, team_ids=team_ids)

    async def GetInvitationMail(
        self, request: GetInvitationMailRequest, context: Context
    ) -> GetInvitationMailResponse:
        async with self.db() as session:
            found = await session.execute(
                select(Invitation, Workspace.title, User.display_name)
                .join(Workspace, Workspace.workspace_id == Invitation.workspace_id)
                .join(User, User.user_id == Invitation.inviter_id)
                .where(
                    Invitation.workspace_id == request.workspace_id,
                    Invitation.invitation_id == request.invitation_id,
                )
            )
        row = found.one_or_none()
        if row is None:
            raise invalid()
        invitation, title, inviter_name = row
        return GetInvitationMailResponse(
            email=invitation.email,
            token=self.invitations.token(invitation),
            workspace_title=title,
            inviter_name=inviter_name,
            role=invitation.role,
            expire_time=timestamp_of(invitation.expire_time),
        )

    async def CheckInvitation(
        self, request: CheckInvitationRequest, context: Context
    ) -> CheckInvitationResponse:
        async with self.db() as session:
            invitation = await self.invitations.preview(session, request.token, accepted_too=True)
        return CheckInvitationResponse(email=invitation.email)

    async def SearchMembers(self, request: SearchMembersRequest, context: Context) -> SearchMembersResponse:
        after = (request.after.score, request.after.id) if request.HasField("after") else None
        found = await self.members.find(request.workspace_id, request.query, after, request.limit)
        return SearchMembersResponse(
            hits=[MemberHit(score=hit.score, user=user_to_pb(hit.row, request.workspace_id)) for hit in found]
        )


def _ids_taken() -> errors.Error:
    return errors.already_exists("USER_ID_TAKEN", "The ids belong to another user or workspace.")
