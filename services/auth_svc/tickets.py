"""Secrets that are given out once and redeemed once: the links of mails, and the steps of a sign-in.

A ticket holds for one purpose, and belongs to one account or to none yet. Its token has 256 random bits; the table has
a hash of it, and what the ticket is about encrypted.
"""

import base64
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from services.auth_svc.models import Ticket
from services.auth_svc.refresh_tokens import fingerprint
from services.chassis.sealing import Seals

PREFIX = "mbt_"


class Purpose(Enum):
    """What a ticket is good for, and for how many seconds."""

    SIGN_UP = ("sign-up", 86_400)  # the link of a sign-up where addresses must be verified first
    VERIFY_EMAIL = ("verify-email", 86_400)
    RESET_PASSWORD = ("reset-password", 3600)
    FIRST_PASSWORD = ("first-password", 7 * 86_400)  # of an account that an admin made
    APPROVE_EMAIL = ("approve-email", 86_400)  # to the present address
    CONFIRM_EMAIL = ("confirm-email", 86_400)  # to the new one
    SECOND_FACTOR = ("second-factor", 300)  # the password was right
    PASSKEY_SIGN_IN = ("passkey-sign-in", 300)
    ADD_TOTP = ("add-totp", 600)
    ADD_PASSKEY = ("add-passkey", 600)
    # Written where an address turns out to be taken, so that asking costs the same; nobody has its token.
    NOTHING = ("nothing", 0)

    @property
    def label(self) -> str:
        """As it is stored."""
        return self.value[0]

    @property
    def lifetime(self) -> timedelta:
        """From giving out to the end."""
        return timedelta(seconds=self.value[1])


@dataclass(frozen=True, slots=True)
class Found:
    """A ticket that somebody holds; `data` is what it was given out with."""

    user_id: str | None
    data: dict[str, Any]
    create_time: datetime


@dataclass(frozen=True)
class Tickets:
    """Gives out tickets, and takes them back, in the caller's transaction."""

    seals: Seals
    now: Callable[[], datetime]

    def give(
        self, session: AsyncSession, purpose: Purpose, user_id: str | None, data: dict[str, Any] | None = None
    ) -> str:
        """A new ticket's token."""
        token = PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()
        now = self.now()
        session.add(
            Ticket(
                token_hash=fingerprint(token),
                purpose=purpose.label,
                user_id=user_id,
                sealed_data=self.seals.seal(json.dumps(data or {}).encode(), purpose.label),
                create_time=now,
                expire_time=now + purpose.lifetime,
            )
        )
        return token

    async def look(
        self, session: AsyncSession, purposes: set[Purpose], token: str
    ) -> tuple[Purpose, Found] | None:
        """The ticket, which stays; locked until the end of the transaction, so that one caller at a time tries it."""
        row = await session.scalar(
            select(Ticket)
            .where(
                Ticket.token_hash == fingerprint(token),
                Ticket.purpose.in_([purpose.label for purpose in purposes]),
                Ticket.expire_time > self.now(),
            )
            .with_for_update()
        )
        if row is None:
            return None
        purpose = next(purpose for purpose in purposes if purpose.label == row.purpose)
        return purpose, self._found(row)

    async def redeem(self, session: AsyncSession, purpose: Purpose, token: str) -> Found | None:
        """The ticket, which is gone when the transaction commits; None when it is unknown, used or too old."""
        row = await session.scalar(
            delete(Ticket)
            .where(
                Ticket.token_hash == fingerprint(token),
                Ticket.purpose == purpose.label,
                Ticket.expire_time > self.now(),
            )
            .returning(Ticket)
        )
        return self._found(row) if row is not None else None

    async def void(self, session: AsyncSession, user_id: str, *purposes: Purpose) -> None:
        """Takes back all tickets of an account that were given out for these purposes."""
        await session.execute(
            delete(Ticket).where(
                Ticket.user_id == user_id, Ticket.purpose.in_([purpose.label for purpose in purposes])
            )
        )

    def _found(self, row: Ticket) -> Found:
        return Found(row.user_id, json.loads(self.seals.open(row.sealed_data, row.purpose)), row.create_time)
