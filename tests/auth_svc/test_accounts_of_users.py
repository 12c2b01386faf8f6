"""Accounts follow their users, in whatever order and however late the events come."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest
from meshboard.auth.v1.internal_auth_service_pb2 import CheckSessionResponse
from meshboard.user.v1.events_pb2 import UserCreated, UserStateChanged
from meshboard.user.v1.user_pb2 import User
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.auth_svc.accounts_of_users import AccountsOfUsers
from services.auth_svc.internal_sessions import set_disabled
from services.auth_svc.mails import Mails
from services.auth_svc.models import Account, Mail
from services.auth_svc.origins import Origin
from services.auth_svc.settings import AuthSettings
from services.auth_svc.tickets import Tickets
from services.chassis.bus import Bus
from services.chassis.cache import Cache, CachedMessages
from services.chassis.sealing import Seals
from tests.auth_svc.conftest import new_email
from tests.harness import new_id
from tests.parts import Parts

NOW = datetime(2030, 1, 1, tzinfo=UTC)
Sessions = async_sessionmaker[AsyncSession]


@pytest.fixture
async def accounts(settings: AuthSettings, parts: Parts) -> AsyncIterator[AccountsOfUsers]:
    bus = await Bus.connect(parts.nats_url, "test")
    cache = await Cache.connect(settings.redis_url, bus, new_id())
    yield AccountsOfUsers(
        settings,
        Tickets(Seals(settings.derived_keys("tickets")), lambda: NOW),
        Mails(Seals(settings.derived_keys("mails"))),
        CachedMessages(cache, "alive", CheckSessionResponse),
        lambda: NOW,
    )
    await cache.close()
    await bus.close()


async def hear_created(accounts: AccountsOfUsers, sessions: Sessions, user: User) -> None:
    async with sessions.begin() as session:
        await accounts.on_user_created(session, UserCreated(user=user))


async def hear_state(
    accounts: AccountsOfUsers, sessions: Sessions, user: User, state: User.State.ValueType, seconds: int
) -> None:
    event = UserStateChanged(user_id=user.user_id, state=state)
    event.time.FromDatetime(NOW + timedelta(seconds=seconds))
    async with sessions.begin() as session:
        await accounts.on_user_state_changed(session, event)


async def account_of(sessions: Sessions, user: User) -> Account | None:
    async with sessions() as session:
        return await session.get(Account, user.user_id)


async def mails(sessions: Sessions) -> int:
    async with sessions() as session:
        return await session.scalar(select(func.count()).select_from(Mail)) or 0


def managed(email: str = "") -> User:
    return User(
        user_id=new_id(), email=email or new_email(), display_name="Grace", managing_workspace_id=new_id()
    )


async def test_an_account_whose_reservation_is_gone_is_made_anew(
    accounts: AccountsOfUsers, sessions: Sessions
):
    user = managed()
    await hear_created(accounts, sessions, user)
    account = await account_of(sessions, user)
    assert account
    assert (account.email, account.password_hash, account.activate_time) == (user.email, "", NOW)
    assert await mails(sessions) == 1
    await hear_created(accounts, sessions, user)
    assert await mails(sessions) == 1


async def test_an_address_that_is_taken_meanwhile_stays_with_its_owner(
    accounts: AccountsOfUsers, sessions: Sessions
):
    first = managed()
    await hear_created(accounts, sessions, first)
    second = managed(first.email)
    await hear_created(accounts, sessions, second)
    assert await account_of(sessions, second) is None
    assert await account_of(sessions, first) is not None


async def test_who_was_erased_gets_no_account_from_what_comes_late(
    accounts: AccountsOfUsers, sessions: Sessions
):
    user = managed()
    async with sessions.begin() as session:
        assert (await accounts.erase(session, user.user_id)).erased == {}
    await hear_created(accounts, sessions, user)
    assert await account_of(sessions, user) is None
    assert await mails(sessions) == 0


async def test_people_who_signed_up_are_left_alone(accounts: AccountsOfUsers, sessions: Sessions):
    user = managed()
    user.ClearField("managing_workspace_id")
    await hear_created(accounts, sessions, user)
    assert await account_of(sessions, user) is None


async def test_the_newest_state_counts(accounts: AccountsOfUsers, sessions: Sessions):
    user = managed()
    await hear_created(accounts, sessions, user)
    for state, seconds, disabled in (
        (User.DEACTIVATED, 10, True),
        (User.ACTIVE, 5, True),  # of before
        (User.ACTIVE, 20, False),
        (User.DEACTIVATED, 20, False),  # again
        (User.DEACTIVATED, 15, False),
        (User.DEACTIVATED, 30, True),
    ):
        await hear_state(accounts, sessions, user, state, seconds)
        account = await account_of(sessions, user)
        assert account
        assert (account.disable_time is not None) == disabled


async def test_what_the_operator_has_disabled_no_admin_enables(accounts: AccountsOfUsers, sessions: Sessions):
    user = managed()
    await hear_created(accounts, sessions, user)
    async with sessions.begin() as session:
        await set_disabled(session, user.user_id, True, NOW - timedelta(days=1), Origin(), actor_id="")
    await hear_state(accounts, sessions, user, User.DEACTIVATED, 10)
    await hear_state(accounts, sessions, user, User.ACTIVE, 20)
    account = await account_of(sessions, user)
    assert account
    assert account.disable_time == NOW - timedelta(days=1)
