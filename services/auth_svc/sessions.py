"""Sign-in sessions: how one begins, is continued, is renewed and ends."""

import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum

from meshboard.auth.v1.events_pb2 import SessionRevoked, SignedIn
from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from uuid_utils.compat import uuid7

from services.auth_svc import refresh_tokens
from services.auth_svc.models import ApiKey, EndedKey, ServiceAccount, Session
from services.auth_svc.origins import Origin
from services.auth_svc.refresh_tokens import RefreshToken, fingerprint
from services.auth_svc.settings import AuthSettings
from services.chassis import outbox
from services.chassis.auth import LEEWAY_SECONDS
from services.chassis.db import Adds, fetch_at_once
from services.chassis.times import timestamp_of
from services.chassis.trust import Ask, Load

PASSWORD = "pwd"  # noqa: S105 - a method of RFC 8176


@dataclass(frozen=True, slots=True)
class Begun:
    """A new session with the secrets that only its client will hold."""

    session: Session
    refresh_token: RefreshToken
    refresh_key: str


def begin(
    session: Adds,
    user_id: str,
    workspace_id: str,
    *,
    origin: Origin,
    methods: tuple[str, ...],
    settings: AuthSettings,
    now: datetime,
    in_cookies: bool = False,
    impersonator: Session | None = None,
    seconds: int | None = None,
) -> Begun:
    """Begins a session of a user in a workspace ("": in none), and emits `SignedIn`, unless somebody is impersonated.

    `methods` are those of RFC 8176. `impersonator` is the session of the admin who acts as the user, `seconds` how long
    the session lasts at most.
    """
    token = refresh_tokens.first_token()
    refresh_key = refresh_tokens.new_refresh_key()
    end_time = now + timedelta(seconds=settings.session_absolute_seconds if seconds is None else seconds)
    row = Session(
        session_id=str(uuid7()),
        user_id=user_id,
        workspace_id=workspace_id or None,
        family_hash=fingerprint(token.family),
        key_hash=fingerprint(refresh_key),
        generation=token.generation,
        create_time=now,
        expire_time=min(now + timedelta(seconds=settings.session_seconds), end_time),
        end_time=end_time,
        last_use_time=now,
        auth_time=now,
        methods=list(methods),
        in_cookies=in_cookies,
        user_agent=origin.user_agent,
        address=origin.address,
        impersonator_id=impersonator.user_id if impersonator else None,
        impersonator_session_id=impersonator.session_id if impersonator else None,
    )
    session.add(row)
    if impersonator is None:
        signed_in = SignedIn(
            user_id=row.user_id, session_id=row.session_id, workspace_id=workspace_id, time=timestamp_of(now)
        )
        outbox.add(session, signed_in)
    return Begun(row, token, refresh_key)


async def renew(
    session: AsyncSession,
    session_id: str,
    *,
    origin: Origin,
    settings: AuthSettings,
    now: datetime,
    methods: tuple[str, ...] = (),
) -> Begun | None:
    """Begins a session in the place of another one, which ends: the person has just proved who they are.

    So nobody who has got hold of the old one gains by it (OWASP Session Management Cheat Sheet, "Renew the Session ID
    After Any Privilege Level Change"). `methods` are added. None when the session has ended meanwhile.
    """
    row = await session.get(Session, session_id, with_for_update=True)
    if row is None or row.revoke_time or row.expire_time <= now:
        return None
    merged = tuple(dict.fromkeys([*row.methods, *methods]))
    begun = begin(
        session,
        row.user_id,
        row.workspace_id or "",
        origin=origin,
        methods=merged,
        settings=settings,
        now=now,
        in_cookies=row.in_cookies,
    )
    begun.session.end_time = row.end_time
    begun.session.expire_time = min(begun.session.expire_time, row.end_time)
    await _revoke(session, row, SessionRevoked.RENEWED, now)
    return begun


class Verdict(Enum):
    """What presenting a refresh token leads to."""

    EXCHANGED = "exchanged"
    SUPERSEDED = "superseded"
    REUSED = "reused"
    INVALID = "invalid"


