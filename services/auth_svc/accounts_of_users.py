"""What becomes of an account when its user is made by an admin, deactivated, or erased."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import structlog
from meshboard.auth.v1.events_pb2 import AccountCreated, SessionRevoked
from meshboard.auth.v1.internal_auth_service_pb2 import CheckSessionResponse
from meshboard.user.v1.events_pb2 import UserCreated, UserStateChanged
from meshboard.user.v1.user_pb2 import User
from sqlalchemy import delete, func, select, union
from sqlalchemy import event as events
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from services.auth_svc import audit, links, sessions
from services.auth_svc.internal_sessions import set_disabled
from services.auth_svc.mails import Mails
from services.auth_svc.models import (
    Account,
    AuditEntryRow,
    EmailChange,
    EndedKey,
    ErasedUser,
    FactorRow,
    Mail,
    RecoveryCode,
    Session,
    Ticket,
)
from services.auth_svc.origins import Origin
from services.auth_svc.settings import AuthSettings
from services.auth_svc.tickets import Purpose, Tickets
from services.chassis import outbox
from services.chassis.auth import LEEWAY_SECONDS
from services.chassis.cache import CachedMessages
from services.chassis.emails import email_key
from services.chassis.erasures import Erased

log = structlog.get_logger(__name__)

_BATCH = 500


@dataclass(frozen=True)
class AccountsOfUsers:
    """Consumes events of users. `alive` remembers which sessions are alive, for CheckSession."""

    settings: AuthSettings
    tickets: Tickets
    mails: Mails
    alive: CachedMessages[CheckSessionResponse]
    now: Callable[[], datetime]
    _forgetting: set[asyncio.Task[None]] = field(default_factory=set)

    async def on_user_created(self, session: AsyncSession, event: UserCreated) -> None:
        """Begins the account that an admin has made, and mails a link to choose a password."""
        user, now = event.user, self.now()
        if not user.managing_workspace_id:
            return
        if await session.get(ErasedUser, user.user_id) is not None:
            return
        account = await session.get(Account, user.user_id, with_for_update=True)
        if account is None:
            account = await self._add(session, user, now)
        if account is None or account.activate_time is not None:
            return
        account.activate_time = now
        outbox.add(session, AccountCreated(user_id=account.user_id))
        token = self.tickets.give(session, Purpose.FIRST_PASSWORD, account.user_id)
        self.mails.add(session, now, account.email, *links.first_password(self.settings, token))
        audit.record(
            session,
            "account.created",
            Origin(),
            now,
            actor_id=outbox.actor.get().partition(",")[0],
            subject_id=account.user_id,
            workspace_id=user.managing_workspace_id,
        )

    async def _add(self, session: AsyncSession, user: User, now: datetime) -> Account | None:
        """The account anew: its reservation was cleared away while the event was on its way."""
        account: Account | None = await session.scalar(
            insert(Account)
            .values(
                user_id=user.user_id,
                email=user.email,
                email_key=email_key(user.email),
                password_hash="",
                display_name=user.display_name,
                workspace_id=user.managing_workspace_id,
                managing_workspace_id=user.managing_workspace_id,
                create_time=now,
                try_time=now,
            )
            .on_conflict_do_nothing()
            .returning(Account)
        )
        if account is None:
            log.error("managed_user_without_account", user_id=user.user_id)
        return account

    async def on_user_state_changed(self, session: AsyncSession, event: UserStateChanged) -> None:
        """Disables and enables the account with its user, unless something newer was heard before."""
        time = event.time.ToDatetime(tzinfo=UTC)
        account = await session.get(Account, event.user_id, with_for_update=True)
        if account is None or (account.state_time and account.state_time >= time):
            return
        account.state_time = time
        actor_id = outbox.actor.get().partition(",")[0]
        if event.state == User.DEACTIVATED:
            now = self.now()
            # One that was disabled by who runs the installation stays so when the user is active again.
            account.deactivate_time = now if account.disable_time is None else None
            ended = await set_disabled(session, event.user_id, True, now, Origin(), actor_id=actor_id)
            self._forget_later(session, [row.session_id for row in ended or []])
        elif account.deactivate_time is not None and account.deactivate_time == account.disable_time:
            account.deactivate_time = None
            await set_disabled(session, event.user_id, False, self.now(), Origin(), actor_id=actor_id)

    async def erase(self, session: AsyncSession, user_id: str) -> Erased:
        """Erases the account with all that hangs on it. The audit log stays: it knows accounts by their ids alone."""
        now = self.now()
        await session.execute(
            insert(ErasedUser).values(user_id=user_id, erase_time=now).on_conflict_do_nothing()
        )
        entries = union(
            *(
                select(AuditEntryRow.audit_entry_id).where(column == user_id)
                for column in (AuditEntryRow.actor_id, AuditEntryRow.subject_id)
            )
        ).subquery()
        kept = {"audit_entries": await session.scalar(select(func.count()).select_from(entries)) or 0}
        account = await session.get(Account, user_id, with_for_update=True)
        if account is None:
            return Erased({}, kept)
        ended = await sessions.revoke_all(session, user_id, SessionRevoked.DISABLED, now)
        await self._remember_ended(session, user_id, now)
        addresses = {account.email_key}
        if change := await session.get(EmailChange, user_id):
            addresses.add(email_key(change.new_email))
        erased = {
            "accounts": 1,
            "mails": await self._delete_mails(session, addresses),
            **{
                table.__tablename__: await session.scalar(
                    select(func.count()).select_from(table).where(table.user_id == user_id)
                )
                or 0
                for table in (Session, Ticket, FactorRow, RecoveryCode, EmailChange)
            },
        }
        await session.execute(delete(Account).where(Account.user_id == user_id))
        self._forget_later(session, [row.session_id for row in ended])
        return Erased(erased, kept)

    async def _remember_ended(self, session: AsyncSession, user_id: str, now: datetime) -> None:
        """Keeps the ids of sessions whose access tokens may still be about, for who asks which have ended."""
        since = now - timedelta(seconds=self.settings.access_token_seconds + LEEWAY_SECONDS)
        await session.flush()
        await session.execute(
            insert(EndedKey)
            .from_select(
                ["session_id", "revoke_time"],
                select(Session.session_id, Session.revoke_time).where(
                    Session.user_id == user_id, Session.revoke_time > since
                ),
            )
            .on_conflict_do_nothing()
        )

    async def _delete_mails(self, session: AsyncSession, addresses: set[str]) -> int:
        """Deletes the mails that wait for these addresses, which stand in them encrypted."""
        found: list[str] = []
        rows = await session.stream_scalars(select(Mail).execution_options(yield_per=_BATCH))
        async for row in rows:
            content: dict[str, Any] = self.mails.read(row)
            if email_key(content.get("to") or content.get("reset", "")) in addresses:
                found.append(row.mail_id)
        await session.execute(delete(Mail).where(Mail.mail_id.in_(found)))
        return len(found)

    def _forget_later(self, session: AsyncSession, session_ids: Iterable[str]) -> None:
        """Forgets that sessions are alive, once the transaction has committed."""

        async def forget() -> None:
            for session_id in session_ids:
                await self.alive.invalidate(session_id)

        def start(_: object) -> None:
            task = asyncio.get_running_loop().create_task(forget())
            self._forgetting.add(task)
            task.add_done_callback(self._forgetting.discard)

        events.listen(session.sync_session, "after_commit", start, once=True)
