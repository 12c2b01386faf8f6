"""The catalogue: the event names and properties of a source, as the store knows them and as people describe them."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp
from meshboard.analytics.v1.catalogue_pb2 import CatalogueEvent, CatalogueProperty
from meshboard.analytics.v1.catalogue_service_pb2 import (
    GetCatalogueEventRequest,
    GetCatalogueEventResponse,
    GetCataloguePropertyRequest,
    GetCataloguePropertyResponse,
    ListCatalogueEventsRequest,
    ListCatalogueEventsResponse,
    ListCataloguePropertiesRequest,
    ListCataloguePropertiesResponse,
    PropertyEvent,
    PropertyValue,
    UpdateCatalogueEventRequest,
    UpdateCatalogueEventResponse,
    UpdateCataloguePropertyRequest,
    UpdateCataloguePropertyResponse,
)
from meshboard.analytics.v1.catalogue_service_pb2_grpc import CatalogueServiceServicer
from meshboard.analytics.v1.events_pb2 import CatalogueEventUpdated, CataloguePropertyUpdated
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.analytics_svc.models import CatalogueEntry, Source
from services.analytics_svc.selection import OWN, Selection
from services.analytics_svc.summaries import MAX_NAMES, SAMPLES, Seen, Summaries, Values
from services.chassis import auth, errors, outbox
from services.chassis.masks import changed_fields
from services.chassis.paging import Pages
from services.chassis.search import Query, words_of
from services.chassis.texts import clean_name
from services.chassis.times import timestamp_of

Context = grpc.aio.ServicerContext[Any, Any]

EVENT, PROPERTY = "event", "property"
MAX_ENTRIES = 10_000
_MUTABLE = {"description", "tags", "hidden"}
_NOTHING_SAID = "0"


class _Name(NamedTuple):
    """A name with what was seen and said of it; either may be missing, not both."""

    name: str
    seen: Seen | None
    entry: CatalogueEntry | None

    @property
    def key(self) -> tuple[int, str]:
        """The order of lists: the most frequent first."""
        return -(self.seen.count if self.seen else 0), self.name


class CatalogueServicer(CatalogueServiceServicer):
    """The access stage has checked `sources.query` or `sources.edit` on the source."""

    def __init__(
        self,
        db: async_sessionmaker[AsyncSession],
        summaries: Summaries,
        pages: Pages,
        now: Callable[[], datetime],
    ) -> None:
        self.db = db
        self.summaries = summaries
        self.pages = pages
        self.now = now

    async def ListCatalogueEvents(
        self, request: ListCatalogueEventsRequest, context: Context
    ) -> ListCatalogueEventsResponse:
        workspace_id = auth.caller().workspace_id
        page = self.pages.open(request, workspace_id)
        seen = await self.summaries.events(workspace_id, request.source_id)
        names = _chosen(request, seen, await self._entries(workspace_id, request.source_id, EVENT))
        shown, next_page_token = page.close(page.rest(names, _key), _key)
        return ListCatalogueEventsResponse(
            events=[_event_to_pb(request.source_id, one) for one in shown],
            next_page_token=next_page_token,
            truncated=len(seen) > MAX_NAMES,
        )

    async def GetCatalogueEvent(
        self, request: GetCatalogueEventRequest, context: Context
    ) -> GetCatalogueEventResponse:
        workspace_id = auth.caller().workspace_id
        seen = await self.summaries.events(workspace_id, request.source_id)
        entry = await self._entry(workspace_id, request.source_id, EVENT, request.name)
        one = _Name(request.name, next((s for s in seen if s.name == request.name), None), entry)
        if not one.seen and not one.entry:
            raise _absent(request.name)
        return GetCatalogueEventResponse(event=_event_to_pb(request.source_id, one))

    async def UpdateCatalogueEvent(
        self, request: UpdateCatalogueEventRequest, context: Context
    ) -> UpdateCatalogueEventResponse:
        workspace_id = auth.caller().workspace_id
        fields = changed_fields(request.event, request.update_mask, _MUTABLE)
        async with self.db.begin() as session:
            entry = await self._say(session, EVENT, request.event, fields)
            event = _event_to_pb(request.event.source_id, _Name(request.event.name, None, entry))
            updated = CatalogueEventUpdated(workspace_id=workspace_id, event=event)
            outbox.add(session, updated, workspace_id=workspace_id)
        return UpdateCatalogueEventResponse(event=event)

    async def ListCatalogueProperties(
        self, request: ListCataloguePropertiesRequest, context: Context
    ) -> ListCataloguePropertiesResponse:
        workspace_id = auth.caller().workspace_id
        page = self.pages.open(request, workspace_id)
        seen = await self.summaries.properties(workspace_id, request.source_id, request.event)
        entries = await self._entries(workspace_id, request.source_id, PROPERTY)
        names = _chosen(request, seen, entries)
        if request.event:
            names = [one for one in names if one.seen]
        shown, next_page_token = page.close(page.rest(names, _key), _key)
        values = await self.summaries.values(
            workspace_id, request.source_id, request.event, [one.seen for one in shown if one.seen]
        )
        return ListCataloguePropertiesResponse(
            properties=[
                _property_to_pb(request.source_id, one, values.get(one.name, Values())) for one in shown
            ],
            next_page_token=next_page_token,
            truncated=len(seen) > MAX_NAMES,
        )

    async def GetCatalogueProperty(
        self, request: GetCataloguePropertyRequest, context: Context
    ) -> GetCataloguePropertyResponse:
        workspace_id, source_id, name = auth.caller().workspace_id, request.source_id, request.name
        profile = await self.summaries.profile(workspace_id, source_id, name)
        entry = await self._entry(workspace_id, source_id, PROPERTY, name)
        if profile is None:
            if entry is None:
                raise _absent(name)
            return GetCataloguePropertyResponse(
                property=_property_to_pb(source_id, _Name(name, None, entry), Values())
            )
        if name.startswith(OWN):
            found = await self.summaries.values(workspace_id, source_id, "", [profile.seen])
            values = found[name]
        else:
            kind = CatalogueProperty.BOOLEAN if name == "is_robot" else CatalogueProperty.STRING
            values = Values(kind, [row[0] for row in profile.values[:SAMPLES]])
        return GetCataloguePropertyResponse(
            property=_property_to_pb(source_id, _Name(name, profile.seen, entry), values),
            values=[PropertyValue(value=value, count=count) for value, count in profile.values],
            events=[PropertyEvent(name=event, count=count) for event, count in profile.events],
        )

    async def UpdateCatalogueProperty(
        self, request: UpdateCataloguePropertyRequest, context: Context
    ) -> UpdateCataloguePropertyResponse:
        workspace_id, wanted = auth.caller().workspace_id, request.property
        fields = changed_fields(wanted, request.update_mask, _MUTABLE)
        Selection(workspace_id, [], None, None).property(wanted.name, "property.name")
        async with self.db.begin() as session:
            entry = await self._say(session, PROPERTY, wanted, fields)
            changed = _property_to_pb(wanted.source_id, _Name(wanted.name, None, entry), Values())
            updated = CataloguePropertyUpdated(workspace_id=workspace_id, property=changed)
            outbox.add(session, updated, workspace_id=workspace_id)
        return UpdateCataloguePropertyResponse(property=changed)

    async def _entries(self, workspace_id: str, source_id: str, kind: str) -> dict[str, CatalogueEntry]:
        async with self.db() as session:
            rows = await session.scalars(
                select(CatalogueEntry).where(
                    CatalogueEntry.workspace_id == workspace_id,
                    CatalogueEntry.source_id == source_id,
                    CatalogueEntry.kind == kind,
                )
            )
        return {row.name: row for row in rows}

    async def _entry(self, workspace_id: str, source_id: str, kind: str, name: str) -> CatalogueEntry | None:
        async with self.db() as session:
            return await session.get(CatalogueEntry, (workspace_id, source_id, kind, name))

    async def _say(
        self, session: AsyncSession, kind: str, wanted: CatalogueEvent | CatalogueProperty, fields: set[str]
    ) -> CatalogueEntry | None:
        """Writes what is said; None when nothing is left. Where nothing is said there is no row."""
        workspace_id = auth.caller().workspace_id
        held = await session.scalar(
            select(Source.source_id)
            .where(Source.workspace_id == workspace_id, Source.source_id == wanted.source_id)
            .with_for_update(key_share=True)
        )
        if held is None:
            raise errors.not_found("SOURCE_NOT_FOUND", "There is no such source.", source_id=wanted.source_id)
        entry = await session.get(CatalogueEntry, (workspace_id, held, kind, wanted.name))
        if wanted.etag and wanted.etag != _etag(entry):
            raise errors.etag_mismatch()
        said: dict[str, Any] = {
            "description": entry.description if entry else "",
            "tags": entry.tags if entry else [],
            "hidden": entry.hidden if entry else False,
        }
        said |= {name: getattr(wanted, name) for name in fields}
        said["tags"] = [clean_name(tag, f"{kind}.tags[{i}]") for i, tag in enumerate(said["tags"])]
        if not any(said.values()):
            if entry is not None:
                await session.delete(entry)
            return None
        if entry is None:
            await self._require_room(session, held)
            entry = CatalogueEntry(workspace_id=workspace_id, source_id=held, kind=kind, name=wanted.name)
            session.add(entry)
        for name, value in said.items():
            setattr(entry, name, value)
        entry.update_time = self.now()
        return entry

    async def _require_room(self, session: AsyncSession, source_id: str) -> None:
        count = await session.scalar(
            select(func.count()).where(
                CatalogueEntry.workspace_id == auth.caller().workspace_id,
                CatalogueEntry.source_id == source_id,
            )
        )
        if count is not None and count >= MAX_ENTRIES:
            raise errors.resource_exhausted(
                "CATALOGUE_FULL", f"Something is said about {MAX_ENTRIES} names of this source."
            )


def _chosen(
    request: ListCatalogueEventsRequest | ListCataloguePropertiesRequest,
    seen: Sequence[Seen],
    entries: Mapping[str, CatalogueEntry],
) -> list[_Name]:
    """What a list shows of the names seen and described, in its order."""
    words = Query.of(request.query).words if request.query else ()
    names = [_Name(one.name, one, entries.get(one.name)) for one in seen[:MAX_NAMES]]
    known = {one.name for one in names}
    names += [_Name(name, None, entry) for name, entry in entries.items() if name not in known]

    def wanted(one: _Name) -> bool:
        entry = one.entry
        if entry is not None and entry.hidden and not request.include_hidden:
            return False
        if request.tag and (entry is None or request.tag not in entry.tags):
            return False
        if not words:
            return True
        text = _folded(one.name, *((entry.description, *entry.tags) if entry else ()))
        return all(word in text for word in words)

    return sorted(filter(wanted, names), key=_key)


@lru_cache(maxsize=20_000)
def _folded(*texts: str) -> str:
    return " ".join(word for text in texts for word in words_of(text))


def _key(one: _Name) -> tuple[int, str]:
    return one.key


def _etag(entry: CatalogueEntry | None) -> str:
    """Follows from what is said, so that a row that went away and came back is no other."""
    if entry is None:
        return _NOTHING_SAID
    said = json.dumps([entry.description, entry.tags, entry.hidden])
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _event_to_pb(source_id: str, one: _Name) -> CatalogueEvent:
    return CatalogueEvent(source_id=source_id, name=one.name, **_said(one.entry), **_known(one.seen))


def _property_to_pb(source_id: str, one: _Name, values: Values) -> CatalogueProperty:
    return CatalogueProperty(
        source_id=source_id,
        name=one.name,
        type=values.type,
        sample_values=values.samples,
        number_count=one.seen.number_count if one.seen else 0,
        **_said(one.entry),
        **_known(one.seen),
    )


def _said(entry: CatalogueEntry | None) -> dict[str, Any]:
    if entry is None:
        return {"etag": _NOTHING_SAID}
    return {
        "description": entry.description,
        "tags": entry.tags,
        "hidden": entry.hidden,
        "etag": _etag(entry),
        "update_time": timestamp_of(entry.update_time),
    }


def _known(seen: Seen | None) -> dict[str, Any]:
    if seen is None:
        return {}
    first, last = Timestamp(), Timestamp()
    first.FromMilliseconds(seen.first_seen)
    last.FromMilliseconds(seen.last_seen)
    return {
        "count": seen.count,
        "recent_count": seen.recent_count,
        "first_seen_time": first,
        "last_seen_time": last,
    }


def _absent(name: str) -> errors.Error:
    return errors.not_found(
        "CATALOGUE_NAME_NOT_FOUND", "The source has no such name, seen or described.", name=name
    )
