"""Makes what is logged of a batch: events that lack nothing, and what the pipeline would have to find out of them.

Events are completed as they are read, as columns: what they lack is written behind what they have, which protobuf reads
as one message.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from google.protobuf.timestamp_pb2 import Timestamp
from meshboard.analytics.v1.event_columns_pb2 import WrittenBatch
from meshboard.analytics.v1.ingest_service_pb2 import IngestRequest
from meshboard.analytics.v1.source_pb2 import Source
from uuid_utils.compat import uuid7

from services.analytics_svc.event_keys import keys_of
from services.analytics_svc.glance import Glance
from services.analytics_svc.user_agents import AgentFields

# The keys of fields of an Event: their numbers, and that a length follows.
_INSERT_ID, _TIME = b"\x1a", b"\x22"
# What is shorter has a length of one byte.
_SHORT = 128

# Where an address is: `country`, `region` and `city` as a serialized LoggedEvent; nothing when it is not known.
PlaceOf = Callable[[str], bytes]


@dataclass(frozen=True, slots=True)
class Receipt:
    """How a batch was received: when, from which address, and what tells where addresses are, if anything does."""

    time: Timestamp
    address: str = ""
    place_of: PlaceOf | None = None


def completed(
    request: IngestRequest, seen: Glance, source: Source, receipt: Receipt, agents: AgentFields
) -> bytes:
    """The events of a request, at which `seen` is a glance, without their addresses and with all that they lack.

    A serialized LoggedBatch. It has `keys` unless some user agents have to be looked at first.
    """
    count = len(seen.events)
    insert_ids, headers, addresses = (
        _values(request, seen, name) for name in ("insert_id", "user_agent", "ip")
    )
    parts = [_without_addresses(seen.events, addresses)]
    if not all(insert_ids):
        made = _new_ids(count)
        missing = [b"" if insert_id else next(made) for insert_id in insert_ids]
        parts.append([_field(_INSERT_ID, insert_id) if insert_id else b"" for insert_id in missing])
        insert_ids = [one or other for one, other in zip(insert_ids, missing, strict=True)]
    if len(seen.columns.time) < count:
        time = _field(_TIME, receipt.time.SerializeToString())
        parts.append([b"" if event.HasField("time") else time for event in request.events])
    if (place_of := receipt.place_of) is not None:
        parts.append([place_of(address.decode() or receipt.address) for address in addresses])
    told = agents.of(headers, source.robots)
    if told is not None:
        parts.append(told)
    batch = WrittenBatch(events=map(b"".join, zip(*parts, strict=True)))
    if told is not None:
        batch.keys.append(keys_of(source.source_id, insert_ids))
        batch.has_links = len(seen.columns.previous_id) > 0
    return batch.SerializeToString()


def _values(request: IngestRequest, seen: Glance, name: str) -> Sequence[bytes]:
    """A text of each event, empty for those that lack it."""
    column: Sequence[bytes] = getattr(seen.columns, name)
    if len(column) == len(seen.events):
        return column
    if not column:
        return [b""] * len(seen.events)
    return [getattr(event, name).encode() for event in request.events]


def _without_addresses(events: Sequence[bytes], addresses: Sequence[bytes]) -> Sequence[bytes]:
    """The address is the last field of an Event, behind its key and its length."""
    if not any(addresses):
        return events
    sizes = [size + (2 if size < _SHORT else 3) if (size := len(one)) else 0 for one in addresses]
    return [event[: len(event) - size] for event, size in zip(events, sizes, strict=True)]


def _field(key: bytes, value: bytes) -> bytes:
    return key + bytes([len(value)]) + value


def _new_ids(count: int) -> Iterator[bytes]:
    prefix = uuid7().hex.encode()
    return (b"%b-%d" % (prefix, index) for index in range(count))
