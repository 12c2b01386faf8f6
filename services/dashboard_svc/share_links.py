"""Share links as their holders have them: tokens, tickets, and the check that stands before each call.

A token has 256 random bits, and the table a hash of it. A ticket shows that its holder knew the password of a link:
it is signed, names the link, and counts for one password. What a call finds of a link is remembered for half a
second, so that many streams cost one read; a link that ends, or is changed, ends its streams within two.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import Context, ContextVar
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import structlog
from google.protobuf.message import Message
from meshboard.dashboard.v1 import share_link_pb2
from meshboard.dashboard.v1.dashboard_pb2 import Dashboard
from meshboard.dashboard.v1.events_pb2 import ShareLinkDeleted, ShareLinkUpdated
from meshboard.dashboard.v1.share_service_pb2 import UnlockSharedDashboardRequest
from sqlalchemy import exc, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import errors
from services.chassis.bus import Bus, Received
from services.chassis.origins import is_allowed
from services.chassis.together import Together
from services.dashboard_svc.boards import Boards
from services.dashboard_svc.convert import share_link_to_pb
from services.dashboard_svc.models import ShareLink

log = structlog.get_logger(__name__)

# Lets scanners for leaked secrets recognise one, and the gateway keep it out of its log.
TOKEN_PREFIX = "mbs_"  # noqa: S105 - the beginning of tokens
TICKET_PREFIX = "mbu_"
TICKET_HEADER = "x-share-ticket"
# How long what is known of a link counts.
FRESH_SECONDS = 0.5
REMEMBERED = 10_000
# How often views are written down.
NOTE_SECONDS = 5.0
_ID_BYTES = 16
_TIME_BYTES = 8


@dataclass(frozen=True, slots=True)
class Link:
    """A link that shows something. The messages are shared: not to be changed.

    `ticket` is what a call has shown, where that counts: where there is a password.
    """

    link: share_link_pb2.ShareLink
    dashboard: Dashboard
    password_hash: str | None
    ticket: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """The key of its row."""
        return self.link.workspace_id, self.link.dashboard_id, self.link.share_link_id


@dataclass(frozen=True, slots=True)
class _Found:
    """A row, as far as calls need it."""

    link: share_link_pb2.ShareLink
    password_hash: str | None
    expire_time: datetime | None


_current: ContextVar[Link] = ContextVar("share_link")


def current() -> Link:
    """The link whose token the current call carries."""
    return _current.get()


def new_token() -> tuple[str, bytes]:
    """A token, which is shown once, and the hash that is kept of it."""
    token = TOKEN_PREFIX + secrets.token_urlsafe(32)
    return token, hash_of(token)


def hash_of(token: str) -> bytes:
    """SHA-256: what is random needs no slow hash."""
    return hashlib.sha256(token.encode()).digest()


def absent() -> errors.Error:
    """What is said of a link that shows nothing, whatever the reason."""
    return errors.not_found("SHARE_LINK_NOT_FOUND", "There is no such share link.")


class Tickets:
    """Gives out tickets, signed with the first of the keys, and knows those signed with any."""

    def __init__(self, keys: Sequence[bytes], seconds: float, now: Callable[[], datetime]) -> None:
        self._keys = keys
        self._lifetime = timedelta(seconds=seconds)
        self._now = now

    def give(self, link: Link) -> tuple[str, datetime]:
        """A ticket for the link as its password is now, and when it expires."""
        expire_time = (self._now() + self._lifetime).replace(microsecond=0)
        body = UUID(link.link.share_link_id).bytes + int(expire_time.timestamp()).to_bytes(_TIME_BYTES)
        return _spell(body + _mac(self._keys[0], body, link)), expire_time

    def check(self, link: Link, ticket: str) -> None:
        """Raises UNAUTHENTICATED (SHARE_PASSWORD_REQUIRED) where there is a password, and this is no ticket."""
        if link.password_hash is None:
            return
        try:
            raw = base64.urlsafe_b64decode(ticket.removeprefix(TICKET_PREFIX) + "==")
        except (binascii.Error, ValueError):
            raw = b""
        body, mac = raw[: _ID_BYTES + _TIME_BYTES], raw[_ID_BYTES + _TIME_BYTES :]
        known = any(hmac.compare_digest(mac, _mac(key, body, link)) for key in self._keys)
        expire_time = int.from_bytes(body[_ID_BYTES:])
        if (
            not known
            or body[:_ID_BYTES] != UUID(link.link.share_link_id).bytes
            or expire_time <= self._now().timestamp()
        ):
            raise errors.unauthenticated("SHARE_PASSWORD_REQUIRED", "The share link has a password.")


class ShareLinks:
    """Finds the link of a token, and counts views. `run` must run beside the calls."""

    def __init__(
        self,
        db: async_sessionmaker[AsyncSession],
        boards: Boards,
        tickets: Tickets,
        public_origin: str,
        now: Callable[[], datetime],
    ) -> None:
        self.db = db
        self.boards = boards
        self.tickets = tickets
        self.now = now
        self._public_origin = public_origin
        self._loads = Together(self._load, seconds=5)
        self._known: OrderedDict[bytes, tuple[float, asyncio.Task[_Found | None]]] = OrderedDict()
        self._views: Counter[tuple[str, str, str]] = Counter()
        self._seen: set[tuple[str, str, str]] = set()

    async def listen(self, bus: Bus) -> None:
        """Follows what other replicas change."""
        for kind in (ShareLinkUpdated, ShareLinkDeleted):
            await bus.listen(kind.DESCRIPTOR.full_name, self._happened)

    async def check(self, request: Message, metadata: Mapping[str, str]) -> None:
        """The access stage for methods of the holder of a share link.

        Raises NOT_FOUND (SHARE_LINK_NOT_FOUND), UNAUTHENTICATED (SHARE_PASSWORD_REQUIRED) or PERMISSION_DENIED
        (ORIGIN_NOT_ALLOWED).
        """
        carried: Any = request
        link = await self.find(carried.token)
        self._check_origin(link, metadata)
        if not isinstance(request, UnlockSharedDashboardRequest):
            ticket = carried.ticket or metadata.get(TICKET_HEADER, "")
            self.tickets.check(link, ticket)
            link = replace(link, ticket=ticket if link.password_hash is not None else "")
        _current.set(link)

    async def find(self, token: str) -> Link:
        """The link of a token, while it shows something. Raises NOT_FOUND (SHARE_LINK_NOT_FOUND)."""
        found = await self._found(hash_of(token))
        if found is None or found.link.paused or (found.expire_time and found.expire_time <= self.now()):
            raise absent()
        link = found.link
        try:
            dashboard = await self.boards.dashboard(link.workspace_id, link.dashboard_id)
        except errors.Error as error:
            raise (absent() if error.reason == "DASHBOARD_NOT_FOUND" else error) from error
        # What was locked must never be free because the dashboard calls it something else now.
        if link.locked_variables and not link.HasField("snapshot"):
            names = {variable.name for variable in dashboard.variables}
            if not names.issuperset(variable.name for variable in link.locked_variables):
                raise absent()
        return Link(link, dashboard, found.password_hash)

    def viewed(self, link: Link, times: int = 1) -> None:
        """Notes that somebody has looked at what the link shows; 0 times: has begun to watch it."""
        self._views[link.key] += times
        self._seen.add(link.key)

    async def run(self) -> None:
        """Writes views down now and then, until it is cancelled."""
        while True:
            await asyncio.sleep(NOTE_SECONDS)
            try:
                await self.note_views()
            except (OSError, TimeoutError, exc.SQLAlchemyError) as error:
                log.warning("views_not_noted", error=type(error).__name__)

    async def note_views(self) -> None:
        """Writes down the views since the last time."""
        seen, self._seen = self._seen, set()
        views, self._views = self._views, Counter()
        if not seen:
            return
        now = self.now()
        try:
            async with self.db.begin() as session:
                # Sorted, so that no two processes block each other.
                for workspace_id, dashboard_id, share_link_id in sorted(seen):
                    await session.execute(
                        update(ShareLink)
                        .where(
                            ShareLink.workspace_id == workspace_id,
                            ShareLink.dashboard_id == dashboard_id,
                            ShareLink.share_link_id == share_link_id,
                        )
                        .values(
                            view_count=ShareLink.view_count
                            + views[workspace_id, dashboard_id, share_link_id],
                            last_view_time=func.greatest(ShareLink.last_view_time, now),
                        )
                    )
        except BaseException:
            self._seen |= seen
            self._views += views
            raise

    async def close(self) -> None:
        """Writes down what has been noted, as far as the database answers."""
        with suppress(OSError, TimeoutError, exc.SQLAlchemyError):
            await self.note_views()

    def forget(self) -> None:
        """Has all links read anew."""
        self._known.clear()

    def _check_origin(self, link: Link, metadata: Mapping[str, str]) -> None:
        origin = metadata.get("origin", "")
        own = origin == self._public_origin or metadata.get("sec-fetch-site") == "same-origin"
        if origin and not own and not is_allowed(origin, link.link.allowed_origins):
            raise errors.permission_denied(
                "ORIGIN_NOT_ALLOWED", "The share link is not for pages of this origin.", origin=origin[:256]
            )

    async def _found(self, token_hash: bytes) -> _Found | None:
        until, reading = self._known.get(token_hash, (0.0, None))
        if reading is None or time.monotonic() >= until or (reading.done() and reading.exception()):
            # In an empty context: it reads for several calls.
            reading = asyncio.create_task(self._loads.ask(token_hash), context=Context())
            self._known[token_hash] = (time.monotonic() + FRESH_SECONDS, reading)
            self._known.move_to_end(token_hash)
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return await asyncio.shield(reading)

    async def _load(self, token_hashes: Sequence[bytes]) -> list[_Found | None]:
        async with self.db() as session:
            rows = await session.scalars(select(ShareLink).where(ShareLink.token_hash.in_(token_hashes)))
        found = {
            row.token_hash: _Found(share_link_to_pb(row), row.password_hash, row.expire_time) for row in rows
        }
        return [found.get(token_hash) for token_hash in token_hashes]

    def _happened(self, _: Received) -> None:
        self.forget()


def _mac(key: bytes, body: bytes, link: Link) -> bytes:
    return hmac.digest(key, body + hashlib.sha256((link.password_hash or "").encode()).digest(), "sha256")


def _spell(raw: bytes) -> str:
    return TICKET_PREFIX + base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
