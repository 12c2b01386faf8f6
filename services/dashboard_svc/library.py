"""The library: widgets that are written once and shown by many."""

from __future__ import annotations

from collections.abc import Iterable

from meshboard.dashboard.v1 import dashboard_pb2
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from services.chassis import errors
from services.dashboard_svc import markdown
from services.dashboard_svc.convert import CONTENT, copy_field
from services.dashboard_svc.models import LibraryWidget


def absent() -> errors.Error:
    """What is said of a library widget that is not there."""
    return errors.not_found("LIBRARY_WIDGET_NOT_FOUND", "There is no such library widget.")


async def shown_widgets(
    session: AsyncSession, workspace_id: str, widgets: Iterable[dashboard_pb2.Widget]
) -> list[dashboard_pb2.Widget]:
    """The widgets with what those of the library say, and with the HTML of texts.

    One whose library widget is gone stays without title, kind and content.
    """
    shown = list(widgets)
    wanted = {widget.library_widget_id.lower() for widget in shown if widget.library_widget_id}
    library = await _read(session, workspace_id, wanted) if wanted else {}
    for widget in shown:
        if row := library.get(widget.library_widget_id.lower()):
            show(row, widget)
        elif widget.markdown and not widget.html:  # a version keeps none
            widget.html = markdown.to_html(widget.markdown)
    return shown


async def resolved(
    session: AsyncSession, workspace_id: str, content: dashboard_pb2.DashboardContent
) -> dashboard_pb2.DashboardContent:
    """A copy of the content in which widgets say what those of the library say: what it asks of sources."""
    copy = dashboard_pb2.DashboardContent.FromString(content.SerializeToString())
    await shown_widgets(session, workspace_id, copy.widgets)
    return copy


def show(row: LibraryWidget, widget: dashboard_pb2.Widget) -> None:
    """Gives a widget what one of the library says."""
    content = dashboard_pb2.Widget.FromString(row.content)
    widget.title, widget.kind = row.title, dashboard_pb2.Widget.Kind.ValueType(row.kind)
    for field in (*CONTENT, "html"):
        copy_field(content, widget, field)


async def held(session: AsyncSession, workspace_id: str, library_widget_id: str) -> LibraryWidget:
    """A library widget that something is to show, kept from being changed or deleted meanwhile. Raises NOT_FOUND."""
    row = await session.get(
        LibraryWidget,
        (workspace_id, library_widget_id.lower()),
        with_for_update={"read": True, "key_share": True},
    )
    if row is None:
        raise absent()
    return row


async def name_in_file(
    session: AsyncSession, workspace_id: str, content: dashboard_pb2.DashboardContent
) -> None:
    """Puts names in place of the ids of library widgets, as far as they have names."""
    wanted = {widget.library_widget_id for widget in content.widgets} - {""}
    library = await _read(session, workspace_id, wanted) if wanted else {}
    for widget in content.widgets:
        row = library.get(widget.library_widget_id)
        if row is not None and row.name:
            widget.library_widget_name = row.name
            widget.ClearField("library_widget_id")


async def find_from_file(
    session: AsyncSession, workspace_id: str, content: dashboard_pb2.DashboardContent
) -> None:
    """The opposite. Raises NOT_FOUND for a name that is not there; INVALID_ARGUMENT for both a name and an id."""
    wanted = {widget.library_widget_name for widget in content.widgets} - {""}
    if not wanted:
        return
    rows = await session.scalars(
        select(LibraryWidget).where(
            LibraryWidget.workspace_id == workspace_id, LibraryWidget.name.in_(wanted)
        )
    )
    ids = {row.name: row.library_widget_id for row in rows}
    for index, widget in enumerate(content.widgets):
        name, field = widget.library_widget_name, f"content.widgets[{index}].library_widget_name"
        if name and widget.library_widget_id:
            raise errors.invalid_fields(
                [(field, "stands beside library_widget_id: leave one of the two out")]
            )
        if name and name not in ids:
            raise errors.not_found(
                "LIBRARY_WIDGET_NOT_FOUND",
                f"{field}: no library widget of the workspace is called {name!r}.",
                field=field,
                name=name,
            )
        if name:
            widget.library_widget_id = ids[name]
            widget.ClearField("library_widget_name")


async def _read(
    session: AsyncSession, workspace_id: str, library_widget_ids: Iterable[str]
) -> dict[str, LibraryWidget]:
    rows = await session.scalars(
        select(LibraryWidget).where(
            LibraryWidget.workspace_id == workspace_id,
            LibraryWidget.library_widget_id.in_(library_widget_ids),
        )
    )
    return {row.library_widget_id: row for row in rows}
