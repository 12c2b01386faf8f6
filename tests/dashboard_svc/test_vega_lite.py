from __future__ import annotations

from typing import Any

import pytest

from services.dashboard_svc import vega_lite
from services.dashboard_svc.structs import Unfit
from services.dashboard_svc.vega_lite import NAMES, check
from tests.dashboard_svc.custom import SPEC, VEGA_LITE

CHART: dict[str, Any] = {
    "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
    "title": {"text": "a: <b>, 'c'", "subtitle": ["url(x)", "javascript:alert(1)"], "anchor": "start"},
    "width": "container",
    "height": {"step": 20},
    "data": {"name": "rows"},
    "transform": [
        {"filter": {"and": [{"field": "count", "gt": 5}, {"not": {"field": "os", "oneOf": ["", "x'y"]}}]}},
        {"aggregate": [{"op": "sum", "field": "count", "as": "total"}], "groupby": ["properties\\.plan"]},
        {"window": [{"op": "row_number", "as": "rank"}], "sort": [{"field": "total", "order": "descending"}]},
        {"fold": ["count", "total"], "as": ["name", "number"]},
        {"timeUnit": "yearmonthdate", "field": "time", "as": "day"},
        {"stack": "total", "groupby": ["day"], "as": ["from", "to"], "offset": "normalize"},
    ],
    "layer": [
        {
            "mark": {
                "type": "line",
                "point": {"filled": True, "size": 20},
                "strokeDash": [4, 2],
                "font": "Georgia, serif",
            },
            "encoding": {
                "x": {
                    "field": "time",
                    "type": "temporal",
                    "axis": {"format": "%b %d: %H", "labelAngle": -45},
                },
                "y": {
                    "field": "total",
                    "type": "quantitative",
                    "stack": None,
                    "scale": {"domain": [0, 100], "type": "symlog", "nice": True},
                    "axis": {"format": "$,.2f", "formatType": "number", "title": None},
                },
                "color": {
                    "field": "properties\\.plan",
                    "scale": {"domain": ["https://a.example", "b"], "range": ["#fff", "rgb(1, 2, 3)"]},
                    "legend": {"orient": "bottom", "title": "Plan"},
                },
                "opacity": {"condition": {"test": {"field": "total", "lt": 3}, "value": 0.3}, "value": 1},
                "shape": {"value": "M0,-1L1,1L-1,1Z"},
                "order": {"aggregate": "count", "bin": {"maxbins": 20}},
                "tooltip": [{"field": "total", "type": "quantitative", "title": "All"}],
                "text": {"value": "a: <b>"},
            },
        }
    ],
    "resolve": {"scale": {"y": "independent"}},
    "config": {
        "view": {"stroke": None},
        "axisX": {"labelFont": "serif", "gridColor": "grey"},
        "numberFormat": ".2~s",
    },
}


def test_lets_charts_in() -> None:
    check(SPEC)
    check(CHART)


