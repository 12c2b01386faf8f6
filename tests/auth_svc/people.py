"""People with second factors."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

import grpc
import grpc.aio
import pyotp
from meshboard.auth.v1.auth_service_pb2 import (
    CompleteSignInRequest,
    CompleteSignInResponse,
    SignInRequest,
    SignInResponse,
)
from meshboard.auth.v1.factor_pb2 import Factor
from meshboard.auth.v1.factor_service_pb2 import (
    BeginPasskeyRequest,
    BeginTotpRequest,
    ConfirmPasskeyRequest,
    ConfirmPasskeyResponse,
    ConfirmTotpRequest,
    ConfirmTotpResponse,
    ListFactorsRequest,
)
from sqlalchemy import select

from services.auth_svc.models import AuditEntryRow
from tests.auth_svc.authenticator import Authenticator
from tests.auth_svc.conftest import PASSWORD, Services
from tests.harness import reason_of

T = TypeVar("T")
Metadata = tuple[tuple[str, str], ...]


@dataclass
class Person:
    """Somebody with an account, at an address of their own, so that tests do not slow down one another."""

    services: Services
    user_id: str
    email: str
    access_token: str
    device_token: str
    address: str

    @property
    def from_here(self) -> Metadata:
        """The metadata of a call without a token."""
        return (("x-meshboard-address", self.address),)

    @property
    def metadata(self) -> Metadata:
        """The metadata of a call with the newest access token."""
        return (("authorization", f"Bearer {self.access_token}"), *self.from_here)

    def move(self) -> None:
        """Goes to another address."""
        self.address = new_address()

    async def add_totp(self, title: str = "Phone") -> tuple[str, ConfirmTotpResponse]:
        """Adds an authenticator app, and gives its secret."""
        begun = await self.services.factors.BeginTotp(BeginTotpRequest(), metadata=self.metadata)
        confirmed = await self.services.factors.ConfirmTotp(
            ConfirmTotpRequest(mfa_token=begun.mfa_token, code=code_of(begun.secret), title=title),
            metadata=self.metadata,
        )
        self.access_token = confirmed.access_token
        return begun.secret, confirmed

    async def add_passkey(
        self, authenticator: Authenticator | None = None, title: str = "Laptop"
    ) -> tuple[Authenticator, ConfirmPasskeyResponse]:
        """Adds a passkey, and gives its authenticator."""
        authenticator = authenticator or Authenticator()
        begun = await self.services.factors.BeginPasskey(BeginPasskeyRequest(), metadata=self.metadata)
        confirmed = await self.services.factors.ConfirmPasskey(
            ConfirmPasskeyRequest(
                mfa_token=begun.mfa_token, credential=authenticator.create(begun.options), title=title
            ),
            metadata=self.metadata,
        )
        self.access_token = confirmed.access_token
        return authenticator, confirmed

    async def first_step(self) -> SignInResponse:
        """Signs in with the password."""
        return await self.services.auth.SignIn(
            SignInRequest(email=self.email, password=PASSWORD), metadata=self.from_here
        )

    async def second_step(self, request: CompleteSignInRequest) -> CompleteSignInResponse:
        """Finishes a sign-in from this person's address."""
        return await self.services.auth.CompleteSignIn(request, metadata=self.from_here)

    async def factors(self) -> list[Factor]:
        """The factors that are listed."""
        listed = await self.services.factors.ListFactors(ListFactorsRequest(), metadata=self.metadata)
        return list(listed.factors)

    async def audit_entries(self, kind: str) -> list[AuditEntryRow]:
        """What the audit log has about this person."""
        async with self.services.sessions() as session:
            found = await session.scalars(
                select(AuditEntryRow)
                .where(AuditEntryRow.subject_id == self.user_id, AuditEntryRow.kind == kind)
                .order_by(AuditEntryRow.audit_entry_id)
            )
        return list(found)


async def new_person(services: Services) -> Person:
    """Somebody who has just signed up."""
    signed_up = await services.sign_up()
    return Person(
        services,
        signed_up.user.user_id,
        signed_up.user.email,
        signed_up.access_token,
        signed_up.device_token,
        new_address(),
    )


def new_address() -> str:
    """An address from which nobody has called."""
    return ".".join(["10", *(str(random.randrange(1, 255)) for _ in range(3))])


async def outcomes_of(*calls: Awaitable[T]) -> list[T | tuple[grpc.StatusCode, str]]:
    """What calls at once lead to: an answer each, or the code and the reason of its failure."""

    async def outcome_of(call: Awaitable[T]) -> T | tuple[grpc.StatusCode, str]:
        try:
            return await call
        except grpc.aio.AioRpcError as failure:
            return failure.code(), reason_of(failure)

    return await asyncio.gather(*(outcome_of(call) for call in calls))


def code_of(secret: str, ahead: int = 0) -> str:
    """The code that an authenticator app shows, or one that it shows some steps later."""
    return pyotp.TOTP(secret).at(datetime.now(UTC), counter_offset=ahead)


def wrong_code_of(secret: str) -> str:
    """A code that the app shows at no time near the present."""
    near = {code_of(secret, ahead) for ahead in range(-3, 4)}
    return next(code for code in (f"{n:06}" for n in range(8)) if code not in near)
