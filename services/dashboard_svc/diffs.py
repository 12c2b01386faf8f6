"""What differs between two contents of a dashboard, field by field."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Value
from meshboard.dashboard.v1.dashboard_pb2 import DashboardContent, Variable, Widget
from meshboard.dashboard.v1.version_service_pb2 import Change

from services.dashboard_svc.contents import only


def changes(before: DashboardContent, after: DashboardContent) -> Iterator[Change]:
    """The changes that lead from one content to the other, in the order of the contract."""
    for field in DashboardContent.DESCRIPTOR.fields:
        match field.name:
            case "variables":
                yield from _of_variables(before.variables, after.variables)
            case "widgets":
                yield from _of_widgets(before.widgets, after.widgets)
            case _:
                yield from _of_field("", field, before, after)


def _of_variables(before: Sequence[Variable], after: Sequence[Variable]) -> Iterator[Change]:
    olds = {variable.name: variable for variable in before}
    news = {variable.name: variable for variable in after}
    for name, variable in news.items():
        yield from _of_whole(f"variables[{name}]", olds.get(name), variable)
    for name, variable in olds.items():
        if name not in news:
            yield from _of_whole(f"variables[{name}]", variable, None)
    order = [name for name in olds if name in news], [name for name in news if name in olds]
    if order[0] != order[1]:
        yield _change("variables", *order)


def _of_widgets(before: Sequence[Widget], after: Sequence[Widget]) -> Iterator[Change]:
    olds = {widget.widget_id: widget for widget in before}
    news = {widget.widget_id: widget for widget in after}
    for widget_id, widget in news.items():
        yield from _of_whole(f"widgets[{widget.name or widget_id}]", olds.get(widget_id), widget)
    for widget_id, widget in olds.items():
        if widget_id not in news:
            yield from _of_whole(f"widgets[{widget.name or widget_id}]", widget, None)


def _of_whole(path: str, before: Message | None, after: Message | None) -> Iterator[Change]:
    if before is None or after is None:
        yield _change(path, *(None if each is None else MessageToDict(each) for each in (before, after)))
        return
    for field in before.DESCRIPTOR.fields:
        yield from _of_field(f"{path}.", field, before, after)


def _of_field(prefix: str, field: Any, before: Message, after: Message) -> Iterator[Change]:
    path = f"{prefix}{field.json_name}"
    if _has_fields(field) and before.HasField(field.name) and after.HasField(field.name):
        yield from _of_whole(path, getattr(before, field.name), getattr(after, field.name))
        return
    if getattr(before, field.name) == getattr(after, field.name) and _is_set(before, field) == _is_set(
        after, field
    ):
        return
    yield _change(path, *(_only(each, field) for each in (before, after)))


def _is_set(message: Message, field: Any) -> bool:
    return field.has_presence and message.HasField(field.name)


def _only(message: Message, field: Any) -> Any:
    """One field as JSON has it; None: nothing stands there."""
    if field.has_presence and not message.HasField(field.name):
        return None
    return MessageToDict(only(message, [field.name])).get(field.json_name)


def _has_fields(field: Any) -> bool:
    """Whether it is one message of ours: anything else is compared as a whole."""
    kind = field.message_type
    return kind is not None and not field.is_repeated and kind.full_name.startswith("meshboard.")


def _change(path: str, before: Any, after: Any) -> Change:
    change = Change(path=path)
    if before is not None:
        change.before.CopyFrom(ParseDict(before, Value()))
    if after is not None:
        change.after.CopyFrom(ParseDict(after, Value()))
    return change
