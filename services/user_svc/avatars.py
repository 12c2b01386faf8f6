"""The pictures of people."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import grpc.aio
from google.api.httpbody_pb2 import HttpBody
from meshboard.user.v1 import events_pb2
from meshboard.user.v1.avatar_service_pb2 import (
    DeleteAvatarRequest,
    DeleteAvatarResponse,
    GetAvatarRequest,
    GetAvatarResponse,
    SetAvatarRequest,
    SetAvatarResponse,
)
from meshboard.user.v1.avatar_service_pb2_grpc import AvatarServiceServicer
from meshboard.user.v1.user_service_pb2 import GetMeResponse
from sqlalchemy import delete, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import auth, errors, outbox
from services.chassis.cache import CachedMessages
from services.user_svc.convert import user_to_pb
from services.user_svc.models import Avatar, User
from services.user_svc.pictures import Pictures
from services.user_svc.users import user_not_found, visible

Context = grpc.aio.ServicerContext[Any, Any]

_YEAR_SECONDS = 31_536_000


@dataclass(frozen=True)
class AvatarServicer(AvatarServiceServicer):
    """`me` holds the answers of GetMe by user."""

    db: async_sessionmaker[AsyncSession]
    pictures: Pictures
    me: CachedMessages[GetMeResponse]
    now: Callable[[], datetime]

    async def SetAvatar(self, request: SetAvatarRequest, context: Context) -> SetAvatarResponse:
        user_id = auth.caller().user_id
        image = await self.pictures.avatar(request.image.data, "image")
        async with self.db.begin() as session:
            user = await self._lock(session, user_id)
            await session.execute(
                insert(Avatar)
                .values(user_id=user_id, image=image)
                .on_conflict_do_update(index_elements=[Avatar.user_id], set_={"image": image})
            )
            user.version, user.update_time = user.version + 1, self.now()
            user.avatar_version = user.version
            outbox.add(session, events_pb2.UserUpdated(user=user_to_pb(user)))
        await self.me.invalidate(user_id)
        return SetAvatarResponse(user=user_to_pb(user))

    async def DeleteAvatar(self, request: DeleteAvatarRequest, context: Context) -> DeleteAvatarResponse:
        user_id = auth.caller().user_id
        async with self.db.begin() as session:
            user = await self._lock(session, user_id)
            if user.avatar_version is not None:
                await session.execute(delete(Avatar).where(Avatar.user_id == user_id))
                user.version, user.update_time, user.avatar_version = user.version + 1, self.now(), None
                outbox.add(session, events_pb2.UserUpdated(user=user_to_pb(user)))
        await self.me.invalidate(user_id)
        return DeleteAvatarResponse(user=user_to_pb(user))

    async def GetAvatar(self, request: GetAvatarRequest, context: Context) -> GetAvatarResponse:
        async with self.db() as session:
            found = await session.execute(
                select(Avatar.image, User.avatar_version)
                .join(User, User.user_id == Avatar.user_id)
                .where(User.user_id == request.user_id, visible())
            )
        row = found.one_or_none()
        if row is None:
            raise errors.not_found("AVATAR_NOT_FOUND", "There is no such picture.", user_id=request.user_id)
        image, version = row
        kept = f"max-age={_YEAR_SECONDS}, immutable" if request.version == version else "no-cache"
        # Headers of the answer over HTTP. The picture is ours by now, and still nothing in it may run or be framed.
        await context.send_initial_metadata(
            (
                ("cache-control", f"private, {kept}"),
                ("etag", f'"{version}"'),
                ("content-security-policy", "default-src 'none'; frame-ancestors 'none'; sandbox"),
                ("content-disposition", 'inline; filename="avatar.webp"'),
                ("cross-origin-resource-policy", "same-origin"),
            )
        )
        return GetAvatarResponse(image=HttpBody(content_type="image/webp", data=image))

    async def _lock(self, session: AsyncSession, user_id: str) -> User:
        user = await session.get(User, user_id, with_for_update={"key_share": True})
        if user is None:
            raise user_not_found(user_id)
        return user
