"""Files of dashboards: what is read, what is refused, what is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.dashboard_files import MAX_BYTES, FileRefused, parse, read, write

WEB = "01a20b98-093b-7000-8000-000000000001"
APP = "01a20b98-093b-7000-8000-000000000002"


def ids(named: Mapping[str, str]) -> Mapping[str, str]:
    """The sources of a workspace that has two."""
    titles = {"The web": WEB, "The app": APP}
    return {name: titles[title] for name, title in named.items()}


def test_reads_plain_data() -> None:
    file = parse(
        """
        name: shop
        folder: [Teams, Web]
        sources: {web: The web}
        content:
          title: no
          description: |
            Two
            lines
          variables:
            - name: host
              defaults: ['012', "2024-01-01"]
              propertyValues: {sourceId: web, property: host}
          widgets:
            - name: orders
              kind: NUMBER
              ownTimeRange: true
              query:
                sourceIds: [web, 01a20b98-093b-7000-8000-000000000002]
                filters: [{property: properties.amount, operator: GREATER, values: [12.5]}]
        """,
        ids,
    )
    assert file["folder"] == ["Teams", "Web"]
    content = file["content"]
    assert content["title"] == "no"
    assert content["description"] == "Two\nlines\n"
    assert content["variables"][0]["defaults"] == ["012", "2024-01-01"]
    assert content["variables"][0]["propertyValues"]["sourceId"] == WEB
    query = content["widgets"][0]["query"]
    assert query["sourceIds"] == [WEB, APP]
    assert query["filters"][0]["values"] == [12.5]


BAD = {
    "nothing": "",
    "a text": "shop",
    "a list": "[]",
    "another key": "name: x\nstatus: {}\n",
    "another key of a widget": "name: x\ncontent: {widgets: [{colour: red}]}\n",
    "another kind of value": "name: x\ncontent: {title: [x]}\n",
    "no such kind": "name: x\ncontent: {widgets: [{kind: DONUT}]}\n",
    "a key twice": "name: x\nname: y\n",
    "a key that is no text": "1: x\n",
    "a key that is a list": "? [x]\n: y\n",
    "an anchor": "name: &x y\n",
    "an alias of itself": "content: &x\n  widgets: [*x]\n",
    "many laughs": "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
    "a merge": "content: {<<: {title: x}}\n",
    "a tag": "name: !!python/object/apply:os.system [id]\n",
    "a tag of YAML": "name: !!binary aGk=\n",
    "two documents": "name: x\n---\nname: y\n",
    "no YAML": "name: [x\n",
    "deep": f"content: {'[' * 5000}{']' * 5000}\n",
    "deep in what can be anything": f"content: {{widgets: [{{custom: {{options: {'{a: ' * 60}x{'}' * 60}}}}}]}}\n",
    "a control character": "name: \x00\n",
    "a number without end": f"content: {{settings: {{refreshSeconds: {'9' * 10_000}}}}}\n",
    "a source that is not named": "content: {widgets: [{query: {sourceIds: [web]}}]}\n",
    "a source that is a number": "content: {widgets: [{query: {sourceIds: [1]}}]}\n",
    "sources that are a list": "sources: [web]\n",
    "sources without titles": "sources: {web: }\n",
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case: str) -> None:
    with pytest.raises(FileRefused):
        parse(BAD[case], ids)


def test_refuses_what_is_huge_or_not_utf_8_or_not_there(tmp_path: Path) -> None:
    huge, broken = tmp_path / "huge.yaml", tmp_path / "broken.yaml"
    huge.write_bytes(b"#" * (MAX_BYTES + 1))
    broken.write_bytes(b"name: \xff\n")
    for path, why in ((huge, "2 MiB"), (broken, "UTF-8"), (tmp_path / "none", "cannot be read")):
        with pytest.raises(FileRefused, match=why):
            read(path, ids)


def test_writes_titles_in_place_of_ids() -> None:
    query = {"sourceIds": [WEB, APP, "01a20b98-093b-7000-8000-000000000003"]}
    file = {"name": "shop", "content": {"title": "Shop", "widgets": [{"name": "x", "query": query}]}}
    text = write(file, {WEB: "Shöp (web)", APP: "shop, web!"})
    assert text == (
        "name: shop\n"
        "sources:\n"
        "  shop-web: Shöp (web)\n"
        "  shop-web-2: shop, web!\n"
        "content:\n"
        "  title: Shop\n"
        "  widgets:\n"
        "  - name: x\n"
        "    query:\n"
        "      sourceIds:\n"
        "      - shop-web\n"
        "      - shop-web-2\n"
        "      - 01a20b98-093b-7000-8000-000000000003\n"
    )


def test_texts_of_several_lines_are_blocks() -> None:
    text = write({"name": "x", "content": {"title": "X", "description": "One\nTwo\n"}}, {})
    assert "  description: |\n    One\n    Two\n" in text


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(
    [
        "no",
        "~",
        "null",
        "1",
        "012",
        "1e3",
        "2024-01-01",
        "=",
        "<<",
        "*a",
        "&a",
        "!x",
        "- x",
        "#",
        "a: b",
        " x ",
        "|",
    ]
)


@settings(deadline=None)
@given(
    title=texts, description=texts, values=st.lists(texts | st.floats(-1e9, 1e9) | st.booleans(), max_size=3)
)
def test_what_is_written_is_read_again(title: str, description: str, values: list[Any]) -> None:
    query = {"sourceIds": [WEB], "filters": [{"property": "x", "values": values}]}
    content = {"title": title, "description": description, "widgets": [{"name": "w", "query": query}]}
    text = write({"name": "x", "content": content}, {WEB: "The web"})
    again = parse(text, ids)["content"]
    assert again.get("title", "") == title
    assert again.get("description", "") == description
    assert again["widgets"][0]["query"]["filters"][0].get("values", []) == values
    assert write({"name": "x", "content": again}, {WEB: "The web"}) == text
