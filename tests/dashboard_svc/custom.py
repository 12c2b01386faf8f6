"""A kind of widgets as tests of it make and change it."""

from __future__ import annotations

from typing import Any

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.struct_pb2 import Struct
from meshboard.dashboard.v1 import widget_kind_service_pb2 as pb
from meshboard.dashboard.v1.dashboard_pb2 import CustomWidget, Dashboard, Widget
from meshboard.dashboard.v1.widget_kind_pb2 import WidgetKind
from meshboard.dashboard.v1.widget_service_pb2 import CreateWidgetRequest

from tests.dashboard_svc.conftest import Mesh
from tests.harness import Member, new_id

VEGA_LITE = "https://vega.github.io/schema/vega-lite/v5.json"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["source"],
    "additionalProperties": False,
    "properties": {
        "source": {"type": "string"},
        "by": {"type": "string", "default": "browser"},
        "plan": {"type": "string"},
        "title": {"type": "string"},
        "top": {"type": "integer", "minimum": 1, "maximum": 50, "default": 10},
    },
}
QUERY: dict[str, Any] = {
    "sourceIds": [{"$option": "source"}],
    "measures": [{"aggregation": "COUNT"}],
    "breakdowns": [{"property": {"$option": "by"}}],
    "filters": [{"$if": "plan", "property": "properties.plan", "values": [{"$option": "plan"}]}],
    "limit": {"$option": "top"},
}
SPEC: dict[str, Any] = {
    "$schema": VEGA_LITE,
    "data": {"name": "rows"},
    "title": {"$option": "title"},
    "mark": {"type": "bar", "tooltip": True},
    "encoding": {
        "x": {"field": "count", "type": "quantitative"},
        "y": {"field": {"$column": "by"}, "type": "nominal", "sort": "-x"},
    },
}


def struct(json: dict[str, Any]) -> Struct:
    made = Struct()
    made.update(json)
    return made


def kind_request(name: str = "bars", **parts: Any) -> pb.CreateWidgetKindRequest:
    """A request for a kind of bars; `parts` as Python has JSON."""
    given = {"options_schema": SCHEMA, "query_template": QUERY, "spec": SPEC, **parts}
    made = {part: struct(given.pop(part)) for part in ("options_schema", "query_template", "spec")}
    return pb.CreateWidgetKindRequest(**{"name": name, "title": "Bars", **made, **given})


async def make_kind(mesh: Mesh, member: Member, name: str = "bars", **parts: Any) -> WidgetKind:
    """A new kind."""
    response = await mesh.kinds.CreateWidgetKind(kind_request(name, **parts), metadata=member.metadata)
    kind: WidgetKind = response.widget_kind
    return kind


async def change_kind(
    mesh: Mesh, member: Member, kind: WidgetKind, etag: str = "", **parts: Any
) -> WidgetKind:
    """The kind with these parts."""
    fields: dict[str, Any] = {
        key: struct(part) if isinstance(part, dict) else part for key, part in parts.items()
    }
    request = pb.UpdateWidgetKindRequest(
        widget_kind=WidgetKind(widget_kind_id=kind.widget_kind_id, etag=etag, **fields),
        update_mask=FieldMask(paths=fields),
    )
    changed: WidgetKind = (await mesh.kinds.UpdateWidgetKind(request, metadata=member.metadata)).widget_kind
    return changed


def custom(kind: WidgetKind, version: int = 0, **options: Any) -> CustomWidget:
    """What a widget of the kind shows; by default of a source of its own."""
    return CustomWidget(
        widget_kind_id=kind.widget_kind_id, version=version, options=struct({"source": new_id(), **options})
    )


async def place(
    mesh: Mesh, member: Member, dashboard: Dashboard, kind: WidgetKind, version: int = 0, **options: Any
) -> Widget:
    """A new widget of the kind."""
    request = CreateWidgetRequest(
        dashboard_id=dashboard.dashboard_id, kind=Widget.CUSTOM, custom=custom(kind, version, **options)
    )
    widget: Widget = (await mesh.widgets.CreateWidget(request, metadata=member.metadata)).widget
    return widget
