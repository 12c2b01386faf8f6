"""Messages in the shape of Segment's tracking API (https://segment.com/docs/connections/spec), taken as events."""

from datetime import datetime
from typing import Any

import grpc.aio
from google.protobuf.struct_pb2 import Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp
from meshboard.analytics.v1.compat_service_pb2 import (
    CompatMessage,
    SendAliasRequest,
    SendAliasResponse,
    SendBatchRequest,
    SendBatchResponse,
    SendGroupRequest,
    SendGroupResponse,
    SendIdentifyRequest,
    SendIdentifyResponse,
    SendPageRequest,
    SendPageResponse,
    SendScreenRequest,
    SendScreenResponse,
    SendTrackRequest,
    SendTrackResponse,
)
from meshboard.analytics.v1.compat_service_pb2_grpc import CompatServiceServicer
from meshboard.analytics.v1.ingest_service_pb2 import Event, IngestRequest, IngestResponse, RefusedEvent

from services.analytics_svc.ingest import IngestServicer
from services.chassis import errors

Context = grpc.aio.ServicerContext[Any, Any]

TYPES = frozenset({"track", "identify", "page", "screen", "group", "alias"})
# Of what surrounds a message these are fields of the event, or are said elsewhere.
_NO_PROPERTIES = frozenset({"context.ip", "context.userAgent", "context.page.url", "context.page.referrer"})
_CONTEXT_NAMES = 100


class CompatServicer(CompatServiceServicer):
    """What `ingest` judges and logs are the events that messages become."""

    def __init__(self, ingest: IngestServicer) -> None:
        self.ingest = ingest

    async def SendBatch(self, request: SendBatchRequest, context: Context) -> SendBatchResponse:
        refused = []
        places = []
        batch = IngestRequest()
        for index, message in enumerate(request.batch):
            try:
                batch.events.append(event_of(message, message.type, request.context))
            except MessageRefusedError as why:
                refused.append(RefusedEvent(index=index, reason=why.reason, message=str(why)))
            else:
                places.append(index)
        _set_send_time(batch, request.sent_at)
        answer = await self.ingest.Ingest(batch, context) if places else IngestResponse()
        for refusal in answer.refused:
            refusal.index = places[refusal.index]
            refused.append(refusal)
        refused.sort(key=lambda refusal: refusal.index)
        return SendBatchResponse(
            success=not refused,
            accepted_count=answer.accepted_count,
            refused=refused,
            dropped_count=answer.dropped_count,
        )

    async def SendTrack(self, request: SendTrackRequest, context: Context) -> SendTrackResponse:
        await self._take(request.message, "track", context)
        return SendTrackResponse(success=True)

    async def SendIdentify(self, request: SendIdentifyRequest, context: Context) -> SendIdentifyResponse:
        await self._take(request.message, "identify", context)
        return SendIdentifyResponse(success=True)

    async def SendPage(self, request: SendPageRequest, context: Context) -> SendPageResponse:
        await self._take(request.message, "page", context)
        return SendPageResponse(success=True)

    async def SendScreen(self, request: SendScreenRequest, context: Context) -> SendScreenResponse:
        await self._take(request.message, "screen", context)
        return SendScreenResponse(success=True)

    async def SendGroup(self, request: SendGroupRequest, context: Context) -> SendGroupResponse:
        await self._take(request.message, "group", context)
        return SendGroupResponse(success=True)

    async def SendAlias(self, request: SendAliasRequest, context: Context) -> SendAliasResponse:
        await self._take(request.message, "alias", context)
        return SendAliasResponse(success=True)

    async def _take(self, message: CompatMessage, kind: str, context: Context) -> None:
        """Takes a message that came alone: a refusal is its error."""
        try:
            batch = IngestRequest(events=[event_of(message, kind, Value())])
        except MessageRefusedError as why:
            raise errors.invalid_argument(why.reason, str(why)) from why
        _set_send_time(batch, message.sent_at)
        for refusal in (await self.ingest.Ingest(batch, context)).refused:
            raise errors.invalid_argument(refusal.reason, refusal.message)


