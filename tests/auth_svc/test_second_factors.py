"""What is kept of factors, and the mails that tell of them: looked at within a transaction that is rolled back."""

import json
from dataclasses import dataclass

import pytest
from meshboard.auth.v1.auth_service_pb2 import CompleteSignInRequest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from services.auth_svc import totp
from services.auth_svc.mails import Mails
from services.auth_svc.models import Account, FactorRow, Mail, RecoveryCode
from services.auth_svc.origins import Origin
from services.auth_svc.recovery_codes import fingerprint_of
from services.auth_svc.second_factors import CODE_METHODS, Added, Proved, SecondFactors
from services.auth_svc.settings import AuthSettings
from services.chassis.sealing import Seals, WrongKey
from services.chassis.times import now
from tests.auth_svc.conftest import Services
from tests.auth_svc.people import code_of
from tests.harness import new_id

HERE = Origin("192.0.2.1")
OLD, NEW = bytes(32), bytes([1]) * 32
MAILS = Seals([bytes([2]) * 32])


@dataclass(frozen=True)
class Bench:
    """An account whose factors are changed, and never committed."""

    settings: AuthSettings
    session: AsyncSession
    account: Account
    secret: str

    def factors(self, *keys: bytes) -> SecondFactors:
        """Second factors under these keys."""
        return SecondFactors(Seals(keys or [OLD]), self.settings, Mails(MAILS), now, new_id)

    async def add_totp(self) -> Added:
        """An authenticator app none of whose codes has been used."""
        return await self.factors().add_totp(
            self.session, self.account, HERE, title="Phone", secret=self.secret, step=0
        )

    async def check(self, request: CompleteSignInRequest, *keys: bytes) -> Proved | None:
        """Whose proof the request has."""
        return await self.factors(*keys).check(self.session, self.account.user_id, request, {}, HERE)

    async def mails(self) -> list[tuple[str, str]]:
        """The mails that were written here, by recipient and subject."""
        await self.session.flush()
        found = []
        for mail in await self.session.scalars(select(Mail).order_by(Mail.mail_id)):
            try:
                content = json.loads(MAILS.open(mail.sealed_mail, "mails"))
            except WrongKey:  # the service's own
                continue
            found.append((content["to"], content["subject"]))
        return found


@pytest.fixture
async def bench(services: Services):
    signed_up = await services.sign_up()
    async with services.sessions() as session:
        account = await session.get_one(Account, signed_up.user.user_id)
        yield Bench(services.auth_settings, session, account, totp.new_secret())


async def test_each_change_is_told_by_mail(bench: Bench):
    added = await bench.add_totp()
    code = CompleteSignInRequest(recovery_code=added.recovery_codes[0])
    assert await bench.check(code) == Proved(bench.account.user_id, CODE_METHODS)
    await bench.factors().replace_recovery_codes(bench.session, bench.account, HERE)
    await bench.factors().remove(bench.session, bench.account, HERE, added.factor.factor_id)
    assert await bench.mails() == [
        (bench.account.email, "A second factor was added to your account"),
        (bench.account.email, "A recovery code of your account was used"),
        (bench.account.email, "The recovery codes of your account were replaced"),
        (bench.account.email, "A second factor was removed from your account"),
    ]


async def test_secrets_are_sealed_for_their_factor(bench: Bench):
    factor = (await bench.add_totp()).factor
    assert factor.sealed_secret is not None
    assert bench.secret.encode() not in factor.sealed_secret
    assert Seals([OLD]).open(factor.sealed_secret, f"factors {factor.factor_id}") == bench.secret.encode()
    with pytest.raises(WrongKey):
        Seals([OLD]).open(factor.sealed_secret, f"factors {new_id()}")


async def test_a_secret_is_sealed_anew_after_the_master_key_has_changed(bench: Bench):
    factor = (await bench.add_totp()).factor
    proof = CompleteSignInRequest(totp_code=code_of(bench.secret))
    assert await bench.check(proof, NEW, OLD) is not None
    sealed = await bench.session.scalar(
        select(FactorRow.sealed_secret).where(FactorRow.factor_id == factor.factor_id)
    )
    assert sealed is not None
    assert Seals([NEW]).open(sealed, f"factors {factor.factor_id}") == bench.secret.encode()


async def test_only_hashes_of_recovery_codes_are_kept(bench: Bench):
    codes = (await bench.add_totp()).recovery_codes
    kept = await bench.session.scalars(
        select(RecoveryCode.code_hash).where(RecoveryCode.user_id == bench.account.user_id)
    )
    assert sorted(kept) == sorted(fingerprint_of(code) for code in codes)


async def test_without_a_user_a_code_proves_nothing(bench: Bench):
    codes = (await bench.add_totp()).recovery_codes
    for proof in (
        CompleteSignInRequest(totp_code=code_of(bench.secret)),
        CompleteSignInRequest(recovery_code=codes[0]),
        CompleteSignInRequest(),
    ):
        assert await bench.factors().check(bench.session, None, proof, {"challenge": "AAAA"}, HERE) is None
