"""What files call dashboards and widgets, those of the library too."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection

from meshboard.dashboard.v1.dashboard_pb2 import DashboardContent, Widget

from services.chassis.db import new_id

_LONGEST = 100


def name_from(title: str, other: str) -> str:
    """A name made of a title: `Top pages (7 d)` is `top-pages-7-d`; `other` when nothing of it is left."""
    plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:_LONGEST].strip("-") or other


def name_widgets(content: DashboardContent) -> None:
    """Gives each widget that lacks a name one that is made of its title, and that no other widget has."""
    taken = {widget.name for widget in content.widgets}
    for widget in content.widgets:
        if not widget.name:
            widget.name = free_name(widget, taken)
            taken.add(widget.name)


def free_name(widget: Widget, taken: Collection[str]) -> str:
    """A name that is made of the widget's title, and that is none of these."""
    name = name_from(widget.title, _kind(widget))
    number, free = 1, name
    while free in taken:
        number += 1
        end = f"-{number}"
        free = name[: _LONGEST - len(end)] + end
    return free


def identify_widgets(theirs: DashboardContent, base: DashboardContent, here: DashboardContent) -> None:
    """Gives the widgets of a file the ids of those that they are.

    A widget is the one that has its name here, else the one that had it in the file before; else the one with its id;
    else the one that has no name, but would be called so. All others are new.
    """
    known = {widget.widget_id for content in (here, base) for widget in content.widgets}
    said = [widget.widget_id.lower() for widget in theirs.widgets]
    found = [""] * len(said)
    for ids in (_ids(here), _ids(_named(base)), None, _ids(_named(here))):
        for index, widget in enumerate(theirs.widgets):
            candidate = said[index] if ids is None else ids.get(widget.name, "")
            if not found[index] and candidate in known and candidate not in found:
                found[index] = candidate
    for widget, widget_id in zip(theirs.widgets, found, strict=True):
        widget.widget_id = widget_id or new_id()


def _named(content: DashboardContent) -> DashboardContent:
    """The content as a file says it."""
    named = DashboardContent()
    named.CopyFrom(content)
    name_widgets(named)
    return named


def _ids(content: DashboardContent) -> dict[str, str]:
    return {widget.name: widget.widget_id for widget in content.widgets if widget.name}


def _kind(widget: Widget) -> str:
    return Widget.Kind.Name(widget.kind).lower().replace("_", "-") if widget.kind else "widget"
