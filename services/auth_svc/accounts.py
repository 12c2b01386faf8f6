"""Accounts: address and password, and the links that are mailed for them."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import grpc.aio
from meshboard.auth.v1.account_service_pb2 import (
    Account as AccountPb,
)
from meshboard.auth.v1.account_service_pb2 import (
    ChangeEmailRequest,
    ChangeEmailResponse,
    ChangePasswordRequest,
    ChangePasswordResponse,
    ConfirmEmailChangeRequest,
    ConfirmEmailChangeResponse,
    GetAccountRequest,
    GetAccountResponse,
    ReauthenticateRequest,
    ReauthenticateResponse,
    RequestPasswordResetRequest,
    RequestPasswordResetResponse,
    ResetPasswordRequest,
    ResetPasswordResponse,
    SendVerificationRequest,
    SendVerificationResponse,
    VerifyEmailRequest,
    VerifyEmailResponse,
)
from meshboard.auth.v1.account_service_pb2_grpc import AccountServiceServicer
from meshboard.auth.v1.events_pb2 import EmailChanged, SessionRevoked
from meshboard.auth.v1.internal_auth_service_pb2 import CheckSessionResponse
from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.auth_svc import audit, links, sessions
from services.auth_svc.common_passwords import refuse_common
from services.auth_svc.guesses import Guesses
from services.auth_svc.mails import Mails
from services.auth_svc.models import NOBODY, Account, EmailChange, Session, Ticket
from services.auth_svc.origins import Origin, origin_of
from services.auth_svc.second_factors import SecondFactors
from services.auth_svc.sessions import PASSWORD, Begun
from services.auth_svc.settings import AuthSettings
from services.auth_svc.sign_ups import SignUps, verify
from services.auth_svc.tickets import Found, Purpose, Tickets
from services.auth_svc.tokens import Tokens
from services.chassis import auth, errors, outbox
from services.chassis.cache import CachedMessages
from services.chassis.emails import email_key
from services.chassis.passwords import Passwords
from services.chassis.times import timestamp_of

Context = grpc.aio.ServicerContext[Any, Any]

_BETWEEN_MAILS = timedelta(seconds=60)


@dataclass(frozen=True)
class AccountServicer(AccountServiceServicer):
    """`alive` remembers which sessions are alive, for CheckSession.

    Rows are locked in the order account, tickets, sessions, so that no two calls wait for each other.
    """

    db: async_sessionmaker[AsyncSession]
    settings: AuthSettings
    sign_ups: SignUps
    passwords: Passwords
    guesses: Guesses
    tickets: Tickets
    mails: Mails
    second_factors: SecondFactors
    tokens: Tokens
    alive: CachedMessages[CheckSessionResponse]
    now: Callable[[], datetime]
    new_id: Callable[[], str]

    async def GetAccount(self, request: GetAccountRequest, context: Context) -> GetAccountResponse:
        user_id = auth.caller().user_id
        under_way_since = self.now() - Purpose.CONFIRM_EMAIL.lifetime
        async with self.db() as session:
            row = await session.get_one(Account, user_id)
            kinds = await self.second_factors.kinds(session, user_id)
            new_email = await session.scalar(
                select(EmailChange.new_email).where(
                    EmailChange.user_id == user_id, EmailChange.create_time > under_way_since
                )
            )
        account = AccountPb(
            user_id=row.user_id,
            email=row.email,
            email_verified=row.verify_time is not None,
            second_factor=bool(kinds),
            create_time=timestamp_of(row.create_time),
            password_change_time=timestamp_of(row.password_change_time or row.create_time),
            new_email=new_email or "",
        )
        return GetAccountResponse(account=account)

    async def Reauthenticate(
        self, request: ReauthenticateRequest, context: Context
    ) -> ReauthenticateResponse:
        caller, origin = auth.caller(), origin_of(context)
        if request.WhichOneof("proof") == "password":
            await self._check_password(request.password, origin, "session.renewed")
            methods: tuple[str, ...] = (PASSWORD,)
        else:
            methods = await self._check_factor(request, origin)
        now = self.now()
        async with self.db.begin() as session:
            begun = await self._renew(session, origin, now, methods)
            audit.record(
                session,
                "session.renewed",
                origin,
                now,
                subject_id=caller.user_id,
                session_id=begun.session.session_id,
                methods=list(methods),
            )
        await self.alive.invalidate(caller.session_id)
        return ReauthenticateResponse(**await self._give(context, begun, origin))

    async def ChangePassword(
        self, request: ChangePasswordRequest, context: Context
    ) -> ChangePasswordResponse:
        caller, origin = auth.caller(), origin_of(context)
        refuse_common(request.new_password, "new_password")
        await self._check_password(request.current_password, origin, "password.changed")
        password_hash = await self.passwords.hash(request.new_password)
        now = self.now()
        async with self.db.begin() as session:
            account = await self._lock(session, caller.user_id)
            if account is None:
                raise _session_revoked()
            ended = await self._set_password(session, account, password_hash, now, but=caller.session_id)
            begun = await self._renew(session, origin, now)
            audit.record(
                session,
                "password.changed",
                origin,
                now,
                subject_id=account.user_id,
                session_id=begun.session.session_id,
                ended_sessions=len(ended),
            )
        await self._forget(caller.session_id, *ended)
        return ChangePasswordResponse(**await self._give(context, begun, origin))

    async def ChangeEmail(self, request: ChangeEmailRequest, context: Context) -> ChangeEmailResponse:
        user_id, origin = auth.caller().user_id, origin_of(context)
        await self._count_mail(request.new_email, origin)
        now, data = self.now(), {"change_id": self.new_id()}
        async with self.db.begin() as session:
            account = await self._lock(session, user_id)
            if account is None:
                raise _session_revoked()
            taken = await session.scalar(
                select(Account.user_id).where(
                    Account.email_key == email_key(request.new_email),
                    Account.activate_time.is_not(None),
                    Account.user_id != user_id,
                )
            )
            change = {**data, "new_email": request.new_email, "create_time": now}
            change |= {"approve_time": None, "confirm_time": None}
            await session.execute(
                insert(EmailChange)
                .values(user_id=user_id, **change)
                .on_conflict_do_update(index_elements=[EmailChange.user_id], set_=change)
            )
            await self.tickets.void(session, user_id, Purpose.APPROVE_EMAIL, Purpose.CONFIRM_EMAIL)
            approve = self.tickets.give(session, Purpose.APPROVE_EMAIL, user_id, data)
            # The same work for an address that has an account, so that the time does not tell.
            purpose = Purpose.NOTHING if taken else Purpose.CONFIRM_EMAIL
            confirm = self.tickets.give(session, purpose, user_id, data)
            letter = (
                links.email_in_use(self.settings) if taken else links.confirm_email(self.settings, confirm)
            )
            self.mails.add(session, now, request.new_email, *letter)
            letter = links.approve_email(self.settings, approve, request.new_email)
            self.mails.add(session, now, account.email, *letter)
            audit.record(session, "email_change.requested", origin, now, subject_id=user_id)
        return ChangeEmailResponse()

    async def SendVerification(
        self, request: SendVerificationRequest, context: Context
    ) -> SendVerificationResponse:
        user_id, now = auth.caller().user_id, self.now()
        async with self.db.begin() as session:
            account = await self._lock(session, user_id)
            if account is None or account.verify_time:
                return SendVerificationResponse()
            last = await session.scalar(
                select(func.max(Ticket.create_time)).where(
                    Ticket.user_id == user_id, Ticket.purpose == Purpose.VERIFY_EMAIL.label
                )
            )
            if last is not None and last > now - _BETWEEN_MAILS:
                raise errors.resource_exhausted(
                    "MAIL_DELAYED",
                    "A mail was sent a moment ago.",
                    retry_seconds=(last + _BETWEEN_MAILS - now).total_seconds(),
                )
            await self.tickets.void(session, user_id, Purpose.VERIFY_EMAIL)
            token = self.tickets.give(session, Purpose.VERIFY_EMAIL, user_id)
            self.mails.add(session, now, account.email, *links.verify_email(self.settings, token))
        return SendVerificationResponse()

    async def VerifyEmail(self, request: VerifyEmailRequest, context: Context) -> VerifyEmailResponse:
        origin = origin_of(context)
        if request.cookies:
            self.tokens.check_page(origin)
        purpose, ticket = await self._look(
            request.token, origin, "email.verified", Purpose.SIGN_UP, Purpose.VERIFY_EMAIL
        )
        if purpose is Purpose.SIGN_UP:
            signed_up = await self.sign_ups.redeem_link(
                request.token, ticket.data, origin, in_cookies=request.cookies
            )
            fields = await self.tokens.give(context, signed_up.begun)
            return VerifyEmailResponse(user=signed_up.user, workspace=signed_up.workspace, **fields)
        now = self.now()
        async with self.db.begin() as session:
            account = await self._redeem(session, purpose, request.token, ticket)
            if account is not None:
                verify(session, account, now)
                audit.record(
                    session,
                    "email.verified",
                    origin,
                    now,
                    actor_id=account.user_id,
                    subject_id=account.user_id,
                )
        if account is None:
            raise await self._refuse_link(origin, "email.verified")
        return VerifyEmailResponse()

    async def RequestPasswordReset(
        self, request: RequestPasswordResetRequest, context: Context
    ) -> RequestPasswordResetResponse:
        origin = origin_of(context)
        await self._count_mail(request.email, origin)
        async with self.db.begin() as session:
            self.mails.add_reset(session, self.now(), request.email, origin.address)
        return RequestPasswordResetResponse()

    async def ResetPassword(self, request: ResetPasswordRequest, context: Context) -> ResetPasswordResponse:
        origin = origin_of(context)
        refuse_common(request.new_password, "new_password")
        purpose, ticket = await self._look(
            request.token, origin, "password.reset", Purpose.RESET_PASSWORD, Purpose.FIRST_PASSWORD
        )
        password_hash = await self.passwords.hash(request.new_password)
        now = self.now()
        ended: list[Session] = []
        async with self.db.begin() as session:
            account = await self._redeem(session, purpose, request.token, ticket)
            if account is not None:
                verify(session, account, now)  # the mail has arrived
                ended = await self._set_password(session, account, password_hash, now)
                audit.record(
                    session,
                    "password.reset",
                    origin,
                    now,
                    actor_id=account.user_id,
                    subject_id=account.user_id,
                    ended_sessions=len(ended),
                )
        if account is None:
            raise await self._refuse_link(origin, "password.reset")
        await self._forget(*ended)
        return ResetPasswordResponse()

    async def ConfirmEmailChange(
        self, request: ConfirmEmailChangeRequest, context: Context
    ) -> ConfirmEmailChangeResponse:
        origin = origin_of(context)
        purpose, ticket = await self._look(
            request.token, origin, "email.changed", Purpose.APPROVE_EMAIL, Purpose.CONFIRM_EMAIL
        )
        changed = None
        try:
            async with self.db.begin() as session:
                account = await self._redeem(session, purpose, request.token, ticket)
                if account is not None:
                    changed = await self._advance_change(session, account, purpose, ticket, origin)
        except IntegrityError:  # the constraint on addresses; the link stays, should the address come free
            async with self.db.begin() as session:
                audit.record(
                    session,
                    "email.changed",
                    origin,
                    self.now(),
                    reason="EMAIL_TAKEN",
                    actor_id=ticket.user_id,
                    subject_id=ticket.user_id or "",
                )
            raise errors.already_exists("EMAIL_TAKEN", "The new address has got an account.") from None
        if changed is None:
            raise await self._refuse_link(origin, "email.changed")
        return ConfirmEmailChangeResponse(changed=changed)

    async def _advance_change(
        self, session: AsyncSession, account: Account, purpose: Purpose, ticket: Found, origin: Origin
    ) -> bool | None:
        """Notes that one link of a change of address was redeemed, and does it after the second one.

        Says whether the address is changed; None when the link belongs to another change.
        """
        now = self.now()
        change = await session.get(EmailChange, account.user_id)
        if change is None or change.change_id != ticket.data["change_id"]:
            return None
        who: dict[str, Any] = {"actor_id": account.user_id, "subject_id": account.user_id}
        if purpose is Purpose.APPROVE_EMAIL:
            change.approve_time = now
            audit.record(session, "email_change.approved", origin, now, **who)
        else:
            change.confirm_time = now
            audit.record(session, "email_change.confirmed", origin, now, **who)
        if change.approve_time is None or change.confirm_time is None:
            return False
        self.mails.add(session, now, account.email, *links.email_changed(self.settings))
        account.email, account.email_key = change.new_email, email_key(change.new_email)
        account.verify_time = now
        # What was mailed to the former address is void.
        await self.tickets.void(
            session, account.user_id, Purpose.RESET_PASSWORD, Purpose.FIRST_PASSWORD, Purpose.VERIFY_EMAIL
        )
        await session.delete(change)
        outbox.add(
            session, EmailChanged(user_id=account.user_id, email=account.email, time=timestamp_of(now))
        )
        audit.record(session, "email.changed", origin, now, **who)
        return True

    async def _check_password(self, password: str, origin: Origin, kind: str) -> None:
        """Raises UNAUTHENTICATED (CREDENTIALS_WRONG), or as `Guesses.attempt`. Guesses count as those at sign-in."""
        user_id = auth.caller().user_id
        async with self.db() as session:
            account = await session.get_one(Account, user_id)
        device_token = self._device_token(user_id, origin)
        async with self.guesses.attempt("sign-in", user_id, origin, device_token) as attempt:
            right = await self.passwords.verify(account.password_hash, password)
            attempt.settle(right)
        if not right:
            await self._refuse(origin, kind, "CREDENTIALS_WRONG")
            raise errors.unauthenticated("CREDENTIALS_WRONG", "The password is wrong.")

    async def _check_factor(self, request: ReauthenticateRequest, origin: Origin) -> tuple[str, ...]:
        """The methods of a proof that is right. Raises UNAUTHENTICATED, or as `Guesses.attempt`."""
        user_id, remembered = auth.caller().user_id, {}
        in_two_steps = request.WhichOneof("proof") == "passkey"
        if in_two_steps:
            async with self.db() as session:
                found = await self.tickets.look(session, {Purpose.PASSKEY_SIGN_IN}, request.mfa_token)
            if found is None:
                await self.guesses.address_failed("step", origin)
                raise _step_invalid()
            remembered = found[1].data
        device_token = self._device_token(user_id, origin)
        async with self.guesses.attempt("second-factor", user_id, origin, device_token) as attempt:
            async with self.db.begin() as session:
                # The ticket and the code are used up together, or not at all.
                proved = await self.second_factors.check(session, user_id, request, remembered, origin)
                right = proved is not None and proved.user_id == user_id
                used = (
                    right
                    and in_two_steps
                    and await self.tickets.redeem(session, Purpose.PASSKEY_SIGN_IN, request.mfa_token)
                )
            attempt.settle(right)
        if proved is None or not right:
            await self._refuse(origin, "session.renewed", "FACTOR_WRONG")
            raise errors.unauthenticated(
                "FACTOR_WRONG", "The code or the passkey is wrong, or was used before."
            )
        if in_two_steps and not used:  # somebody else was faster with the same token
            raise _step_invalid()
        return proved.methods

    async def _set_password(
        self,
        session: AsyncSession,
        account: Account,
        password_hash: str,
        now: datetime,
        *,
        but: str | None = None,
    ) -> list[Session]:
        """Sets a password, ends what was begun with the former one, and tells the person; gives the ended sessions."""
        account.password_hash, account.password_change_time = password_hash, now
        await self.tickets.void(
            session, account.user_id, Purpose.RESET_PASSWORD, Purpose.FIRST_PASSWORD, Purpose.SECOND_FACTOR
        )
        self.mails.add(session, now, account.email, *links.password_changed(self.settings))
        return await sessions.revoke_all(
            session, account.user_id, SessionRevoked.PASSWORD_CHANGED, now, but=but
        )

    async def _renew(
        self, session: AsyncSession, origin: Origin, now: datetime, methods: tuple[str, ...] = ()
    ) -> Begun:
        """Begins a session in place of the caller's. Raises UNAUTHENTICATED when that has ended meanwhile."""
        begun = await sessions.renew(
            session,
            auth.caller().session_id,
            origin=origin,
            settings=self.settings,
            now=now,
            methods=methods,
        )
        if begun is None:
            raise _session_revoked()
        return begun

    async def _give(self, context: Context, begun: Begun, origin: Origin) -> dict[str, Any]:
        """The fields of the answer that a renewed session has; its device is known already."""
        device_token = self._device_token(begun.session.user_id, origin)
        fields = await self.tokens.give(context, begun, device_token=device_token)
        fields.pop("device_token", None)
        return fields

    async def _forget(self, *ended: Session | str) -> None:
        for each in ended:
            await self.alive.invalidate(each if isinstance(each, str) else each.session_id)

    async def _lock(self, session: AsyncSession, user_id: str | None) -> Account | None:
        """The account, unless it is disabled, locked against other changes; sessions may begin meanwhile."""
        account = await session.get(Account, user_id or NOBODY, with_for_update={"key_share": True})
        return account if account is not None and account.disable_time is None else None

    async def _look(self, token: str, origin: Origin, kind: str, *purposes: Purpose) -> tuple[Purpose, Found]:
        """The ticket of a link, which stays. Raises UNAUTHENTICATED (LINK_INVALID)."""
        await self.guesses.check_address("link", origin)
        async with self.db() as session:
            found = await self.tickets.look(session, set(purposes), token)
        if found is None:
            raise await self._refuse_link(origin, kind)
        return found

    async def _redeem(
        self, session: AsyncSession, purpose: Purpose, token: str, ticket: Found
    ) -> Account | None:
        """The account of a link, which is used up; None when somebody was faster or the account is disabled."""
        account = await self._lock(session, ticket.user_id)
        if account is None or not await self.tickets.redeem(session, purpose, token):
            return None
        return account

    async def _count_mail(self, email: str, origin: Origin) -> None:
        """Slows down who has many mails sent to one address. Raises as `Guesses.attempt`."""
        async with self.guesses.attempt("mail", email_key(email), origin) as attempt:
            attempt.settle(False)

    async def _refuse_link(self, origin: Origin, kind: str) -> errors.Error:
        await self.guesses.address_failed("link", origin)
        await self._refuse(origin, kind, "LINK_INVALID")
        return links.invalid()

    async def _refuse(self, origin: Origin, kind: str, reason: str) -> None:
        claims = auth.caller().claims
        subject_id = claims.user_id if claims else ""
        async with self.db.begin() as session:
            audit.record(session, kind, origin, self.now(), reason=reason, subject_id=subject_id)

    def _device_token(self, user_id: str, origin: Origin) -> str:
        """The device token of the caller's browser, if it is one of this account."""
        token = origin.device_cookie
        return token if self.guesses.knows_device(user_id, token) else ""


def _session_revoked() -> errors.Error:
    return errors.unauthenticated("SESSION_REVOKED", "The session has ended: sign in again.")


def _step_invalid() -> errors.Error:
    return errors.unauthenticated("MFA_TOKEN_INVALID", "The first step was too long ago: begin again.")
