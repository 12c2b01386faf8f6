"""The second factors of the caller's own account."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import grpc.aio
from meshboard.auth.v1.factor_pb2 import Factor
from meshboard.auth.v1.factor_service_pb2 import (
    BeginPasskeyRequest,
    BeginPasskeyResponse,
    BeginTotpRequest,
    BeginTotpResponse,
    ConfirmPasskeyRequest,
    ConfirmPasskeyResponse,
    ConfirmTotpRequest,
    ConfirmTotpResponse,
    DeleteFactorRequest,
    DeleteFactorResponse,
    ListFactorsRequest,
    ListFactorsResponse,
    ReplaceRecoveryCodesRequest,
    ReplaceRecoveryCodesResponse,
)
from meshboard.auth.v1.factor_service_pb2_grpc import FactorServiceServicer
from meshboard.auth.v1.internal_auth_service_pb2 import CheckSessionResponse
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.auth_svc import audit, sessions, totp
from services.auth_svc.guesses import Guesses
from services.auth_svc.models import Account, FactorRow
from services.auth_svc.origins import Origin, origin_of
from services.auth_svc.passkeys import WrongPasskey
from services.auth_svc.second_factors import CODE_METHODS, PASSKEY, TOTP, SecondFactors
from services.auth_svc.sessions import Begun
from services.auth_svc.settings import AuthSettings
from services.auth_svc.tickets import Found, Purpose, Tickets
from services.auth_svc.tokens import Tokens
from services.chassis import auth, errors
from services.chassis.cache import CachedMessages
from services.chassis.paging import Pages
from services.chassis.times import timestamp_of

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True)
class FactorServicer(FactorServiceServicer):
    """`alive` remembers which sessions are alive, for CheckSession."""

    db: async_sessionmaker[AsyncSession]
    settings: AuthSettings
    pages: Pages
    guesses: Guesses
    tickets: Tickets
    second_factors: SecondFactors
    tokens: Tokens
    alive: CachedMessages[CheckSessionResponse]
    now: Callable[[], datetime]

    async def ListFactors(self, request: ListFactorsRequest, context: Context) -> ListFactorsResponse:
        user_id = auth.caller().user_id
        page = self.pages.open(request, user_id)
        async with self.db() as session:
            rows = await session.scalars(
                select(FactorRow)
                .where(FactorRow.user_id == user_id, page.after(FactorRow.factor_id))
                .order_by(FactorRow.factor_id)
                .limit(page.limit)
            )
        factors, next_page_token = page.close(rows.all(), lambda row: (row.factor_id,))
        return ListFactorsResponse(factors=map(_factor_to_pb, factors), next_page_token=next_page_token)

    async def BeginTotp(self, request: BeginTotpRequest, context: Context) -> BeginTotpResponse:
        user_id, secret = auth.caller().user_id, totp.new_secret()
        async with self.db.begin() as session:
            account = await session.get_one(Account, user_id)
            mfa_token = self.tickets.give(session, Purpose.ADD_TOTP, user_id, {"secret": secret})
        uri = totp.uri_of(secret, account.email)
        qr_svg = await asyncio.to_thread(totp.qr_svg, uri)  # takes some 20 ms
        return BeginTotpResponse(mfa_token=mfa_token, secret=secret, uri=uri, qr_svg=qr_svg)

    async def ConfirmTotp(self, request: ConfirmTotpRequest, context: Context) -> ConfirmTotpResponse:
        user_id, origin = auth.caller().user_id, origin_of(context)
        secret: str = (await self._look(Purpose.ADD_TOTP, request.mfa_token)).data["secret"]
        async with self.guesses.attempt("totp", user_id, origin, self._device_token(origin)) as attempt:
            step = totp.step_of(secret, request.code, self.now())
            attempt.settle(step is not None)
        if step is None:
            raise await self._refused(origin, TOTP, "code", "The code is not one of this secret.")
        async with self.db.begin() as session:
            account = await self.second_factors.lock_account(session, user_id)
            await self._redeem(session, Purpose.ADD_TOTP, request.mfa_token)
            added = await self.second_factors.add_totp(
                session, account, origin, title=request.title, secret=secret, step=step
            )
            begun = await self._renew(session, origin, CODE_METHODS)
        return ConfirmTotpResponse(
            factor=_factor_to_pb(added.factor),
            recovery_codes=added.recovery_codes,
            **await self._give(context, origin, begun),
        )

    async def BeginPasskey(self, request: BeginPasskeyRequest, context: Context) -> BeginPasskeyResponse:
        user_id = auth.caller().user_id
        async with self.db.begin() as session:
            options, remembered = await self.second_factors.ask_for_new_passkey(session, user_id)
            mfa_token = self.tickets.give(session, Purpose.ADD_PASSKEY, user_id, remembered)
        return BeginPasskeyResponse(mfa_token=mfa_token, options=options)

    async def ConfirmPasskey(
        self, request: ConfirmPasskeyRequest, context: Context
    ) -> ConfirmPasskeyResponse:
        user_id, origin = auth.caller().user_id, origin_of(context)
        ticket = await self._look(Purpose.ADD_PASSKEY, request.mfa_token)
        try:
            passkey = self.second_factors.read_new_passkey(request.credential, ticket.data)
        except WrongPasskey:
            raise await self._refused(
                origin, PASSKEY, "credential", "The credential is no answer to the challenge."
            ) from None
        async with self.db.begin() as session:
            account = await self.second_factors.lock_account(session, user_id)
            await self._redeem(session, Purpose.ADD_PASSKEY, request.mfa_token)
            added = await self.second_factors.add_passkey(
                session, account, origin, title=request.title, passkey=passkey
            )
            begun = await self._renew(session, origin, passkey.methods)
        return ConfirmPasskeyResponse(
            factor=_factor_to_pb(added.factor),
            recovery_codes=added.recovery_codes,
            **await self._give(context, origin, begun),
        )

    async def DeleteFactor(self, request: DeleteFactorRequest, context: Context) -> DeleteFactorResponse:
        async with self.db.begin() as session:
            account = await self.second_factors.lock_account(session, auth.caller().user_id)
            await self.second_factors.remove(session, account, origin_of(context), request.factor_id)
        return DeleteFactorResponse()

    async def ReplaceRecoveryCodes(
        self, request: ReplaceRecoveryCodesRequest, context: Context
    ) -> ReplaceRecoveryCodesResponse:
        async with self.db.begin() as session:
            account = await self.second_factors.lock_account(session, auth.caller().user_id)
            codes = await self.second_factors.replace_recovery_codes(session, account, origin_of(context))
        return ReplaceRecoveryCodesResponse(recovery_codes=codes)

    async def _look(self, purpose: Purpose, mfa_token: str) -> Found:
        """The caller's own ticket; raises UNAUTHENTICATED."""
        async with self.db() as session:
            found = await self.tickets.look(session, {purpose}, mfa_token)
        if found is None or found[1].user_id != auth.caller().user_id:
            raise _mfa_token_invalid()
        return found[1]

    async def _redeem(self, session: AsyncSession, purpose: Purpose, mfa_token: str) -> None:
        if await self.tickets.redeem(session, purpose, mfa_token) is None:
            raise _mfa_token_invalid()  # somebody else was faster with the same token

    async def _renew(self, session: AsyncSession, origin: Origin, methods: tuple[str, ...]) -> Begun:
        begun = await sessions.renew(
            session,
            auth.caller().session_id,
            origin=origin,
            settings=self.settings,
            now=self.now(),
            methods=methods,
        )
        if begun is None:
            raise errors.unauthenticated("SESSION_REVOKED", "The session has ended: sign in again.")
        return begun

    async def _give(self, context: Context, origin: Origin, begun: Begun) -> dict[str, Any]:
        """The tokens of the new session, once it is committed; the device is the same as before."""
        await self.alive.invalidate(auth.caller().session_id)
        fields = await self.tokens.give(context, begun, device_token=self._device_token(origin))
        fields.pop("device_token", None)
        return fields

    def _device_token(self, origin: Origin) -> str:
        known = self.guesses.knows_device(auth.caller().user_id, origin.device_cookie)
        return origin.device_cookie if known else ""

    async def _refused(self, origin: Origin, kind: str, field: str, text: str) -> errors.Error:
        """Notes that a factor was not added, and gives the error."""
        async with self.db.begin() as session:
            audit.record(
                session,
                "factor.added",
                origin,
                self.now(),
                reason="FACTOR_WRONG",
                subject_id=auth.caller().user_id,
                factor_kind=kind,
            )
        return errors.invalid_argument("FACTOR_WRONG", text, field=field)


def _factor_to_pb(row: FactorRow) -> Factor:
    return Factor(
        factor_id=row.factor_id,
        kind=Factor.Kind.Value(row.kind),
        title=row.title,
        create_time=timestamp_of(row.create_time),
        last_use_time=timestamp_of(row.last_use_time) if row.last_use_time else None,
    )


def _mfa_token_invalid() -> errors.Error:
    return errors.unauthenticated(
        "MFA_TOKEN_INVALID", "The first step was used or is too long ago: begin again."
    )
