"""Takes events of applications: judges each, and answers when the good ones are in the event log."""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from datetime import datetime
from typing import Any, NamedTuple

import grpc.aio
from google.protobuf.struct_pb2 import Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp
from meshboard.analytics.v1.ingest_service_pb2 import (
    Event,
    IngestRequest,
    IngestResponse,
    IngestStreamRequest,
    IngestStreamResponse,
    RefusedEvent,
)
from meshboard.analytics.v1.ingest_service_pb2_grpc import IngestServiceServicer
from meshboard.analytics.v1.source_pb2 import Source
from prometheus_client import Counter

from services.analytics_svc import write_keys
from services.analytics_svc.completion import Receipt, completed
from services.analytics_svc.event_log import EventLog
from services.analytics_svc.geo import GeoDatabase
from services.analytics_svc.glance import DAY_SECONDS, MAX_PROPERTIES, MAX_PROPERTIES_BYTES, glance
from services.analytics_svc.quotas import Quotas
from services.analytics_svc.rules import Rulebook, Rules
from services.analytics_svc.streams import acknowledged
from services.analytics_svc.user_agents import AgentFields
from services.chassis import auth, errors
from services.chassis.bus import BusError

Context = grpc.aio.ServicerContext[Any, Any]

# How long a batch may have been on its way before the sender's clock is taken to be wrong.
TRAVEL_SECONDS = 5

_events = Counter("meshboard_ingest_events_total", "Events by what became of them.", ["outcome"])
_accepted, _refused, _dropped = (_events.labels(outcome) for outcome in ("accepted", "refused", "dropped"))


class Judged(NamedTuple):
    """A batch as it is logged, and what is not in it."""

    batch: bytes
    refused: list[RefusedEvent]
    dropped: int


class IngestServicer(IngestServiceServicer):
    """`now` is the time of receipt."""

    def __init__(
        self,
        log: EventLog,
        now: Callable[[], datetime],
        *,
        rulebook: Rulebook,
        quotas: Quotas,
        agents: AgentFields,
        geo: GeoDatabase | None = None,
    ) -> None:
        self.log = log
        self.now = now
        self.rulebook = rulebook
        self.quotas = quotas
        self.geo = geo
        self.agents = agents

    async def Ingest(self, request: IngestRequest, context: Context) -> IngestResponse:
        source = write_keys.source()
        receive_time = Timestamp()
        receive_time.FromDatetime(self.now())
        correct_times(request, receive_time)
        judged = await self._judge(source, request, receive_time)
        accepted = len(request.events)
        if accepted:
            give_back = await self.quotas.take(source, accepted)
            try:
                await self.log.append(source, judged.batch)
            except BusError as error:
                give_back()
                raise errors.unavailable("The event log takes no events now.") from error
        _accepted.inc(accepted)
        _refused.inc(len(judged.refused))
        _dropped.inc(judged.dropped)
        return IngestResponse(accepted_count=accepted, refused=judged.refused, dropped_count=judged.dropped)

    async def IngestStream(
        self, requests: AsyncIterator[IngestStreamRequest], context: Context
    ) -> AsyncIterator[IngestStreamResponse]:
        async def take(request: IngestRequest) -> IngestResponse:
            return await self.Ingest(request, context)

        async for acknowledgement in acknowledged(requests, take, auth.recheck):
            yield acknowledgement

    async def _judge(self, source: Source, request: IngestRequest, receive_time: Timestamp) -> Judged:
        """Leaves the events in the request that are to be kept."""
        rules = self.rulebook.rules_of(source)
        refused: list[RefusedEvent] = []
        dropped = 0
        seen = glance(request.SerializeToString()) if rules is None else None
        if seen is None or not seen.is_good(receive_time.seconds):
            strip(request)
            if rules is not None and rules.are_slow:  # other calls go on meanwhile
                refused, dropped = await asyncio.to_thread(judge, request, receive_time.seconds, rules)
            else:
                refused, dropped = judge(request, receive_time.seconds, rules)
            seen = glance(request.SerializeToString())
        receipt = Receipt(receive_time, write_keys.address(), self.geo.place_of if self.geo else None)
        return Judged(completed(request, seen, source, receipt, self.agents), refused, dropped)


