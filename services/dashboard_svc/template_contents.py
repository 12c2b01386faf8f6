"""What dashboards that are made from templates show, in the JSON form of `DashboardContent`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.json_format import ParseDict
from meshboard.dashboard.v1.dashboard_pb2 import DashboardContent

Json = dict[str, Any]

_DAY = 86_400
_WEEK = 7 * _DAY


@dataclass(frozen=True, slots=True)
class Template:
    """`build` makes what a dashboard of a source shows."""

    title: str
    description: str
    build: Callable[[str], Json]

    def content(self, source_id: str) -> DashboardContent:
        """The content of a dashboard of this source."""
        content = self.build(source_id)
        return ParseDict(
            {"title": self.title, "description": self.description, **content}, DashboardContent()
        )


def _widget(name: str, title: str, kind: str, place: tuple[int, int, int, int], **more: Any) -> Json:
    layout = dict(zip(("x", "y", "width", "height"), place, strict=True))
    return {"name": name, "title": title, "kind": kind, "layout": layout, **more}


def _count(alias: str, *filters: Json, **more: Any) -> Json:
    return {"aggregation": "COUNT", "alias": alias, "filters": list(filters), **more}


def _unique(alias: str, of: str) -> Json:
    return {"aggregation": "UNIQUE", "property": of, "alias": alias}


def _where(of: str, operator: str, *values: Any) -> Json:
    return {"property": of, "operator": operator, "values": list(values)}


def _chosen(name: str, of: str) -> Json:
    return _where(of, "EQUAL", f"${name}")


def _values_of(source_id: str, name: str, title: str, of: str, *filters: Json) -> Json:
    """A variable: several of the values that a property has."""
    values = {"sourceId": source_id, "property": of, "filters": list(filters)}
    return {"name": name, "title": title, "multiple": True, "propertyValues": values}


def _web_analytics(source_id: str) -> Json:
    usual = {"lastSeconds": 30 * _DAY}
    # A page that was seen: robots see none.
    seen = [_where("path", "EXISTS"), _where("is_robot", "EQUAL", "false")]
    filters = [
        *seen,
        *(_chosen(name, name) for name in ("host", "path", "country", "device")),
        _chosen("referrer", "referrer_host"),
    ]
    views, visitors = _count("views"), _unique("visitors", "distinct_id")
    visits = _unique("visits", "visit_id")
    per_visit = {"formula": "views / visits", "alias": "views_per_visit"}

    def query(*measures: Json, **more: Any) -> Json:
        asked = {"sourceIds": [source_id], "measures": list(measures), "filters": filters, "timeRange": usual}
        return {"query": {**asked, **more}}

    def number(*measures: Json) -> Json:
        compared = query(*measures, comparison={"period": "PREVIOUS"})
        return {**compared, "display": {"sparkline": True}}

    def by(*of: str, also: tuple[Json, ...] = (), limit: int = 20) -> Json:
        asked = query(visitors, views, breakdowns=[{"property": each} for each in of], limit=limit)
        asked["query"]["filters"] = [*filters, *also]
        return asked

    def hidden(measure: Json) -> Json:
        return {**measure, "hidden": True}

    return {
        "tags": ["web"],
        "settings": {"timeRange": usual},
        "variables": [
            _values_of(source_id, "host", "Host", "host", *seen),
            _values_of(source_id, "path", "Page", "path", *seen, _chosen("host", "host")),
            _values_of(source_id, "referrer", "Came from", "referrer_host", *seen),
            _values_of(source_id, "country", "Country", "country", *seen),
            _values_of(source_id, "device", "Device", "device", *seen),
        ],
        "widgets": [
            _widget(
                "live-visitors",
                "Visitors in the last 5 minutes",
                "NUMBER",
                (0, 0, 4, 4),
                ownTimeRange=True,
                **query(visitors, timeRange={"lastSeconds": 300}),
            ),
            _widget("visitors", "Visitors", "NUMBER", (4, 0, 5, 4), **number(visitors)),
            _widget("visits", "Visits", "NUMBER", (9, 0, 5, 4), **number(visits)),
            _widget("views", "Views", "NUMBER", (14, 0, 5, 4), **number(views)),
            _widget(
                "views-per-visit",
                "Views per visit",
                "NUMBER",
                (19, 0, 5, 4),
                query=query(hidden(views), hidden(visits), per_visit)["query"],
                display={"decimals": 2},
            ),
            _widget(
                "over-time",
                "Visitors and views",
                "TIMESERIES",
                (0, 4, 24, 8),
                **query(visitors, views, granularity="DAY", fillGaps=True),
            ),
            _widget("pages", "Top pages", "TABLE", (0, 12, 12, 10), **by("path")),
            _widget(
                "sources",
                "Where visitors come from",
                "TABLE",
                (12, 12, 12, 10),
                **by("referrer_host", also=(_where("referrer_host", "EXISTS"),)),
            ),
            _widget("countries", "Countries", "BAR", (0, 22, 8, 8), **by("country", limit=10)),
            _widget("devices", "Devices", "PIE", (8, 22, 8, 8), **by("device", limit=10)),
            _widget("browsers", "Browsers", "BAR", (16, 22, 8, 8), **by("browser", limit=10)),
            _widget(
                "campaigns",
                "Campaigns",
                "TABLE",
                (0, 30, 24, 8),
                **by(
                    "utm_source",
                    "utm_medium",
                    "utm_campaign",
                    also=(_where("utm_source", "EXISTS"),),
                    limit=50,
                ),
            ),
        ],
    }


def _product(source_id: str) -> Json:
    usual = {"lastSeconds": 30 * _DAY}
    filters = [_chosen("country", "country"), _chosen("device", "device")]
    users, events = _unique("users", "person_id"), _count("events")
    steps = ("first_step", "second_step", "third_step")

    def query(*measures: Json, **more: Any) -> Json:
        asked = {"sourceIds": [source_id], "measures": list(measures), "filters": filters, "timeRange": usual}
        return {"query": {**asked, **more}}

    def active(days: int) -> Json:
        compared = query(users, timeRange={"lastSeconds": days * _DAY}, comparison={"period": "PREVIOUS"})
        return {**compared, "ownTimeRange": True}

    def step(name: str, title: str) -> Json:
        values = {"sourceId": source_id, "property": "event"}
        return {"name": name, "title": title, "propertyValues": values}

    return {
        "tags": ["product"],
        "settings": {"timeRange": usual},
        "variables": [
            _values_of(source_id, "country", "Country", "country"),
            _values_of(source_id, "device", "Device", "device"),
            *(step(name, f"Step {number} of the funnel") for number, name in enumerate(steps, 1)),
        ],
        "widgets": [
            _widget("daily-users", "Active users, last day", "NUMBER", (0, 0, 6, 4), **active(1)),
            _widget("weekly-users", "Active users, last 7 days", "NUMBER", (6, 0, 6, 4), **active(7)),
            _widget("monthly-users", "Active users, last 30 days", "NUMBER", (12, 0, 6, 4), **active(30)),
            _widget(
                "events-per-user",
                "Events per user",
                "NUMBER",
                (18, 0, 6, 4),
                **query(
                    {**events, "hidden": True},
                    {**users, "hidden": True},
                    {"formula": "events / users", "alias": "events_per_user"},
                ),
                display={"decimals": 1},
            ),
            _widget(
                "users-over-time",
                "Active users per day",
                "TIMESERIES",
                (0, 4, 12, 8),
                **query(users, granularity="DAY", fillGaps=True),
            ),
            _widget(
                "events-over-time",
                "Events per day",
                "STACKED",
                (12, 4, 12, 8),
                **query(events, granularity="DAY", breakdowns=[{"property": "event"}], top=8, others=True),
            ),
            _widget(
                "events",
                "Events by name",
                "TABLE",
                (0, 12, 12, 10),
                **query(events, users, breakdowns=[{"property": "event"}], limit=50),
            ),
            _widget(
                "funnel",
                "Funnel",
                "FUNNEL",
                (12, 12, 12, 10),
                description="Choose its steps above; a step for which none is chosen is any event.",
                funnel={
                    "sourceIds": [source_id],
                    "actor": "PERSON_ID",
                    "filters": filters,
                    "timeRange": usual,
                    "windowSeconds": 14 * _DAY,
                    "steps": [
                        {"title": f"Step {number}", "filters": [_chosen(name, "event")]}
                        for number, name in enumerate(steps, 1)
                    ],
                },
            ),
            _widget(
                "retention",
                "Users who come back, by week",
                "RETENTION",
                (0, 22, 24, 10),
                ownTimeRange=True,
                retention={
                    "sourceIds": [source_id],
                    "actor": "PERSON_ID",
                    "filters": filters,
                    "period": "WEEK",
                    "periodCount": 8,
                    "timeRange": {"lastSeconds": 8 * _WEEK},
                },
            ),
        ],
    }


def _api_traffic(source_id: str) -> Json:
    usual = {"lastSeconds": _DAY}
    filters = [_chosen("host", "host"), _chosen("method", "properties.method"), _chosen("path", "path")]
    requests = _count("requests")
    errors = _count("errors", _where("properties.status", "GREATER_OR_EQUAL", 500), hidden=True)
    rate = {"formula": "errors / requests * 100", "alias": "error_rate"}
    hidden = {**requests, "hidden": True}

    def taking(*percentiles: str) -> list[Json]:
        return [
            {"aggregation": each, "property": "properties.duration", "alias": each.lower()}
            for each in percentiles
        ]

    def query(*measures: Json, **more: Any) -> Json:
        asked = {"sourceIds": [source_id], "measures": list(measures), "filters": filters, "timeRange": usual}
        return {"query": {**asked, **more}}

    hourly = {"granularity": "HOUR", "fillGaps": True}
    by_path: Json = {"breakdowns": [{"property": "path"}], "limit": 20}
    seconds = {"display": {"unit": "SECONDS"}}
    percent = {"unit": "PERCENT", "decimals": 2}
    return {
        "tags": ["api"],
        "settings": {"timeRange": usual},
        "variables": [
            _values_of(source_id, "host", "Host", "host"),
            _values_of(source_id, "method", "Method", "properties.method"),
            _values_of(source_id, "path", "Path", "path", _chosen("host", "host")),
        ],
        "widgets": [
            _widget(
                "requests",
                "Requests",
                "NUMBER",
                (0, 0, 8, 4),
                **query(requests, comparison={"period": "PREVIOUS"}),
                display={"sparkline": True},
            ),
            _widget(
                "error-rate",
                "Error rate",
                "NUMBER",
                (8, 0, 8, 4),
                **query(hidden, errors, rate),
                display={
                    **percent,
                    "thresholds": [
                        {"from": 0, "color": "GOOD"},
                        {"from": 1, "color": "WARNING"},
                        {"from": 5, "color": "BAD"},
                    ],
                },
            ),
            _widget("p95", "Duration, 95 %", "NUMBER", (16, 0, 8, 4), **query(*taking("P95")), **seconds),
            _widget(
                "requests-over-time",
                "Requests by status",
                "STACKED",
                (0, 4, 12, 8),
                **query(
                    requests,
                    granularity="HOUR",
                    breakdowns=[{"property": "properties.status"}],
                    top=8,
                    others=True,
                ),
            ),
            _widget(
                "errors-over-time",
                "Error rate",
                "TIMESERIES",
                (12, 4, 12, 8),
                **query(hidden, errors, rate, **hourly),
                display=percent,
            ),
            _widget(
                "durations",
                "Duration",
                "TIMESERIES",
                (0, 12, 24, 8),
                **query(*taking("P50", "P95", "P99"), **hourly),
                **seconds,
            ),
            _widget(
                "slowest-paths",
                "Slowest paths",
                "TABLE",
                (0, 20, 12, 10),
                **query(*taking("P95", "P50"), requests, **by_path),
                **seconds,
            ),
            _widget(
                "failing-paths",
                "Most failures",
                "TABLE",
                (12, 20, 12, 10),
                **query(
                    {**errors, "hidden": False},
                    requests,
                    rate,
                    **by_path,
                    orderBy=[{"column": "errors", "descending": True}],
                ),
            ),
            _widget(
                "statuses",
                "Status by hour",
                "HEATMAP",
                (0, 30, 24, 8),
                **query(requests, granularity="HOUR", breakdowns=[{"property": "properties.status"}]),
            ),
        ],
    }


# By the names that they are called by, in the order of the list.
TEMPLATES: Mapping[str, Template] = {
    "api-traffic": Template(
        "API traffic",
        "Requests, errors and durations of a server, as its access log has them: `properties.status`,"
        " `properties.method` and `properties.duration`, in seconds.",
        _api_traffic,
    ),
    "product": Template(
        "Product",
        "Who uses a product, how often, what they do, how far they get and whether they come back.",
        _product,
    ),
    "web-analytics": Template(
        "Web analytics",
        "Visitors, visits and views of a site: where they come from, what they read, and with what. An event with a"
        " URL is a view.",
        _web_analytics,
    ),
}
