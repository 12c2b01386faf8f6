"""People: reading and changing them."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import grpc.aio
from meshboard.user.v1 import events_pb2, user_pb2
from meshboard.user.v1.user_service_pb2 import (
    BatchGetUsersRequest,
    BatchGetUsersResponse,
    GetMeRequest,
    GetMeResponse,
    GetUserRequest,
    GetUserResponse,
    ListUsersRequest,
    ListUsersResponse,
    SearchUsersRequest,
    SearchUsersResponse,
    UpdateUserRequest,
    UpdateUserResponse,
)
from meshboard.user.v1.user_service_pb2_grpc import UserServiceServicer
from sqlalchemy import ColumnElement, Text, cast, exists, or_, select, true, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import auth, errors, outbox
from services.chassis.cache import CachedMessages
from services.chassis.masks import changed_fields
from services.chassis.paging import Pages
from services.chassis.search import place_of
from services.chassis.texts import clean_name
from services.user_svc.convert import profile_to_pb, user_to_pb
from services.user_svc.member_search import MemberSearch
from services.user_svc.models import Member, ProfileRow, User

Context = grpc.aio.ServicerContext[Any, Any]


def user_not_found(user_id: str) -> errors.Error:
    """What is said of a user who does not exist, or whom the caller may not see."""
    return errors.not_found("USER_NOT_FOUND", "There is no such user.", user_id=user_id)


@dataclass(frozen=True)
class UserServicer(UserServiceServicer):
    """`cache` holds the answers of GetMe by user."""

    db: async_sessionmaker[AsyncSession]
    cache: CachedMessages[GetMeResponse]
    now: Callable[[], datetime]
    pages: Pages
    members: MemberSearch

    async def GetMe(self, request: GetMeRequest, context: Context) -> GetMeResponse:
        user_id = auth.caller().user_id
        response = await self.cache.get(user_id, lambda: self._load_me(user_id))
        if response is None:
            raise user_not_found(user_id)
        return response

    async def _load_me(self, user_id: str) -> GetMeResponse | None:
        async with self.db() as session:
            found = await session.execute(
                select(User, ProfileRow)
                .outerjoin(ProfileRow, ProfileRow.user_id == User.user_id)
                .where(User.user_id == user_id)
            )
        row = found.one_or_none()
        return GetMeResponse(user=user_to_pb(row[0]), profile=profile_to_pb(row[1])) if row else None

    async def GetUser(self, request: GetUserRequest, context: Context) -> GetUserResponse:
        async with self.db() as session:
            user = await session.scalar(select(User).where(User.user_id == request.user_id, visible()))
        if user is None:
            raise user_not_found(request.user_id)
        return GetUserResponse(user=_as_seen(user))

    async def BatchGetUsers(self, request: BatchGetUsersRequest, context: Context) -> BatchGetUsersResponse:
        wanted = list(dict.fromkeys(user_id.lower() for user_id in request.user_ids))
        async with self.db() as session:
            rows = await session.scalars(select(User).where(User.user_id.in_(wanted), visible()))
        users = {user.user_id: user for user in rows}
        return BatchGetUsersResponse(
            users=[_as_seen(users[user_id]) for user_id in wanted if user_id in users],
            missing_user_ids=[user_id for user_id in wanted if user_id not in users],
        )

    async def ListUsers(self, request: ListUsersRequest, context: Context) -> ListUsersResponse:
        workspace_id = auth.caller().workspace_id
        page = self.pages.open(request, workspace_id)
        wanted = [Member.workspace_id == workspace_id, page.after(User.display_name, User.user_id)]
        if request.kind:
            wanted.append(User.kind == user_pb2.User.Kind.Name(request.kind))
        if request.state:
            wanted.append(User.state == user_pb2.User.State.Name(request.state))
        if request.managed:
            wanted.append(User.managing_workspace_id == workspace_id)
        async with self.db() as session:
            rows = await session.scalars(
                select(User)
                .join(Member, Member.user_id == User.user_id)
                .where(*wanted)
                .order_by(User.display_name, User.user_id)
                .limit(page.limit)
            )
        users, next_page_token = page.close(rows.all(), lambda user: (user.display_name, user.user_id))
        return ListUsersResponse(users=[_as_seen(user) for user in users], next_page_token=next_page_token)

    async def SearchUsers(self, request: SearchUsersRequest, context: Context) -> SearchUsersResponse:
        workspace_id = auth.caller().workspace_id
        page = self.pages.open(request, workspace_id)
        found = await self.members.find(workspace_id, request.query, place_of(page), page.limit)
        hits, next_page_token = page.close(found, lambda hit: (hit.score, hit.id))
        return SearchUsersResponse(
            users=[user_to_pb(hit.row, workspace_id) for hit in hits], next_page_token=next_page_token
        )

    async def UpdateUser(self, request: UpdateUserRequest, context: Context) -> UpdateUserResponse:
        user_id = auth.caller().user_id
        if request.user.user_id.lower() != user_id:
            raise user_not_found(request.user.user_id)
        changes = {
            field: getattr(request.user, field)
            for field in changed_fields(request.user, request.update_mask, {"display_name"})
        }
        if "display_name" in changes:
            changes["display_name"] = clean_name(changes["display_name"], "user.display_name")
        etag = request.user.etag
        async with self.db.begin() as session:
            user = await session.scalar(
                update(User)
                .where(User.user_id == user_id, cast(User.version, Text) == etag if etag else true())
                .values(**changes, version=User.version + 1, update_time=self.now())
                .returning(User)
            )
            if user is None:
                if await session.get(User, user_id) is None:
                    raise user_not_found(user_id)
                raise errors.etag_mismatch()
            outbox.add(session, events_pb2.UserUpdated(user=user_to_pb(user)))
        await self.cache.invalidate(user_id)
        return UpdateUserResponse(user=user_to_pb(user))


def visible() -> ColumnElement[bool]:
    """SQL: whether the user is the caller or a member of the caller's workspace."""
    caller = auth.caller()
    co_member = exists().where(Member.workspace_id == caller.workspace_id, Member.user_id == User.user_id)
    return or_(User.user_id == caller.user_id, co_member)


def _as_seen(user: User) -> user_pb2.User:
    caller = auth.caller()
    return user_to_pb(user, seen_from=None if user.user_id == caller.user_id else caller.workspace_id)
