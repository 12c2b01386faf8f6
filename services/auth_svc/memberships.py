"""What ends when somebody leaves a workspace or gets another role there: impersonation, and service accounts."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from meshboard.user.v1.events_pb2 import MemberRemoved, MemberUpdated, RoleUpdated, WorkspaceDeleted
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from services.auth_svc import audit
from services.auth_svc.consumers import on_member_removed
from services.auth_svc.impersonations import end_impersonations
from services.auth_svc.models import Account, ServiceAccount
from services.auth_svc.origins import Origin
from services.auth_svc.service_accounts import retire
from services.auth_svc.usable_keys import UsableKeys
from services.chassis import outbox
from services.chassis.inbox import after_commit


@dataclass(frozen=True)
class Memberships:
    """Consumes events of members."""

    keys: UsableKeys
    now: Callable[[], datetime]

    async def on_member_removed(self, session: AsyncSession, event: MemberRemoved) -> None:
        """Ends impersonation by and of the member; a service account ends with its membership."""
        await on_member_removed(session, event)
        await end_impersonations(session, event.workspace_id, event.user_id, self.now())
        await self._delete_service_account(session, event)

    async def on_member_updated(self, session: AsyncSession, event: MemberUpdated) -> None:
        """Ends impersonation by and of a member with another role: one may now have more rights than the other."""
        member = event.member
        await end_impersonations(session, member.workspace_id, member.user.user_id, self.now())

    async def on_role_updated(self, session: AsyncSession, event: RoleUpdated) -> None:
        """Ends all impersonation in the workspace when a role allows more or less: nothing here says who has it."""
        if event.added_permissions or event.removed_permissions:
            await end_impersonations(session, event.role.workspace_id, None, self.now())

    async def on_workspace_deleted(self, session: AsyncSession, event: WorkspaceDeleted) -> None:
        """Ends impersonation in the workspace, and its service accounts; nobody signs in to it any more."""
        now = self.now()
        await session.execute(
            update(Account)
            .where(Account.last_workspace_id == event.workspace_id)
            .values(last_workspace_id=None)
        )
        await end_impersonations(session, event.workspace_id, None, now)
        accounts = await session.scalars(
            select(ServiceAccount)
            .where(ServiceAccount.workspace_id == event.workspace_id)
            .order_by(ServiceAccount.service_account_id)
            .with_for_update()
        )
        for account in accounts.all():
            after_commit(session, partial(self.keys.forget, await retire(session, account, now)))
            await session.delete(account)

    async def _delete_service_account(self, session: AsyncSession, event: MemberRemoved) -> None:
        identity = (event.workspace_id, event.user_id)
        account = await session.get(ServiceAccount, identity, with_for_update=True)
        if account is None:
            return
        now = self.now()
        if account.activate_time is not None:  # else it was deleted here, or nobody has ever seen it
            audit.record(
                session,
                "service_account.deleted",
                Origin(),
                now,
                actor_id=outbox.actor.get().partition(",")[0],
                subject_id=event.user_id,
                workspace_id=event.workspace_id,
            )
        after_commit(session, partial(self.keys.forget, await retire(session, account, now)))
        await session.delete(account)
