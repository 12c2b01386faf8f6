"""Widgets of kinds that workspaces have made: what they show is made of their options when they are written.

Query and spec are stored with the widget, so that viewers, streams and links need not know of kinds. In files a widget
says its kind by name, and its options; the rest is made where the file is applied.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from meshboard.dashboard.v1.dashboard_pb2 import CustomWidget, DashboardContent, Widget
from meshboard.dashboard.v1.widget_kind_pb2 import WidgetKind
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import errors
from services.dashboard_svc import models
from services.dashboard_svc.convert import copy_field, widget_kind_to_pb
from services.dashboard_svc.widget_definitions import WidgetDefinition

# What is made of the options, and not said.
_MADE = ("widget_kind_id", "version", "spec")


def absent() -> errors.Error:
    """What is said of a kind that is not there."""
    return errors.not_found("WIDGET_KIND_NOT_FOUND", "There is no such kind of widgets.")


class CustomWidgets:
    """Makes what widgets show of their options. Never to be called inside a transaction."""

    def __init__(self, db: async_sessionmaker[AsyncSession]) -> None:
        self._db = db

    async def fill(self, workspace_id: str, widget: Widget) -> bool:
        """Gives a widget what its kind makes of its options, in the version that it names. Says whether it is custom.

        Raises NOT_FOUND (WIDGET_KIND_NOT_FOUND, WIDGET_KIND_VERSION_NOT_FOUND) and INVALID_ARGUMENT
        (WIDGET_OPTIONS_INVALID).
        """
        if not widget.HasField("custom") or widget.kind not in {0, Widget.CUSTOM} or widget.library_widget_id:
            return False
        async with self._db() as session:
            kind, version = await _find(session, workspace_id, widget.custom)
        show(widget, await asyncio.to_thread(_made, widget_kind_to_pb(kind, version), widget.custom))
        return True

    async def complete(self, workspace_id: str, content: DashboardContent, here: DashboardContent) -> None:
        """Gives custom widgets of a file what it does not say. Raises as `fill` does.

        One that says what the one here does is that; one of the same kind has its version, unless it says another.
        """
        present = {widget.widget_id: widget for widget in here.widgets}
        for widget in content.widgets:
            if not is_custom(widget):
                continue
            known = present.get(widget.widget_id, Widget())
            if _said(known, keep_version=bool(widget.custom.version)).custom == widget.custom:
                copy_field(known, widget, "custom")
                copy_field(known, widget, "query")
                continue
            _assume_version(widget, known)
            await self.fill(workspace_id, widget)


def is_custom(widget: Widget) -> bool:
    """Whether a widget itself, not one of the library that it shows, is of a kind that the workspace has made."""
    return widget.kind == Widget.CUSTOM and widget.HasField("custom")


def show(widget: Widget, made: Widget) -> None:
    """Gives a widget what its kind has made."""
    copy_field(made, widget, "custom")
    copy_field(made, widget, "query")


def as_said(content: DashboardContent, pinned: Iterable[str] = ()) -> DashboardContent:
    """A copy of a content in which custom widgets say what files say of them; the `pinned` ones their version too."""
    copy = DashboardContent()
    copy.CopyFrom(content)
    for widget in copy.widgets:
        widget.CopyFrom(_said(widget, keep_version=widget.widget_id in pinned))
    return copy


def with_versions(content: DashboardContent, present: DashboardContent) -> DashboardContent:
    """A copy of a content in which custom widgets that say no version have that of the present one."""
    copy = DashboardContent()
    copy.CopyFrom(content)
    known = {widget.widget_id: widget for widget in present.widgets}
    for widget in filter(is_custom, copy.widgets):
        _assume_version(widget, known.get(widget.widget_id, Widget()))
    return copy


async def hold(
    session: AsyncSession, workspace_id: str, widget: Widget, present: Iterable[str | None] = ()
) -> None:
    """Keeps the kind of a widget from being deleted meanwhile, unless it is `present`. Raises NOT_FOUND."""
    widget_kind_id = widget.custom.widget_kind_id
    if not widget_kind_id or widget_kind_id in present:
        return
    lock = {"read": True, "key_share": True}
    if await session.get(models.WidgetKind, (workspace_id, widget_kind_id), with_for_update=lock) is None:
        raise absent()


async def read_version(
    session: AsyncSession, kind: models.WidgetKind, number: int
) -> models.WidgetKindVersion:
    """A version of a kind, 0 for the newest. Raises NOT_FOUND."""
    key = (kind.workspace_id, kind.widget_kind_id, number or kind.number)
    version = await session.get(models.WidgetKindVersion, key)
    if version is None:
        raise errors.not_found(
            "WIDGET_KIND_VERSION_NOT_FOUND", f"The kind has no version {number}.", version=number
        )
    return version


def _assume_version(widget: Widget, known: Widget) -> None:
    if known.custom.kind_name == widget.custom.kind_name:
        widget.custom.version = widget.custom.version or known.custom.version


def _said(widget: Widget, *, keep_version: bool) -> Widget:
    said = Widget()
    said.CopyFrom(widget)
    if is_custom(said):
        said.ClearField("query")
        for field in _MADE:
            if field != "version" or not keep_version:
                said.custom.ClearField(field)  # type: ignore[arg-type]
    return said


async def _find(
    session: AsyncSession, workspace_id: str, custom: CustomWidget
) -> tuple[models.WidgetKind, models.WidgetKindVersion]:
    if not custom.widget_kind_id and not custom.kind_name:
        raise errors.invalid_fields([("custom.widget_kind_id", "is not set")])
    named = (
        models.WidgetKind.widget_kind_id == custom.widget_kind_id.lower()
        if custom.widget_kind_id
        else models.WidgetKind.name == custom.kind_name
    )
    kind = await session.scalar(
        select(models.WidgetKind).where(models.WidgetKind.workspace_id == workspace_id, named)
    )
    if kind is None:
        raise absent()
    return kind, await read_version(session, kind, custom.version)


def _made(kind: WidgetKind, custom: CustomWidget) -> Widget:
    return WidgetDefinition(kind).made_of(custom.options)
