"""Structs of the contract as Python has JSON, within bounds."""

from __future__ import annotations

import math
from typing import Any

import orjson
from google.protobuf.struct_pb2 import Struct, Value

Json = Any
MAX_DEPTH = 24
MAX_VALUES = 4000
_LONGEST_MESSAGE = 500
# A whole number beyond this is not exact, and stays a float.
_EXACT = 2**53


class Unfit(ValueError):
    """Something in a kind or in the options of a widget is not as it has to be; the message says what, and where.

    It is cut off behind 500 characters, as it may quote what is wrong.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= _LONGEST_MESSAGE else f"{message[:_LONGEST_MESSAGE]}…")


def json_of(struct: Struct, max_bytes: int) -> dict[str, Json]:
    """The Struct as JSON.

    Raises Unfit beyond `max_bytes` as JSON, MAX_DEPTH and MAX_VALUES, and for numbers that JSON does not have.
    """
    found: dict[str, Json] = _Reading().json_of(Value(struct_value=struct), 0)
    if size_of(found) > max_bytes:
        raise Unfit(f"has more than {max_bytes} bytes")
    return found


def struct_of(json: dict[str, Json]) -> Struct:
    """JSON as a Struct."""
    struct = Struct()
    struct.update(json)
    return struct


def size_of(json: Json) -> int:
    """The bytes of a value as JSON."""
    return len(orjson.dumps(json))


def count_of(json: Json) -> int:
    """How many values there are in a value, itself included."""
    if isinstance(json, dict):
        return 1 + sum(map(count_of, json.values()))
    if isinstance(json, list):
        return 1 + sum(map(count_of, json))
    return 1


def place_of(path: tuple[str | int, ...]) -> str:
    """`encoding.x[2]`: where in a value something stands."""
    place = ""
    for step in path:
        place += f"[{step}]" if isinstance(step, int) else f".{step}" if place else step
    return place[:200]


class _Reading:
    def __init__(self) -> None:
        self._count = 0

    def json_of(self, value: Value, depth: int) -> Json:
        self._count += 1
        if depth > MAX_DEPTH:
            raise Unfit(f"is nested more than {MAX_DEPTH} deep")
        if self._count > MAX_VALUES:
            raise Unfit(f"has more than {MAX_VALUES} values")
        match value.WhichOneof("kind"):
            case "struct_value":
                return {key: self.json_of(each, depth + 1) for key, each in value.struct_value.fields.items()}
            case "list_value":
                return [self.json_of(each, depth + 1) for each in value.list_value.values]
            case "number_value":
                return _number(value.number_value)
            case "string_value":
                return value.string_value
            case "bool_value":
                return value.bool_value
            case _:
                return None


def _number(number: float) -> int | float:
    if not math.isfinite(number):
        raise Unfit("holds a number that JSON does not have")
    return int(number) if number.is_integer() and abs(number) <= _EXACT else number
