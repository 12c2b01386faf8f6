"""The keys that access tokens are signed with, and their change without anyone noticing.

A new key is published for an hour before it signs, and for a token's lifetime after the next one has taken over, so
that verifiers know it whenever they meet it. Private keys are encrypted with a key derived from the master key.
An operator may make the next key before it is due, and retire one that has leaked.
"""

import asyncio
import base64
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

import structlog
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
)
from meshboard.auth.v1.auth_service_pb2 import GetJwksResponse, JsonWebKey
from meshboard.auth.v1.events_pb2 import SigningKeyRetired
from sqlalchemy import delete, func, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from uuid_utils.compat import uuid7

from services.auth_svc.models import SigningKeyRow
from services.auth_svc.settings import AuthSettings
from services.chassis import outbox
from services.chassis.auth import ALGORITHM, LEEWAY_SECONDS, Keys
from services.chassis.bus import Bus
from services.chassis.sealing import Seals, WrongKey

log = structlog.get_logger(__name__)

# How long verifiers are told of a key before it signs: longer than any of them remembers the key set.
_NOTICE = timedelta(hours=1)
_RELOAD_SECONDS = 60
CONTEXT = "signing_keys"
PURPOSE = "signing-keys"
# "sign" in ASCII: the advisory lock of whoever makes a key.
_LOCK = 0x7369676E


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A key that signs from `activate_time` on."""

    key_id: str
    private: ec.EllipticCurvePrivateKey
    activate_time: datetime


class LastKey(Exception):
    """The only key cannot be retired: tokens could not be signed."""


class SigningKeys:
    """The keys at hand; `load` before the first use."""

    def __init__(
        self, db: async_sessionmaker[AsyncSession], settings: AuthSettings, now: Callable[[], datetime]
    ) -> None:
        self._db = db
        self._seals = Seals(settings.derived_keys(PURPOSE))
        self._lifetime = timedelta(seconds=settings.signing_key_seconds)
        self._token_lifetime = timedelta(seconds=settings.access_token_seconds + LEEWAY_SECONDS)
        self._now = now
        self._keys: list[SigningKey] = []  # by activate_time
        self._changed = asyncio.Event()

    def current(self) -> SigningKey:
        """The key that signs now."""
        now = self._now()
        # None is active yet when another replica, whose clock is ahead, has just made the first one.
        return next((key for key in reversed(self._keys) if key.activate_time <= now), self._keys[0])

    async def public_keys(self) -> Keys:
        """The public keys by id, for this process itself."""
        return {key.key_id: key.private.public_key() for key in self._keys}

    async def load(self) -> None:
        """Reads the keys, makes the next one when it is due, and deletes those whose tokens have expired.

        Raises WrongKey when no master key at hand is the one that they were encrypted with.
        """
        now = self._now()
        async with self._db.begin() as session:
            keys = await self._read(session)
            if not keys:
                keys.append(self._add(session, now))
            elif keys[-1].activate_time + self._lifetime - _NOTICE <= now:
                keys.append(self._add(session, now + _NOTICE))
            while len(keys) > 1 and keys[1].activate_time + self._token_lifetime <= now:
                retired = keys.pop(0)
                await session.execute(delete(SigningKeyRow).where(SigningKeyRow.key_id == retired.key_id))
        self._keys = keys

    async def listen(self, bus: Bus) -> None:
        """Has `follow` load at once when a key is retired."""
        await bus.listen(SigningKeyRetired.DESCRIPTOR.full_name, lambda _: self._changed.set())

    async def follow(self) -> None:
        """Loads again every minute, until it is cancelled: another replica or an operator may have changed the keys."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RELOAD_SECONDS):
                    await self._changed.wait()
            self._changed.clear()
            try:
                await self.load()
            except (OSError, TimeoutError, SQLAlchemyError, WrongKey) as error:
                log.warning("signing_keys_not_loaded", error=repr(error))

    async def stored(self) -> list[SigningKey]:
        """The keys in the table, in the order in which they sign. Raises WrongKey."""
        async with self._db.begin() as session:
            return await self._read(session)

    async def rotate(self, session: AsyncSession) -> tuple[SigningKey, bool]:
        """The key that signs next, an hour from now, and whether it is new: a second one waits for nobody."""
        now = self._now()
        keys = await self._read(session)
        if keys and keys[-1].activate_time > now:
            return keys[-1], False
        return self._add(session, now + _NOTICE if keys else now), True

    async def retire(self, session: AsyncSession, key_id: str) -> SigningKey | None:
        """Takes a key away at once, and announces it; gives the key that signs from now on.

        If the others wait for their time, the first of them signs at once. None when there is no such key. Raises
        LastKey.
        """
        now = self._now()
        keys = await self._read(session)
        left = [key for key in keys if key.key_id != key_id]
        if len(left) == len(keys):
            return None
        if not left:
            raise LastKey
        await session.execute(delete(SigningKeyRow).where(SigningKeyRow.key_id == key_id))
        outbox.add(session, SigningKeyRetired(key_id=key_id))
        if left[0].activate_time > now:
            left[0] = replace(left[0], activate_time=now)
            await session.execute(
                update(SigningKeyRow).where(SigningKeyRow.key_id == left[0].key_id).values(activate_time=now)
            )
        return next(key for key in reversed(left) if key.activate_time <= now)

    async def _read(self, session: AsyncSession) -> list[SigningKey]:
        """All keys; nobody changes them before the transaction ends."""
        await session.execute(select(func.pg_advisory_xact_lock(_LOCK)))
        keys = [self._open(row) for row in await session.scalars(select(SigningKeyRow))]
        return sorted(keys, key=lambda key: key.activate_time)

    def _add(self, session: AsyncSession, activate_time: datetime) -> SigningKey:
        key = SigningKey(str(uuid7()), ec.generate_private_key(ec.SECP256R1()), activate_time)
        plain = key.private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        sealed = self._seals.seal(plain, f"{CONTEXT} {key.key_id}")
        session.add(SigningKeyRow(key_id=key.key_id, sealed_key=sealed, activate_time=activate_time))
        log.info("signing_key_made", key_id=key.key_id, activate_time=activate_time.isoformat())
        return key

    def _open(self, row: SigningKeyRow) -> SigningKey:
        plain = self._seals.open(row.sealed_key, f"{CONTEXT} {row.key_id}")
        private = load_der_private_key(plain, None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        return SigningKey(row.key_id, private, row.activate_time)


def jwks(keys: Keys) -> GetJwksResponse:
    """The keys as a JSON Web Key Set (RFC 7517; RFC 7518, section 6.2)."""
    response = GetJwksResponse()
    for key_id, key in keys.items():
        point = key.public_numbers()
        response.keys.append(
            JsonWebKey(
                kty="EC",
                crv="P-256",
                x=_coordinate(point.x),
                y=_coordinate(point.y),
                kid=key_id,
                alg=ALGORITHM,
                use="sig",
            )
        )
    return response


def _coordinate(value: int) -> str:
    return base64.urlsafe_b64encode(value.to_bytes(32, "big")).rstrip(b"=").decode()
