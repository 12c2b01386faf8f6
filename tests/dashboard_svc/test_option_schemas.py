from __future__ import annotations

import socket
from typing import Any

import pytest
from google.protobuf.struct_pb2 import ListValue, Struct, Value

from services.dashboard_svc import option_schemas
from services.dashboard_svc.option_schemas import MAX_LOOKS, OptionSchema
from services.dashboard_svc.structs import MAX_DEPTH, MAX_VALUES, Unfit, json_of, struct_of


def schema_of(properties: dict[str, Any], **more: Any) -> OptionSchema:
    return OptionSchema({"type": "object", "properties": properties, **more})


def refusal(schema: OptionSchema, options: dict[str, Any]) -> str:
    """Why options do not fit; "" when they do."""
    try:
        schema.check(options)
    except Unfit as problem:
        return str(problem)
    return ""


def test_says_what_is_wrong_with_options_and_where() -> None:
    schema = schema_of(
        {
            "source": {"type": "string", "minLength": 1},
            "limits": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
            "window": {"$ref": "#/$defs/window"},
        },
        required=["source"],
        additionalProperties=False,
        **{
            "$defs": {
                "window": {"type": "object", "properties": {"days": {"type": "integer", "maximum": 90}}}
            }
        },
    )
    assert refusal(schema, {"source": "x", "limits": [1, 2.0], "window": {"days": 7}}) == ""
    assert refusal(schema, {}) == 'options: "source" is a required property'
    assert refusal(schema, {"source": "x", "limits": [1, "two"]}).startswith("options.limits[1]: ")
    assert refusal(schema, {"source": "x", "window": {"days": 91}}).startswith("options.window.days: ")
    assert "evil" in refusal(schema, {"source": "x", "evil": 1})
    assert len(refusal(schema, {"source": "x", "limits": "y" * 100_000})) < 600


def test_knows_what_it_declares() -> None:
    schema = schema_of(
        {
            "by": {"$ref": "#/$defs/column", "default": "browser"},
            "window": {"type": "object", "properties": {"days": {"type": ["integer", "null"], "default": 7}}},
            "plans": {"type": "array", "items": {"$ref": "#/$defs/column"}},
            "anything": {},
            "shapes": {"type": "array", "items": {"type": "object"}},
        },
        **{"$defs": {"column": {"type": "string", "default": "os"}}},
    )
    assert (schema.default("by"), schema.default("window.days")) == ("browser", 7)
    assert schema.declared("by.more") is None
    assert schema.declared("absent") is None
    typed = {}
    for path in ("by", "window", "window.days", "plans", "anything", "shapes"):
        declared = schema.declared(path)
        assert declared is not None
        typed[path] = schema.is_typed(declared)
    assert typed == {
        "by": True,
        "window": False,
        "window.days": True,
        "plans": True,
        "anything": False,
        "shapes": False,
    }


def bombs() -> dict[str, dict[str, Any]]:
    """Schemas that a validator would not come to an end with, or only late, or that would have it fetch something."""
    doubling = {f"a{n}": {"anyOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(40)}
    doubled = {**doubling, "a40": {"type": "string"}}
    deep: dict[str, Any] = {}
    for _ in range(40):
        deep = {"items": deep}
    return {
        "itself": {"$defs": {"a": {"$ref": "#/$defs/a"}}},
        "each other": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"allOf": [{"$ref": "#/$defs/a"}]}}},
        "a tree": {"$defs": {"a": {"properties": {"child": {"$ref": "#/$defs/a"}}}}},
        "the root": {"properties": {"child": {"$ref": "#"}}},
        "doubling": {"$defs": doubled, "properties": {"x": {"$ref": "#/$defs/a0"}}},
        "doubling by name": {
            "$defs": {
                **{
                    f"a{n}": {"properties": {key: {"$ref": f"#/$defs/a{n + 1}"} for key in "xy"}}
                    for n in range(40)
                },
                "a40": {},
            }
        },
        "wide": {"properties": {f"p{n}": {} for n in range(1000)}},
        "deep": {"properties": {"x": deep}},
        "a dynamic reference": {"$dynamicAnchor": "a", "properties": {"x": {"$dynamicRef": "#a"}}},
        "an anchor": {"$defs": {"a": {"$anchor": "b"}}},
        "an id": {"$id": "https://a.example/schema"},
        "a vocabulary": {"$vocabulary": {}},
        "another place": {"properties": {"x": {"$ref": "https://a.example/schema"}}},
        "a file": {"properties": {"x": {"$ref": "file:///etc/passwd"}}},
        "a pointer elsewhere": {"properties": {"x": {"$ref": "#/properties/y"}, "y": {}}},
        "a reference that is none": {"properties": {"x": {"$ref": 5}}},
        "what was not evaluated": {"unevaluatedProperties": False},
        "backtracking": {"properties": {"x": {"pattern": r"^(a+)+\1$"}}},
        "looking ahead": {"properties": {"x": {"pattern": "^(?=.*a)b"}}},
        "a pattern of patterns": {"properties": {"x": {"pattern": "((a{500}){500}){500}"}}},
        "a long pattern": {"properties": {"x": {"pattern": "a" * 201}}},
        "a long pattern as a name": {"patternProperties": {"a" * 201: {}}},
        "many patterns": {"patternProperties": {f"a{n}": {} for n in range(51)}},
        "a list for a schema": {"properties": {"x": []}},
        "a schema in a list": {"allOf": [5]},
        "an unknown keyword": {"evaluate": "process.exit()"},
    }


