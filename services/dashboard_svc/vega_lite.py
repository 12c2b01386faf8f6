"""Which Vega-Lite is let in (https://vega.github.io/vega-lite/docs/spec.html): what can neither run nor fetch anything.

In Vega-Lite some texts are expressions, a language of its own that pages compile; others are addresses that are
loaded. Which these are is a long list, and it grows. So it is not those that are refused: properties that are known to
hold no expression and no address are let in, and a text where it is no more than a text.
"""

from __future__ import annotations

import re
from typing import Any

from services.dashboard_svc.placeholders import IF, placeholder
from services.dashboard_svc.structs import Unfit, place_of

Json = Any
Path = tuple[str | int, ...]

SCHEMAS = [f"https://vega.github.io/schema/vega-lite/v{version}.json" for version in (5, 6)]
# The name of the rows of the result.
ROWS = {"name": "rows"}

_VIEWS = """
    title subtitle description width height padding autosize background data transform mark encoding layer facet
    row column columns hconcat vconcat concat spec spacing align bounds center resolve config view type contains
    resize
"""
_MARKS = """
    tooltip content clip color fill stroke opacity fillOpacity strokeOpacity strokeWidth strokeDash
    strokeDashOffset strokeCap strokeJoin strokeMiterLimit filled point line area bar arc rect rule text tick
    trail circle square boxplot errorbar errorband interpolate tension orient size shape cornerRadius
    cornerRadiusEnd cornerRadiusTopLeft cornerRadiusTopRight cornerRadiusBottomLeft cornerRadiusBottomRight
    innerRadius outerRadius padAngle radius radius2 radiusOffset theta theta2 thetaOffset angle baseline dx dy x
    y x2 y2 xOffset yOffset font fontSize fontStyle fontWeight limit lineHeight lineBreak ellipsis thickness
    bandSize binSpacing minBandSize continuousBandSize discreteBandSize extent box median ticks outliers borders
    band invalid order blend aspect gradient stops offset x1 y1 r1 r2 step startAngle endAngle
"""
_CHANNELS = """
    field aggregate argmin argmax bin timeUnit value datum bandPosition stack sort scale axis legend header
    format formatType condition detail key op maxbins base divide nice minstep steps anchor binned unit utc
    xError yError xError2 yError2
"""
_SCALES = """
    domain range scheme zero reverse round clamp exponent constant paddingInner paddingOuter domainMin domainMax
    domainMid rangeMin rangeMax count bins independent shared
"""
_GUIDES = """
    grid labels values tickCount tickMinStep tickSize tickColor tickWidth tickOffset tickOpacity tickRound
    tickExtra tickBand tickDash tickCap labelAngle labelAlign labelBaseline labelBound labelColor labelFlush
    labelFlushOffset labelFont labelFontSize labelFontStyle labelFontWeight labelLimit labelLineHeight
    labelOffset labelOpacity labelOrient labelOverlap labelPadding labelSeparation labelAnchor titleX titleY
    titleAlign titleAnchor titleAngle titleBaseline titleColor titleFont titleFontSize titleFontStyle
    titleFontWeight titleLimit titleLineHeight titleOpacity titleOrient titlePadding gridColor gridDash
    gridDashOffset gridOpacity gridWidth gridCap domainColor domainWidth domainOpacity domainDash
    domainDashOffset domainCap position minExtent maxExtent zindex translate interval direction columnPadding
    rowPadding gridAlign symbolType symbolSize symbolFillColor symbolStrokeColor symbolStrokeWidth symbolOpacity
    symbolLimit symbolOffset symbolDash gradientLength gradientThickness gradientOpacity gradientStrokeColor
    gradientStrokeWidth legendX legendY fillColor strokeColor clipHeight frame subtitleColor subtitleFont
    subtitleFontSize subtitleFontStyle subtitleFontWeight subtitleLineHeight subtitlePadding
"""
_CONFIG = """
    axisX axisY axisTop axisBottom axisLeft axisRight axisBand axisDiscrete axisPoint axisQuantitative
    axisTemporal numberFormat timeFormat countTitle fieldTitle category diverging heatmap ordinal ramp symbol
    continuousWidth continuousHeight discreteWidth discreteHeight bandPaddingInner bandPaddingOuter
    barBandPaddingInner pointPadding continuousPadding minOpacity maxOpacity minSize maxSize minStrokeWidth
    maxStrokeWidth minFontSize maxFontSize
"""
_TRANSFORMS = """
    filter test groupby as fold flatten window joinaggregate ignorePeers pivot
"""
_PREDICATES = """
    equal lt lte gt gte oneOf valid and or not
"""
NAMES = frozenset(
    " ".join((_VIEWS, _MARKS, _CHANNELS, _SCALES, _GUIDES, _CONFIG, _TRANSFORMS, _PREDICATES)).split()
)
# Where a text would be an expression, and an object is a condition on a field.
_CONDITIONS = {"filter", "test", "and", "or", "not"}
# Where a text names a column.
_COLUMNS = {"field", "as", "groupby", "fold", "flatten", "pivot", "stack", "argmin", "argmax"}
_COLUMN = re.compile(r"(?:[^\\.\[\]'\"]|\\[\\.\[\]'\"]){1,512}")
# Where a text is shown, compared with, or says how a number or a time is written: any text. So is a `value` in `_SAID`.
_TEXTS = {
    *(
        "title",
        "subtitle",
        "text",
        "description",
        "datum",
        "values",
        "domain",
        "sort",
        "equal",
        "oneOf",
        "lt",
        "lte",
    ),
    *("gt", "gte", "format", "numberFormat", "timeFormat", "countTitle", "ellipsis", "lineBreak"),
}
_SAID = {"text", "tooltip", "description"}
# All other texts are words of the language, colours, fonts or shapes: never an address.
_WORD = re.compile(r"(?!.*url\s*\()[A-Za-z0-9 _#%.,()+-]{0,1000}", re.IGNORECASE)
# A way of its own to write a value would be a function that is called by this name.
_WAYS = {"number", "time"}


