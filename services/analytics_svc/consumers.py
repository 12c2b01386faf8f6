"""What the domain events of other services mean here."""

from meshboard.analytics.v1.events_pb2 import SourceDeleted
from meshboard.user.v1.events_pb2 import WorkspaceDeleted
from sqlalchemy import delete
from sqlalchemy.ext.asyncio import AsyncSession

from services.analytics_svc.failures import forget_source
from services.analytics_svc.models import Cohort, Source
from services.analytics_svc.write_keys import WriteKeys
from services.chassis import outbox
from services.chassis.db import GrantRow
from services.chassis.inbox import after_commit


async def on_workspace_deleted(write_keys: WriteKeys, session: AsyncSession, event: WorkspaceDeleted) -> None:
    """Deletes the sources of a workspace with the grants on them, and its cohorts, and has its write keys refused.

    Nobody has rights to what the sources have collected, and the next sweep removes it (removals.py).
    """
    await session.execute(delete(GrantRow).where(GrantRow.workspace_id == event.workspace_id))
    await session.execute(delete(Cohort).where(Cohort.workspace_id == event.workspace_id))
    sources = (
        await session.scalars(
            delete(Source).where(Source.workspace_id == event.workspace_id).returning(Source)
        )
    ).all()
    for source in sources:
        await forget_source(session, source.workspace_id, source.source_id)
        gone = SourceDeleted(workspace_id=source.workspace_id, source_id=source.source_id)
        outbox.add(session, gone, workspace_id=source.workspace_id)

    async def forget() -> None:
        for source in sources:
            await write_keys.forget_source(source.source_id)

    after_commit(session, forget)