@pytest.mark.parametrize("name", bombs())
def test_lets_no_bomb_in(name: str) -> None:
    with pytest.raises(Unfit):
        OptionSchema({"type": "object", **bombs()[name]})


def test_fetches_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/schema"
        with pytest.raises(Unfit):
            schema_of({"x": {"$ref": url}})
        # Where a reference is none but data, it is let in, and stays data.
        schema = schema_of({"x": {"enum": [{"$ref": url}], "default": {"$ref": url}, "$comment": url}})
        assert refusal(schema, {"x": {"$ref": url}}) == ""
        assert refusal(schema, {"x": 1}) != ""
        with pytest.raises(TimeoutError):
            server.accept()


def test_patterns_take_linear_time() -> None:
    schema = schema_of({"x": {"type": "string", "pattern": "^(a+)+$"}, "y": {"pattern": "(.*)*(.*)*b"}})
    assert refusal(schema, {"x": "a" * 30_000 + "!"}) != ""
    assert refusal(schema, {"x": "a" * 30_000, "y": "b" + "a" * 30_000}) == ""
    assert refusal(schema, {"y": "c" * 30_000}) != ""


def test_the_costliest_schema_is_bounded_by_the_values() -> None:
    parts = [{"contains": {"const": n}} for n in range(300)]
    schema = schema_of(
        {"x": {"type": "array", "items": {"anyOf": [{"enum": [n]} for n in range(300)]}, "allOf": parts}}
    )
    values = [-1.5] * (MAX_LOOKS // 903 - 2)
    assert "anyOf" in refusal(schema, {"x": values})
    assert "more than 110 values" in refusal(schema, {"x": [*values, 1]})
    unique = schema_of({"x": {"uniqueItems": True}})
    assert refusal(unique, {"x": [{"a": n} for n in range(MAX_VALUES // 2)]}) == ""


def nested(depth: int) -> Struct:
    value = Value(string_value="x")
    for _ in range(depth):
        value = Value(list_value=ListValue(values=[value]))
    return Struct(fields={"x": value})


def test_structs_are_bounded() -> None:
    assert json_of(struct_of({"a": [1.0, 2.5, None, True, "x"], "b": {}}), 100) == {
        "a": [1, 2.5, None, True, "x"],
        "b": {},
    }
    assert json_of(nested(MAX_DEPTH - 1), 1000)
    for struct in (
        nested(MAX_DEPTH),
        struct_of({"a": "x" * 100}),
        Struct(fields={"x": Value(list_value=ListValue(values=[Value()] * MAX_VALUES))}),
        struct_of({"a": float("nan")}),
        struct_of({"a": float("inf")}),
    ):
        with pytest.raises(Unfit):
            json_of(struct, 100 if len(struct.fields["a"].string_value) else 100_000)


def test_the_bounds_are_where_they_are_said_to_be() -> None:
    schema_of({f"p{n}": {} for n in range(option_schemas.MAX_SCHEMAS - 1)})
    schema_of({"x": {"pattern": "a" * option_schemas.MAX_PATTERN}})
    OptionSchema(
        {"type": "object", "patternProperties": {f"a{n}": {} for n in range(option_schemas.MAX_PATTERNS)}}
    )
