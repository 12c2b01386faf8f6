"""Contents written to the working copy are what is read from it, whatever was there before."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from meshboard.analytics.v1.query_pb2 import Query
from meshboard.dashboard.v1.dashboard_pb2 import DashboardContent, Layout, Settings, Variable, Widget
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import db, errors
from services.chassis.db import OutboxRow
from services.chassis.times import now
from services.dashboard_svc import contents, models
from services.dashboard_svc.diffs import changes
from tests.harness import new_id

Sessions = async_sessionmaker[AsyncSession]
SOURCE = new_id()
WIDGET_IDS = [new_id() for _ in range(4)]
ANN = new_id()

widgets = st.builds(
    Widget,
    widget_id=st.sampled_from(WIDGET_IDS),
    title=st.sampled_from(["", "A", "B"]),
    kind=st.sampled_from([Widget.TABLE, Widget.BAR]),
    query=st.builds(Query, source_ids=st.just([SOURCE]), limit=st.integers(0, 2)),
    layout=st.builds(Layout, x=st.just(0), y=st.integers(0, 3), width=st.just(4), height=st.just(4)),
)
variables = st.builds(
    Variable,
    name=st.sampled_from(["a", "b", "c"]),
    title=st.sampled_from(["", "A"]),
    text=st.just(Variable.FreeText()),
)
boards = st.builds(
    DashboardContent,
    title=st.sampled_from(["Shop", "Traffic"]),
    description=st.sampled_from(["", "Told"]),
    tags=st.lists(st.sampled_from("xyz"), unique=True),
    variables=st.lists(variables, unique_by=lambda variable: variable.name),
    settings=st.one_of(
        st.none(), st.just(Settings()), st.builds(Settings, refresh_seconds=st.integers(0, 2))
    ),
    widgets=st.lists(widgets, unique_by=lambda widget: widget.widget_id).map(
        lambda some: sorted(some, key=lambda each: (each.layout.y, each.layout.x, each.widget_id))
    ),
)
LAW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture
async def sessions(database_url: str) -> AsyncIterator[Sessions]:
    sessions = db.connect(database_url)
    yield sessions
    await db.engine(sessions).dispose()


async def blank(session: AsyncSession) -> models.Dashboard:
    dashboard = models.Dashboard(
        workspace_id=new_id(),
        dashboard_id=new_id(),
        title="Blank",
        description="",
        tags=[],
        content=b"",
        version=1,
        creator_id=ANN,
        create_time=now(),
        update_time=now(),
    )
    session.add(dashboard)
    await session.flush()
    return dashboard


async def told(session: AsyncSession, dashboard: models.Dashboard) -> int:
    return (
        await session.scalar(
            select(func.count()).where(OutboxRow.headers["Workspace-Id"].astext == dashboard.workspace_id)
        )
        or 0
    )


@LAW
@given(steps=st.lists(boards, min_size=1, max_size=4))
async def test_what_is_written_is_read(sessions: Sessions, steps: list[DashboardContent]) -> None:
    async with sessions() as session:
        dashboard = await blank(session)
        for wanted in steps:
            before, version = await contents.content_of(session, dashboard), dashboard.version
            changed = await contents.write_content(session, dashboard, wanted, author_id=ANN, now=now())
            after = await contents.content_of(session, dashboard)
            assert after == wanted
            assert changed is (before != wanted)
            assert bool(list(changes(before, after))) is changed
            assert dashboard.version == version + changed
            if changed:
                await contents.record(session, dashboard, ANN)
            events = await told(session, dashboard)
            assert not await contents.write_content(session, dashboard, wanted, author_id=ANN, now=now())
            assert await told(session, dashboard) == events
            kept = await session.get_one(
                models.Version, (dashboard.workspace_id, dashboard.dashboard_id, dashboard.version)
            )
            assert DashboardContent.FromString(kept.content) == wanted


async def test_gives_ids_to_new_widgets(sessions: Sessions) -> None:
    async with sessions() as session:
        dashboard = await blank(session)
        wanted = DashboardContent(title="Blank", widgets=[Widget(title="A"), Widget(title="B")])
        await contents.write_content(session, dashboard, wanted, author_id=ANN, now=now())
        ids = [widget.widget_id for widget in (await contents.content_of(session, dashboard)).widgets]
        assert len(set(ids)) == 2


async def test_bounds_the_number_of_widgets(sessions: Sessions) -> None:
    async with sessions() as session:
        dashboard = await blank(session)
        wanted = DashboardContent(title="Blank", widgets=[Widget() for _ in range(101)])
        with pytest.raises(errors.Error) as failure:
            await contents.write_content(session, dashboard, wanted, author_id=ANN, now=now())
        assert failure.value.reason == "TOO_MANY_WIDGETS"
