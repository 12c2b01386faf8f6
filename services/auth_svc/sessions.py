"""Sign-in sessions: how one begins, is continued and ends."""

import hmac
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum

import jwt
from google.protobuf.timestamp_pb2 import Timestamp
from meshboard.auth.v1.events_pb2 import SessionRevoked, SignedIn
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from uuid_utils.compat import uuid7

from services.auth_svc import refresh_tokens
from services.auth_svc.models import Account, Session
from services.auth_svc.refresh_tokens import RefreshToken, fingerprint
from services.auth_svc.settings import AuthSettings
from services.auth_svc.signing_keys import SigningKey
from services.chassis import outbox
from services.chassis.auth import ACCESS_TOKEN_TYPE, ALGORITHM, AUDIENCE, LEEWAY_SECONDS
from services.chassis.trust import Ask, Load


@dataclass(frozen=True, slots=True)
class Begun:
    """A new session with the secrets that only its client will hold."""

    session: Session
    refresh_token: RefreshToken
    refresh_key: str


def begin(
    session: AsyncSession, account: Account, workspace_id: str, settings: AuthSettings, now: datetime
) -> Begun:
    """Begins a session of the account in a workspace ("": in none), and emits `SignedIn`."""
    token = refresh_tokens.first_token()
    refresh_key = refresh_tokens.new_refresh_key()
    row = Session(
        session_id=str(uuid7()),
        user_id=account.user_id,
        workspace_id=workspace_id or None,
        family_hash=fingerprint(token.family),
        key_hash=fingerprint(refresh_key),
        generation=token.generation,
        create_time=now,
        expire_time=now + timedelta(seconds=settings.session_seconds),
    )
    session.add(row)
    outbox.add(
        session,
        SignedIn(
            user_id=row.user_id, session_id=row.session_id, workspace_id=workspace_id, time=_timestamp(now)
        ),
    )
    return Begun(row, token, refresh_key)


class Verdict(Enum):
    """What presenting a refresh token leads to."""

    EXCHANGED = "exchanged"
    SUPERSEDED = "superseded"
    REUSED = "reused"
    INVALID = "invalid"


async def exchange(
    session: AsyncSession, token: RefreshToken, refresh_key: str, settings: AuthSettings, now: datetime
) -> tuple[Verdict, Session | None]:
    """Judges a refresh token, and does what follows from that; the lock on the session's row settles races.

    After EXCHANGED the session's newest token is the successor of `token`. After REUSED it is revoked. Source: RFC
    9700, section 4.14.
    """
    row = await session.scalar(
        select(Session).where(Session.family_hash == fingerprint(token.family)).with_for_update()
    )
    if row is None or row.revoke_time or row.expire_time <= now or token.generation > row.generation:
        return Verdict.INVALID, row
    if token.generation < row.generation - 1:
        _revoke(session, row, SessionRevoked.REFRESH_TOKEN_REUSED, now)
        return Verdict.REUSED, row
    if token.generation == row.generation - 1:
        # Its successor is the newest token, hence not used yet.
        if not hmac.compare_digest(fingerprint(refresh_key), row.key_hash):
            return Verdict.SUPERSEDED, row
        return Verdict.EXCHANGED, row
    row.generation += 1
    row.expire_time = now + timedelta(seconds=settings.session_seconds)
    return Verdict.EXCHANGED, row


async def sign_out(session: AsyncSession, session_id: str, now: datetime) -> Session | None:
    """Revokes the session; None when it had ended before."""
    row = await session.get(Session, session_id, with_for_update=True)
    if row is None or row.revoke_time:
        return None
    _revoke(session, row, SessionRevoked.SIGNED_OUT, now)
    return row


def _revoke(
    session: AsyncSession, row: Session, reason: SessionRevoked.Reason.ValueType, now: datetime
) -> None:
    row.revoke_time = now
    outbox.add(
        session,
        SessionRevoked(
            user_id=row.user_id, session_id=row.session_id, reason=reason, revoke_time=_timestamp(now)
        ),
    )


def access_token(row: Session, key: SigningKey, settings: AuthSettings, now: datetime) -> str:
    """An access token of the session (RFC 9068)."""
    issued = int(now.timestamp())
    claims = {
        "iss": settings.public_url,
        "aud": AUDIENCE,
        "sub": row.user_id,
        "exp": issued + settings.access_token_seconds,
        "iat": issued,
        "jti": str(uuid7()),
        "client_id": "meshboard",
        "sid": row.session_id,
        "wid": row.workspace_id or "",
        "amr": ["pwd"],
        "auth_time": int(row.create_time.timestamp()),
        "scope": "meshboard",
    }
    header = {"typ": ACCESS_TOKEN_TYPE, "kid": key.key_id}
    return jwt.encode(claims, key.private, ALGORITHM, headers=header)


async def list_revoked(
    db: async_sessionmaker[AsyncSession], settings: AuthSettings, now: datetime
) -> list[Session]:
    """The sessions that were revoked within the lifetime of an access token."""
    since = now - timedelta(seconds=settings.access_token_seconds + LEEWAY_SECONDS)
    async with db() as session:
        return list(await session.scalars(select(Session).where(Session.revoke_time > since)))


async def is_alive(db: async_sessionmaker[AsyncSession], session_id: str, now: datetime) -> bool:
    """Whether the session has begun and not ended."""
    async with db() as session:
        row = await session.get(Session, session_id)
    return row is not None and row.revoke_time is None and row.expire_time > now


def own_sessions(
    db: async_sessionmaker[AsyncSession], settings: AuthSettings, now: Callable[[], datetime]
) -> tuple[Load, Ask]:
    """What other services ask over the network (chassis.trust.sessions_of), from the table."""

    async def load() -> set[str]:
        return {row.session_id for row in await list_revoked(db, settings, now())}

    async def ask(session_id: str) -> bool:
        return await is_alive(db, session_id, now())

    return load, ask


def _timestamp(time: datetime) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromDatetime(time)
    return timestamp