class MessageRefusedError(Exception):
    """A message is no good; `reason` is the name of an ErrorReason."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def event_of(message: CompatMessage, kind: str, default_context: Value) -> Event:
    """The event that a message of the type `kind` becomes. Raises MessageRefusedError."""
    if kind not in TYPES:
        raise MessageRefusedError(
            "MESSAGE_TYPE_UNKNOWN", f"type: must be one of {', '.join(sorted(TYPES))}, not {kind[:50]!r}"
        )
    user_id = _id(message.user_id, "userId")
    anonymous_id = _id(message.anonymous_id, "anonymousId")
    event = Event(
        event=message.event if kind == "track" else kind,
        distinct_id=user_id or anonymous_id,
        insert_id=message.message_id,
    )
    for name, value in (("timestamp", message.timestamp), ("originalTimestamp", message.original_timestamp)):
        if not event.HasField("time") and (time := _time(value, name)):
            event.time.CopyFrom(time)
    what, name = (
        (message.traits, "traits") if kind in {"identify", "group"} else (message.properties, "properties")
    )
    if (said := _object(what, name)) is not None:
        event.properties.CopyFrom(said)
    if kind == "alias":
        event.previous_id = _id(message.previous_id, "previousId")
    elif kind == "identify" and user_id != anonymous_id:
        event.previous_id = anonymous_id if user_id else ""
    elif kind == "group" and (group_id := _id(message.group_id, "groupId")):
        event.properties["group_id"] = group_id
    elif kind in {"page", "screen"}:
        _add_page(event, message, kind)
    _add_context(
        event, _object(message.context, "context") or _object(default_context, "context") or Struct()
    )
    return event


def _add_page(event: Event, message: CompatMessage, kind: str) -> None:
    for name, value in (("name", message.name), ("category", message.category)):
        if value and name not in event.properties.fields:
            event.properties[name] = value
    if kind == "page":
        event.url = _text(event.properties, "url")
        event.referrer = _text(event.properties, "referrer")


def _add_context(event: Event, context: Struct) -> None:
    """Fills the fields of the event from what surrounds it; the rest becomes properties such as `context.os.name`."""
    event.ip = event.ip or _text(context, "ip")
    event.user_agent = _text(context, "userAgent")
    page = context.fields["page"].struct_value if "page" in context.fields else Struct()
    event.url = event.url or _text(page, "url")
    event.referrer = event.referrer or _text(page, "referrer")
    left = _CONTEXT_NAMES
    for name, value in context.fields.items():
        inner = value.struct_value.fields if value.HasField("struct_value") and name != "traits" else {}
        pairs = {f"context.{name}": value, **{f"context.{name}.{key}": each for key, each in inner.items()}}
        for path, each in pairs.items():
            scalar = (
                each.HasField("string_value") or each.HasField("number_value") or each.HasField("bool_value")
            )
            if scalar and path not in _NO_PROPERTIES and left:
                event.properties.fields[path].CopyFrom(each)
                left -= 1


def _set_send_time(batch: IngestRequest, value: Value) -> None:
    """A time of sending that cannot be read is none."""
    try:
        if time := _time(value, "sentAt"):
            batch.send_time.CopyFrom(time)
    except MessageRefusedError:
        return


def _id(value: Value, name: str) -> str:
    """A text, or a number as people write it; empty when there is none."""
    match value.WhichOneof("kind"):
        case None | "null_value":
            return ""
        case "string_value":
            return value.string_value
        case "number_value":
            number = value.number_value
            return str(int(number)) if number.is_integer() else str(number)
    raise MessageRefusedError("MESSAGE_INVALID", f"{name}: must be a text or a number")


def _time(value: Value, name: str) -> Timestamp | None:
    """A time of ISO 8601, in UTC when it says nothing, or milliseconds since 1970; None when there is none."""
    time = Timestamp()
    try:
        match value.WhichOneof("kind"):
            case None | "null_value":
                return None
            case "string_value":
                time.FromDatetime(datetime.fromisoformat(value.string_value))  # in UTC when it says nothing
                return time
            case "number_value":
                time.FromMicroseconds(round(value.number_value * 1000))
                return time
    except (ValueError, OverflowError) as error:
        raise MessageRefusedError("TIME_INVALID", f"{name}: {error}"[:200]) from error
    raise MessageRefusedError("TIME_INVALID", f"{name}: must be a text or a number")


def _object(value: Value, name: str) -> Struct | None:
    """An object; None when there is none."""
    match value.WhichOneof("kind"):
        case None | "null_value":
            return None
        case "struct_value":
            return value.struct_value
    raise MessageRefusedError("MESSAGE_INVALID", f"{name}: must be an object")


def _text(struct: Struct, name: str) -> str:
    """The text of that name; empty when there is none."""
    return struct.fields[name].string_value if name in struct.fields else ""
