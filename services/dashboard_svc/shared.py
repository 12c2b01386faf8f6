"""What share links show of dashboards: nothing that says whose they are, or where their data comes from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from google.rpc.status_pb2 import Status
from meshboard.analytics.v1.query_pb2 import Filter, TimeRange
from meshboard.dashboard.v1.annotation_pb2 import Annotation
from meshboard.dashboard.v1.dashboard_pb2 import Dashboard, Variable, Widget, WidgetData
from meshboard.dashboard.v1.dashboard_service_pb2 import WatchDashboardResponse
from meshboard.dashboard.v1.share_link_pb2 import (
    LockedVariable,
    SharedAnnotation,
    SharedDashboard,
    SharedVariable,
    SharedWidget,
    ShareLink,
)
from meshboard.dashboard.v1.share_service_pb2 import WatchSharedDashboardResponse

from services.chassis import errors
from services.dashboard_svc.definitions import IN_TEXT
from services.dashboard_svc.scopes import Scope, scope_of

End = WatchDashboardResponse.End
_KINDS = {
    "text": SharedVariable.TEXT,
    "list": SharedVariable.LIST,
    "property_values": SharedVariable.VALUES,
    "time_span": SharedVariable.TIME_SPAN,
}
# What holders of a link are told of the end of their streams; anything else is the end of the link.
_ENDS = {End.DRAINING, End.RENEW}


def shared_dashboard(
    link: ShareLink, dashboard: Dashboard, widgets: Iterable[Widget], bound_too: Iterable[Variable] = ()
) -> SharedDashboard:
    """The dashboard as the link shows it. Variables that are `bound_too` are their defaults."""
    locked = {variable.name: ", ".join(variable.defaults) for variable in bound_too}
    locked |= {variable.name: ", ".join(variable.values) for variable in link.locked_variables}
    return SharedDashboard(
        title=_filled(dashboard.title, locked),
        description=_filled(dashboard.description, locked),
        variables=map(_shared_variable, free_variables(link, dashboard)),
        settings=dashboard.settings if dashboard.HasField("settings") else None,
        widgets=[_shared_widget(widget, locked) for widget in widgets],
        allow_time_range=link.allow_time_range,
        show_annotations=link.show_annotations,
        refresh_seconds=link.refresh_seconds,
    )


def frozen_dashboard(link: ShareLink, dashboard: Dashboard, widgets: Iterable[Widget]) -> SharedDashboard:
    """The dashboard as a snapshot shows it: there is nothing to choose."""
    shared = shared_dashboard(link, dashboard, widgets, dashboard.variables)
    shared.ClearField("variables")
    shared.data_time.CopyFrom(link.snapshot.data_time)
    return shared


def free_variables(link: ShareLink, dashboard: Dashboard) -> list[Variable]:
    """The variables that the link leaves to its viewers."""
    locked = {variable.name for variable in link.locked_variables}
    return [variable for variable in dashboard.variables if variable.name not in locked]


def scope_of_link(
    link: ShareLink, dashboard: Dashboard, choices: Sequence[str], time_range: TimeRange | None
) -> Scope:
    """The scope of a call by a link. Raises INVALID_ARGUMENT: CHOICE_INVALID for what it does not leave to choose."""
    if time_range is not None and not link.allow_time_range:
        raise errors.invalid_argument(
            "CHOICE_INVALID", "The time to look at cannot be chosen.", field="time_range"
        )
    chosen = scope_of(free_variables(link, dashboard), choices, time_range)
    return bound(chosen, link.locked_variables, link.filters)


def bound(scope: Scope, locked: Iterable[LockedVariable], filters: Iterable[Filter]) -> Scope:
    """The scope with what binds its viewers whatever they choose."""
    choices = {**dict(scope.choices), **{variable.name: tuple(variable.values) for variable in locked}}
    return Scope(
        choices=tuple(sorted(choices.items())),
        time_range=scope.time_range,
        filters=tuple(filter_.SerializeToString(deterministic=True) for filter_ in filters),
    )


def shared_data(data: WidgetData) -> WidgetData:
    """The data of a widget, without how far which log was read and why a query failed."""
    shown = WidgetData()
    shown.CopyFrom(data)
    for answer in ("result", "funnel", "retention", "sparkline"):
        if shown.HasField(answer):
            getattr(shown, answer).ClearField("watermark")
            getattr(shown, answer).ClearField("cached")
    if shown.HasField("error"):
        shown.error.CopyFrom(Status(code=shown.error.code, message="There is no data for this widget."))
    return shown


def shared_annotation(annotation: Annotation) -> SharedAnnotation:
    """An annotation, without who made it."""
    return SharedAnnotation(
        time=annotation.time,
        end_time=annotation.end_time if annotation.HasField("end_time") else None,
        text=annotation.text,
        tags=annotation.tags,
        title=annotation.title,
    )


def shared_news(news: WatchDashboardResponse) -> bytes:
    """A message of a stream as links show it, serialized."""
    return _shared_news(news).SerializeToString()


def shared_news_without_annotations(news: WatchDashboardResponse) -> bytes:
    """The same for links that show no annotations."""
    shown = _shared_news(news)
    shown.ClearField("annotations_changed")
    return shown.SerializeToString()


def _shared_news(news: WatchDashboardResponse) -> WatchSharedDashboardResponse:
    if news.HasField("end"):
        reason = news.end.reason if news.end.reason in _ENDS else End.LINK_ENDED
        return WatchSharedDashboardResponse(end=End(reason=reason))
    shown = WatchSharedDashboardResponse(
        cursor=news.cursor,
        changes=map(shared_data, news.changes),
        removed_widget_ids=news.removed_widget_ids,
        annotations_changed=news.annotations_changed,
        heartbeat=news.heartbeat if news.HasField("heartbeat") else None,
    )
    if news.HasField("snapshot"):
        shown.snapshot.widgets.extend(map(shared_data, news.snapshot.widgets))
        shown.snapshot.SetInParent()
    return shown


def _shared_variable(variable: Variable) -> SharedVariable:
    return SharedVariable(
        name=variable.name,
        title=variable.title,
        defaults=variable.defaults,
        multiple=variable.multiple,
        kind=_KINDS[str(variable.WhichOneof("choice"))],
        options=variable.list.options,
    )


def _filled(text: str, locked: Mapping[str, str]) -> str:
    """The text with the values of locked variables in it, which viewers cannot fill in; the others stay for them to."""

    def value(found: re.Match[str]) -> str:
        return locked[found[1]].replace("$", "$$") if found[1] in locked else found[0]

    return IN_TEXT.sub(value, text)


def _shared_widget(widget: Widget, locked: Mapping[str, str]) -> SharedWidget:
    return SharedWidget(
        widget_id=widget.widget_id,
        title=_filled(widget.title, locked),
        description=_filled(widget.description, locked),
        kind=widget.kind,
        layout=widget.layout,
        html=widget.html,
        display=widget.display if widget.HasField("display") else None,
        spec=widget.custom.spec if widget.custom.HasField("spec") else None,
    )
