"""How the product looks and behaves for a person."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any
from zoneinfo import available_timezones

import grpc.aio
from google.protobuf.field_mask_pb2 import FieldMask
from meshboard.user.v1 import events_pb2
from meshboard.user.v1.profile_pb2 import Profile
from meshboard.user.v1.profile_service_pb2 import (
    GetProfileRequest,
    GetProfileResponse,
    UpdateProfileRequest,
    UpdateProfileResponse,
)
from meshboard.user.v1.profile_service_pb2_grpc import ProfileServiceServicer
from meshboard.user.v1.user_service_pb2 import GetMeResponse
from sqlalchemy import Text, cast, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import auth, errors, outbox
from services.chassis.cache import CachedMessages
from services.chassis.masks import changed_fields
from services.user_svc.convert import profile_to_pb
from services.user_svc.models import ProfileRow, User
from services.user_svc.users import user_not_found

Context = grpc.aio.ServicerContext[Any, Any]

_NOTIFICATIONS = ("notifications.product_news", "notifications.reports", "notifications.alerts")
_MUTABLE = {"locale", "time_zone", "theme", *_NOTIFICATIONS}
# Language, script, region and variants of BCP 47 (RFC 5646, section 2.1); extensions say nothing that we could follow.
_LOCALE = re.compile(
    r"([a-z]{2,3})(-[a-z]{4})?(-(?:[a-z]{2}|\d{3}))?((?:-(?:[a-z\d]{5,8}|\d[a-z\d]{3}))*)", re.ASCII
)


@dataclass(frozen=True)
class ProfileServicer(ProfileServiceServicer):
    """`me` holds the answers of GetMe by user."""

    db: async_sessionmaker[AsyncSession]
    me: CachedMessages[GetMeResponse]
    now: Callable[[], datetime]

    async def GetProfile(self, request: GetProfileRequest, context: Context) -> GetProfileResponse:
        async with self.db() as session:
            row = await session.get(ProfileRow, auth.caller().user_id)
        return GetProfileResponse(profile=profile_to_pb(row))

    async def UpdateProfile(self, request: UpdateProfileRequest, context: Context) -> UpdateProfileResponse:
        user_id, etag, changes = auth.caller().user_id, request.profile.etag, _changes(request)
        new = {"user_id": user_id, "update_time": self.now(), **changes}
        changed = {"update_time": self.now(), "version": ProfileRow.version + 1, **changes}
        async with self.db.begin() as session:
            if await session.get(User, user_id, with_for_update={"key_share": True, "read": True}) is None:
                raise user_not_found(user_id)
            match etag:
                case "":
                    statement: Any = (
                        insert(ProfileRow)
                        .values(**new)
                        .on_conflict_do_update(index_elements=[ProfileRow.user_id], set_=changed)
                    )
                case "0":  # as it was in the beginning
                    statement = insert(ProfileRow).values(**new).on_conflict_do_nothing()
                case _:
                    current = cast(ProfileRow.version, Text) == etag
                    statement = (
                        update(ProfileRow).where(ProfileRow.user_id == user_id, current).values(changed)
                    )
            row = await session.scalar(statement.returning(ProfileRow))
            if row is None:
                raise errors.etag_mismatch()
            outbox.add(session, events_pb2.ProfileUpdated(user_id=user_id, profile=profile_to_pb(row)))
        await self.me.invalidate(user_id)
        return UpdateProfileResponse(profile=profile_to_pb(row))


def _changes(request: UpdateProfileRequest) -> dict[str, Any]:
    """The columns to change. Raises INVALID_ARGUMENT."""
    profile = request.profile
    paths = list(request.update_mask.paths) or [
        field.name for field, _ in profile.ListFields() if field.name in {*_MUTABLE, "notifications"}
    ]
    single = [name for path in paths for name in (_NOTIFICATIONS if path == "notifications" else (path,))]
    fields = changed_fields(profile, FieldMask(paths=single), _MUTABLE) if single else set()
    changes: dict[str, Any] = {}
    if "locale" in fields:
        changes["locale"] = _locale(profile.locale)
    if "time_zone" in fields:
        if profile.time_zone and profile.time_zone not in _time_zones():
            raise errors.invalid_fields([("profile.time_zone", "is not in the IANA time zone database")])
        changes["time_zone"] = profile.time_zone
    if "theme" in fields:
        changes["theme"] = Profile.Theme.Name(profile.theme or Profile.SYSTEM)
    for path in fields & set(_NOTIFICATIONS):
        name = path.removeprefix("notifications.")
        changes[f"notify_{name}"] = getattr(profile.notifications, name)
    return changes


def _locale(tag: str) -> str:
    """The tag in its usual spelling: `de-Latn-CH`."""
    found = _LOCALE.fullmatch(tag.lower())
    if not found and tag:
        raise errors.invalid_fields([("profile.locale", "is no language tag of BCP 47")])
    if not found:
        return ""
    language, script, region, variants = found.groups(default="")
    return language + (script and f"-{script[1:].title()}") + region.upper() + variants


@cache
def _time_zones() -> frozenset[str]:
    return frozenset(available_timezones())