def check(spec: dict[str, Json]) -> None:
    """Raises Unfit for a spec, or the template of one, that holds anything that is not let in."""
    if spec.get("$schema") not in SCHEMAS:
        raise Unfit(f"$schema: is neither {' nor '.join(SCHEMAS)}")
    _check({name: value for name, value in spec.items() if name != "$schema"}, ())


def _check(value: Json, path: Path) -> None:
    if isinstance(value, dict) and not placeholder(value):
        for name, each in value.items():
            _check_property(name, each, (*path, name))
    elif isinstance(value, list):
        for index, each in enumerate(value):
            _check(each, (*path, index))
    elif isinstance(value, str):
        _check_text(value, path)


def _check_property(name: str, value: Json, path: Path) -> None:
    if name == IF:  # in a template: nothing that is made of one has it
        return
    if name not in NAMES:
        raise Unfit(f"{place_of(path)}: is not a property that is let in")
    if name == "data":
        if value != ROWS:
            raise Unfit(f'{place_of(path)}: the only data are {{"name": "rows"}}, the rows of the result')
        return
    if name in _CONDITIONS and not all(map(_is_condition, value if isinstance(value, list) else [value])):
        raise Unfit(f"{place_of(path)}: a text would be an expression here; an object can say the condition")
    _check(value, path)


def _is_condition(value: Json) -> bool:
    return isinstance(value, dict) and not placeholder(value)


def _check_text(text: str, path: Path) -> None:
    names = [step for step in path if isinstance(step, str)]
    name = names[-1] if names else ""
    if name in _COLUMNS:
        if not _COLUMN.fullmatch(text):
            raise Unfit(f"{place_of(path)}: dots, brackets and quotes in a name have a backslash before them")
    elif name == "formatType":
        if text not in _WAYS:
            raise Unfit(f"{place_of(path)}: is neither number nor time")
    elif name in _TEXTS or (name == "value" and _SAID.intersection(names)):
        return
    elif not _WORD.fullmatch(text):
        raise Unfit(f"{place_of(path)}: is no word of Vega-Lite, colour, font or shape")
