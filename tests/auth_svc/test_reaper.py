from datetime import UTC, datetime, timedelta

from meshboard.auth.v1.events_pb2 import AccountDiscarded
from sqlalchemy import select, update

from services.auth_svc.models import Account, Session
from services.auth_svc.reaper import reap
from services.chassis.db import OutboxRow
from tests.auth_svc.conftest import Services, claims_of, new_email
from tests.harness import new_id


def pending(try_time: datetime) -> Account:
    email = new_email()
    return Account(
        user_id=new_id(),
        email=email,
        email_key=email,
        password_hash="",
        display_name="Ada",
        workspace_id=new_id(),
        create_time=try_time - timedelta(days=1),
        try_time=try_time,
    )


async def test_clears_sign_ups_that_nobody_finishes(services: Services):
    now = datetime.now(UTC)
    fresh = now - timedelta(seconds=services.auth_settings.pending_account_seconds - 60)
    stale = now - timedelta(seconds=services.auth_settings.pending_account_seconds + 60)
    left, kept = pending(stale), pending(fresh)
    active = (await services.sign_up()).user.user_id
    async with services.sessions.begin() as session:
        session.add_all([left, kept])
        await session.execute(update(Account).where(Account.user_id == active).values(try_time=stale))
    await reap(services.sessions, services.auth_settings, now)
    async with services.sessions() as session:
        assert await session.get(Account, left.user_id) is None
        assert await session.get(Account, kept.user_id) is not None
        assert await session.get(Account, active) is not None
        rows = await session.scalars(
            select(OutboxRow).where(OutboxRow.subject == AccountDiscarded.DESCRIPTOR.full_name)
        )
        events = [AccountDiscarded.FromString(row.payload) for row in rows]
    assert events == [AccountDiscarded(user_id=left.user_id, workspace_id=left.workspace_id)]


async def test_clears_sessions_a_week_after_their_end(services: Services):
    now = datetime.now(UTC)
    ids = [claims_of((await services.sign_up()).access_token)["sid"] for _ in range(4)]
    expired, revoked, just_expired, alive = ids
    async with services.sessions.begin() as session:
        for session_id, change in (
            (expired, {"expire_time": now - timedelta(days=8)}),
            (revoked, {"revoke_time": now - timedelta(days=8)}),
            (just_expired, {"expire_time": now - timedelta(days=1)}),
        ):
            await session.execute(update(Session).where(Session.session_id == session_id).values(**change))
    await reap(services.sessions, services.auth_settings, now)
    async with services.sessions() as session:
        left = set(await session.scalars(select(Session.session_id).where(Session.session_id.in_(ids))))
    assert left == {just_expired, alive}
