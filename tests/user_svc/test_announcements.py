"""What user_svc tells the others, and what it makes of their events."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from google.protobuf.message import Message
from meshboard.auth.v1.events_pb2 import AccountDiscarded, EmailChanged, SignedIn
from meshboard.user.v1.events_pb2 import RightsChanged, UserUpdated
from meshboard.user.v1.user_service_pb2 import GetMeRequest
from meshboard.user.v1.workspace_service_pb2 import RemoveMemberRequest
from sqlalchemy import select

from services.chassis import outbox, trust
from services.chassis.bus import Received
from services.chassis.db import OutboxRow
from services.chassis.inbox import Repeatable, consume
from services.chassis.outbox import Relay
from services.user_svc.consumers import on_account_discarded, on_email_changed, on_signed_in
from services.user_svc.models import User, Workspace
from services.user_svc.rights import rights_of
from tests.conditions import eventually
from tests.harness import new_id
from tests.user_svc.conftest import Person, UserSvc
from tests.user_svc.roles import allow, member_with


@asynccontextmanager
async def working(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def publish(svc: UserSvc, event: Message, event_id: str) -> None:
    # A message id of its own, as after the stream's duplicate window: only the inbox can know the repetition.
    await svc.bus.publish(
        event.DESCRIPTOR.full_name,
        event.SerializeToString(),
        message_id=new_id(),
        headers={outbox.EVENT_ID: event_id},
    )


async def test_changes_of_rights_reach_everyone(svc: UserSvc, owner: Person):
    heard: list[RightsChanged] = []

    def hear(message: Received) -> None:
        event = RightsChanged.FromString(message.payload)
        if event.workspace_id == owner.workspace_id:
            heard.append(event)

    listening = await svc.bus.listen(RightsChanged.DESCRIPTOR.full_name, hear)
    async with working(Relay(svc.url, svc.bus, "user").run()):
        viewer = await svc.join(owner, "viewer")
        await svc.workspaces.RemoveMember(
            RemoveMemberRequest(workspace_id=owner.workspace_id, user_id=viewer.user_id),
            metadata=owner.metadata,
        )
        await eventually(lambda: len(heard) == 2)
    await listening.unsubscribe()
    assert [event.version for event in heard] == [2, 3]


async def test_a_changed_role_is_in_force_elsewhere(svc: UserSvc, owner: Person):
    """Another service remembers rights for a minute; it forgets those of a changed role when it hears of it."""
    analyst = await member_with(svc, owner, "analyst", ["audit.view"])
    rights = await trust.follow_rights(svc.bus, rights_of(svc.sessions))

    async def may(permission: str) -> bool:
        return permission in (await rights.get(analyst.user_id, owner.workspace_id)).permissions

    async with working(Relay(svc.url, svc.bus, "user").run()):
        assert await may("audit.view")
        await allow(svc, owner, "analyst", ["members.view"])
        await eventually(lambda: may("members.view"))
        assert not await may("audit.view")


async def test_the_newest_address_stays_in_any_order(svc: UserSvc, owner: Person):
    time = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
    for email, at in (
        ("first@example.org", time),
        ("third@example.org", time + timedelta(minutes=2)),
        ("second@example.org", time + timedelta(minutes=1)),
    ):
        event = EmailChanged(user_id=owner.user_id, email=email)
        event.time.FromDatetime(at)
        async with svc.sessions.begin() as session:
            await on_email_changed(session, event)
    async with svc.sessions() as session:
        user = await session.get_one(User, owner.user_id)
        rows = await session.scalars(
            select(OutboxRow)
            .where(OutboxRow.subject == UserUpdated.DESCRIPTOR.full_name)
            .order_by(OutboxRow.id)
        )
        told = [UserUpdated.FromString(row.payload).user for row in rows]
    assert user.email == "third@example.org"
    assert [each.email for each in told if each.user_id == owner.user_id] == [
        "first@example.org",
        "third@example.org",
    ]


async def test_a_sign_in_is_remembered_in_any_order_and_again(svc: UserSvc, owner: Person):
    time = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    seen = 0

    async def counted(events: Sequence[SignedIn]) -> None:
        nonlocal seen
        await on_signed_in(svc.sessions, events)
        seen += sum(event.user_id == owner.user_id for event in events)

    def signed_in(at: datetime) -> SignedIn:
        event = SignedIn(user_id=owner.user_id)
        event.time.FromDatetime(at)
        return event

    newer, older, again = new_id(), new_id(), new_id()
    await publish(svc, signed_in(time), newer)
    await publish(svc, signed_in(time - timedelta(days=1)), older)
    await publish(svc, signed_in(time), again)
    async with working(consume(svc.bus, svc.sessions, new_id(), {SignedIn: Repeatable(counted)})):
        await eventually(lambda: seen == 3)
    async with svc.sessions() as session:
        assert (await session.get_one(User, owner.user_id)).sign_in_time == time


async def test_what_an_unfinished_sign_up_left_goes(svc: UserSvc, owner: Person):
    discarded = await svc.person()
    event = AccountDiscarded(user_id=discarded.user_id, workspace_id=discarded.workspace_id)
    await publish(svc, event, new_id())

    async def gone() -> bool:
        async with svc.sessions() as session:
            return (
                await session.get(User, discarded.user_id) is None
                and await session.get(Workspace, discarded.workspace_id) is None
            )

    async with working(consume(svc.bus, svc.sessions, new_id(), {AccountDiscarded: on_account_discarded})):
        await eventually(gone)
    assert (await svc.users.GetMe(GetMeRequest(), metadata=owner.metadata)).user.user_id == owner.user_id