def correct_times(request: IngestRequest, receive_time: Timestamp) -> None:
    """Moves the events' times by as much as the clock that they are from is wrong.

    What lies between sending and receipt is taken for the error of the clock, as far as it is too much for the way.
    """
    if not request.HasField("send_time"):
        return
    try:
        error = receive_time.ToNanoseconds() - request.send_time.ToNanoseconds()
    except ValueError:  # no time at all
        return
    if abs(error) <= TRAVEL_SECONDS * 1_000_000_000:
        return
    for event in request.events:
        if event.HasField("time"):
            # What has no place in a Timestamp stays as it was sent, and is judged so.
            with suppress(ValueError):
                event.time.FromNanoseconds(event.time.ToNanoseconds() + error)


def judge(request: IngestRequest, now_seconds: int, rules: Rules | None) -> tuple[list[RefusedEvent], int]:
    """Leaves the events in the request that are to be kept, as they are to be kept.

    Gives those that are refused, and how many are left out without being refused.
    """
    refused, gone = [], []
    for index, event in enumerate(request.events):
        in_sample = rules is None or rules.keeps(event.distinct_id)
        if why := refusal_of(event, now_seconds, rules):
            refused.append(RefusedEvent(index=index, reason=why[0], message=why[1]))
            gone.append(index)
        elif not in_sample:
            gone.append(index)
    for index in reversed(gone):
        del request.events[index]
    return refused, len(gone) - len(refused)


def strip(request: IngestRequest) -> None:
    """Leaves nothing in the request but events."""
    request.ClearField("write_key")
    request.ClearField("send_time")
    # What this contract does not know would be read as fields of LoggedBatch and LoggedEvent.
    request.DiscardUnknownFields()


def refusal_of(event: Event, now_seconds: int, rules: Rules | None = None) -> tuple[str, str] | None:
    """The reason and the words why an event is refused.

    None for a good one: it has lost what the rules hide, and its lists and objects have become text.
    """
    if not 1 <= len(event.event) <= 200:
        return "EVENT_NAME_INVALID", "event: must have 1 to 200 characters"
    if not 1 <= len(event.distinct_id) <= 200:
        return "DISTINCT_ID_INVALID", "distinct_id: must have 1 to 200 characters"
    if len(event.insert_id) > 200:
        return "INSERT_ID_INVALID", "insert_id: must have at most 200 characters"
    if event.HasField("time") and not _plausible(event.time, now_seconds):
        return "TIME_INVALID", "time: must be from 1970 to a day ahead"
    if len(event.url) > 4096:
        return "CONTEXT_INVALID", "url: must have at most 4,096 characters"
    if len(event.referrer) > 4096:
        return "CONTEXT_INVALID", "referrer: must have at most 4,096 characters"
    if len(event.user_agent) > 2048:
        return "CONTEXT_INVALID", "user_agent: must have at most 2,048 characters"
    if len(event.previous_id) > 200:
        return "CONTEXT_INVALID", "previous_id: must have at most 200 characters"
    if len(event.ip) > 45:
        return "CONTEXT_INVALID", "ip: must have at most 45 characters"
    if rules is not None:
        if refusal := rules.refusal_of(event):
            return refusal
        rules.redact(event)
    if event.HasField("properties"):
        return _refusal_of_properties(event.properties)
    return None


def _plausible(time: Timestamp, now_seconds: int) -> bool:
    return 0 <= time.seconds <= now_seconds + DAY_SECONDS and 0 <= time.nanos < 1_000_000_000


def _refusal_of_properties(properties: Struct) -> tuple[str, str] | None:
    fields = properties.fields
    if len(fields) > MAX_PROPERTIES:
        return "PROPERTIES_INVALID", "properties: must have at most 200 names"
    if properties.ByteSize() > MAX_PROPERTIES_BYTES:
        return "PROPERTIES_INVALID", "properties: must have at most 64 KiB"
    for name, value in fields.items():
        if not 1 <= len(name) <= 200:
            return "PROPERTIES_INVALID", f"properties.{name[:50]}: a name must have 1 to 200 characters"
        kind = value.WhichOneof("kind")
        if kind == "number_value":
            if not math.isfinite(value.number_value):
                return "PROPERTIES_INVALID", f"properties.{name}: must be finite"
        elif kind in {"list_value", "struct_value"}:
            value.string_value = json.dumps(
                _plain(value), ensure_ascii=False, separators=(",", ":"), sort_keys=True
            )
    return None


def _plain(value: Value) -> Any:
    """The value as json.dumps takes it; a whole number has no point."""
    match value.WhichOneof("kind"):
        case "struct_value":
            return {name: _plain(inner) for name, inner in value.struct_value.fields.items()}
        case "list_value":
            return [_plain(inner) for inner in value.list_value.values]
        case "number_value":
            number = value.number_value
            return int(number) if number.is_integer() else number
        case None | "null_value":
            return None
        case kind:
            return getattr(value, kind)
