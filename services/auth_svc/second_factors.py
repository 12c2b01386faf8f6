"""Second factors of accounts: authenticator apps, passkeys, recovery codes; and whether a proof is right."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from google.protobuf.struct_pb2 import Struct
from meshboard.auth.v1.factor_pb2 import Factor
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from services.auth_svc.models import FactorRow
from services.auth_svc.settings import AuthSettings
from services.chassis.sealing import Seals


@dataclass(frozen=True, slots=True)
class Proved:
    """Whose proof was right, and by which methods (RFC 8176), beside those of the first step."""

    user_id: str
    methods: tuple[str, ...]


@dataclass(frozen=True)
class SecondFactors:
    """Checks proofs in the caller's transaction: what works once has been used when it commits."""

    seals: Seals
    settings: AuthSettings
    now: Callable[[], datetime]

    async def kinds(self, session: AsyncSession, user_id: str) -> list[Factor.Kind.ValueType]:
        """The kinds of factors that the account has; none when signing in takes the password alone."""
        kinds = await session.scalars(
            select(FactorRow.kind).where(FactorRow.user_id == user_id).distinct().order_by(FactorRow.kind)
        )
        found = [Factor.Kind.Value(kind) for kind in kinds]
        return [*found, Factor.RECOVERY_CODES] if found else []

    async def challenge(self, session: AsyncSession, user_id: str | None) -> tuple[Struct, dict[str, Any]]:
        """What a browser is asked for, and what a ticket has to remember of it; for an account, or for any."""
        raise NotImplementedError

    async def check(
        self, session: AsyncSession, user_id: str | None, proof: Any, remembered: dict[str, Any]
    ) -> Proved | None:
        """Whose proof it is, when it is right.

        `proof` is a message with the oneof `proof` (CompleteSignInRequest, ReauthenticateRequest), `remembered` what
        `challenge` gave. Without a `user_id` the passkey says whose it is.
        """
        raise NotImplementedError
