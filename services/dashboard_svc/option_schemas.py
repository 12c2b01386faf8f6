"""JSON Schemas of the options of widgets: which are let in, and what they say of options.

A schema comes from an administrator of a workspace, options from its editors, and both are judged in a process that
others use too. So what a schema may hold is listed, nothing in it is fetched, and with its references followed it is a
small tree: no part of it is looked at more often than there are values. Patterns are matched by an engine that is
linear in the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jsonschema_rs

from services.dashboard_svc.structs import Unfit, count_of, place_of

Schema = dict[str, Any]
Path = tuple[str | int, ...]

DRAFT = "https://json-schema.org/draft/2020-12/schema"
MAX_SCHEMAS = 1000
# How often a part of a schema is held against a value, at most: an odd one takes two microseconds.
MAX_LOOKS = 100_000
MAX_DEPTH = 16
MAX_PATTERNS = 50
MAX_PATTERN = 200
# Of a compiled pattern, in bytes.
_PATTERN_SIZE = 64 << 10

# What holds a schema, a list of schemas, and schemas by a name.
_ONE = {"additionalProperties", "propertyNames", "items", "contains", "not", "if", "then", "else"}
_LIST = {"prefixItems", "allOf", "anyOf", "oneOf"}
_NAMED = {"properties", "patternProperties", "dependentSchemas", "$defs"}
_PLAIN = {
    *("$schema", "$ref", "$comment", "title", "description", "default", "examples", "deprecated", "readOnly"),
    *("writeOnly", "format", "type", "enum", "const", "multipleOf", "maximum", "exclusiveMaximum", "minimum"),
    *("exclusiveMinimum", "maxLength", "minLength", "pattern", "maxItems", "minItems", "uniqueItems"),
    *("maxContains", "minContains", "maxProperties", "minProperties", "required", "dependentRequired"),
}
_SCALARS = {"string", "number", "integer", "boolean", "null"}
_DEFINITIONS = "#/$defs/"


class OptionSchema:
    """A schema that is let in. Raises Unfit for any other."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        if schema.get("$schema", DRAFT) != DRAFT:
            raise Unfit(f"$schema: is not {DRAFT}")
        if schema.get("type") != "object":
            raise Unfit("type: is not 'object'")
        tree = _Tree(schema)
        self._most_values = MAX_LOOKS // tree.count
        patterns = tree.patterns
        if len(patterns) > MAX_PATTERNS or any(len(pattern) > MAX_PATTERN for pattern in patterns):
            raise Unfit(
                f"has more than {MAX_PATTERNS} patterns, or one of more than {MAX_PATTERN} characters"
            )
        try:
            self._validator = jsonschema_rs.Draft202012Validator(
                schema,
                pattern_options=jsonschema_rs.RegexOptions(size_limit=_PATTERN_SIZE),
                validate_formats=False,
                retriever=_fetch_nothing,
            )
        except jsonschema_rs.ValidationError as error:
            raise Unfit(f"{place_of(tuple(error.instance_path))}: {error.message}") from None

    def check(self, options: dict[str, Any]) -> None:
        """Raises Unfit when the options are not as the schema says, or too many values for it."""
        if count_of(options) > self._most_values:
            raise Unfit(
                f"options: have more than {self._most_values} values, which is what the schema is judged with"
            )
        try:
            self._validator.validate(options)
        except jsonschema_rs.ValidationError as error:
            place = place_of(("options", *error.instance_path))
            raise Unfit(f"{place}: {error.message}") from None

    def default(self, path: str) -> Any:
        """What stands for an option that is not given; None: nothing."""
        declared = self.declared(path)
        return None if declared is None else declared.get("default")

    def declared(self, path: str) -> Schema | None:
        """What the schema says of an option, by its names from the outside in; None: nothing."""
        found: Any = self._schema
        for name in path.split("."):
            properties = self._followed(found).get("properties", {})
            if name not in properties:
                return None
            found = properties[name]
        return self._followed(found)

    def is_typed(self, schema: Schema) -> bool:
        """Whether it says that a value is a text, a number, true or false, or a list of these."""
        types = _types(schema)
        if types == {"array"}:
            items = schema.get("items")
            return (
                isinstance(items, dict)
                and bool(_types(self._followed(items)))
                and (_types(self._followed(items)) <= _SCALARS)
            )
        return bool(types) and types <= _SCALARS

    def _followed(self, schema: Any) -> Schema:
        """The schema that a reference stands for; what stands beside the reference goes before."""
        found: Schema = schema if isinstance(schema, dict) else {}
        if "$ref" not in found:
            return found
        beside = {keyword: value for keyword, value in found.items() if keyword != "$ref"}
        return {**self._followed(_target(self._schema, found["$ref"], ())), **beside}


class _Tree:
    """Walks a schema with its references followed, and counts. Raises Unfit for what is not let in."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self.count = 0
        self.patterns = list(self._walk(root, (), ()))

    def _walk(self, schema: Any, path: Path, references: tuple[str, ...]) -> Iterator[str]:
        self.count += 1
        if self.count > MAX_SCHEMAS:
            raise Unfit(f"has more than {MAX_SCHEMAS} schemas, when its references are followed")
        if isinstance(schema, bool):
            return
        if not isinstance(schema, dict):
            raise Unfit(f"{place_of(path)}: is no schema")
        if len(path) > 2 * MAX_DEPTH:
            raise Unfit(f"{place_of(path)}: is more than {MAX_DEPTH} schemas deep")
        if isinstance(pattern := schema.get("pattern"), str):
            yield pattern
        for keyword, value in schema.items():
            yield from self._walk_keyword(keyword, value, path, references)

    def _walk_keyword(
        self, keyword: str, value: Any, path: Path, references: tuple[str, ...]
    ) -> Iterator[str]:
        at = (*path, keyword)
        if keyword == "$ref":
            if value in references:
                raise Unfit(f"{place_of(at)}: leads into itself")
            yield from self._walk(_target(self._root, value, at), at, (*references, value))
        elif keyword in _ONE:
            yield from self._walk(value, at, references)
        elif keyword in _LIST and isinstance(value, list):
            for index, each in enumerate(value):
                yield from self._walk(each, (*at, index), references)
        elif keyword in _NAMED and isinstance(value, dict):
            if keyword == "patternProperties":
                yield from value
            for name, each in value.items():
                yield from self._walk(each, (*at, name), references)
        elif keyword not in _PLAIN | _LIST | _NAMED:
            raise Unfit(f"{place_of(at)}: is not a keyword that is let in")


def _target(root: Schema, reference: Any, path: Path) -> Any:
    """The schema that a reference names: one of the definitions at the top, and nothing else."""
    definitions = root.get("$defs")
    if isinstance(reference, str) and reference.startswith(_DEFINITIONS) and isinstance(definitions, dict):
        name = reference.removeprefix(_DEFINITIONS)
        if name in definitions:
            return definitions[name]
    raise Unfit(f"{place_of(path)}: is not {_DEFINITIONS} and the name of one")


def _types(schema: Schema) -> set[str]:
    types = schema.get("type", [])
    return {types} if isinstance(types, str) else set(types)


def _fetch_nothing(uri: str) -> Any:
    raise ValueError(f"{uri} is not fetched")
