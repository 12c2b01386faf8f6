"""The content of dashboards: read from the working copy, written to it, and kept as versions.

Whoever changes a dashboard or its widgets holds the lock of the dashboard's row (`boards.locked`), and calls `record`
at the end of the transaction, when the row has its new `version` and `update_time`.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from typing import TypeVar

from google.protobuf.message import Message
from meshboard.dashboard.v1 import dashboard_pb2
from meshboard.dashboard.v1.dashboard_pb2 import DashboardContent
from meshboard.dashboard.v1.events_pb2 import DashboardUpdated, WidgetCreated, WidgetDeleted, WidgetUpdated
from sqlalchemy import ColumnElement, delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from services.chassis import errors, outbox
from services.chassis.db import new_id
from services.dashboard_svc.convert import dashboard_to_pb, fill_widget, widget_to_pb
from services.dashboard_svc.models import Dashboard, Version, Widget

MAX_CONTENT_BYTES = 2 << 20
MAX_WIDGETS = 100
MAX_VERSIONS = 1000
TOGETHER = timedelta(minutes=10)
_KEPT = ("variables", "settings", "annotation_queries")
# What a content says beside the widgets.
FIELDS = ("title", "description", "tags", *_KEPT)
# Of a widget: its place, its times, and what is made of the rest.
_NO_CONTENT = {"dashboard_id", "create_time", "update_time", "etag", "html"}

M = TypeVar("M", bound=Message)


async def content_of(session: AsyncSession, dashboard: Dashboard) -> DashboardContent:
    """The working copy, its widgets in the order of the layout."""
    rows = await session.scalars(
        select(Widget).where(*_widgets_of(dashboard)).order_by(Widget.y, Widget.x, Widget.widget_id)
    )
    content = DashboardContent.FromString(dashboard.content)
    content.title = dashboard.title
    content.description = dashboard.description
    content.tags.extend(dashboard.tags)
    content.widgets.extend(map(widget_content, rows))
    return content


async def shown_content(session: AsyncSession, dashboard: Dashboard) -> DashboardContent:
    """What viewers see."""
    if dashboard.published_version is None:
        return await content_of(session, dashboard)
    version = await session.get_one(
        Version, (dashboard.workspace_id, dashboard.dashboard_id, dashboard.published_version)
    )
    return DashboardContent.FromString(version.content)


def widget_content(row: Widget) -> dashboard_pb2.Widget:
    """The content of a widget."""
    widget = widget_to_pb(row)
    return only(widget, {field.name for field in widget.DESCRIPTOR.fields} - _NO_CONTENT)


async def write_content(
    session: AsyncSession,
    dashboard: Dashboard,
    content: DashboardContent,
    *,
    author_id: str,
    now: datetime,
) -> bool:
    """Makes the working copy equal to the content, and emits the domain events of what that changes.

    Widgets are matched by `widget_id`; those without get one. Says whether anything has changed; then the row has a new
    version, and `record` is to be called. The content has been checked before, but for the number of its widgets.
    """
    if len(content.widgets) > MAX_WIDGETS:
        raise errors.failed_precondition(
            "TOO_MANY_WIDGETS", f"A dashboard has at most {MAX_WIDGETS} widgets.", limit=MAX_WIDGETS
        )
    changed = write_fields(dashboard, content)
    widgets = await _write_widgets(session, dashboard, content, author_id, now)
    if not changed and not widgets:
        return False
    touch(dashboard, now)
    events: list[Message] = [*widgets]
    if changed:
        events.insert(0, DashboardUpdated(dashboard=dashboard_to_pb(dashboard)))
    for event in events:
        outbox.add(session, event, workspace_id=dashboard.workspace_id)
    return True


def touch(dashboard: Dashboard, now: datetime) -> None:
    """Gives the row a new version, as each change of the dashboard or its widgets does."""
    dashboard.version += 1
    dashboard.update_time = now


def only(message: M, fields: Collection[str]) -> M:
    """A copy of the message with these fields alone."""
    copy = type(message)()
    copy.CopyFrom(message)
    for field, _ in message.ListFields():
        if field.name not in fields:
            copy.ClearField(field.name)
    return copy


def kept_of(content: DashboardContent) -> bytes:
    """What the column `content` of a dashboard's row holds of this: what has no column of its own."""
    return only(content, _KEPT).SerializeToString(deterministic=True)


def write_fields(dashboard: Dashboard, content: DashboardContent, fields: Collection[str] = FIELDS) -> bool:
    """Gives the row these fields of the content. Says whether anything has changed."""
    present = DashboardContent.FromString(dashboard.content)
    kept = only(present, [field for field in _KEPT if field not in fields])
    kept.MergeFrom(only(content, [field for field in _KEPT if field in fields]))
    wanted: dict[str, object] = {"content": kept_of(kept)}
    if "tags" in fields:
        wanted["tags"] = list(content.tags)
    wanted |= {name: getattr(content, name) for name in ("title", "description") if name in fields}
    changes = {name: value for name, value in wanted.items() if getattr(dashboard, name) != value}
    for name, value in changes.items():
        setattr(dashboard, name, value)
    return bool(changes)


