import grpc
from meshboard.analytics.v1.events_pb2 import SourceDeleted
from meshboard.user.v1.events_pb2 import WorkspaceDeleted
from sqlalchemy import func, select

from services.analytics_svc.consumers import on_workspace_deleted
from services.analytics_svc.models import Cohort, Source
from services.analytics_svc.write_keys import WriteKeys
from services.chassis.cache import Cache
from services.chassis.db import GrantRow, OutboxRow
from services.chassis.times import now
from tests.analytics_svc.conftest import Analytics
from tests.analytics_svc.test_cohorts import create
from tests.conditions import eventually
from tests.harness import outcome
from tests.parts import Parts


async def test_a_deleted_workspace_accepts_no_events(analytics: Analytics, parts: Parts) -> None:
    gone, spared = analytics.identity.member("admin"), analytics.identity.member("admin")
    sources = {member.workspace_id: await analytics.source(member) for member in (gone, spared)}
    for _, write_key in sources.values():  # so that it is remembered
        await analytics.send(write_key, [{}])
    for member in (gone, spared):
        await create(analytics, member)
    cache = await Cache.connect(parts.redis_url, analytics.bus, "analytics")
    write_keys = WriteKeys(analytics.db, cache, now)
    for _ in range(2):
        async with analytics.db.begin() as session:
            await on_workspace_deleted(write_keys, session, WorkspaceDeleted(workspace_id=gone.workspace_id))
    source, write_key = sources[gone.workspace_id]

    async def is_refused() -> bool:
        return await outcome(analytics.send(write_key, [{}])) == (
            grpc.StatusCode.UNAUTHENTICATED,
            "WRITE_KEY_INVALID",
        )

    await eventually(is_refused, seconds=4)
    await analytics.send(sources[spared.workspace_id][1], [{}])
    await cache.close()
    async with analytics.db() as session:
        for table in (Source, GrantRow, Cohort):
            for member, count in ((gone, 0), (spared, 1)):
                left = (
                    select(func.count()).select_from(table).where(table.workspace_id == member.workspace_id)
                )
                assert await session.scalar(left) == count, table
        told = await session.scalars(
            select(OutboxRow.payload).where(OutboxRow.subject == SourceDeleted.DESCRIPTOR.full_name)
        )
        events = [SourceDeleted.FromString(row) for row in told]
    assert [event.source_id for event in events].count(source.source_id) == 1
