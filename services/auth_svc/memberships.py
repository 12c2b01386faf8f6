"""What ends when somebody leaves a workspace or gets another role there: impersonation, and service accounts."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from meshboard.auth.v1.internal_auth_service_pb2 import CheckSessionResponse
from meshboard.user.v1.events_pb2 import MemberRemoved, MemberUpdated
from sqlalchemy import event as events
from sqlalchemy.ext.asyncio import AsyncSession

from services.auth_svc import audit
from services.auth_svc.consumers import on_member_removed
from services.auth_svc.impersonations import end_impersonations
from services.auth_svc.models import ServiceAccount
from services.auth_svc.origins import Origin
from services.auth_svc.service_accounts import retire
from services.auth_svc.usable_keys import Ended, UsableKeys
from services.chassis import outbox
from services.chassis.cache import CachedMessages


@dataclass(frozen=True)
class Memberships:
    """Consumes events of members. `alive` is what CheckSession remembers of sessions."""

    keys: UsableKeys
    alive: CachedMessages[CheckSessionResponse]
    now: Callable[[], datetime]
    _forgetting: set[asyncio.Task[None]] = field(default_factory=set)

    async def on_member_removed(self, session: AsyncSession, event: MemberRemoved) -> None:
        """Ends impersonation by and of the member; a service account ends with its membership."""
        await on_member_removed(session, event)
        session_ids = await end_impersonations(session, event.workspace_id, event.user_id, self.now())
        keys = await self._delete_service_account(session, event)
        self._forget_later(session, session_ids, keys)

    async def on_member_updated(self, session: AsyncSession, event: MemberUpdated) -> None:
        """Ends impersonation by and of a member with another role: one may now have more rights than the other."""
        member = event.member
        session_ids = await end_impersonations(session, member.workspace_id, member.user.user_id, self.now())
        self._forget_later(session, session_ids, [])

    async def _delete_service_account(self, session: AsyncSession, event: MemberRemoved) -> list[Ended]:
        identity = (event.workspace_id, event.user_id)
        account = await session.get(ServiceAccount, identity, with_for_update=True)
        if account is None:
            return []
        now = self.now()
        if account.activate_time is not None:  # else it was deleted here, or has never been seen
            audit.record(
                session,
                "service_account.deleted",
                Origin(),
                now,
                actor_id=outbox.actor.get().partition(",")[0],
                subject_id=event.user_id,
                workspace_id=event.workspace_id,
            )
        ended = await retire(session, account, now)
        await session.delete(account)
        return ended

    def _forget_later(self, session: AsyncSession, session_ids: Sequence[str], keys: Sequence[Ended]) -> None:
        """Forgets what has ended once the transaction has committed."""
        if not session_ids and not keys:
            return

        async def forget() -> None:
            for session_id in session_ids:
                await self.alive.invalidate(session_id)
            await self.keys.forget(keys)

        def start(_: object) -> None:
            task = asyncio.get_running_loop().create_task(forget())
            self._forgetting.add(task)
            task.add_done_callback(self._forgetting.discard)

        events.listen(session.sync_session, "after_commit", start, once=True)
