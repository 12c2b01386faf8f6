"""Templates with places for options: `{"$option": "path"}` and `{"$column": "path"}` in JSON.

What comes to stand in such a place is a text, a number, true or false, or a list of these: an option never brings a
field or an object of its own. An object with `"$if": "path"` is left out when there is no such option.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from services.dashboard_svc.option_schemas import OptionSchema, Schema
from services.dashboard_svc.structs import Unfit, place_of, size_of

Json = Any
Path = tuple[str | int, ...]
OPTION, COLUMN, IF = "$option", "$column", "$if"
MAX_BYTES = 64 << 10
_ABSENT = object()
# What splits the name of a column in Vega-Lite.
_SPLITS = re.compile(r"[\\.\[\]'\"]")


def placeholder(value: Json) -> tuple[str, Json] | None:
    """What a value is a place for, as `$option` and the path; None: it is none."""
    if isinstance(value, dict):
        for kind in (OPTION, COLUMN):
            if kind in value:
                return kind, value[kind]
    return None


def check(template: dict[str, Json], schema: OptionSchema, *, columns: bool) -> None:
    """Raises Unfit when a place is not for an option that the schema declares with a type, or for a column.

    Only with `columns` there are places for these.
    """
    if template.keys() & {OPTION, COLUMN, IF}:
        raise Unfit("is as a whole no place for an option")
    for value, path in _objects(template, ()):
        at = place_of(path)
        if IF in value:
            _declared(schema, value[IF], at)
        if place := placeholder(value):
            _check_place(value, place, schema, at)
            if place[0] == COLUMN and not columns:
                raise Unfit(f"{at}: {COLUMN} is for a spec; a query has {OPTION}")


def _check_place(value: dict[str, Json], place: tuple[str, Json], schema: OptionSchema, at: str) -> None:
    if len(value) > 1:
        raise Unfit(f"{at}: a place for an option has its path and nothing else")
    kind, path = place
    declared = _declared(schema, path, at)
    if not schema.is_typed(declared):
        raise Unfit(f"{at}: the option needs a type: a text, number, boolean, or an array of these")
    if kind == COLUMN and declared.get("type") != "string":
        raise Unfit(f"{at}: the option is no string, as the name of a column is")


def _declared(schema: OptionSchema, path: Json, at: str) -> Schema:
    declared = schema.declared(path) if isinstance(path, str) else None
    if declared is None:
        raise Unfit(f"{at}: the schema has no such option")
    return declared


def emptied(template: Json) -> Json:
    """The template with nothing in its places: null in objects, and left out of lists."""
    if placeholder(template):
        return None
    if isinstance(template, dict):
        return {key: emptied(value) for key, value in template.items() if key != IF}
    if isinstance(template, list):
        return [emptied(value) for value in template if not placeholder(value)]
    return template


def filled(template: Json, options: Json, schema: OptionSchema) -> Json:
    """The template with options in its places; without the fields and entries for which there is none.

    Raises Unfit when it becomes larger than MAX_BYTES.
    """
    return _Filling(options, schema).fill(template)


class _Filling:
    def __init__(self, options: Json, schema: OptionSchema) -> None:
        self._options = options
        self._schema = schema
        self._room = MAX_BYTES
        self._found: dict[str, tuple[Json, int]] = {}

    def fill(self, template: Json) -> Json:
        if place := placeholder(template):
            return self._value(*place)
        if isinstance(template, dict):
            if IF in template and self._value(OPTION, template[IF]) is _ABSENT:
                return _ABSENT
            made = {key: self.fill(value) for key, value in template.items() if key != IF}
            return {key: value for key, value in made.items() if value is not _ABSENT}
        if isinstance(template, list):
            return [value for value in map(self.fill, template) if value is not _ABSENT]
        return template

    def _value(self, kind: str, path: str) -> Json:
        if path not in self._found:
            value = self._look_up(path)
            self._found[path] = value, 0 if value is _ABSENT else size_of(value)
        value, size = self._found[path]
        self._room -= size
        if self._room < 0:
            raise Unfit(f"options: what becomes of them has more than {MAX_BYTES} bytes")
        return _SPLITS.sub(r"\\\g<0>", value) if kind == COLUMN and isinstance(value, str) else value

    def _look_up(self, path: str) -> Json:
        value = self._options
        for name in path.split("."):
            if not isinstance(value, dict) or name not in value:
                value = self._schema.default(path)
                break
            value = value[name]
        # A list may begin otherwise than its other entries are declared, and a default be anything.
        if any(isinstance(part, dict | list) for part in (value if isinstance(value, list) else [value])):
            raise Unfit(f"options.{path}: is no text, number, boolean, or list of these")
        return _ABSENT if value is None else value


def _objects(template: Json, path: Path) -> Iterator[tuple[dict[str, Json], Path]]:
    """The objects in a template, with where they stand."""
    if isinstance(template, dict):
        yield template, path
        for key, value in template.items():
            yield from _objects(value, (*path, key))
    elif isinstance(template, list):
        for index, value in enumerate(template):
            yield from _objects(value, (*path, index))
