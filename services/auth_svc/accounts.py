"""Signing up, in and out, and keeping a session going."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import grpc.aio
import structlog
from meshboard.auth.v1.auth_service_pb2 import (
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
from meshboard.auth.v1.events_pb2 import AccountCreated
from meshboard.auth.v1.internal_auth_service_pb2 import CheckSessionResponse
from meshboard.user.v1.internal_user_service_pb2 import CreateUserRequest, GetSignInRequest
from meshboard.user.v1.internal_user_service_pb2_grpc import InternalUserServiceStub
from sqlalchemy import select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.auth_svc import refresh_tokens, sessions
from services.auth_svc.emails import email_key
from services.auth_svc.models import Account, Session
from services.auth_svc.passwords import Passwords
from services.auth_svc.sessions import Verdict
from services.auth_svc.settings import AuthSettings
from services.auth_svc.sign_in_delays import SignInDelays, address_of
from services.auth_svc.signing_keys import SigningKeys, jwks
from services.chassis import auth, errors, outbox
from services.chassis.cache import CachedMessages

Context = grpc.aio.ServicerContext[Any, Any]

audit = structlog.get_logger("audit", log="audit")


@dataclass(frozen=True)
class AuthServicer(AuthServiceServicer):
    """`alive` remembers which sessions are alive, for CheckSession; `refresh_token_key` are 32 bytes."""

    db: async_sessionmaker[AsyncSession]
    settings: AuthSettings
    users: InternalUserServiceStub
    passwords: Passwords
    delays: SignInDelays
    keys: SigningKeys
    alive: CachedMessages[CheckSessionResponse]
    refresh_token_key: bytes
    now: Callable[[], datetime]
    new_id: Callable[[], str]

    async def SignUp(self, request: SignUpRequest, context: Context) -> SignUpResponse:
        if self.passwords.is_common(request.password):
            raise errors.invalid_argument(
                "PASSWORD_COMMON",
                "The password is among the most used ones: choose another.",
                field="password",
            )
        pending = await self._pending_account(request)
        created = await self.users.CreateUser(
            CreateUserRequest(
                user_id=pending.user_id,
                workspace_id=pending.workspace_id,
                email=pending.email,
                display_name=pending.display_name,
            )
        )
        now = self.now()
        async with self.db.begin() as session:
            account = await session.get(Account, pending.user_id, with_for_update=True)
            if account is None:
                raise errors.unavailable("The sign-up was not finished in time: begin again.")
            if account.activate_time is None:
                account.activate_time = now
                outbox.add(session, AccountCreated(user_id=account.user_id))
            account.last_workspace_id = account.workspace_id
            begun = sessions.begin(session, account, account.workspace_id, self.settings, now)
        self._note("signed_up", begun.session, context)
        return SignUpResponse(
            user=created.user,
            workspace=created.workspace,
            access_token=self._access_token(begun.session),
            refresh_token=refresh_tokens.spell(begun.refresh_token, self.refresh_token_key),
            refresh_key=begun.refresh_key,
            expires_in_seconds=self.settings.access_token_seconds,
        )

    async def _pending_account(self, request: SignUpRequest) -> Account:
        """A new account, or the one that an earlier try with the same password has left."""
        account = await self._find_account(request.email)
        if account is None:
            account = await self._add_account(request)
            if account is not None:
                return account
            account = await self._find_account(request.email)
        if (
            account is not None
            and account.activate_time is None
            and await self.passwords.verify(account.password_hash, request.password)
        ):
            async with self.db.begin() as session:
                await session.execute(
                    update(Account).where(Account.user_id == account.user_id).values(try_time=self.now())
                )
            return account
        raise errors.already_exists("EMAIL_TAKEN", "The address has an account: sign in instead.")

    async def _add_account(self, request: SignUpRequest) -> Account | None:
        password_hash = await self.passwords.hash(request.password)
        now = self.now()
        async with self.db.begin() as session:
            account: Account | None = await session.scalar(
                insert(Account)
                .values(
                    user_id=self.new_id(),
                    email=request.email,
                    email_key=email_key(request.email),
                    password_hash=password_hash,
                    display_name=request.display_name,
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

    async def SignIn(self, request: SignInRequest, context: Context) -> SignInResponse:
        key, address = email_key(request.email), address_of(context)
        await self.delays.check(key, address)
        account = await self._find_account(request.email)
        known = account is not None and account.activate_time is not None
        # The same work for an unknown address, so that the time does not tell.
        right = await self.passwords.verify(
            account.password_hash if account and known else None, request.password
        )
        if account is None or not right:
            audit.info("sign_in_failed", user_id=account.user_id if account else "", address=address)
            await self.delays.failed(key, address)
            raise errors.unauthenticated("CREDENTIALS_WRONG", "The address or the password is wrong.")
        await self.delays.succeeded(key, address)
        signed_in = await self.users.GetSignIn(
            GetSignInRequest(user_id=account.user_id, workspace_id=account.last_workspace_id or "")
        )
        rehashed = (
            await self.passwords.hash(request.password)
            if self.passwords.is_outdated(account.password_hash)
            else account.password_hash
        )
        workspace_id = signed_in.workspace.workspace_id
        async with self.db.begin() as session:
            await session.execute(
                update(Account)
                .where(Account.user_id == account.user_id, Account.password_hash == account.password_hash)
                .values(last_workspace_id=workspace_id or None, password_hash=rehashed)
            )
            begun = sessions.begin(session, account, workspace_id, self.settings, self.now())
        self._note("signed_in", begun.session, context)
        return SignInResponse(
            user=signed_in.user,
            workspace=signed_in.workspace if workspace_id else None,
            access_token=self._access_token(begun.session),
            refresh_token=refresh_tokens.spell(begun.refresh_token, self.refresh_token_key),
            refresh_key=begun.refresh_key,
            expires_in_seconds=self.settings.access_token_seconds,
        )

    async def Refresh(self, request: RefreshRequest, context: Context) -> RefreshResponse:
        token = refresh_tokens.read(request.refresh_token, self.refresh_token_key)
        if token is None:
            raise _refresh_token_invalid()
        # The verdict leaves the transaction as a value: an error would take the revocation back.
        async with self.db.begin() as session:
            verdict, row = await sessions.exchange(
                session, token, request.refresh_key, self.settings, self.now()
            )
        match verdict:
            case Verdict.SUPERSEDED:
                raise errors.aborted(
                    "REFRESH_TOKEN_SUPERSEDED", "The refresh token was exchanged already: use the newest one."
                )
            case Verdict.REUSED:
                assert row is not None
                await self.alive.invalidate(row.session_id)
                self._note("refresh_token_reused", row, context)
                raise errors.unauthenticated(
                    "REFRESH_TOKEN_REUSED", "An old refresh token was used again: the session is revoked."
                )
            case Verdict.EXCHANGED:
                assert row is not None
                return RefreshResponse(
                    access_token=self._access_token(row),
                    refresh_token=refresh_tokens.spell(token.successor(), self.refresh_token_key),
                    expires_in_seconds=self.settings.access_token_seconds,
                )
            case Verdict.INVALID:
                raise _refresh_token_invalid()

    async def SignOut(self, request: SignOutRequest, context: Context) -> SignOutResponse:
        session_id = auth.caller().session_id
        async with self.db.begin() as session:
            row = await sessions.sign_out(session, session_id, self.now())
        await self.alive.invalidate(session_id)
        if row is not None:
            self._note("signed_out", row, context)
        return SignOutResponse()

    async def GetJwks(self, request: GetJwksRequest, context: Context) -> GetJwksResponse:
        return jwks(await self.keys.public_keys())

    def _access_token(self, row: Session) -> str:
        return sessions.access_token(row, self.keys.current(), self.settings, self.now())

    def _note(self, what: str, row: Session, context: Context) -> None:
        audit.info(what, user_id=row.user_id, session_id=row.session_id, address=address_of(context))


def _refresh_token_invalid() -> errors.Error:
    return errors.unauthenticated("REFRESH_TOKEN_INVALID", "The refresh token is not valid: sign in again.")
