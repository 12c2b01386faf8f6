"""How an account comes to be: at once, or by a mailed link where addresses must be verified first."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from meshboard.auth.v1.auth_service_pb2 import SignUpRequest
from meshboard.auth.v1.events_pb2 import AccountCreated, EmailVerified
from meshboard.user.v1.internal_user_service_pb2 import CheckInvitationRequest, CreateUserRequest
from meshboard.user.v1.internal_user_service_pb2_grpc import InternalUserServiceStub
from meshboard.user.v1.user_pb2 import User
from meshboard.user.v1.workspace_pb2 import Workspace
from sqlalchemy import select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.auth_svc import audit, links, sessions
from services.auth_svc.mails import Mails
from services.auth_svc.models import Account
from services.auth_svc.origins import Origin
from services.auth_svc.sessions import PASSWORD, Begun
from services.auth_svc.settings import AuthSettings
from services.auth_svc.tickets import Purpose, Tickets
from services.chassis import errors, outbox
from services.chassis.emails import email_key
from services.chassis.passwords import Passwords
from services.chassis.times import timestamp_of


@dataclass(frozen=True, slots=True)
class SignedUp:
    """A new account with its first session."""

    user: User
    workspace: Workspace
    begun: Begun


@dataclass(frozen=True)
class SignUps:
    """Makes accounts."""

    db: async_sessionmaker[AsyncSession]
    settings: AuthSettings
    users: InternalUserServiceStub
    passwords: Passwords
    tickets: Tickets
    mails: Mails
    now: Callable[[], datetime]
    new_id: Callable[[], str]

    async def sign_up(self, request: SignUpRequest, origin: Origin) -> SignedUp:
        """Makes the account, signs it in, and mails a link to verify its address. Raises ALREADY_EXISTS.

        An invitation has come by mail, and verifies the address. It is looked at first, so that whoever has none learns
        nothing of accounts by it. Raises as `InvitationService.AcceptInvitation` says.
        """
        invitation = request.invitation_token
        if invitation:
            invited = await self.users.CheckInvitation(CheckInvitationRequest(token=invitation))
            if email_key(invited.email) != email_key(request.email):
                raise errors.permission_denied(
                    "INVITATION_FOR_ANOTHER", "The invitation is for another address."
                )
        pending = await self._pending_account(request)
        return await self._finish(pending, origin, in_cookies=request.cookies, invitation=invitation)

    async def mail_link(self, request: SignUpRequest) -> None:
        """Mails a link that makes the account; or, to an address that has one, a mail that says so.

        Both cost the same, so that the time does not tell.
        """
        password_hash = await self.passwords.hash(request.password)
        now = self.now()
        async with self.db.begin() as session:
            taken = await session.scalar(
                select(Account.user_id).where(
                    Account.email_key == email_key(request.email), Account.activate_time.is_not(None)
                )
            )
            purpose = Purpose.NOTHING if taken else Purpose.SIGN_UP
            data = {
                "email": request.email,
                "password_hash": password_hash,
                "display_name": request.display_name,
            }
            token = self.tickets.give(session, purpose, None, data)
            mail = links.account_exists(self.settings) if taken else links.sign_up(self.settings, token)
            self.mails.add(session, now, request.email, *mail)

    async def redeem_link(
        self, token: str, data: dict[str, Any], origin: Origin, *, in_cookies: bool
    ) -> SignedUp:
        """Makes the account that a link is about, with a verified address, or resumes what an earlier try has left.

        The link works until the account is active. Raises ALREADY_EXISTS (EMAIL_TAKEN) when the address has got an
        account otherwise, UNAUTHENTICATED (LINK_INVALID) when somebody else has been faster with the same link.
        """
        account = await self._add_account(data["email"], data["password_hash"], data["display_name"])
        if account is None:
            account = await self._find_account(data["email"])
            if account is None or account.password_hash != data["password_hash"]:
                raise _email_taken()
            if account.activate_time is not None:
                raise links.invalid()
            await self._resume(account)
        return await self._finish(account, origin, in_cookies=in_cookies, link=token)

    async def _finish(
        self, pending: Account, origin: Origin, *, in_cookies: bool, link: str = "", invitation: str = ""
    ) -> SignedUp:
        """Activates the account and signs it in.

        A `link`, which is used up then, or an `invitation` verifies its address.
        """
        created = await self.users.CreateUser(
            CreateUserRequest(
                user_id=pending.user_id,
                workspace_id=pending.workspace_id,
                email=pending.email,
                display_name=pending.display_name,
                invitation_token=invitation,
            )
        )
        now = self.now()
        async with self.db.begin() as session:
            account = await session.get(Account, pending.user_id, with_for_update=True)
            if account is None:
                raise errors.unavailable("The sign-up was not finished in time: begin again.")
            if link and not await self.tickets.redeem(session, Purpose.SIGN_UP, link):
                raise links.invalid()
            if account.activate_time is None:
                account.activate_time = now
                account.password_change_time = now
                outbox.add(session, AccountCreated(user_id=account.user_id))
                if link or invitation:
                    verify(session, account, now)
                else:
                    token = self.tickets.give(session, Purpose.VERIFY_EMAIL, account.user_id)
                    self.mails.add(session, now, account.email, *links.verify_email(self.settings, token))
            account.last_workspace_id = created.workspace.workspace_id
            begun = sessions.begin(
                session,
                account.user_id,
                account.last_workspace_id,
                origin=origin,
                methods=(PASSWORD,),
                settings=self.settings,
                now=now,
                in_cookies=in_cookies,
            )
            audit.record(
                session,
                "account.created",
                origin,
                now,
                actor_id=account.user_id,
                subject_id=account.user_id,
                workspace_id=account.last_workspace_id,
                session_id=begun.session.session_id,
            )
        return SignedUp(created.user, created.workspace, begun)

    async def _pending_account(self, request: SignUpRequest) -> Account:
        """A new account, or the one that an earlier try with the same password has left."""
        account = await self._find_account(request.email)
        if account is None:
            account = await self._add_account(
                request.email, await self.passwords.hash(request.password), request.display_name
            )
            if account is not None:
                return account
            account = await self._find_account(request.email)
        if (
            account is not None
            and account.activate_time is None
            and await self.passwords.verify(account.password_hash, request.password)
        ):
            await self._resume(account)
            return account
        raise _email_taken()

    async def _resume(self, pending: Account) -> None:
        """Keeps the reaper away from an account that is being finished."""
        async with self.db.begin() as session:
            await session.execute(
                update(Account).where(Account.user_id == pending.user_id).values(try_time=self.now())
            )

    async def _add_account(self, email: str, password_hash: str, display_name: str) -> Account | None:
        now = self.now()
        async with self.db.begin() as session:
            account: Account | None = await session.scalar(
                insert(Account)
                .values(
                    user_id=self.new_id(),
                    email=email,
                    email_key=email_key(email),
                    password_hash=password_hash,
                    display_name=display_name,
                    workspace_id=self.new_id(),
                    create_time=now,
                    try_time=now,
                )
                .on_conflict_do_nothing(index_elements=[Account.email_key])
                .returning(Account)
            )
        return account

    async def _find_account(self, email: str) -> Account | None:
        async with self.db() as session:
            account: Account | None = await session.scalar(
                select(Account).where(Account.email_key == email_key(email))
            )
        return account


def verify(session: AsyncSession, account: Account, now: datetime) -> None:
    """Notes that a mail to the account's address has reached its owner, and emits `EmailVerified` the first time."""
    if account.verify_time is None:
        account.verify_time = now
        outbox.add(
            session, EmailVerified(user_id=account.user_id, email=account.email, time=timestamp_of(now))
        )


def _email_taken() -> errors.Error:
    return errors.already_exists("EMAIL_TAKEN", "The address has an account: sign in instead.")
