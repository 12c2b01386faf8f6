"""What user_svc's events change here, by way of outbox, JetStream and inbox."""

from datetime import UTC, datetime, timedelta

from meshboard.user.v1.events_pb2 import MemberRemoved, UserUpdated
from meshboard.user.v1.user_pb2 import User
from meshboard.user.v1.user_service_pb2 import UpdateUserRequest
from meshboard.user.v1.workspace_service_pb2 import (
    CreateWorkspaceRequest,
    RemoveMemberRequest,
)
from sqlalchemy import update

from services.auth_svc.consumers import on_member_removed, on_user_updated
from services.auth_svc.models import Account
from services.user_svc import models as user_models
from tests.auth_svc.conftest import Services, bearer
from tests.conditions import eventually
from tests.harness import new_id


async def account_of(services: Services, user_id: str) -> Account:
    async with services.sessions() as session:
        return await session.get_one(Account, user_id)


async def test_a_new_name_arrives(services: Services):
    signed_up = await services.sign_up()
    user_id = signed_up.user.user_id
    await services.users.UpdateUser(
        UpdateUserRequest(user=User(user_id=user_id, display_name="Countess")),
        metadata=bearer(signed_up.access_token),
    )

    async def arrived() -> bool:
        return (await account_of(services, user_id)).display_name == "Countess"

    await eventually(arrived)


async def test_an_older_name_does_not_replace_a_newer_one(services: Services):
    user_id = (await services.sign_up()).user.user_id
    time = datetime(2030, 1, 1, tzinfo=UTC)
    for name, at in (("Newer", time), ("Older", time - timedelta(seconds=1))):
        event = UserUpdated(user=User(user_id=user_id, display_name=name))
        event.user.update_time.FromDatetime(at)
        async with services.sessions.begin() as session:
            await on_user_updated(session, event)
    assert (await account_of(services, user_id)).display_name == "Newer"


async def test_the_next_sign_in_is_not_to_a_workspace_that_was_left(services: Services):
    owner, guest = await services.sign_up(), await services.sign_up()
    shared = await services.workspaces.CreateWorkspace(
        CreateWorkspaceRequest(title="Shared"), metadata=bearer(owner.access_token)
    )
    workspace_id, user_id = shared.workspace.workspace_id, guest.user.user_id
    await services.admit(workspace_id, bearer(owner.access_token), user_id, guest.access_token)
    async with services.sessions.begin() as session:
        await session.execute(
            update(Account).where(Account.user_id == user_id).values(last_workspace_id=workspace_id)
        )
    assert (await services.sign_in(guest.user.email)).workspace.workspace_id == workspace_id
    await services.workspaces.RemoveMember(
        RemoveMemberRequest(workspace_id=workspace_id, user_id=user_id), metadata=bearer(owner.access_token)
    )

    async def forgotten() -> bool:
        return (await account_of(services, user_id)).last_workspace_id is None

    await eventually(forgotten)
    signed_in = await services.sign_in(guest.user.email)
    assert signed_in.workspace == guest.workspace


async def test_leaving_another_workspace_changes_nothing(services: Services):
    signed_up = await services.sign_up()
    event = MemberRemoved(workspace_id=new_id(), user_id=signed_up.user.user_id)
    async with services.sessions.begin() as session:
        await on_member_removed(session, event)
    account = await account_of(services, signed_up.user.user_id)
    assert account.last_workspace_id == signed_up.workspace.workspace_id


async def test_user_svc_learns_of_sign_ins(services: Services):
    signed_up = await services.sign_up()

    async def learned() -> bool:
        async with services.user_sessions() as session:
            user = await session.get_one(user_models.User, signed_up.user.user_id)
        return user.sign_in_time is not None

    await eventually(learned)
