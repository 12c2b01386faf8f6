"""What ends here when a workspace is deleted."""

from meshboard.auth.v1.auth_service_pb2 import RefreshRequest
from meshboard.user.v1.workspace_service_pb2 import DeleteWorkspaceRequest
from sqlalchemy import func, select

from services.auth_svc.models import Account, ApiKey, AuditEntryRow, ServiceAccount
from tests.auth_svc.conftest import Services
from tests.auth_svc.machines import exchange, join, machine, outcome_in_workspace, owner_of
from tests.conditions import eventually
from tests.harness import outcome


async def test_service_accounts_end_with_their_keys(services: Services):
    owner, other = await owner_of(services), await owner_of(services)
    guest = await join(services, owner, "viewer")
    bot, spared = await machine(services, owner), await machine(services, other)
    token = await exchange(services, bot.secret)
    assert await outcome_in_workspace(services, token, owner.workspace_id) == "OK"
    await services.workspaces.DeleteWorkspace(
        DeleteWorkspaceRequest(workspace_id=owner.workspace_id), metadata=owner.metadata
    )
    assert await outcome_in_workspace(services, token, owner.workspace_id) != "OK"
    assert await outcome_in_workspace(services, owner.account.access_token, owner.workspace_id) != "OK"

    async def ended() -> bool:
        async with services.sessions() as session:
            left = [
                await session.scalar(
                    select(func.count()).select_from(table).where(table.workspace_id == owner.workspace_id)
                )
                for table in (ServiceAccount, ApiKey)
            ]
            last = await session.scalar(
                select(Account.last_workspace_id).where(Account.user_id == owner.user_id)
            )
            told = await session.scalar(
                select(AuditEntryRow.actor_id).where(
                    AuditEntryRow.workspace_id == owner.workspace_id,
                    AuditEntryRow.kind == "workspace.deleted",
                )
            )
        return left == [0, 0] and last is None and told == owner.user_id

    await eventually(ended)

    async def refused_key() -> bool:
        return (await outcome(exchange(services, bot.secret)))[1] == "API_KEY_INVALID"

    await eventually(refused_key)
    await exchange(services, spared.secret)
    # People stay, and sign in to what is left to them.
    assert (await services.sign_in(owner.account.user.email)).workspace.workspace_id == ""
    signed_in = await services.sign_in(guest.account.user.email)
    assert signed_in.workspace.workspace_id == guest.account.workspace.workspace_id
    refreshed = await services.auth.Refresh(RefreshRequest(refresh_token=owner.account.refresh_token))
    assert refreshed.access_token
