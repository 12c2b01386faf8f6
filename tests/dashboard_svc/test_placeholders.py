from __future__ import annotations

from typing import Any

import pytest

from services.dashboard_svc import placeholders
from services.dashboard_svc.option_schemas import OptionSchema
from services.dashboard_svc.placeholders import MAX_BYTES, check, emptied, filled
from services.dashboard_svc.structs import Unfit

SCHEMA = OptionSchema(
    {
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "number": {"type": "number", "default": 5},
            "flag": {"type": "boolean"},
            "list": {"type": "array", "items": {"type": "string"}},
            "inner": {"type": "object", "properties": {"days": {"type": "integer"}}},
            "any": {},
        },
    }
)


def option(path: str) -> dict[str, str]:
    return {"$option": path}


def test_puts_options_in_their_places() -> None:
    template = {
        "a": option("text"),
        "b": [option("flag"), option("text"), 1],
        "c": {"d": option("inner.days"), "e": option("number")},
        "f": option("list"),
        "g": {"$column": "text"},
    }
    options = {"text": "x.y[0]'\"\\", "flag": False, "list": ["p", "q"], "inner": {"days": 0}}
    assert filled(template, options, SCHEMA) == {
        "a": "x.y[0]'\"\\",
        "b": [False, "x.y[0]'\"\\", 1],
        "c": {"d": 0, "e": 5},
        "f": ["p", "q"],
        "g": "x\\.y\\[0\\]\\'\\\"\\\\",
    }


def test_leaves_out_what_is_not_given() -> None:
    template = {
        "a": option("text"),
        "b": [option("text"), {"c": option("text")}],
        "d": [{"$if": "text", "e": 1}, {"$if": "number", "e": 2}],
        "f": {"$if": "inner.days", "g": 1},
    }
    assert filled(template, {}, SCHEMA) == {"b": [{}], "d": [{"e": 2}]}
    assert filled(template, {"text": "", "inner": {"days": 0}}, SCHEMA) == {
        "a": "",
        "b": ["", {"c": ""}],
        "d": [{"e": 1}, {"e": 2}],
        "f": {"g": 1},
    }
    assert filled({"a": option("text")}, {"text": None}, SCHEMA) == {}
    assert emptied(template) == {"a": None, "b": [{"c": None}], "d": [{"e": 1}, {"e": 2}], "f": {"g": 1}}


def test_what_stands_in_options_is_no_template() -> None:
    for text in ('{"$option": "number"}', "$option", "${number}", "$number"):
        assert filled({"a": option("text")}, {"text": text}, SCHEMA) == {"a": text}


@pytest.mark.parametrize(
    "template",
    [
        {"a": option("absent")},
        {"a": option("inner")},
        {"a": option("any")},
        {"a": option("text.more")},
        {"a": option("")},
        {"a": {"$option": 5}},
        {"a": {"$option": None}},
        {"a": {"$option": "text", "b": 1}},
        {"a": {"$option": "text", "$column": "text"}},
        {"a": {"$option": {"$option": "text"}}},
        {"a": [{"b": {"$column": "number"}}]},
        {"a": {"$column": "list"}},
        {"a": {"$if": "absent", "b": 1}},
        {"a": {"$if": ["text"], "b": 1}},
        {"$option": "text"},
        {"$column": "text"},
        {"$if": "text", "a": 1},
    ],
    ids=str,
)
def test_refuses_places_for_what_is_not_declared(template: dict[str, Any]) -> None:
    with pytest.raises(Unfit):
        check(template, SCHEMA, columns=True)


def test_places_for_columns_are_in_specs_alone() -> None:
    template = {"a": {"$column": "text"}}
    check(template, SCHEMA, columns=True)
    with pytest.raises(Unfit):
        check(template, SCHEMA, columns=False)


def test_no_option_brings_a_field() -> None:
    schema = OptionSchema(
        {
            "type": "object",
            "properties": {
                "list": {"type": "array", "items": {"type": "string"}, "prefixItems": [{}]},
                "default": {"type": "string", "default": {"expr": "alert(1)"}},
            },
        }
    )
    for path, options in (
        ("list", {"list": [{"expr": "alert(1)"}]}),
        ("default", {}),
        ("list", {"list": [["x"]]}),
    ):
        check({"a": option(path)}, schema, columns=True)
        schema.check(options)
        with pytest.raises(Unfit):
            filled({"a": option(path)}, options, schema)


def test_an_option_in_many_places_does_not_grow_without_bound() -> None:
    size = 30_000
    template = {"a": [option("text")] * (MAX_BYTES // size)}
    assert len(filled(template, {"text": "x" * size}, SCHEMA)["a"]) == 2
    with pytest.raises(Unfit):
        filled({"a": [option("text")] * 1000}, {"text": "x" * size}, SCHEMA)
    assert placeholders.filled({"a": [option("text")] * 1000}, {}, SCHEMA) == {"a": []}