async def _write_widgets(
    session: AsyncSession, dashboard: Dashboard, content: DashboardContent, author_id: str, now: datetime
) -> list[Message]:
    """The events of what has changed."""
    rows = await session.scalars(select(Widget).where(*_widgets_of(dashboard)))
    before = {row.widget_id: row for row in rows}
    # A list of repeated ids would be one widget for the database: the last one.
    wanted = {widget.widget_id.lower() or new_id(): widget for widget in content.widgets}
    events: list[Message] = []
    for widget_id in sorted(before.keys() - wanted.keys()):
        await session.delete(before[widget_id])
        events.append(
            WidgetDeleted(
                workspace_id=dashboard.workspace_id,
                dashboard_id=dashboard.dashboard_id,
                widget_id=widget_id,
            )
        )
    # First what goes, then what comes: names of widgets are unique on a dashboard.
    await session.flush()
    for widget_id, widget in wanted.items():
        if row := before.get(widget_id):
            if _change_widget(row, widget, now):
                events.append(WidgetUpdated(workspace_id=row.workspace_id, widget=widget_to_pb(row)))
        else:
            row = Widget(
                workspace_id=dashboard.workspace_id,
                dashboard_id=dashboard.dashboard_id,
                widget_id=widget_id,
                version=1,
                creator_id=author_id,
                create_time=now,
                update_time=now,
            )
            fill_widget(row, widget)
            session.add(row)
            events.append(WidgetCreated(workspace_id=row.workspace_id, widget=widget_to_pb(row)))
    await session.flush()
    return events


def _change_widget(row: Widget, widget: dashboard_pb2.Widget, now: datetime) -> bool:
    """Says whether anything has changed."""
    before = widget_content(row)
    fill_widget(row, widget)
    if widget_content(row) == before:
        return False
    row.version += 1
    row.update_time = now
    return True


async def record(
    session: AsyncSession,
    dashboard: Dashboard,
    author_id: str,
    reason: str = "",
    *,
    restored_number: int | None = None,
) -> int:
    """Keeps the working copy as the version `dashboard.version`, made at `dashboard.update_time`; gives the number.

    Without a reason nothing is kept when nothing has changed: the number is then that of the last version. The new one
    takes the place of the one before when that is by the same author, within 10 minutes, and neither has a reason; or
    when nothing has changed but that there is a reason now. Raises FAILED_PRECONDITION (DASHBOARD_TOO_LARGE).
    """
    await session.flush()
    content = (await content_of(session, dashboard)).SerializeToString(deterministic=True)
    if len(content) > MAX_CONTENT_BYTES:
        raise errors.failed_precondition(
            "DASHBOARD_TOO_LARGE",
            f"A dashboard holds at most {MAX_CONTENT_BYTES} bytes.",
            limit_bytes=MAX_CONTENT_BYTES,
            bytes=len(content),
        )
    last = await session.execute(
        select(Version.number, Version.content == content)
        .where(*versions_of(dashboard))
        .order_by(Version.number.desc())
        .limit(1)
    )
    for number, unchanged in last:
        if unchanged and not reason and restored_number is None:
            return int(number)
    version = Version(
        workspace_id=dashboard.workspace_id,
        dashboard_id=dashboard.dashboard_id,
        number=dashboard.version,
        author_id=author_id,
        reason=reason,
        restored_number=restored_number,
        content=content,
        begin_time=dashboard.update_time,
        create_time=dashboard.update_time,
    )
    if not await _put_together(session, dashboard, version):
        session.add(version)
        await session.flush()
        await _prune(session, dashboard)
    return dashboard.version


async def _put_together(session: AsyncSession, dashboard: Dashboard, version: Version) -> bool:
    """Whether the last version has become this one. What viewers see while there is a draft, or files are of, stays."""
    last = select(func.max(Version.number)).where(*versions_of(dashboard)).scalar_subquery()
    continued = Version.content == version.content
    if not version.reason and version.restored_number is None:
        continued |= Version.begin_time > dashboard.update_time - TOGETHER
    number = await session.scalar(
        update(Version)
        .where(
            *versions_of(dashboard),
            Version.number == last,
            Version.number.is_distinct_from(dashboard.published_version),
            Version.author_id == version.author_id,
            Version.reason == "",
            Version.restored_number.is_(None),
            Version.exported.is_(False),
            continued,
        )
        .values(
            number=version.number,
            reason=version.reason,
            restored_number=version.restored_number,
            content=version.content,
            create_time=version.create_time,
        )
        .returning(Version.number)
        .execution_options(synchronize_session=False)
    )
    return number is not None


async def _prune(session: AsyncSession, dashboard: Dashboard) -> None:
    oldest = (
        select(Version.number)
        .where(*versions_of(dashboard))
        .order_by(Version.number.desc())
        .offset(MAX_VERSIONS)
        .limit(1)
        .scalar_subquery()
    )
    await session.execute(
        delete(Version)
        .where(
            *versions_of(dashboard),
            Version.number <= oldest,
            Version.number.is_distinct_from(dashboard.published_version),
        )
        .execution_options(synchronize_session=False)
    )


def versions_of(dashboard: Dashboard) -> tuple[ColumnElement[bool], ...]:
    """The condition on versions that they are this dashboard's."""
    return (
        Version.workspace_id == dashboard.workspace_id,
        Version.dashboard_id == dashboard.dashboard_id,
    )


def _widgets_of(dashboard: Dashboard) -> tuple[ColumnElement[bool], ...]:
    return (
        Widget.workspace_id == dashboard.workspace_id,
        Widget.dashboard_id == dashboard.dashboard_id,
    )
