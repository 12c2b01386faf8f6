from __future__ import annotations

import re
from urllib.parse import unquote

import html5lib
import pytest

from services.chassis import errors
from services.dashboard_svc.markdown import MAX_HTML, filled, to_html, to_text
from tests.dashboard_svc.hostile import TEXTS

TAGS = {
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
ATTRIBUTES = {"href", "src", "alt", "title", "rel", "start", "align"}


def dangers(markup: str) -> list[str]:
    """What a browser's parser finds in the HTML beyond what a text may have."""
    fragment = html5lib.parseFragment(markup, treebuilder="etree", namespaceHTMLElements=True)
    found = []
    for element in list(fragment.iter())[1:]:
        if not isinstance(element.tag, str):
            found.append(f"comment {element.text}")
            continue
        namespace, _, tag = element.tag.removeprefix("{").partition("}")
        if namespace != "http://www.w3.org/1999/xhtml" or tag not in TAGS:
            found.append(element.tag)
        for name, value in element.attrib.items():
            if name not in ATTRIBUTES:
                found.append(f"{tag} {name}")
            # As browsers read a URL: without spaces in front, tabs and line breaks within, and in any case.
            url = re.sub(r"[\x00-\x20]", "", unquote(value)).lower()
            scheme = re.match(r"([a-z][a-z0-9+.-]*):", url)
            if name in {"href", "src"} and scheme and scheme[1] not in {"http", "https", "mailto"}:
                found.append(f"{name}={value}")
    return found


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_made_can_do_nothing(text: str) -> None:
    for markdown in (
        text,
        f"# {text}",
        f"> {text}",
        f"- a\n\n  {text}",
        f"[{text}](https://a.example)",
        f"**{text}**",
    ):
        assert dangers(to_html(markdown)) == []


def test_there_are_a_hundred_hostile_texts() -> None:
    assert len(set(TEXTS)) >= 100


@pytest.mark.parametrize(
    "markup",
    [
        "<script>alert(1)</script>",
        "<p onclick='x'>x</p>",
        "<a href='java\tscript:alert(1)'>x</a>",
        "<a href='%6aavascript:alert(1)'>x</a>",
        "<img srcset='x'>",
        "<p style='color:red'>x</p>",
        "<svg></svg>",
        "<!-- x -->",
    ],
)
def test_the_check_sees_what_is_dangerous(markup: str) -> None:
    assert dangers(markup)


def test_makes_what_markdown_says() -> None:
    made = to_html(
        "# Title\n\n*a* **b** `c`\n\n1. one\n2. two\n\n|x|y|\n|:-|-:|\n|1|2|\n\n[to](https://a.example/?b=1&c=2) ![alt](https://a.example/p.png)"
    )
    for part in (
        "<h1>Title</h1>",
        "<em>a</em> <strong>b</strong> <code>c</code>",
        "<ol>\n<li>one</li>",
        '<th align="left">x</th>\n<th align="right">y</th>',
        '<a href="https://a.example/?b=1&amp;c=2" rel="noopener noreferrer nofollow">to</a>',
        '<img src="https://a.example/p.png" alt="alt">',
    ):
        assert part in made


def test_html_in_a_text_is_text() -> None:
    assert to_html("<b>x</b>") == "<p>&lt;b&gt;x&lt;/b&gt;</p>\n"
    assert to_text(to_html("# <b>x</b> & *y*")).strip() == "<b>x</b> & y"


def test_no_image_is_fetched_from_here() -> None:
    for url in ("/oauth2/authorize", "//a.example/x", "x.png", "mailto:a@a.example"):
        assert "src" not in to_html(f"![x]({url})")


@pytest.mark.parametrize(
    "markdown",
    [
        "|a" * 100 + "\n" + "|-" * 100 + "\n" + "|\n" * 2_000,
        "[](/)" * 4_000,  # more only with what is added to links
        "[a]: /" + "b" * 5_000 + "\n\n" + "[a]" * 3_000,
    ],
)
def test_a_text_that_makes_very_much_is_refused(markdown: str) -> None:
    with pytest.raises(errors.Error) as refusal:
        to_html(markdown)
    assert refusal.value.reason == "VALIDATION_FAILED"
    assert str(MAX_HTML) in refusal.value.message


def test_values_stand_in_place_of_variables() -> None:
    values = {"land": ["de", "a & b"], "none": [], "a_b": ["x"]}

    def shown(text: str) -> str:
        return filled(to_html(text), values).strip()

    assert shown("# In ${land}") == "<h1>In de, a &amp; b</h1>"
    assert shown("*${a_b}* `${a_b}` [${a_b}](https://a.example)") == (
        '<p><em>x</em> <code>x</code> <a href="https://a.example" rel="noopener noreferrer nofollow">x</a></p>'
    )
    assert shown("nothing: ${none}.") == "<p>nothing: .</p>"
    assert shown("${other} and ${land}") == "<p>${other} and de, a &amp; b</p>"
    assert shown("$${land} costs 5 $$") == "<p>${land} costs 5 $</p>"
    for text in ("", "plain", "${other}", "$land", "{land}"):
        assert shown(text) == ""


@pytest.mark.parametrize("value", TEXTS)
def test_no_value_can_do_anything(value: str) -> None:
    for text in (
        "${x}",
        "# ${x}",
        "[a](https://a.example/${x})",
        "[a](${x})",
        "<${x}>",
        "<https://${x}>",
        "https://a.example/${x}",
        "![${x}](https://a.example/i.png '${x}')",
        "![a](${x})",
        '[a](https://a.example "${x}")',
        "`${x}`",
        "| ${x} |\n|---|\n| ${x} |",
    ):
        html = to_html(text)
        made = filled(html, {"x": [value]})
        assert dangers(made or html) == []
        # It has no more tags than before, and no other URLs.
        urls = re.compile(r'<[a-z0-9]+|href="[^"]*"|src="[^"]*"')
        assert urls.findall(made or html) == urls.findall(html)


def test_what_values_make_is_bounded() -> None:
    html = to_html("${x} " * 4000)
    assert len(filled(html, {"x": ["y" * 10]})) < MAX_HTML
    with pytest.raises(errors.Error) as failure:
        filled(html, {"x": ["y" * 1000] * 100})
    assert failure.value.reason == "VARIABLE_UNFIT"
