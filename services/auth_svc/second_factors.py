"""Second factors of accounts: authenticator apps, passkeys, recovery codes; and whether a proof is right."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from google.protobuf.struct_pb2 import Struct
from meshboard.auth.v1.factor_pb2 import Factor
from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from services.auth_svc import audit, links, passkeys, recovery_codes, totp
from services.auth_svc.mails import Mails
from services.auth_svc.models import Account, FactorRow, RecoveryCode
from services.auth_svc.origins import Origin
from services.auth_svc.passkeys import NewPasskey, RelyingParty, WrongPasskey
from services.auth_svc.settings import AuthSettings
from services.auth_svc.tickets import Purpose
from services.chassis import errors
from services.chassis.sealing import Seals

LIMIT = 10
# What a code says of how its holder was authenticated (RFC 8176).
CODE_METHODS = ("otp", "mfa")
TOTP, PASSKEY, RECOVERY_CODES = (
    Factor.Kind.Name(kind) for kind in (Factor.TOTP, Factor.PASSKEY, Factor.RECOVERY_CODES)
)
_NOWHERE = Origin()


@dataclass(frozen=True, slots=True)
class Proved:
    """Whose proof was right, and by which methods (RFC 8176), beside those of the first step."""

    user_id: str
    methods: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Added:
    """A new factor, with the recovery codes that come with the first one."""

    factor: FactorRow
    recovery_codes: list[str]


@dataclass(frozen=True)
class SecondFactors:
    """Keeps factors and checks proofs in the caller's transaction: what works once has been used when it commits.

    Who changes the factors of an account has locked it with `lock_account`, so that changes come one after the other.
    An account with a factor has a row for its recovery codes too, which is no factor that could be limited or removed.
    """

    seals: Seals
    settings: AuthSettings
    mails: Mails
    now: Callable[[], datetime]
    new_id: Callable[[], str]

    async def kinds(self, session: AsyncSession, user_id: str) -> list[Factor.Kind.ValueType]:
        """The kinds of factors that the account has; none when signing in takes the password alone."""
        kinds = await session.scalars(
            select(FactorRow.kind).where(FactorRow.user_id == user_id).distinct().order_by(FactorRow.kind)
        )
        return [Factor.Kind.Value(kind) for kind in kinds]

    async def challenge(self, session: AsyncSession, user_id: str | None) -> tuple[Struct, dict[str, Any]]:
        """What a browser is asked for, and what a ticket has to remember of it; for an account, or for any."""
        allowed = await self._credential_ids(session, user_id) if user_id else []
        purpose = Purpose.SECOND_FACTOR if user_id else Purpose.PASSKEY_SIGN_IN
        options, challenge = self._relying_party.ask(allowed, purpose.lifetime)
        return options, {"challenge": challenge}

    async def check(
        self,
        session: AsyncSession,
        user_id: str | None,
        proof: Any,
        remembered: dict[str, Any],
        origin: Origin = _NOWHERE,
    ) -> Proved | None:
        """Whose proof it is, when it is right.

        `proof` is a message with the oneof `proof` (CompleteSignInRequest, ReauthenticateRequest), `remembered` what
        `challenge` gave. Without a `user_id` the passkey says whose it is, and nothing but a passkey is a proof.
        """
        kind = proof.WhichOneof("proof")
        if kind == "passkey":
            try:
                return await self._check_passkey(session, user_id, proof.passkey, remembered, origin)
            except WrongPasskey:
                return None
        if kind == "totp_code" and user_id:
            return await self._check_totp(session, user_id, proof.totp_code)
        if kind == "recovery_code" and user_id:
            return await self._check_recovery_code(session, user_id, proof.recovery_code, origin)
        return None

    async def _check_totp(self, session: AsyncSession, user_id: str, code: str) -> Proved | None:
        now = self.now()
        rows = await session.scalars(
            select(FactorRow).where(FactorRow.user_id == user_id, FactorRow.kind == TOTP)
        )
        for row in rows.all():
            secret = self._secret(row)
            step = totp.step_of(secret, code, now)
            if step is None:
                continue
            # The row settles who is first with a code; after a change of the master key it is sealed anew.
            used = await session.scalar(
                update(FactorRow)
                .where(FactorRow.factor_id == row.factor_id, FactorRow.last_step < step)
                .values(last_step=step, last_use_time=now, sealed_secret=self._seal(row.factor_id, secret))
                .returning(FactorRow.factor_id)
            )
            if used is not None:
                return Proved(user_id, CODE_METHODS)
        return None

    async def _check_recovery_code(
        self, session: AsyncSession, user_id: str, code: str, origin: Origin
    ) -> Proved | None:
        now = self.now()
        used = await session.scalar(
            delete(RecoveryCode)
            .where(
                RecoveryCode.user_id == user_id,
                RecoveryCode.code_hash == recovery_codes.fingerprint_of(code),
            )
            .returning(RecoveryCode.user_id)
        )
        if used is None:
            return None
        await session.execute(
            update(FactorRow)
            .where(FactorRow.user_id == user_id, FactorRow.kind == RECOVERY_CODES)
            .values(last_use_time=now)
        )
        left = await session.scalar(
            select(func.count()).select_from(RecoveryCode).where(RecoveryCode.user_id == user_id)
        )
        account = await session.get_one(Account, user_id)
        audit.record(
            session,
            "recovery_code.used",
            origin,
            now,
            actor_id=user_id,
            subject_id=user_id,
            left=left or 0,
        )
        self.mails.add(session, now, account.email, *links.recovery_code_used(self.settings, left or 0))
        return Proved(user_id, CODE_METHODS)

    async def _check_passkey(
        self,
        session: AsyncSession,
        user_id: str | None,
        credential: Struct,
        remembered: dict[str, Any],
        origin: Origin,
    ) -> Proved | None:
        credential_id, claimed = passkeys.credential_id_of(credential), passkeys.user_id_of(credential)
        row = await session.scalar(
            select(FactorRow)
            .join(Account)
            .where(
                FactorRow.credential_id == credential_id,
                Account.activate_time.is_not(None),
                Account.disable_time.is_(None),
            )
        )
        # The first step says whose it must be, else the user handle; where both do, they agree (section 7.2, step 6).
        if row is None or row.user_id != (user_id or claimed) or (claimed and claimed != row.user_id):
            return None
        challenge = remembered.get("challenge")
        if not challenge or row.public_key is None:  # nobody was asked for a passkey
            return None
        asserted = self._relying_party.asserted(credential, challenge, row.public_key)
        now = self.now()
        used = await session.scalar(
            update(FactorRow)
            .where(
                FactorRow.factor_id == row.factor_id,
                FactorRow.sign_count < asserted.sign_count
                if asserted.sign_count
                else FactorRow.sign_count == 0,
            )
            .values(sign_count=asserted.sign_count, last_use_time=now)
            .returning(FactorRow.factor_id)
        )
        if used is None:
            # Somebody may have a copy of the key (section 6.1.1).
            audit.record(
                session,
                "factor.used",
                origin,
                now,
                reason="FACTOR_WRONG",
                actor_id="",
                subject_id=row.user_id,
                factor_id=row.factor_id,
                cause="COUNTER_REGRESSED",
            )
            return None
        return Proved(row.user_id, asserted.methods)

    async def lock_account(self, session: AsyncSession, user_id: str) -> Account:
        """The account, whose factors nobody else changes until the end of the transaction."""
        # NO KEY UPDATE, so that rows which refer to the account can be inserted meanwhile.
        return await session.get_one(Account, user_id, with_for_update={"key_share": True})

    async def ask_for_new_passkey(self, session: AsyncSession, user_id: str) -> tuple[Struct, dict[str, Any]]:
        """What a browser is asked for to make a passkey, and what a ticket has to remember of it."""
        account = await session.get_one(Account, user_id)
        known = await self._credential_ids(session, user_id)
        options, challenge = self._relying_party.ask_for_new(
            user_id, account.email, account.display_name, known, Purpose.ADD_PASSKEY.lifetime
        )
        return options, {"challenge": challenge}

    def read_new_passkey(self, credential: Struct, remembered: dict[str, Any]) -> NewPasskey:
        """The passkey that was made. Raises WrongPasskey."""
        return self._relying_party.registered(credential, remembered["challenge"])

    async def add_totp(
        self, session: AsyncSession, account: Account, origin: Origin, *, title: str, secret: str, step: int
    ) -> Added:
        """Adds an authenticator app, whose code of this step has been used. Raises FAILED_PRECONDITION."""
        factor_id = self.new_id()
        return await self._add(
            session,
            account,
            origin,
            factor_id=factor_id,
            kind=TOTP,
            title=title,
            sealed_secret=self._seal(factor_id, secret),
            last_step=step,
        )

    async def add_passkey(
        self, session: AsyncSession, account: Account, origin: Origin, *, title: str, passkey: NewPasskey
    ) -> Added:
        """Adds a passkey. Raises FAILED_PRECONDITION, or ALREADY_EXISTS when some account has it."""
        return await self._add(
            session,
            account,
            origin,
            factor_id=self.new_id(),
            kind=PASSKEY,
            title=title,
            credential_id=passkey.credential_id,
            public_key=passkey.public_key,
            sign_count=passkey.sign_count,
        )

    async def remove(self, session: AsyncSession, account: Account, origin: Origin, factor_id: str) -> None:
        """Removes a factor, and the recovery codes with the last one. Raises NOT_FOUND."""
        user_id, now = account.user_id, self.now()
        kind = await session.scalar(
            delete(FactorRow)
            .where(
                FactorRow.user_id == user_id,
                FactorRow.factor_id == factor_id,
                FactorRow.kind != RECOVERY_CODES,
            )
            .returning(FactorRow.kind)
        )
        if kind is None:
            raise errors.not_found("FACTOR_NOT_FOUND", "The account has no such factor.")
        if not await self._count(session, user_id):
            await self._remove_recovery_codes(session, user_id)
        audit.record(
            session, "factor.removed", origin, now, subject_id=user_id, factor_id=factor_id, factor_kind=kind
        )
        self.mails.add(
            session, now, account.email, *links.factor_removed(self.settings, Factor.Kind.Value(kind))
        )

    async def replace_recovery_codes(
        self, session: AsyncSession, account: Account, origin: Origin
    ) -> list[str]:
        """New recovery codes in place of the old ones. Raises FAILED_PRECONDITION."""
        if not await self._count(session, account.user_id):
            raise errors.failed_precondition("FACTOR_MISSING", "Recovery codes need another factor: add one.")
        now = self.now()
        codes = await self._give_recovery_codes(session, account.user_id)
        audit.record(session, "recovery_codes.replaced", origin, now, subject_id=account.user_id)
        self.mails.add(session, now, account.email, *links.recovery_codes_replaced(self.settings))
        return codes

    async def _add(self, session: AsyncSession, account: Account, origin: Origin, **values: Any) -> Added:
        user_id, now = account.user_id, self.now()
        count = await self._count(session, user_id)
        if count >= LIMIT:
            raise errors.failed_precondition(
                "FACTOR_LIMIT", f"An account has at most {LIMIT} factors: delete one first.", limit=LIMIT
            )
        row: FactorRow | None = await session.scalar(
            insert(FactorRow)
            .values(user_id=user_id, create_time=now, **values)
            .on_conflict_do_nothing(index_elements=[FactorRow.credential_id])
            .returning(FactorRow)
        )
        if row is None:
            raise errors.already_exists("PASSKEY_EXISTS", "The passkey belongs to an account already.")
        codes = [] if count else await self._give_recovery_codes(session, user_id)
        audit.record(
            session,
            "factor.added",
            origin,
            now,
            subject_id=user_id,
            factor_id=row.factor_id,
            factor_kind=row.kind,
        )
        self.mails.add(
            session, now, account.email, *links.factor_added(self.settings, Factor.Kind.Value(row.kind))
        )
        return Added(row, codes)

    async def _give_recovery_codes(self, session: AsyncSession, user_id: str) -> list[str]:
        await self._remove_recovery_codes(session, user_id)
        codes = recovery_codes.new_codes()
        await session.execute(
            insert(RecoveryCode),
            [{"user_id": user_id, "code_hash": recovery_codes.fingerprint_of(code)} for code in codes],
        )
        session.add(
            FactorRow(
                factor_id=self.new_id(),
                user_id=user_id,
                kind=RECOVERY_CODES,
                title="Recovery codes",
                create_time=self.now(),
            )
        )
        return codes

    async def _remove_recovery_codes(self, session: AsyncSession, user_id: str) -> None:
        await session.execute(delete(RecoveryCode).where(RecoveryCode.user_id == user_id))
        await session.execute(
            delete(FactorRow).where(FactorRow.user_id == user_id, FactorRow.kind == RECOVERY_CODES)
        )

    async def _count(self, session: AsyncSession, user_id: str) -> int:
        count = await session.scalar(
            select(func.count())
            .select_from(FactorRow)
            .where(FactorRow.user_id == user_id, FactorRow.kind != RECOVERY_CODES)
        )
        return count or 0

    async def _credential_ids(self, session: AsyncSession, user_id: str) -> list[bytes]:
        found = await session.scalars(
            select(FactorRow.credential_id)
            .where(FactorRow.user_id == user_id, FactorRow.credential_id.is_not(None))
            .order_by(FactorRow.factor_id)
        )
        return [credential_id for credential_id in found if credential_id]

    @property
    def _relying_party(self) -> RelyingParty:
        return RelyingParty.at(self.settings.public_url)

    def _seal(self, factor_id: str, secret: str) -> bytes:
        return self.seals.seal(secret.encode(), _context(factor_id))

    def _secret(self, row: FactorRow) -> str:
        assert row.sealed_secret is not None
        return self.seals.open(row.sealed_secret, _context(row.factor_id)).decode()


def _context(factor_id: str) -> str:
    return f"factors {factor_id}"