@dataclass(frozen=True, slots=True)
class Going:
    """What tokens say of a session that goes on."""

    user_id: str
    session_id: str
    workspace_id: str | None
    methods: list[str]
    auth_time: datetime
    expire_time: datetime
    end_time: datetime
    in_cookies: bool
    impersonator_id: str | None


@dataclass(frozen=True, slots=True)
class Shown:
    """A refresh token, and where it came from."""

    token: RefreshToken
    origin: Origin


# As text, for the driver itself: building and compiling it with SQLAlchemy took longer than running it. It waits for
# nobody's lock, so that no session holds up the others.
_EXCHANGE_NEWEST = """
    WITH shown AS (
        SELECT * FROM unnest($1::bytea[], $2::int[], $3::text[], $4::text[])
            WITH ORDINALITY AS shown (family_hash, generation, user_agent, address, number)
    ), newest AS (
        SELECT session_id, shown.user_agent, shown.address, number
        FROM shown JOIN sessions USING (family_hash, generation)
        WHERE revoke_time IS NULL AND expire_time > $5
        FOR NO KEY UPDATE OF sessions SKIP LOCKED
    )
    UPDATE sessions
    SET generation = generation + 1, last_use_time = $5, expire_time = least($6, end_time),
        user_agent = newest.user_agent, address = newest.address
    FROM newest WHERE sessions.session_id = newest.session_id
    RETURNING number, user_id::text, sessions.session_id::text, workspace_id::text, methods, auth_time, expire_time,
        end_time, in_cookies, impersonator_id::text
"""


async def exchange_newest(
    db: async_sessionmaker[AsyncSession],
    settings: AuthSettings,
    now: Callable[[], datetime],
    shown: Sequence[Shown],
) -> list[Going | None]:
    """Exchanges those that are the newest of their sessions, in one statement; None for each other (see `exchange`).

    Of a token that is there twice one is exchanged; so is none whose session somebody else holds at the moment.
    """
    time = now()
    rows = await fetch_at_once(
        db,
        _EXCHANGE_NEWEST,
        [fingerprint(each.token.family) for each in shown],
        [each.token.generation for each in shown],
        [each.origin.user_agent for each in shown],
        [each.origin.address for each in shown],
        time,
        time + timedelta(seconds=settings.session_seconds),
    )
    going = {number: Going(*row) for number, *row in rows}
    return [going.get(number) for number in range(1, len(shown) + 1)]


async def exchange(
    session: AsyncSession,
    token: RefreshToken,
    refresh_key: str,
    *,
    origin: Origin,
    settings: AuthSettings,
    now: datetime,
) -> tuple[Verdict, Session | None]:
    """Judges a refresh token that is not the newest one, or was not a moment ago; the lock on the row settles races.

    After EXCHANGED the session's newest token is the successor of `token`. After REUSED it is revoked. Source: RFC
    9700, section 4.14.
    """
    row = await session.scalar(
        select(Session).where(Session.family_hash == fingerprint(token.family)).with_for_update()
    )
    if row is None or row.revoke_time or row.expire_time <= now or token.generation > row.generation:
        return Verdict.INVALID, row
    if token.generation < row.generation - 1:
        await _revoke(session, row, SessionRevoked.REFRESH_TOKEN_REUSED, now)
        return Verdict.REUSED, row
    if token.generation == row.generation - 1:
        # Its successor is the newest token, hence not used yet.
        if not hmac.compare_digest(fingerprint(refresh_key), row.key_hash):
            return Verdict.SUPERSEDED, row
        return Verdict.EXCHANGED, row
    row.generation += 1
    row.last_use_time = now
    row.expire_time = min(now + timedelta(seconds=settings.session_seconds), row.end_time)
    row.user_agent, row.address = origin.user_agent, origin.address
    return Verdict.EXCHANGED, row


