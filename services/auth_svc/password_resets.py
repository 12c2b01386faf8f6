"""Asking for a new password: looked into after the answer, so that neither the answer nor its time tells anything."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from services.auth_svc import audit, links
from services.auth_svc.mails import Mails
from services.auth_svc.models import Account
from services.auth_svc.origins import Origin
from services.auth_svc.settings import AuthSettings
from services.auth_svc.tickets import Purpose, Tickets
from services.chassis.emails import email_key


@dataclass(frozen=True)
class PasswordResets:
    """Writes the mails that were asked for."""

    settings: AuthSettings
    tickets: Tickets
    mails: Mails
    now: Callable[[], datetime]

    async def write(self, session: AsyncSession, email: str, address: str) -> None:
        """Mails a link to the account of an address, if it has one; earlier links stop working."""
        now = self.now()
        account = await session.scalar(
            select(Account)
            .where(
                Account.email_key == email_key(email),
                Account.activate_time.is_not(None),
                Account.disable_time.is_(None),
            )
            .with_for_update(key_share=True)
        )
        audit.record(
            session,
            "password_reset.requested",
            Origin(address),
            now,
            subject_id=account.user_id if account else "",
        )
        if account is None:
            return
        await self.tickets.void(session, account.user_id, Purpose.RESET_PASSWORD)
        token = self.tickets.give(session, Purpose.RESET_PASSWORD, account.user_id)
        # To the address of the account, whatever spelling has found it.
        self.mails.add(session, now, account.email, *links.reset_password(self.settings, token))
