"""Accounts that admins of a workspace make for others, and manage."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import grpc.aio
from meshboard.auth.v1.internal_account_service_pb2 import ReserveAccountRequest
from meshboard.auth.v1.internal_account_service_pb2_grpc import InternalAccountServiceStub
from meshboard.user.v1 import events_pb2, user_pb2
from meshboard.user.v1.managed_user_service_pb2 import (
    CreateManagedUserRequest,
    CreateManagedUserResponse,
    DeactivateUserRequest,
    DeactivateUserResponse,
    ReactivateUserRequest,
    ReactivateUserResponse,
    UpdateManagedUserRequest,
    UpdateManagedUserResponse,
)
from meshboard.user.v1.managed_user_service_pb2_grpc import ManagedUserServiceServicer
from meshboard.user.v1.user_service_pb2 import GetMeResponse
from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import auth, errors, outbox
from services.chassis.cache import CachedMessages
from services.chassis.masks import changed_fields
from services.chassis.texts import clean_name
from services.chassis.times import timestamp_of
from services.user_svc.convert import member_to_pb, user_to_pb
from services.user_svc.memberships import lock_user, require_owners, require_seniority
from services.user_svc.models import ACTIVE, DEACTIVATED, ERASING, Member, User, Workspace
from services.user_svc.rights import announce_rights, lock_rights
from services.user_svc.roles import require_rank, require_role
from services.user_svc.users import user_not_found
from services.user_svc.workspaces import add_member, require_allowed_email

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True)
class ManagedUserServicer(ManagedUserServiceServicer):
    """`accounts` keeps addresses in auth_svc; `me` holds the answers of GetMe by user."""

    db: async_sessionmaker[AsyncSession]
    accounts: InternalAccountServiceStub
    me: CachedMessages[GetMeResponse]
    now: Callable[[], datetime]
    new_id: Callable[[], str]

    async def CreateManagedUser(
        self, request: CreateManagedUserRequest, context: Context
    ) -> CreateManagedUserResponse:
        name = clean_name(request.display_name, "display_name")
        async with self.db() as session:
            made = await self._made(session, request.request_id)
            if made is not None:
                return made
            # Before the address is kept, so that a refusal leaves no trace.
            await _require_allowed(session, request)
        reserved = await self.accounts.ReserveAccount(
            ReserveAccountRequest(
                user_id=self.new_id(),
                workspace_id=auth.caller().workspace_id,
                email=request.email,
                display_name=name,
            )
        )
        return await self._add(request, reserved.user_id, name)

    async def _add(
        self, request: CreateManagedUserRequest, user_id: str, name: str
    ) -> CreateManagedUserResponse:
        caller, now = auth.caller(), self.now()
        async with self.db.begin() as session:
            await lock_rights(session, caller.workspace_id)
            workspace = await _require_allowed(session, request)
            user = await session.scalar(
                insert(User)
                .values(
                    user_id=user_id,
                    display_name=name,
                    email=request.email,
                    managing_workspace_id=caller.workspace_id,
                    creator_id=caller.user_id,
                    request_id=request.request_id or None,
                    create_time=now,
                    update_time=now,
                )
                .on_conflict_do_nothing()
                .returning(User)
            )
            if user is None:  # somebody has made it a moment ago
                made = await self._made(session, request.request_id)
                if made is None:
                    raise errors.already_exists("EMAIL_TAKEN", "The address has an account.")
                return made
            outbox.add(session, events_pb2.UserCreated(user=user_to_pb(user)))
            member = await add_member(session, workspace, user, request.role, now)
            await announce_rights(session, caller.workspace_id)
        return CreateManagedUserResponse(member=member_to_pb(member, user))

    async def UpdateManagedUser(
        self, request: UpdateManagedUserRequest, context: Context
    ) -> UpdateManagedUserResponse:
        fields = changed_fields(request.user, request.update_mask, {"display_name"})
        name = clean_name(request.user.display_name, "user.display_name") if fields else ""
        async with self.db.begin() as session:
            user = await session.get(User, request.user.user_id, with_for_update={"key_share": True})
            user = _managed(user, request.user.user_id)
            await require_seniority(session, user.user_id)
            if request.user.etag and request.user.etag != str(user.version):
                raise errors.etag_mismatch()
            if fields:
                user.display_name, user.version, user.update_time = name, user.version + 1, self.now()
                outbox.add(session, events_pb2.UserUpdated(user=user_to_pb(user)))
        await self.me.invalidate(user.user_id)
        return UpdateManagedUserResponse(user=user_to_pb(user))

    async def DeactivateUser(
        self, request: DeactivateUserRequest, context: Context
    ) -> DeactivateUserResponse:
        return DeactivateUserResponse(user=await self._become(DEACTIVATED, request.user_id.lower()))

    async def ReactivateUser(
        self, request: ReactivateUserRequest, context: Context
    ) -> ReactivateUserResponse:
        return ReactivateUserResponse(user=await self._become(ACTIVE, request.user_id.lower()))

    async def _become(self, state: str, user_id: str) -> user_pb2.User:
        now = self.now()
        async with self.db.begin() as session:
            found, memberships = await lock_user(session, user_id)
            user = _managed(found, user_id)
            await require_seniority(session, user_id)
            if user.state != state:
                if state == DEACTIVATED:
                    require_owners(memberships, named_in=auth.caller().workspace_id)
                user.state, user.version, user.update_time = state, user.version + 1, now
                outbox.add(session, events_pb2.UserUpdated(user=user_to_pb(user)))
                changed = events_pb2.UserStateChanged(
                    user_id=user_id, state=user_pb2.User.State.Value(state), time=timestamp_of(now)
                )
                outbox.add(session, changed, workspace_id=auth.caller().workspace_id)
                for membership in memberships:
                    await announce_rights(session, membership.workspace_id)
        await self.me.invalidate(user_id)
        return user_to_pb(user)

    async def _made(self, session: AsyncSession, request_id: str) -> CreateManagedUserResponse | None:
        """What an earlier call with this `request_id` has answered; "" is that of none."""
        caller = auth.caller()
        found = await session.execute(
            select(Member, User)
            .join(User, User.user_id == Member.user_id)
            .where(
                Member.workspace_id == caller.workspace_id,
                User.managing_workspace_id == caller.workspace_id,
                User.creator_id == caller.user_id,
                User.request_id == request_id,
            )
        )
        row = found.one_or_none()
        return CreateManagedUserResponse(member=member_to_pb(*row)) if row else None


async def _require_allowed(session: AsyncSession, request: CreateManagedUserRequest) -> Workspace:
    """The workspace, if it lets such a member in, and the caller may give that role."""
    workspace_id = auth.caller().workspace_id
    await require_role(session, workspace_id, request.role)
    await require_rank(session, request.role)
    workspace = await session.get_one(Workspace, workspace_id)
    require_allowed_email(workspace, request.email)
    return workspace


def _managed(user: User | None, user_id: str) -> User:
    """The user, if the caller's workspace manages it. Raises NOT_FOUND (USER_NOT_FOUND)."""
    if user is None or user.managing_workspace_id != auth.caller().workspace_id or user.state == ERASING:
        raise user_not_found(user_id)
    return user
