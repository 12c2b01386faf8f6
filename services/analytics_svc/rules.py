"""What a source says of the events that it takes: which are allowed, whose are kept, and what in them is hidden.

All of it is done while the sender waits, so that what is hidden never reaches a disk. It is work per event, and only
for sources that have such rules.
"""

import hmac
import re
from collections import OrderedDict
from collections.abc import Iterator
from hashlib import blake2b, sha256
from urllib.parse import unquote_plus

from google.protobuf.struct_pb2 import Struct, Value
from meshboard.analytics.v1.ingest_service_pb2 import Event
from meshboard.analytics.v1.source_pb2 import PropertyType, RedactedPattern, Source

from services.analytics_svc.redaction import REDACTED, Patterns

# Rules are made ready once for a version of a source; this many are remembered.
MAX_REMEMBERED = 1000

_QUERY_VALUE = re.compile(r"([?&;#])([^=&;#]*+)=([^&;#]*+)")
_BRACKET = re.compile(r"[\[\]]")
_TYPES = {
    "string_value": PropertyType.STRING,
    "number_value": PropertyType.NUMBER,
    "bool_value": PropertyType.BOOLEAN,
    "list_value": PropertyType.LIST,
    "struct_value": PropertyType.OBJECT,
}


class Rulebook:
    """The rules of sources. `key` makes pseudonyms: 32 bytes, the same in all replicas."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._rules: OrderedDict[str, tuple[str, Rules | None]] = OrderedDict()

    def rules_of(self, source: Source) -> "Rules | None":
        """The rules of a source; None when it has none."""
        known = self._rules.get(source.source_id)
        if known is not None and known[0] == source.etag:
            self._rules.move_to_end(source.source_id)
            return known[1]
        rules = Rules(source, self._key) if _has_rules(source) else None
        self._rules[source.source_id] = source.etag, rules
        if len(self._rules) > MAX_REMEMBERED:
            self._rules.popitem(last=False)
        return rules


def _has_rules(source: Source) -> bool:
    return bool(
        source.allowed_events
        or source.property_types
        or source.redacted_properties
        or source.redacted_patterns
        or 0 < source.sample_rate < 1
    )


class Rules:
    """The rules of a source, ready to be applied."""

    def __init__(self, source: Source, key: bytes) -> None:
        self._events = frozenset(source.allowed_events)
        self._types = {wanted.name: wanted.type for wanted in source.property_types}
        self._names = frozenset(name.casefold() for name in source.redacted_properties)
        patterns = source.redacted_patterns
        self._patterns = Patterns(patterns) if patterns else None
        # The versions of browsers look like addresses.
        self._patterns_of_agents = Patterns(p for p in patterns if p.known != RedactedPattern.IP_ADDRESS)
        rate = source.sample_rate
        self._sampled_below = int(rate * 2**64) if 0 < rate < 1 else None
        self._source = source.source_id.encode()
        self._key = key

    @property
    def are_slow(self) -> bool:
        """Whether they look into the texts of events."""
        return self._patterns is not None

    def refusal_of(self, event: Event) -> tuple[str, str] | None:
        """The reason and the words why the source does not want an event; None when it does."""
        if self._events and event.event not in self._events:
            return "EVENT_NOT_ALLOWED", "event: is not among the allowed events of the source"
        if self._types:
            for name, value in event.properties.fields.items():
                wanted = self._types.get(name)
                found = _TYPES.get(value.WhichOneof("kind") or "")  # null has any type
                if wanted is not None and found is not None and wanted != found:
                    return (
                        "PROPERTY_TYPE_WRONG",
                        f"properties.{name}: must be {PropertyType.Type.Name(wanted)}",
                    )
        return None

    def keeps(self, distinct_id: str) -> bool:
        """Whether a person is in the sample. In a larger sample of the source all of a smaller one are."""
        if self._sampled_below is None:
            return True
        hashed = blake2b(distinct_id.encode(), digest_size=8, key=self._source)
        return int.from_bytes(hashed.digest()) < self._sampled_below

    def redact(self, event: Event) -> None:
        """Hides what is not to be kept. Lists and objects must not have become text yet."""
        if self._names:
            self._drop_named(event.properties)
            if "=" in event.url:
                event.url = self._hide_values(event.url)
            if "=" in event.referrer:
                event.referrer = self._hide_values(event.referrer)
        if self._patterns is None or not self._patterns.may_be_in(_texts(event)):
            return
        event.event = self._patterns.replace(event.event)
        event.url = self._patterns.replace(event.url)
        event.referrer = self._patterns.replace(event.referrer)
        event.user_agent = self._patterns_of_agents.replace(event.user_agent)
        event.distinct_id = self._pseudonym(event.distinct_id)
        event.previous_id = self._pseudonym(event.previous_id)
        event.insert_id = self._pseudonym(event.insert_id)
        self._hide_in(event.properties)

    # By name

    def _drop_named(self, struct: Struct) -> None:
        for name in [name for name in struct.fields if self._is_named(name)]:
            del struct.fields[name]
        for value in struct.fields.values():
            self._drop_named_in(value)

    def _is_named(self, name: str) -> bool:
        """`user.email` is `email` too."""
        name = name.casefold()
        return name in self._names or name.rpartition(".")[2] in self._names

    def _drop_named_in(self, value: Value) -> None:
        match value.WhichOneof("kind"):
            case "struct_value":
                self._drop_named(value.struct_value)
            case "list_value":
                for inner in value.list_value.values:
                    self._drop_named_in(inner)

    def _hide_values(self, url: str) -> str:
        """`?user[email]=…` is a value of the name `email`, and of the name `user`."""

        def hide(match: re.Match[str]) -> str:
            names = _BRACKET.split(unquote_plus(match[2]).casefold())
            return match[0] if self._names.isdisjoint(names) else f"{match[1]}{match[2]}={REDACTED}"

        return _QUERY_VALUE.sub(hide, url)

    # By pattern

    def _hide_in(self, struct: Struct) -> None:
        assert self._patterns is not None
        for name, value in list(struct.fields.items()):
            if self._patterns.may_be_in([name]) or not self._hide_in_value(value):
                del struct.fields[name]

    def _hide_in_value(self, value: Value) -> bool:
        """Whether the value can stay."""
        assert self._patterns is not None
        match value.WhichOneof("kind"):
            case "string_value":
                value.string_value = self._patterns.replace(value.string_value)
            case "number_value":
                return not self._patterns.may_be_in([_number_text(value.number_value)])
            case "struct_value":
                self._hide_in(value.struct_value)
            case "list_value":
                kept = [inner for inner in value.list_value.values if self._hide_in_value(inner)]
                if len(kept) < len(value.list_value.values):
                    copies = [Value.FromString(inner.SerializeToString()) for inner in kept]
                    del value.list_value.values[:]
                    value.list_value.values.extend(copies)
        return True

    def _pseudonym(self, identifier: str) -> str:
        """The same for the same id of the source, so that a person stays one."""
        assert self._patterns is not None
        if not identifier or not self._patterns.may_be_in([identifier]):
            return identifier
        digest = hmac.digest(self._key, self._source + b" " + identifier.encode(), sha256)
        return f"redacted-{digest.hex()[:32]}"


def _texts(event: Event) -> Iterator[str]:
    yield from (
        event.event,
        event.url,
        event.referrer,
        event.user_agent,
        event.distinct_id,
        event.previous_id,
        event.insert_id,
    )
    yield from _texts_of(event.properties)


def _texts_of(struct: Struct) -> Iterator[str]:
    for name, value in struct.fields.items():
        yield name
        yield from _texts_of_value(value)


def _texts_of_value(value: Value) -> Iterator[str]:
    match value.WhichOneof("kind"):
        case "string_value":
            yield value.string_value
        case "number_value":
            yield _number_text(value.number_value)
        case "struct_value":
            yield from _texts_of(value.struct_value)
        case "list_value":
            for inner in value.list_value.values:
                yield from _texts_of_value(inner)


def _number_text(number: float) -> str:
    return str(int(number)) if number.is_integer() else repr(number)
