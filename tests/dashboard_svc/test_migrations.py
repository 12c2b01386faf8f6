"""What migrations make of what is there."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from alembic.script import ScriptDirectory
from meshboard.dashboard.v1.dashboard_pb2 import DashboardContent
from sqlalchemy import select, text

from services.chassis import db as chassis_db
from services.dashboard_svc.models import Dashboard, LibraryWidget, Version
from tests.harness import new_id
from tests.parts import Parts

UNDONE = (
    "ALTER TABLE versions DROP COLUMN exported",
    "ALTER TABLE applied_files DROP COLUMN base_version, DROP COLUMN folder",
    "ALTER TABLE library_widgets DROP COLUMN name",
    "DROP INDEX dashboards_by_title, dashboards_by_update_time",
    "ALTER TABLE dashboards DROP COLUMN published_title, DROP COLUMN published_update_time",
)


async def test_0010_names_library_widgets_and_finds_the_titles_of_drafts(parts: Parts) -> None:
    url = await parts.fresh_database("dashboard")
    await chassis_db.migrate(url, "services.dashboard_svc")
    db, now, workspace_id = chassis_db.connect(url), datetime(2026, 1, 2, tzinfo=UTC), new_id()
    row: dict[str, Any] = {
        "workspace_id": workspace_id,
        "version": 1,
        "creator_id": new_id(),
        "create_time": now,
        "update_time": now,
    }
    titles = ["Short", "Long " + "ü" * 195, "x" * 127, "y" * 128]
    names = ["Top pages", "Top pages!", "日本", "", "Ends - "]
    async with db.begin() as session:
        for number, title in enumerate(titles, 1):
            dashboard_id = new_id()
            content = DashboardContent(title=title, description="More").SerializeToString(deterministic=True)
            session.add(
                Dashboard(
                    **row, dashboard_id=dashboard_id, title="Draft", description="", published_version=number
                )
            )
            await session.flush()
            session.add(
                Version(
                    workspace_id=workspace_id,
                    dashboard_id=dashboard_id,
                    number=number,
                    author_id=new_id(),
                    reason="",
                    content=content,
                    begin_time=now,
                    create_time=now,
                )
            )
        for title in names:
            session.add(LibraryWidget(**row, library_widget_id=new_id(), title=title, kind=4, content=b""))
    async with db.begin() as session:
        for statement in UNDONE:
            await session.execute(text(statement))
        # The one before it, whatever that is.
        await session.execute(text("UPDATE alembic_version SET version_num = :before"), {"before": before()})

    await chassis_db.migrate(url, "services.dashboard_svc")
    async with db() as session:
        found = await session.scalars(select(Dashboard).order_by(Dashboard.published_version))
        assert [(each.published_title, each.published_update_time) for each in found] == [
            (title, now) for title in titles
        ]
        widgets = await session.scalars(select(LibraryWidget).order_by(LibraryWidget.library_widget_id))
        named = list(widgets)
    assert [each.name for each in named] == [
        "top-pages",
        f"top-pages-{named[1].library_widget_id[-12:]}",
        "widget",
        f"widget-{named[3].library_widget_id[-12:]}",
        "ends",
    ]
    await chassis_db.engine(db).dispose()


def before() -> str:
    """The revision before 0010."""
    script = ScriptDirectory(str(chassis_db._folder("services.dashboard_svc") / "migrations"))
    return str(script.get_revision("0010").down_revision)
