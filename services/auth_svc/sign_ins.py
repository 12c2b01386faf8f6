"""Signing up, in and out, and keeping a session going."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import grpc.aio
from meshboard.auth.v1.auth_service_pb2 import (
    BeginPasskeySignInRequest,
    BeginPasskeySignInResponse,
    CompleteSignInRequest,
    CompleteSignInResponse,
    GetJwksRequest,
    GetJwksResponse,
    RefreshRequest,
    RefreshResponse,
    SignInRequest,
    SignInResponse,
    SignOutRequest,
    SignOutResponse,
    SignUpRequest,
    SignUpResponse,
)
from meshboard.auth.v1.auth_service_pb2_grpc import AuthServiceServicer
from meshboard.auth.v1.events_pb2 import SessionRevoked
from meshboard.auth.v1.factor_pb2 import Factor
from meshboard.auth.v1.internal_auth_service_pb2 import CheckSessionResponse
from meshboard.user.v1.internal_user_service_pb2 import GetSignInRequest
from meshboard.user.v1.internal_user_service_pb2_grpc import InternalUserServiceStub
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.auth_svc import audit, sessions
from services.auth_svc.common_passwords import refuse_common
from services.auth_svc.guesses import Guesses
from services.auth_svc.models import NOBODY, Account, Session
from services.auth_svc.origins import Origin, origin_of
from services.auth_svc.passkeys import WrongPasskey, user_id_of
from services.auth_svc.second_factors import SecondFactors
from services.auth_svc.sessions import PASSWORD, Going, Shown, Verdict
from services.auth_svc.settings import AuthSettings
from services.auth_svc.sign_ups import SignUps
from services.auth_svc.signing_keys import SigningKeys, jwks
from services.auth_svc.tickets import Purpose, Tickets
from services.auth_svc.tokens import Tokens
from services.chassis import auth, errors
from services.chassis.cache import CachedMessages
from services.chassis.db import Rows, fetch_at_once
from services.chassis.emails import email_key
from services.chassis.passwords import Passwords
from services.chassis.texts import clean_name
from services.chassis.together import Together

Context = grpc.aio.ServicerContext[Any, Any]


# As text, for the driver itself: half of the time of a sign-in, beside argon2's, went into building statements.
_FIND = """
    SELECT user_id::text, password_hash, last_workspace_id::text, disable_time, array(
        SELECT DISTINCT kind FROM factors WHERE factors.user_id = coalesce(accounts.user_id, $2) ORDER BY kind
    )
    FROM (SELECT) AS nobody LEFT JOIN accounts ON email_key = $1 AND activate_time IS NOT NULL
"""
_COME_BACK = """
    UPDATE accounts SET last_workspace_id = $3
    WHERE user_id = $1 AND (password_hash = $2 OR $2 = '')
    RETURNING disable_time IS NULL
