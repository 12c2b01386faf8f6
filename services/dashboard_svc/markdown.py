"""Texts of widgets: Markdown as HTML that can do nothing, and as plain text.

Two walls stand one behind the other: the parser makes no HTML of what looks like HTML, and follows no odd link
(CommonMark with tables, https://spec.commonmark.org); what it has made is sanitised like something that a stranger
sent.
"""

from __future__ import annotations

import html
import re

import nh3
from markdown_it import MarkdownIt

from services.chassis import errors

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
# An image is fetched without a click: never from here, with the viewer's cookies.
_IMAGE_URL = re.compile(r"https?://", re.IGNORECASE)


def to_html(markdown: str) -> str:
    """The text as HTML. Raises INVALID_ARGUMENT when it has more than MAX_HTML characters."""
    tokens = _PARSER.parse(markdown)
    for token in tokens:
        # The parser says how a column is aligned with a style, and styles do not pass.
        if style := token.attrs.pop("style", None):
            token.attrs["align"] = str(style).removeprefix("text-align:")
    made: str = _PARSER.renderer.render(tokens, _PARSER.options, {})
    if len(made) > MAX_HTML:
        raise errors.invalid_fields([("markdown", f"makes more than {MAX_HTML} characters of HTML")])
    return nh3.clean(
        made,
        tags=_TAGS,
        attributes=_ATTRIBUTES,
        attribute_filter=_filter,
        url_schemes=_SCHEMES,
        link_rel="noopener noreferrer nofollow",
    )


def to_text(markup: str) -> str:
    """The text of what `to_html` made."""
    return html.unescape(nh3.clean(markup, tags=set()))


def _filter(tag: str, attribute: str, value: str) -> str | None:
    if (tag, attribute) == ("img", "src") and not _IMAGE_URL.match(value):
        return None
    return value
