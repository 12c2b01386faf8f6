"""What a file and people have made of the same content, put together.

Three contents are compared: the `base`, which is what the file said when it was applied last, what stands `here`, and
what the file says now, `theirs`. What only one side has changed is taken; what both have changed, and otherwise, is a
conflict. A place of a conflict is as in `diffs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from google.protobuf.message import Message
from meshboard.dashboard.v1.dashboard_pb2 import DashboardContent, Variable, Widget

from services.dashboard_svc.contents import only

M = TypeVar("M", bound=Message)


@dataclass(slots=True)
class Merge:
    """The content in which the file prevails where there is a conflict, and the places of conflicts."""

    content: DashboardContent
    conflicts: list[str] = field(default_factory=list)


def merge(base: DashboardContent, here: DashboardContent, theirs: DashboardContent) -> Merge:
    """Puts the contents together; widgets are matched by their ids, variables by their names."""
    merged = Merge(DashboardContent())
    for each in DashboardContent.DESCRIPTOR.fields:
        match each.name:
            case "variables":
                variables = _variables(_by_name(base), _by_name(here), _by_name(theirs), merged.conflicts)
                merged.content.variables.extend(variables)
            case "widgets":
                widgets = _widgets(_by_id(base), _by_id(here), _by_id(theirs), merged.conflicts)
                merged.content.widgets.extend(widgets)
            case _:
                _merge_field("", each, (base, here, theirs), merged.content, merged.conflicts)
    return merged


def _by_name(content: DashboardContent) -> dict[str, Variable]:
    return {variable.name: variable for variable in content.variables}


def _by_id(content: DashboardContent) -> dict[str, Widget]:
    return {widget.widget_id: widget for widget in content.widgets}


def _merge_field(
    prefix: str, field_: Any, sides: tuple[M, M, M], merged: Message, conflicts: list[str]
) -> None:
    """Gives `merged` one field. Settings are put together field by field; all else is one thing."""
    base, here, theirs = (only(side, [field_.name]) for side in sides)
    path = f"{prefix}{field_.json_name}"
    if theirs in (here, base):
        merged.MergeFrom(here)
    elif here == base:
        merged.MergeFrom(theirs)
    elif field_.name == "settings":
        into: Any = merged
        of: tuple[Any, ...] = sides
        into.settings.SetInParent()
        one, two, three = (side.settings for side in of)
        _merge_fields(f"{path}.", (one, two, three), into.settings, conflicts)
    else:
        merged.MergeFrom(theirs)
        conflicts.append(path)


def _merge_fields(prefix: str, sides: tuple[M, M, M], merged: Message, conflicts: list[str]) -> None:
    for each in merged.DESCRIPTOR.fields:
        _merge_field(prefix, each, sides, merged, conflicts)


def _widgets(
    base: Mapping[str, Widget],
    here: Mapping[str, Widget],
    theirs: Mapping[str, Widget],
    conflicts: list[str],
) -> list[Widget]:
    found = []
    for widget_id in dict.fromkeys((*here, *theirs)):
        before, mine, yours = base.get(widget_id), here.get(widget_id), theirs.get(widget_id)
        if yours in (mine, before):
            kept = mine
        elif mine == before:
            kept = yours
        elif mine and yours:
            kept = Widget()
            path = f"widgets[{yours.name or mine.name or widget_id}]."
            _merge_fields(path, (before or Widget(), mine, yours), kept, conflicts)
        else:
            kept = yours
            conflicts.append(f"widgets[{(yours or mine or Widget()).name or widget_id}]")
        if kept:
            found.append(kept)
    return sorted(found, key=lambda widget: (widget.layout.y, widget.layout.x, widget.widget_id))


def _variables(
    base: Mapping[str, Variable],
    here: Mapping[str, Variable],
    theirs: Mapping[str, Variable],
    conflicts: list[str],
) -> list[Variable]:
    found = []
    for name in _order(list(base), list(here), list(theirs)):
        before, mine, yours = base.get(name), here.get(name), theirs.get(name)
        if yours in (mine, before):
            kept = mine
        elif mine == before:
            kept = yours
        else:
            kept = yours
            conflicts.append(f"variables[{name}]")
        if kept:
            found.append(kept)
    return found


def _order(base: list[str], here: list[str], theirs: list[str]) -> list[str]:
    """The names of both sides in the order of the file when it has changed that, else in the one here.

    A name that stands on the other side alone comes after the one that it stands after there: variables may look only
    at those before them.
    """
    same = [name for name in base if name in theirs] == [name for name in theirs if name in base]
    order, more = (list(here), theirs) if same else (list(theirs), here)
    for index, name in enumerate(more):
        if name not in order:
            order.insert(order.index(more[index - 1]) + 1 if index else 0, name)
    return order
