"""A whole content, looked at before it is written: does it fit together, and may the caller ask what it asks?"""

from __future__ import annotations

from meshboard.dashboard.v1.dashboard_pb2 import DashboardContent, Layout, Widget
from sqlalchemy.ext.asyncio import AsyncSession

from services.chassis import errors
from services.dashboard_svc import custom_widgets, kinds, layouts, library
from services.dashboard_svc.contents import FIELDS
from services.dashboard_svc.definitions import clean, questions_of
from services.dashboard_svc.sources import Sources, question_of
from services.dashboard_svc.validation import Validation, check_variables


class ContentChecks:
    """Looks at what a content has that the `present` one of the dashboard does not: the rest is there already."""

    def __init__(self, validation: Validation, sources: Sources) -> None:
        self._validation = validation
        self._sources = sources

    async def check(self, workspace_id: str, content: DashboardContent, present: DashboardContent) -> None:
        """Cleans the content, and fails as `CreateDashboard` and `CreateWidget` would. Not inside a transaction."""
        clean(content, FIELDS, "content.")
        check_names(content)
        places = {widget.widget_id: widget.layout for widget in content.widgets}
        for index, widget in changed_widgets(content, present):
            kinds.check(widget, f"content.widgets[{index}].")
            check_variables(widget, content.variables)
            layouts.check_free(widget.widget_id, widget.layout, places)
        asked = questions_of(present).keys()
        await self._sources.validate(
            query for key, query in questions_of(content).items() if key not in asked
        )
        if asking := _newly_asking(content, present):
            await self._validation.check(workspace_id, asking)


async def hold_uses(
    session: AsyncSession, workspace_id: str, content: DashboardContent, present: DashboardContent
) -> None:
    """Keeps the library widgets and kinds that the content newly has from being deleted meanwhile. Raises NOT_FOUND."""
    known = {widget.library_widget_id for widget in present.widgets}
    wanted = {widget.library_widget_id for widget in content.widgets} - known - {""}
    # In an order that all keep, so that two calls do not wait for each other.
    for library_widget_id in sorted(wanted):
        await library.held(session, workspace_id, library_widget_id)
    known = {widget.custom.widget_kind_id for widget in present.widgets}
    for widget in sorted(content.widgets, key=lambda widget: widget.custom.widget_kind_id):
        await custom_widgets.hold(session, workspace_id, widget, known)


def changed_widgets(content: DashboardContent, present: DashboardContent) -> list[tuple[int, Widget]]:
    """The widgets that are new or otherwise than in the present content, with their places in the list."""
    before = {widget.widget_id: widget for widget in present.widgets}
    return [
        (index, widget)
        for index, widget in enumerate(content.widgets)
        if before.get(widget.widget_id) != widget
    ]


def check_names(content: DashboardContent) -> None:
    """Raises ALREADY_EXISTS when two widgets have one name."""
    names: set[str] = set()
    for widget in content.widgets:
        if widget.name and widget.name in names:
            raise errors.already_exists(
                "WIDGET_NAME_TAKEN", "Another widget of the dashboard has this name.", name=widget.name
            )
        names.add(widget.name)


def settle_layouts(content: DashboardContent) -> set[str]:
    """Gives each widget a place, and says, by their ids, which did not have one: they stand below all others."""
    unplaced = {widget.widget_id for widget in content.widgets if not widget.HasField("layout")}
    places: list[Layout] = []
    for widget in content.widgets:
        if widget.widget_id not in unplaced:
            widget.layout.CopyFrom(layouts.settle(widget.layout))
            places.append(widget.layout)
    for widget in content.widgets:
        if widget.widget_id in unplaced:
            widget.layout.CopyFrom(layouts.below(places))
            places.append(widget.layout)
    return unplaced


def _newly_asking(content: DashboardContent, present: DashboardContent) -> list[Widget]:
    """The widgets that ask what no widget of the present content asks, or show another one of the library."""
    asked = [question_of(widget) for widget in present.widgets]
    shown = {widget.library_widget_id for widget in present.widgets}
    return [
        widget
        for _, widget in changed_widgets(content, present)
        if widget.library_widget_id not in shown | {""}
        or (question_of(widget) is not None and question_of(widget) not in asked)
    ]