async def revoke(
    session: AsyncSession, session_id: str, reason: SessionRevoked.Reason.ValueType, now: datetime
) -> Session | None:
    """Ends the session, and those in which its person impersonates others; None when it had ended before."""
    row = await session.get(Session, session_id, with_for_update=True)
    if row is None or row.revoke_time:
        return None
    await _revoke(session, row, reason, now)
    return row


async def revoke_all(
    session: AsyncSession,
    user_id: str,
    reason: SessionRevoked.Reason.ValueType,
    now: datetime,
    *,
    but: str | None = None,
) -> list[Session]:
    """Ends all sessions of a user that are alive, but the one with the id `but`; gives those that it has ended."""
    rows = await session.scalars(
        select(Session)
        .where(
            Session.user_id == user_id,
            Session.revoke_time.is_(None),
            Session.expire_time > now,
            Session.session_id != but if but else Session.session_id.is_not(None),
        )
        .order_by(
            Session.session_id
        )  # the same order everywhere, so that two callers do not wait for each other
        .with_for_update()
    )
    ended = list(rows)
    for row in ended:
        await _revoke(session, row, reason, now)
    return ended


async def _revoke(
    session: AsyncSession, row: Session, reason: SessionRevoked.Reason.ValueType, now: datetime
) -> None:
    if row.revoke_time:
        return
    row.revoke_time = now
    announce_end(session, row.user_id, row.session_id, reason, now)
    impersonated = await session.scalars(
        select(Session)
        .where(Session.impersonator_session_id == row.session_id, Session.revoke_time.is_(None))
        .with_for_update()
    )
    for other in impersonated:
        other.revoke_time = now
        announce_end(session, other.user_id, other.session_id, SessionRevoked.IMPERSONATION_ENDED, now)


def announce_end(
    session: AsyncSession,
    user_id: str,
    session_id: str,
    reason: SessionRevoked.Reason.ValueType,
    now: datetime,
) -> None:
    """Tells all services to refuse what the session's tokens are sent with."""
    outbox.add(
        session,
        SessionRevoked(user_id=user_id, session_id=session_id, reason=reason, revoke_time=timestamp_of(now)),
    )


async def list_revoked(
    db: async_sessionmaker[AsyncSession], settings: AuthSettings, now: datetime
) -> dict[str, datetime]:
    """The sessions and API keys that were revoked within the lifetime of an access token, and when."""
    since = now - timedelta(seconds=settings.access_token_seconds + LEEWAY_SECONDS)
    of_sessions = select(Session.session_id, Session.revoke_time).where(Session.revoke_time > since)
    of_keys = select(EndedKey.session_id, EndedKey.revoke_time).where(EndedKey.revoke_time > since)
    async with db() as session:
        rows = await session.execute(of_sessions.union_all(of_keys))
        return {session_id: revoke_time for session_id, revoke_time in rows if revoke_time}


async def is_alive(db: async_sessionmaker[AsyncSession], session_id: str, now: datetime) -> bool:
    """Whether the session has begun and not ended, or belongs to an API key that may be used."""
    of_session = select(Session.session_id).where(
        Session.session_id == session_id, Session.revoke_time.is_(None), Session.expire_time > now
    )
    of_key = (
        select(ApiKey.session_id)
        .join(ServiceAccount, ServiceAccount.service_account_id == ApiKey.service_account_id)
        .where(
            ApiKey.session_id == session_id,
            ServiceAccount.disable_time.is_(None),
            or_(ApiKey.expire_time.is_(None), ApiKey.expire_time > now),
        )
    )
    async with db() as session:
        return (await session.scalar(of_session.union_all(of_key))) is not None


def sessions_in_table(
    db: async_sessionmaker[AsyncSession], settings: AuthSettings, now: Callable[[], datetime]
) -> tuple[Load, Ask]:
    """What other services ask over the network (chassis.trust.sessions_of), from the table."""

    async def load() -> set[str]:
        return set(await list_revoked(db, settings, now()))

    async def ask(session_id: str) -> bool:
        return await is_alive(db, session_id, now())

    return load, ask