"""


@dataclass(frozen=True, slots=True)
class _Found:
    """What a sign-in has to know of an account."""

    user_id: str
    password_hash: str
    last_workspace_id: str | None
    disable_time: datetime | None
    factor_kinds: list[str]


@dataclass(frozen=True)
class AuthServicer(AuthServiceServicer):
    """`refreshes` exchanges the newest refresh tokens; `alive` remembers which sessions are alive, for CheckSession."""

    db: async_sessionmaker[AsyncSession]
    settings: AuthSettings
    users: InternalUserServiceStub
    sign_ups: SignUps
    passwords: Passwords
    guesses: Guesses
    tickets: Tickets
    second_factors: SecondFactors
    refreshes: Together[Shown, Going | None]
    tokens: Tokens
    keys: SigningKeys
    alive: CachedMessages[CheckSessionResponse]
    now: Callable[[], datetime]

    async def SignUp(self, request: SignUpRequest, context: Context) -> SignUpResponse:
        origin = self._origin(request, context)
        request.display_name = clean_name(request.display_name, "display_name")
        refuse_common(request.password, "password")
        if self.settings.require_verified_email and not request.invitation_token:
            await self.sign_ups.mail_link(request)
            return SignUpResponse()
        signed_up = await self.sign_ups.sign_up(request, origin)
        return SignUpResponse(
            user=signed_up.user,
            workspace=signed_up.workspace,
            **await self.tokens.give(context, signed_up.begun),
        )

    async def SignIn(self, request: SignInRequest, context: Context) -> SignInResponse:
        origin = self._origin(request, context)
        key = email_key(request.email)
        account = await _find(self.db, key)
        device_token = self._device_token(account.user_id if account else "", request.device_token, origin)
        # By account and not by address: who gets the address after it inherits no delays.
        subject = account.user_id if account else key
        async with self.guesses.attempt("sign-in", subject, origin, device_token) as attempt:
            # The same work for an unknown address, so that the time does not tell.
            right = await self.passwords.verify(account.password_hash if account else None, request.password)
            attempt.settle(right)
        if account is None or not right:
            await self._refuse(origin, account.user_id if account else "", "CREDENTIALS_WRONG")
            raise _credentials_wrong()
        if account.disable_time:
            await self._refuse(origin, account.user_id, "ACCOUNT_DISABLED")
            raise _account_disabled()
        password_hash = await self._keep_hash_strong(account, request.password)
        if account.factor_kinds:
            kinds = [Factor.Kind.Value(kind) for kind in account.factor_kinds]
            return await self._ask_for_second_factor(origin, account.user_id, password_hash, kinds)
        return SignInResponse(
            **await self._begin(
                context,
                origin,
                account.user_id,
                account.last_workspace_id,
                methods=(PASSWORD,),
                in_cookies=request.cookies,
                device_token=device_token,
                password_hash=password_hash,
            )
        )

    async def _ask_for_second_factor(
        self, origin: Origin, user_id: str, password_hash: str, kinds: list[Factor.Kind.ValueType]
    ) -> SignInResponse:
        response = SignInResponse(factors=kinds)
        remembered: dict[str, Any] = {}
        async with self.db.begin() as session:
            # Locked: a change of the password waits for the ticket, and takes it back.
            same = await session.scalar(
                select(Account.user_id)
                .where(Account.user_id == user_id, Account.password_hash == password_hash)
                .with_for_update(key_share=True)
            )
            if same:
                if Factor.PASSKEY in kinds:
                    options, remembered = await self.second_factors.challenge(session, user_id)
                    response.passkey_options.CopyFrom(options)
                response.mfa_token = self.tickets.give(session, Purpose.SECOND_FACTOR, user_id, remembered)
        if not same:
            await self._refuse(origin, user_id, "CREDENTIALS_WRONG")
            raise _credentials_wrong()
        return response

    async def BeginPasskeySignIn(
        self, request: BeginPasskeySignInRequest, context: Context
    ) -> BeginPasskeySignInResponse:
        async with self.db.begin() as session:
            options, remembered = await self.second_factors.challenge(session, None)
            mfa_token = self.tickets.give(session, Purpose.PASSKEY_SIGN_IN, None, remembered)
        return BeginPasskeySignInResponse(mfa_token=mfa_token, options=options)

    async def CompleteSignIn(
        self, request: CompleteSignInRequest, context: Context
    ) -> CompleteSignInResponse:
        origin = self._origin(request, context)
        steps = {Purpose.SECOND_FACTOR, Purpose.PASSKEY_SIGN_IN}
        async with self.db() as session:
            found = await self.tickets.look(session, steps, request.mfa_token)
        if found is None:
            await self.guesses.address_failed("step", origin)
            raise errors.unauthenticated("MFA_TOKEN_INVALID", "The first step was too long ago: begin again.")
        purpose, ticket = found
        user_id = ticket.user_id or ""
        device_token = self._device_token(user_id or _claimed_user_id(request), request.device_token, origin)
        async with self.guesses.attempt("second-factor", user_id, origin, device_token) as attempt:
            async with self.db.begin() as session:
                # Locked: the ticket and the code are used up together, or not at all.
                unused = await self.tickets.look(session, {purpose}, request.mfa_token) is not None
                proved = unused and await self.second_factors.check(
                    session, ticket.user_id, request, ticket.data, origin
                )
                if proved:
                    await self.tickets.redeem(session, purpose, request.mfa_token)
            if unused:
                attempt.settle(bool(proved))
        if not unused:  # somebody else was faster with the same token
            raise errors.unauthenticated("MFA_TOKEN_INVALID", "The first step was used already: begin again.")
        if not proved:
            await self._refuse(origin, user_id, "FACTOR_WRONG")
            raise errors.unauthenticated(
                "FACTOR_WRONG", "The code or the passkey is wrong, or was used before."
            )
        methods = (PASSWORD,) if purpose is Purpose.SECOND_FACTOR else ()
        async with self.db() as session:
            workspace_id = await session.scalar(
                select(Account.last_workspace_id).where(Account.user_id == proved.user_id)
            )
        fields = await self._begin(
            context,
            origin,
            proved.user_id,
            workspace_id,
            methods=(*methods, *proved.methods),
            in_cookies=request.cookies,
            device_token=self._device_token(proved.user_id, request.device_token, origin),
        )
        return CompleteSignInResponse(**fields)

    async def _begin(
        self,
        context: Context,
        origin: Origin,
        user_id: str,
        last_workspace_id: str | None,
        *,
        methods: tuple[str, ...],
        in_cookies: bool,
        device_token: str,
        password_hash: str = "",
    ) -> dict[str, Any]:
        """Begins a session in the workspace of the last time, and gives the fields of the answer.

        `password_hash` is what the password was held against: changed meanwhile, it opens no session any more.
        """
        signed_in = await self.users.GetSignIn(
            GetSignInRequest(user_id=user_id, workspace_id=last_workspace_id or "")
        )
        workspace_id = signed_in.workspace.workspace_id
        now = self.now()
        rows = Rows()
        begun = sessions.begin(
            rows,
            user_id,
            workspace_id,
            origin=origin,
            methods=methods,
            settings=self.settings,
            now=now,
            in_cookies=in_cookies,
        )
        entry = audit.record(
            rows,
            "session.begun",
            origin,
            now,
            actor_id=user_id,
            subject_id=user_id,
            workspace_id=workspace_id,
            session_id=begun.session.session_id,
            logged=False,
            methods=list(methods),
        )
        # The account is locked: one that is disabled meanwhile gets no session that outlives it.
        usable = await rows.insert_if(self.db, _COME_BACK, user_id, password_hash, workspace_id or None)
        if usable is None:
            await self._refuse(origin, user_id, "CREDENTIALS_WRONG")
            raise _credentials_wrong()
        if not usable:
            await self._refuse(origin, user_id, "ACCOUNT_DISABLED")
            raise _account_disabled()
        audit.to_log(entry)
        return {
            "user": signed_in.user,
            "workspace": signed_in.workspace if workspace_id else None,
            **await self.tokens.give(context, begun, device_token=device_token),
        }

    async def Refresh(self, request: RefreshRequest, context: Context) -> RefreshResponse:
        origin = origin_of(context)
        spelled = request.refresh_token or origin.refresh_cookie
        refresh_key = request.refresh_key or ("" if request.refresh_token else origin.refresh_key_cookie)
        token = self.tokens.read_refresh_token(spelled)
        if token is None:
            raise _refresh_token_invalid()
        going = await self.refreshes.ask(Shown(token, origin))
        if going is not None:
            return RefreshResponse(**await self.tokens.give_next(context, going, token.successor()))
        now = self.now()
        # The verdict leaves the transaction as a value: an error would take the revocation back.
        async with self.db.begin() as session:
            verdict, row = await sessions.exchange(
                session, token, refresh_key, origin=origin, settings=self.settings, now=now
            )
            if verdict is Verdict.REUSED:
                assert row is not None
                self._note_end(session, row, origin, now, reason="REFRESH_TOKEN_REUSED")
        match verdict:
            case Verdict.SUPERSEDED:
                raise errors.aborted(
                    "REFRESH_TOKEN_SUPERSEDED", "The refresh token was exchanged already: use the newest one."
                )
            case Verdict.REUSED:
                assert row is not None
                await self.alive.invalidate(row.session_id)
                raise errors.unauthenticated(
                    "REFRESH_TOKEN_REUSED", "An old refresh token was used again: the session is revoked."
                )
            case Verdict.EXCHANGED:
                assert row is not None
                return RefreshResponse(**await self.tokens.give_next(context, row, token.successor()))
            case Verdict.INVALID:
                raise _refresh_token_invalid()

    async def SignOut(self, request: SignOutRequest, context: Context) -> SignOutResponse:
        session_id, origin, now = auth.caller().session_id, origin_of(context), self.now()
        async with self.db.begin() as session:
            row = await sessions.revoke(session, session_id, SessionRevoked.SIGNED_OUT, now)
            if row is not None:
                self._note_end(session, row, origin, now)
        await self.alive.invalidate(session_id)
        if row is not None and row.in_cookies:
            await self.tokens.take_back_cookies(context)
        return SignOutResponse()

    async def GetJwks(self, request: GetJwksRequest, context: Context) -> GetJwksResponse:
        return jwks(await self.keys.public_keys())

    def _origin(
        self, request: SignUpRequest | SignInRequest | CompleteSignInRequest, context: Context
    ) -> Origin:
        origin = origin_of(context)
        if request.cookies:
            self.tokens.check_page(origin)
        return origin

    def _device_token(self, user_id: str, shown: str, origin: Origin) -> str:
        """The device token that the caller has shown, if it is one of this account."""
        token = shown or origin.device_cookie
        return token if self.guesses.knows_device(user_id, token) else ""

    async def _keep_hash_strong(self, account: _Found, password: str) -> str:
        """The hash of the password, made anew if its parameters are not those of now."""
        if not self.passwords.is_outdated(account.password_hash):
            return account.password_hash
        rehashed = await self.passwords.hash(password)
        async with self.db.begin() as session:
            await session.execute(
                update(Account)
                .where(Account.user_id == account.user_id, Account.password_hash == account.password_hash)
                .values(password_hash=rehashed)
            )
        return rehashed

    async def _refuse(self, origin: Origin, user_id: str, reason: str) -> None:
        """Notes a sign-in that was refused; for unknown addresses too, so that the time does not tell."""
        async with self.db.begin() as session:
            audit.record(
                session, "session.begun", origin, self.now(), reason=reason, actor_id="", subject_id=user_id
            )

    def _note_end(
        self, session: AsyncSession, row: Session, origin: Origin, now: datetime, **details: str
    ) -> None:
        audit.record(
            session,
            "session.ended",
            origin,
            now,
            subject_id=row.user_id,
            workspace_id=row.workspace_id or "",
            session_id=row.session_id,
            cause=details.get("reason", "SIGNED_OUT"),
        )


async def _find(db: async_sessionmaker[AsyncSession], key: str) -> _Found | None:
    """The account of an address; the same work for one that is unknown, so that the time does not tell."""
    ((user_id, *rest),) = await fetch_at_once(db, _FIND, key, NOBODY)
    return _Found(user_id, *rest) if user_id else None


def _claimed_user_id(request: CompleteSignInRequest) -> str:
    """Whose a passkey says that it is: good enough to tell whether the device is known to that account."""
    try:
        return user_id_of(request.passkey)
    except WrongPasskey:
        return ""


def _credentials_wrong() -> errors.Error:
    return errors.unauthenticated("CREDENTIALS_WRONG", "The address or the password is wrong.")


def _account_disabled() -> errors.Error:
    return errors.permission_denied("ACCOUNT_DISABLED", "The account is disabled.")


def _refresh_token_invalid() -> errors.Error:
    return errors.unauthenticated("REFRESH_TOKEN_INVALID", "The refresh token is not valid: sign in again.")
