"""Texts of widgets: Markdown as HTML that can do nothing, and as plain text.

Two walls stand one behind the other: the parser makes no HTML of what looks like HTML, and follows no odd link
(CommonMark with tables, https://spec.commonmark.org); what it has made is sanitised like something that a stranger
sent.
"""

from __future__ import annotations

import asyncio
import html
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

import nh3
from markdown_it import MarkdownIt

from services.chassis import errors
from services.dashboard_svc.definitions import IN_TEXT

MAX_HTML = 200_000

_PARSER = MarkdownIt("commonmark", {"html": False}).enable("table")
_TAGS = {
    *(
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "p",
        "br",
        "hr",
        "blockquote",
        "pre",
        "code",
        "em",
        "strong",
        "a",
        "img",
    ),
    *("ul", "ol", "li", "table", "thead", "tbody", "tr", "th", "td"),
}
_ATTRIBUTES = {
    "a": {"href", "title"},
    "img": {"src", "alt", "title"},
    "ol": {"start"},
    "td": {"align"},
    "th": {"align"},
}
_SCHEMES = {"http", "https", "mailto"}
_URLS = {
    # An image is fetched without a click: never from here, with the viewer's cookies.
    ("img", "src"): re.compile(r"https?://", re.IGNORECASE),
    # What begins otherwise is a path at best, and a hidden scheme at worst.
    ("a", "href"): re.compile(r"https?://|mailto:|[/#?]", re.IGNORECASE),
}


async def prepare(markdown: str) -> None:
    """Makes the HTML of a text beside the loop, so that `to_html` has it at once. Raises as that does."""
    if markdown:
        await asyncio.to_thread(to_html, markdown)


@lru_cache(maxsize=64)
def to_html(markdown: str) -> str:
    """The text as HTML; odd ones take half a second. Raises INVALID_ARGUMENT beyond MAX_HTML characters."""
    tokens = _PARSER.parse(markdown)
    for token in tokens:
        # The parser says how a column is aligned with a style, and styles do not pass.
        if style := token.attrs.pop("style", None):
            token.attrs["align"] = str(style).removeprefix("text-align:")
    made: str = _PARSER.renderer.render(tokens, _PARSER.options, {})
    if len(made) <= MAX_HTML:  # which costs little to sanitise
        made = nh3.clean(
            made,
            tags=_TAGS,
            attributes=_ATTRIBUTES,
            attribute_filter=_filter,
            url_schemes=_SCHEMES,
            link_rel="noopener noreferrer nofollow",
        )
    if len(made) > MAX_HTML:
        raise errors.invalid_fields([("markdown", f"makes more than {MAX_HTML} characters of HTML")])
    return made


def filled(markup: str, values: Mapping[str, Sequence[str]]) -> str:
    """What `to_html` made, with values in place of variables; "" when it names none of these.

    The parser has spelled `{` otherwise in URLs, so that a value cannot become one. Raises INVALID_ARGUMENT
    (VARIABLE_UNFIT) beyond MAX_HTML characters, before they are put together.
    """
    parts, at, size, replaced = [], 0, len(markup), False
    for found in IN_TEXT.finditer(markup):
        name = found[1]
        if name and name not in values:
            continue
        value = html.escape(", ".join(values[name])) if name else "$"
        size += len(value)
        if size > MAX_HTML:
            raise errors.invalid_argument(
                "VARIABLE_UNFIT",
                f"The text would have more than {MAX_HTML} characters of HTML.",
                variable=name,
            )
        parts += [markup[at : found.start()], value]
        at, replaced = found.end(), True
    return "".join([*parts, markup[at:]]) if replaced else ""


def to_text(markup: str) -> str:
    """The text of what `to_html` made."""
    return html.unescape(nh3.clean(markup, tags=set()))


def _filter(tag: str, attribute: str, value: str) -> str | None:
    url = _URLS.get((tag, attribute))
    return value if url is None or url.match(value) else None