# What runs or fetches something in Vega-Lite, or could, each where it would stand.
CODE: dict[str, dict[str, Any]] = {
    "an expression as a value": {"encoding": {"x": {"value": {"expr": "alert(1)"}}}},
    "an expression as a property": {"mark": {"type": "bar", "opacity": {"expr": "random()"}}},
    "an expression as data": {"width": {"expr": "containerSize()[0]"}},
    "a signal": {"config": {"axis": {"labelColor": {"signal": "'red'"}}}},
    "signals": {"signals": [{"name": "s", "update": "1"}]},
    "parameters": {"params": [{"name": "p", "expr": "1"}]},
    "a bound parameter": {"params": [{"name": "p", "bind": {"input": "range", "element": "#login"}}]},
    "a selection with events": {
        "params": [{"name": "p", "select": {"type": "point", "on": "click[alert(1)]"}}]
    },
    "a selection": {"selection": {"s": {"type": "single"}}},
    "a calculation": {"transform": [{"calculate": "datum.a", "as": "b"}]},
    "a filter as a text": {"transform": [{"filter": "datum.a > 1"}]},
    "a filter in a list": {
        "transform": [{"filter": {"and": ["datum.a > 1", {"field": "b", "valid": True}]}}]
    },
    "a filter that is denied": {"transform": [{"filter": {"not": "datum.a > 1"}}]},
    "a filter in an alternative": {"transform": [{"filter": {"or": [{"not": {"and": ["alert(1)"]}}]}}]},
    "a filter as an option": {"transform": [{"filter": {"$option": "x"}}]},
    "a test as a text": {"encoding": {"color": {"condition": {"test": "datum.a", "value": "red"}}}},
    "a condition on a parameter": {"encoding": {"color": {"condition": {"param": "p", "value": "red"}}}},
    "an expression for labels": {"encoding": {"x": {"field": "a", "axis": {"labelExpr": "datum.label"}}}},
    "a function that writes": {"encoding": {"x": {"field": "a", "axis": {"formatType": "alert"}}}},
    "a function that writes all": {"config": {"numberFormatType": "alert"}},
    "a name that leaves its text": {"encoding": {"x": {"field": "a'] + alert(1) + datum['a"}}},
    "a name with brackets": {"encoding": {"x": {"field": "a[alert(1)]"}}},
    "an unescaped end": {"encoding": {"x": {"field": "a\\"}}},
    "a new name that leaves its text": {"transform": [{"aggregate": [{"op": "count", "as": 'x"]'}]}]},
    "a group that leaves its text": {"transform": [{"window": [], "groupby": ["a", "b'"]}]},
    "an operation that is none": {"transform": [{"aggregate": [{"op": "sum')+alert('1", "as": "x"}]}]},
    "a unit of time that is none": {"encoding": {"x": {"field": "a", "timeUnit": "year'+alert(1)+'"}}},
    "a missing value": {"transform": [{"impute": "a", "key": "b", "method": "value", "value": 0}]},
    "data of an address": {"data": {"url": "https://a.example/x.json"}},
    "data of a page": {"data": {"url": "javascript:alert(1)"}},
    "data of its own": {"data": {"values": [{"a": 1}]}},
    "data without end": {"data": {"sequence": {"start": 0, "stop": 1e12}}},
    "other named data": {"data": {"name": "rows", "url": "x"}},
    "data as an option": {"data": {"$option": "x"}},
    "sets of data": {"datasets": {"rows": []}},
    "a look-up": {"transform": [{"lookup": "a", "from": {"data": {"url": "x"}, "key": "b"}}]},
    "an image": {"mark": "image", "encoding": {"url": {"value": "https://a.example/x.png"}}},
    "a link": {"encoding": {"href": {"value": "javascript:alert(1)"}}},
    "a link of a mark": {"mark": {"type": "bar", "href": "javascript:alert(1)"}},
    "a paint at an address": {"mark": {"type": "bar", "fill": "url(https://a.example/x.svg#y)"}},
    "a paint as a value": {"encoding": {"color": {"value": "URL (https://a.example)"}}},
    "a paint in a scale": {"encoding": {"color": {"scale": {"range": ["red", "url(#x)"]}}}},
    "a background at an address": {"background": "url(//a.example)"},
    "a font with more": {"config": {"axis": {"labelFont": "x; background: url(//a.example)"}}},
    "a pointer at an address": {"mark": {"type": "bar", "cursor": "url(//a.example), auto"}},
    "what embedders read": {"usermeta": {"embedOptions": {"loader": {}}}},
    "a map": {"projection": {"type": "mercator"}},
    "an unknown property": {"onload": "alert(1)"},
    "an unknown one far inside": {"hconcat": [{"layer": [{"mark": {"type": "bar", "onclick": "alert(1)"}}]}]},
}


@pytest.mark.parametrize("name", CODE)
def test_lets_nothing_in_that_runs_or_fetches(name: str) -> None:
    with pytest.raises(Unfit):
        check({"$schema": VEGA_LITE, **CODE[name]})


def test_is_one_of_two_versions() -> None:
    for schema in (None, 5, "", "https://vega.github.io/schema/vega/v5.json", VEGA_LITE.replace("v5", "v4")):
        with pytest.raises(Unfit):
            check({"$schema": schema, "mark": "bar"})
    with pytest.raises(Unfit):
        check({"mark": "bar"})


def test_no_name_that_is_let_in_is_known_to_run_or_fetch() -> None:
    dangerous = {
        *(
            "expr",
            "signal",
            "signals",
            "params",
            "param",
            "selection",
            "select",
            "bind",
            "on",
            "clear",
            "calculate",
        ),
        *(
            "labelExpr",
            "url",
            "href",
            "loader",
            "usermeta",
            "datasets",
            "lookup",
            "from",
            "impute",
            "sequence",
        ),
        *(
            "graticule",
            "sphere",
            "numberFormatType",
            "timeFormatType",
            "cursor",
            "style",
            "customFormatTypes",
        ),
    }
    assert not NAMES & dangerous
    assert not {name for name in NAMES if name.lower().endswith(("expr", "url", "href"))}
    assert vega_lite.ROWS == {"name": "rows"}
