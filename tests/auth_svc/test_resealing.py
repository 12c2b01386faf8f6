"""What an older master key has encrypted, encrypted anew."""

import base64
import os

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.auth_svc import resealing
from services.auth_svc.mails import Mails
from services.auth_svc.models import Account, FactorRow, Mail
from services.auth_svc.resealing import COLUMNS, Count, reseal
from services.auth_svc.settings import AuthSettings
from services.auth_svc.signing_keys import SigningKeys
from services.auth_svc.tickets import Purpose, Tickets
from services.chassis.sealing import Seals
from services.chassis.times import now
from tests.harness import new_id

Sessions = async_sessionmaker[AsyncSession]
TICKETS, MAILS = 7, 5


def tickets_of(settings: AuthSettings) -> Tickets:
    return Tickets(Seals(settings.derived_keys("tickets")), now)


async def fill(sessions: Sessions, settings: AuthSettings) -> str:
    """Something sealed in each table; gives a ticket's token."""
    await SigningKeys(sessions, settings, now).load()
    user_id = new_id()
    account = Account(
        user_id=user_id,
        email=user_id,
        email_key=user_id,
        password_hash="",
        display_name="",
        workspace_id=new_id(),
        create_time=now(),
        try_time=now(),
    )
    factor_id = new_id()
    totp = FactorRow(
        factor_id=factor_id,
        user_id=user_id,
        kind="TOTP",
        title="",
        sealed_secret=Seals(settings.derived_keys("factors")).seal(b"secret", f"factors {factor_id}"),
        create_time=now(),
    )
    passkey = FactorRow(factor_id=new_id(), user_id=user_id, kind="PASSKEY", title="", create_time=now())
    async with sessions.begin() as session:
        session.add(account)
        await session.flush()
        session.add_all([totp, passkey])
        mails = Mails(Seals(settings.derived_keys("mails")))
        for _ in range(MAILS):
            mails.add(session, now(), "ada@example.org", "Subject", "Text")
        for _ in range(TICKETS - 1):
            tickets_of(settings).give(session, Purpose.VERIFY_EMAIL, user_id)
        return tickets_of(settings).give(session, Purpose.RESET_PASSWORD, user_id, {"why": "forgotten"})


def change_master_key(settings: AuthSettings, *, keep: bool = True) -> None:
    file = settings.master_key_file
    assert file is not None
    kept = file.read_text() if keep else ""
    file.write_text(f"{base64.b64encode(os.urandom(32)).decode()}\n{kept}")


def keep_newest_only(settings: AuthSettings) -> None:
    file = settings.master_key_file
    assert file is not None
    file.write_text(file.read_text().split()[0])


async def test_all_is_readable_without_the_older_key(
    settings: AuthSettings, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(resealing, "_BATCH", 2)
    token = await fill(sessions, settings)
    change_master_key(settings)
    assert await reseal(sessions, settings) == {
        "signing_keys": Count(resealed=1),
        "tickets": Count(resealed=TICKETS),
        "mails": Count(resealed=MAILS),
        "factors": Count(resealed=1),
    }
    keep_newest_only(settings)
    await SigningKeys(sessions, settings, now).load()
    async with sessions.begin() as session:
        found = await tickets_of(settings).redeem(session, Purpose.RESET_PASSWORD, token)
        assert found is not None
        assert found.data == {"why": "forgotten"}
        mails = Seals(settings.derived_keys("mails"))
        for mail in await session.scalars(select(Mail)):
            assert b"ada@example.org" in mails.open(mail.sealed_mail, "mails")
        factors = Seals(settings.derived_keys("factors"))
        (factor,) = await session.scalars(select(FactorRow).where(FactorRow.sealed_secret.is_not(None)))
        assert factor.sealed_secret is not None
        assert factors.open(factor.sealed_secret, f"factors {factor.factor_id}") == b"secret"


async def test_a_repeat_does_what_is_left(settings: AuthSettings, sessions: Sessions):
    await fill(sessions, settings)
    change_master_key(settings)
    fresh = tickets_of(settings)
    async with sessions.begin() as session:
        fresh.give(session, Purpose.VERIFY_EMAIL, None)
    counts = await reseal(sessions, settings)
    assert counts["tickets"] == Count(current=1, resealed=TICKETS)
    again = await reseal(sessions, settings)
    assert again["tickets"] == Count(current=TICKETS + 1)
    assert sum(count.resealed for count in again.values()) == 0


async def test_what_cannot_be_opened_is_counted_and_left_alone(settings: AuthSettings, sessions: Sessions):
    await fill(sessions, settings)
    async with sessions() as session:
        before = set(await session.scalars(select(Mail.sealed_mail)))
    change_master_key(settings, keep=False)
    counts = await reseal(sessions, settings)
    assert counts["mails"] == Count(unreadable=MAILS)
    async with sessions() as session:
        assert set(await session.scalars(select(Mail.sealed_mail))) == before


def test_every_sealed_column_is_resealed():
    """A column that is not in the list is lost together with the older master key."""
    assert {(column.sealed.class_.__tablename__, column.sealed.key) for column in COLUMNS} == {
        (table.name, column.name)
        for table in Account.metadata.tables.values()
        for column in table.columns
        if column.name.startswith("sealed_")
    }
