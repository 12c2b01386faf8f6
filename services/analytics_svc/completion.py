"""Makes what is logged of a batch: events that lack nothing, and what the pipeline would have to find out of them.

Events are completed as they are read, as columns: what they lack is written behind what they have, which protobuf reads
as one message. Only where some events lack what others have, this is done one by one, and not all of it.
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
# Lengths below take one byte.
_SHORT = 128

# Where an address is: `country`, `region` and `city` as a serialized LoggedEvent; nothing when it is not known.
PlaceOf = Callable[[str], bytes]


@dataclass(frozen=True, slots=True)
class Receipt:
    """How a batch was received: when, from which address, and what tells where addresses are, if anything does."""

    time: Timestamp
    address: str = ""
    place_of: PlaceOf | None = None


def completed(seen: Glance, source: Source, receipt: Receipt, agents: AgentFields) -> bytes | None:
    """The events without their addresses, with all that they lack, as a serialized LoggedBatch with `keys`.

    None when only some of the events have what they may do without, when too many of their user agents are new, or when
    some are to be dropped: then they have to be completed one by one.
    """
    columns, count = seen.columns, len(seen.events)
    if not all(
        len(column) in {0, count}
        for column in (columns.insert_id, columns.time, columns.user_agent, columns.ip)
    ):
        return None
    parts: list[Sequence[bytes]] = [_without_addresses(seen)]
    insert_ids: Sequence[bytes] = columns.insert_id
    if not insert_ids:
        insert_ids = list(_new_ids(count))
        parts.append([_INSERT_ID + bytes([len(insert_id)]) + insert_id for insert_id in insert_ids])
    if not columns.time:
        written = receipt.time.SerializeToString()
        parts.append([_TIME + bytes([len(written)]) + written] * count)
    if columns.user_agent:
        told = agents.of(columns.user_agent, source.robots)
        if told is None:
            return None
        parts.append(told)
    if (place_of := receipt.place_of) is not None:
        parts.append([place_of(ip.decode() or receipt.address) for ip in columns.ip or [b""] * count])
    return WrittenBatch(
        events=map(b"".join, zip(*parts, strict=True)) if len(parts) > 1 else parts[0],
        keys=[keys_of(source.source_id, insert_ids)],
        has_links=len(columns.previous_id) > 0,
    ).SerializeToString()


def complete(request: IngestRequest, receipt: Receipt) -> None:
    """Does one by one what `completed` does, but for what the pipeline finds out if it has to."""
    for event, insert_id in zip(request.events, _new_ids(len(request.events)), strict=True):
        if receipt.place_of is not None and (place := receipt.place_of(event.ip or receipt.address)):
            event.MergeFromString(place)  # fields that an Event does not know, and a LoggedEvent does
        event.ClearField("ip")
        if not event.insert_id:
            event.insert_id = insert_id.decode()
        if not event.HasField("time"):
            event.time.CopyFrom(receipt.time)


def _without_addresses(seen: Glance) -> Sequence[bytes]:
    """The address is the last field of an Event: behind its key and its length."""
    addresses = seen.columns.ip
    if not addresses:
        return seen.events
    ends = [-2 - len(address) if len(address) < _SHORT else -3 - len(address) for address in addresses]
    return [event[:end] for event, end in zip(seen.events, ends, strict=True)]


def _new_ids(count: int) -> Iterator[bytes]:
    prefix = uuid7().hex.encode()
    return (b"%b-%d" % (prefix, index) for index in range(count))
