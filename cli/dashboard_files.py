"""Files of dashboards: YAML that holds a meshboard.dashboard.v1.DashboardFile, with names in place of sources' ids.

Files come from anywhere: they are read as plain data of a bounded size, without anchors, aliases and tags.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

import yaml
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from meshboard.dashboard.v1.file_service_pb2 import DashboardFile

MAX_BYTES = 2 << 20
_MAX_DEPTH = 64
_KEYS = ("name", "folder", "baseVersion", "sources", "content")

Json = dict[str, Any]


class FileRefused(ValueError):
    """The file says nothing that can be applied; the message says where and why."""


def read(path: Path, source_ids: Callable[[Mapping[str, str]], Mapping[str, str]]) -> Json:
    """The file as JSON of a DashboardFile. Raises FileRefused.

    `source_ids` gives the ids of sources by the names that the file has for them; it gets what the file says they are
    called.
    """
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise FileRefused(f"it has more than {MAX_BYTES >> 20} MiB")
        return parse(raw.decode(), source_ids)
    except OSError as error:
        raise FileRefused(f"it cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise FileRefused(f"it is not UTF-8: {error.reason} at byte {error.start}") from None


def parse(text: str, source_ids: Callable[[Mapping[str, str]], Mapping[str, str]]) -> Json:
    """As `read`, from a text."""
    try:
        file = yaml.load(text, _Loader)  # noqa: S506 - a safe loader that reads less than SafeLoader
    except yaml.YAMLError as error:
        raise FileRefused(f"it is not YAML: {' '.join(str(error).split())}") from None
    except (ValueError, RecursionError) as error:  # a number or a character that Python does not take
        raise FileRefused(f"it is not YAML: {error}") from None
    if not isinstance(file, dict):
        raise FileRefused("it is no mapping with `name` and `content`")
    if unknown := sorted(set(file) - set(_KEYS)):
        raise FileRefused(f"it has {unknown[0]!r}, but can have only {', '.join(_KEYS)}")
    sources = file.pop("sources", None) or {}
    if not isinstance(sources, dict) or not all(isinstance(title, str) for title in sources.values()):
        raise FileRefused("`sources` is no mapping of names to the titles of sources")
    ids = source_ids(sources)
    for holder, key in _places(file.get("content")):
        holder[key] = _source_id(holder[key], ids)
    try:
        return MessageToDict(ParseDict(file, DashboardFile()))
    except (ParseError, TypeError, ValueError, RecursionError) as error:
        raise FileRefused(str(error)) from None


def write(file: Json, titles: Mapping[str, str]) -> str:
    """The YAML of a file that is given as JSON, in the order of the contract; `titles` are those of sources by id."""
    plain = MessageToDict(ParseDict(file, DashboardFile()))
    content = plain.get("content", {})
    aliases: dict[str, str] = {}
    for holder, key in _places(content):
        source_id = str(holder[key]).lower()
        if source_id in titles and source_id not in aliases:
            aliases[source_id] = _free(_alias(titles[source_id]), set(aliases.values()))
        holder[key] = aliases.get(source_id, holder[key])
    content["widgets"] = [_name_first(widget) for widget in content.get("widgets", [])]
    named = {alias: titles[source_id] for source_id, alias in aliases.items()}
    whole = {
        "name": plain.get("name", ""),
        "folder": plain.get("folder"),
        "baseVersion": plain.get("baseVersion"),
        "sources": named,
        "content": content,
    }
    said = {key: value for key, value in whole.items() if value}
    return yaml.dump(_integers(said), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _source_id(said: Any, ids: Mapping[str, str]) -> str:
    if not isinstance(said, str):
        raise FileRefused(f"{said!r} is no source")
    if said in ids:
        return ids[said]
    try:
        return str(UUID(said))
    except ValueError:
        raise FileRefused(
            f"the source {said!r} is neither an id nor one of `sources`; --source {said}=ID says which it is"
        ) from None


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Where ids of sources stand in a content, as holders and keys. What can be anything is passed over."""
    if isinstance(value, list):
        for each in value:
            yield from _places(each)
    if not isinstance(value, dict):
        return
    for key, each in value.items():
        if key in {"sourceId", "source_id"}:
            yield value, key
        elif key in {"sourceIds", "source_ids"} and isinstance(each, list):
            yield from ((each, index) for index in range(len(each)))
        elif key not in {"custom", "values"}:
            yield from _places(each)


def _alias(title: str) -> str:
    plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:40].strip("-") or "source"


def _free(alias: str, taken: set[str]) -> str:
    number, free = 1, alias
    while free in taken:
        number += 1
        free = f"{alias}-{number}"
    return free


def _name_first(widget: Json) -> Json:
    return {"name": widget["name"], **widget} if "name" in widget else widget


def _integers(value: Any) -> Any:
    """Without the points that JSON numbers of protobuf have behind whole numbers."""
    if isinstance(value, dict):
        return {key: _integers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_integers(each) for each in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


class _Loader(yaml.SafeLoader):
    """Plain data: what JSON has, once each, and not deeper than it makes sense."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise yaml.composer.ComposerError(
                None, None, "anchors and aliases are not read", event.start_mark
            )
        if event.tag is not None:
            raise yaml.composer.ComposerError(None, None, "tags are not read", event.start_mark)
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, "it is nested too deeply", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(None, None, "a key is no text", key.start_mark)
            if key.value in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} stands there twice", key.start_mark
                )
            keys.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, and no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


# The core schema of YAML 1.2, so that `no`, `012` and `2024-01-01` are texts.
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?", list("-+0123456789")),
):
    # What is read as something else is written in quotes.
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)
