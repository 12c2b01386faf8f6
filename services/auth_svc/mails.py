"""Mails: written in the transaction of what they tell, encrypted until they are sent, and sent by whoever is free.

A mail is claimed for a minute, sent, and deleted when the server has taken it. What fails is tried again, for a day. A
crash between the server's yes and the deletion sends the mail twice, with one Message-ID; none is lost.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime, parseaddr
from random import SystemRandom
from typing import Any
from urllib.parse import unquote, urlsplit

import aiosmtplib
import structlog
from prometheus_client import Counter, Gauge
from sqlalchemy import delete, event, func, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from uuid_utils.compat import uuid7

from services.auth_svc.models import Mail
from services.auth_svc.settings import AuthSettings
from services.chassis.db import fetch_at_once
from services.chassis.sealing import Seals

log = structlog.get_logger(__name__)

_CONTEXT = "mails"
_BATCH = 10
_SEND_SECONDS = 30
_CLAIM = timedelta(seconds=60)  # more than sending takes at most
_LONGEST_DELAY = timedelta(hours=1)
_GIVE_UP = timedelta(days=1)
_POLL_SECONDS = 1  # for what others have written
_MEASURE_SECONDS = 5

# Asked each second, mostly for nothing: so as text, for the driver itself.
_DUE = "SELECT FROM mails WHERE try_time <= $1 LIMIT 1"

_waiting = Gauge("meshboard_mails_waiting", "Mails that wait to be sent.", multiprocess_mode="mostrecent")
_outcomes = Counter("meshboard_mails", "Tries to send a mail: sent, failed or given_up.", ["outcome"])


_chance = SystemRandom()

WriteReset = Callable[[AsyncSession, str, str], Awaitable[None]]


@dataclass(frozen=True)
class Mails:
    """`seals` encrypt mails while they wait; `added` is set when one was committed in this process."""

    seals: Seals
    added: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, session: AsyncSession, now: datetime, to: str, subject: str, text: str) -> None:
        """Has a mail sent once the transaction has committed."""
        self._add(session, now, {"to": to, "subject": subject, "text": text})

    def add_reset(self, session: AsyncSession, now: datetime, email: str, address: str) -> None:
        """Has it looked into, once the transaction has committed, who may get a link for a new password.

        At some moment of the next second: what that costs must not be felt by the caller's next call.
        """
        later = now + timedelta(seconds=_chance.random())
        self._add(session, now, {"reset": email, "address": address}, try_time=later)

    def _add(
        self, session: AsyncSession, now: datetime, content: dict[str, str], try_time: datetime | None = None
    ) -> None:
        session.add(
            Mail(
                mail_id=str(uuid7()),
                sealed_mail=self.seals.seal(json.dumps(content).encode(), _CONTEXT),
                create_time=now,
                try_time=try_time or now,
            )
        )
        event.listen(session.sync_session, "after_commit", lambda _: self.added.set(), once=True)

    def read(self, row: Mail) -> dict[str, str]:
        """`to`, `subject` and `text` of a mail, or `reset` and `address` of what is asked for. Raises WrongKey."""
        content: dict[str, str] = json.loads(self.seals.open(row.sealed_mail, _CONTEXT))
        return content


async def run(
    db: async_sessionmaker[AsyncSession],
    settings: AuthSettings,
    mails: Mails,
    write_reset: WriteReset,
    now: Callable[[], datetime],
) -> None:
    """Sends until it is cancelled; any number of replicas may do so at once. `write_reset` writes what is asked for."""
    next_measure = 0.0
    while True:
        mails.added.clear()
        claimed: Sequence[Mail] = ()
        try:
            if time.monotonic() >= next_measure:
                next_measure = time.monotonic() + _MEASURE_SECONDS
                async with db() as session:
                    _waiting.set(await session.scalar(select(func.count()).select_from(Mail)) or 0)
            if await fetch_at_once(db, _DUE, now()):
                claimed = await _claim(db, now())
            await asyncio.gather(
                *(_send(db, settings, mails, row, write_reset=write_reset, now=now) for row in claimed)
            )
        except (OSError, TimeoutError, SQLAlchemyError) as error:
            log.warning("mails_wait_for_postgres", error=repr(error))
        if len(claimed) < _BATCH:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_POLL_SECONDS):
                    await mails.added.wait()


async def _claim(db: async_sessionmaker[AsyncSession], now: datetime) -> Sequence[Mail]:
    """Mails that nobody else sends for the next minute."""
    due = (
        select(Mail.mail_id)
        .where(Mail.try_time <= now)
        .order_by(Mail.try_time)
        .limit(_BATCH)
        .with_for_update(skip_locked=True)
    )
    async with db.begin() as session:
        rows = await session.scalars(
            update(Mail)
            .where(Mail.mail_id.in_(due))
            .values(try_time=now + _CLAIM, try_count=Mail.try_count + 1)
            .returning(Mail)
        )
        return rows.all()


async def _send(
    db: async_sessionmaker[AsyncSession],
    settings: AuthSettings,
    mails: Mails,
    row: Mail,
    *,
    write_reset: WriteReset,
    now: Callable[[], datetime],
) -> None:
    try:
        content = mails.read(row)
        if "reset" in content:
            async with db.begin() as session:
                await session.execute(delete(Mail).where(Mail.mail_id == row.mail_id))
                await write_reset(session, content["reset"], content["address"])
            return
        async with asyncio.timeout(_SEND_SECONDS):
            await _deliver(settings, row, content)
        _outcomes.labels("sent").inc()
    except Exception as error:  # whatever it is, it must hold up no other mail
        await _put_back(db, row, error, now())
        return
    async with db.begin() as session:
        await session.execute(delete(Mail).where(Mail.mail_id == row.mail_id))


async def _put_back(db: async_sessionmaker[AsyncSession], row: Mail, error: Exception, now: datetime) -> None:
    # Of the error its kind alone: what servers answer quotes addresses.
    about = {"mail_id": row.mail_id, "tries": row.try_count, "error": type(error).__name__}
    if isinstance(error, aiosmtplib.SMTPResponseException):
        about["code"] = error.code
    given_up = now - row.create_time >= _GIVE_UP
    async with db.begin() as session:
        if given_up:
            await session.execute(delete(Mail).where(Mail.mail_id == row.mail_id))
        else:
            delay = min(timedelta(seconds=2 ** min(row.try_count, 20)), _LONGEST_DELAY)
            await session.execute(
                update(Mail).where(Mail.mail_id == row.mail_id).values(try_time=now + delay)
            )
    if given_up:
        _outcomes.labels("given_up").inc()
        log.error("mail_given_up", **about)
    else:
        _outcomes.labels("failed").inc()
        log.warning("mail_not_sent", **about)


def compose(settings: AuthSettings, row: Mail, content: dict[str, str]) -> EmailMessage:
    """The mail as it is sent (RFC 5322). Raises ValueError for a header with a line break."""
    # Lines of up to 998 characters are sent as they are, so that a link stays in one piece.
    message = EmailMessage(SMTP.clone(max_line_length=998))
    message["From"] = settings.mail_from
    message["To"] = content["to"]
    message["Subject"] = content["subject"]
    message["Date"] = format_datetime(row.create_time)
    message["Message-ID"] = f"<{row.mail_id}@{_sender(settings).rpartition('@')[2]}>"
    message["Auto-Submitted"] = "auto-generated"  # RFC 3834: nobody answers it by a machine
    message.set_content(content["text"])
    return message


async def _deliver(settings: AuthSettings, row: Mail, content: dict[str, str]) -> None:
    url = urlsplit(settings.smtp_url.get_secret_value())
    options: dict[str, Any] = {}
    if url.username:
        options = {"username": unquote(url.username), "password": unquote(url.password or "")}
    tls = url.scheme == "smtps"
    await aiosmtplib.send(
        compose(settings, row, content),
        sender=_sender(settings),
        recipients=[content["to"]],
        hostname=url.hostname,
        port=url.port or (465 if tls else 587 if url.username else 25),
        use_tls=tls,
        # None: TLS if the server has it. A password is shown to nobody without.
        start_tls=False if tls else True if url.username else None,
        timeout=_SEND_SECONDS,
        **options,
    )


def _sender(settings: AuthSettings) -> str:
    return parseaddr(settings.mail_from)[1]
