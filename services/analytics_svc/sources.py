"""Sources, what they say of their events, and the grants on them."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import grpc.aio
from meshboard.analytics.v1 import events_pb2
from meshboard.analytics.v1.source_pb2 import Source as SourceMessage
from meshboard.analytics.v1.source_service_pb2 import (
    BatchUpdateSourceGrantsRequest,
    BatchUpdateSourceGrantsResponse,
    CreateSourceGrantRequest,
    CreateSourceGrantResponse,
    CreateSourceRequest,
    CreateSourceResponse,
    DeleteSourceGrantRequest,
    DeleteSourceGrantResponse,
    DeleteSourceRequest,
    DeleteSourceResponse,
    GetSourceRequest,
    GetSourceResponse,
    ListSourceGrantsRequest,
    ListSourceGrantsResponse,
    ListSourcesRequest,
    ListSourcesResponse,
    ListSourceUsageRequest,
    ListSourceUsageResponse,
    RotateWriteKeyRequest,
    RotateWriteKeyResponse,
    UpdateSourceRequest,
    UpdateSourceResponse,
)
from meshboard.analytics.v1.source_service_pb2_grpc import SourceServiceServicer
from sqlalchemy import Text, cast, delete, select, true, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.analytics_svc.convert import column_of, source_to_pb, usage_to_pb, write_key_to_pb
from services.analytics_svc.failures import forget_source
from services.analytics_svc.models import Source, SourceUsage, WriteKey
from services.analytics_svc.redaction import BadPatternError, Patterns
from services.analytics_svc.write_keys import (
    NewKey,
    WriteKeys,
    check_room,
    lock_source,
    new_write_key,
    show_newest,
)
from services.chassis import auth, errors, outbox
from services.chassis.clients import Peer
from services.chassis.grants import Grants, grant_to_pb
from services.chassis.masks import changed_fields
from services.chassis.paging import Pages
from services.chassis.resources import Resource, visible

Context = grpc.aio.ServicerContext[Any, Any]

SOURCE = Resource("source", Source.workspace_id, Source.source_id)
# The title of a key that comes with its source.
FIRST_KEY = "First"
_CHANGEABLE = {
    "title",
    "allowed_origins",
    "allowed_events",
    "property_types",
    "redacted_properties",
    "redacted_patterns",
    "sample_rate",
    "robots",
    "retention_days",
    "events_per_day",
    "events_per_month",
}


class SourceServicer(SourceServiceServicer):
    """`new_id` gives UUIDv7s, whose order is that of creation."""

    def __init__(
        self,
        db: async_sessionmaker[AsyncSession],
        write_keys: WriteKeys,
        grants: Grants,
        pages: Pages,
        *,
        now: Callable[[], datetime],
        new_id: Callable[[], str],
    ) -> None:
        self.db = db
        self.write_keys = write_keys
        self.grants = grants
        self.pages = pages
        self.now = now
        self.new_id = new_id

    async def CreateSource(self, request: CreateSourceRequest, context: Context) -> CreateSourceResponse:
        caller = auth.caller()
        key = new_write_key()
        now = self.now()
        async with self.db.begin() as session:
            source = await session.scalar(
                insert(Source)
                .values(
                    workspace_id=caller.workspace_id,
                    source_id=self.new_id(),
                    title=request.title,
                    write_key_prefix=key.prefix,
                    creator_id=caller.user_id,
                    request_id=request.request_id or None,
                    create_time=now,
                    update_time=now,
                )
                .on_conflict_do_nothing(constraint="sources_request_once")
                .returning(Source)
            )
            if source is None:
                return CreateSourceResponse(source=source_to_pb(await _repeated(session, request.request_id)))
            session.add(self._key_row(source, key, FIRST_KEY))
            self.grants.own(session, source.source_id)
            event = events_pb2.SourceCreated(source=source_to_pb(source))
            outbox.add(session, event, workspace_id=caller.workspace_id)
        return CreateSourceResponse(source=source_to_pb(source), write_key=key.secret)

    async def GetSource(self, request: GetSourceRequest, context: Context) -> GetSourceResponse:
        async with self.db() as session:
            source = await session.get(Source, (auth.caller().workspace_id, request.source_id))
        if source is None:
            raise _absent(request.source_id)
        return GetSourceResponse(source=source_to_pb(source))

    async def ListSources(self, request: ListSourcesRequest, context: Context) -> ListSourcesResponse:
        caller = auth.caller()
        assert caller.rights is not None
        page = self.pages.open(request, f"{caller.workspace_id} {caller.user_id}")
        async with self.db() as session:
            rows = await session.scalars(
                select(Source)
                .where(
                    Source.workspace_id == caller.workspace_id,
                    visible(SOURCE, caller.rights, self.now()),
                    page.after(Source.source_id, descending=True),
                )
                .order_by(Source.source_id.desc())
                .limit(page.limit)
            )
        sources, next_page_token = page.close(rows.all(), lambda source: (source.source_id,))
        return ListSourcesResponse(sources=map(source_to_pb, sources), next_page_token=next_page_token)

    async def UpdateSource(self, request: UpdateSourceRequest, context: Context) -> UpdateSourceResponse:
        fields = changed_fields(request.source, request.update_mask, _CHANGEABLE)
        _check(request.source, fields)
        changes = {field: column_of(request.source, field) for field in fields}
        etag = request.source.etag
        async with self.db.begin() as session:
            source = await session.scalar(
                update(Source)
                .where(
                    Source.workspace_id == auth.caller().workspace_id,
                    Source.source_id == request.source.source_id,
                    cast(Source.version, Text) == etag if etag else true(),
                )
                .values(**changes, version=Source.version + 1, update_time=self.now())
                .returning(Source)
            )
            if source is None:
                raise errors.etag_mismatch() if etag else _absent(request.source.source_id)
            event = events_pb2.SourceUpdated(source=source_to_pb(source))
            outbox.add(session, event, workspace_id=source.workspace_id)
        await self.write_keys.forget_source(source.source_id)
        return UpdateSourceResponse(source=source_to_pb(source))

    async def RotateWriteKey(
        self, request: RotateWriteKeyRequest, context: Context
    ) -> RotateWriteKeyResponse:
        now, key = self.now(), new_write_key()
        async with self.db.begin() as session:
            source = await lock_source(session, request.source_id)
            old = await _end_keys(session, source, now, now + timedelta(seconds=request.overlap_seconds))
            row = self._key_row(source, key, old[0].title if old else FIRST_KEY)
            session.add(row)
            await session.flush()
            await check_room(session, request.source_id)
            await show_newest(session, source, now)
            event = events_pb2.WriteKeyRotated(
                workspace_id=source.workspace_id,
                source_id=source.source_id,
                overlap_seconds=request.overlap_seconds,
                write_key=write_key_to_pb(row),
            )
            outbox.add(session, event, workspace_id=source.workspace_id)
        await self.write_keys.forget(*(one.key_hash for one in old))
        return RotateWriteKeyResponse(source=source_to_pb(source), write_key=key.secret)

    async def ListSourceUsage(
        self, request: ListSourceUsageRequest, context: Context
    ) -> ListSourceUsageResponse:
        workspace_id = auth.caller().workspace_id
        page = self.pages.open(request, f"{workspace_id} {request.source_id}")
        day = cast(SourceUsage.day, Text)
        async with self.db() as session:
            rows = await session.scalars(
                select(SourceUsage)
                .where(
                    SourceUsage.workspace_id == workspace_id,
                    SourceUsage.source_id == request.source_id,
                    SourceUsage.event_count > 0,
                    page.after(day, descending=True),
                )
                .order_by(SourceUsage.day.desc())
                .limit(page.limit)
            )
        days, next_page_token = page.close(rows.all(), lambda row: (row.day.isoformat(),))
        return ListSourceUsageResponse(days=map(usage_to_pb, days), next_page_token=next_page_token)

    async def DeleteSource(self, request: DeleteSourceRequest, context: Context) -> DeleteSourceResponse:
        workspace_id = auth.caller().workspace_id
        async with self.db.begin() as session:
            deleted = await session.scalar(
                delete(Source)
                .where(Source.workspace_id == workspace_id, Source.source_id == request.source_id)
                .returning(Source.source_id)
            )
            if deleted is None:
                raise _absent(request.source_id)
            await self.grants.forget(session, request.source_id)
            await forget_source(session, workspace_id, request.source_id)
            event = events_pb2.SourceDeleted(workspace_id=workspace_id, source_id=request.source_id)
            outbox.add(session, event, workspace_id=workspace_id)
        await self.write_keys.forget_source(request.source_id)
        return DeleteSourceResponse()

    async def CreateSourceGrant(
        self, request: CreateSourceGrantRequest, context: Context
    ) -> CreateSourceGrantResponse:
        return CreateSourceGrantResponse(grant=await self.grants.create(request.source_id, request))

    async def ListSourceGrants(
        self, request: ListSourceGrantsRequest, context: Context
    ) -> ListSourceGrantsResponse:
        grants, next_page_token = await self.grants.list(request.source_id, request)
        return ListSourceGrantsResponse(grants=grants, next_page_token=next_page_token)

    async def DeleteSourceGrant(
        self, request: DeleteSourceGrantRequest, context: Context
    ) -> DeleteSourceGrantResponse:
        await self.grants.delete(request.source_id, request.grant_id)
        return DeleteSourceGrantResponse()

    async def BatchUpdateSourceGrants(
        self, request: BatchUpdateSourceGrantsRequest, context: Context
    ) -> BatchUpdateSourceGrantsResponse:
        grants = await self.grants.batch_update(request.source_id, request)
        return BatchUpdateSourceGrantsResponse(grants=grants)

    def _key_row(self, source: Source, key: NewKey, title: str) -> WriteKey:
        return WriteKey(
            workspace_id=source.workspace_id,
            source_id=source.source_id,
            write_key_id=self.new_id(),
            title=title,
            prefix=key.prefix,
            key_hash=key.hash,
            creator_id=auth.caller().user_id,
            create_time=self.now(),
        )


def _check(source: SourceMessage, fields: set[str]) -> None:
    """What the rules of the contract cannot say. Raises INVALID_ARGUMENT naming the field."""
    if "title" in fields and not source.title:
        raise errors.invalid_fields([("source.title", "must have at least 1 character")])
    names = [wanted.name for wanted in source.property_types]
    if "property_types" in fields and len(set(names)) < len(names):
        raise errors.invalid_fields([("source.property_types", "must have each name once")])
    for index, pattern in enumerate(source.redacted_patterns if "redacted_patterns" in fields else ()):
        try:
            Patterns([pattern])
        except BadPatternError as error:
            raise errors.invalid_argument(
                "REDACTED_PATTERN_INVALID",
                f"The regular expression {error}.",
                field=f"source.redacted_patterns[{index}].regex",
            ) from error


async def _end_keys(session: AsyncSession, source: Source, now: datetime, end: datetime) -> list[WriteKey]:
    """Has the keys of a source expire at `end` at the latest; deletes those that have. Gives all, the newest first."""
    keys = (
        await session.scalars(
            select(WriteKey)
            .where(WriteKey.workspace_id == source.workspace_id, WriteKey.source_id == source.source_id)
            .order_by(WriteKey.create_time.desc(), WriteKey.write_key_id.desc())
            .with_for_update()
        )
    ).all()
    for key in keys:
        key.expire_time = min(key.expire_time or end, end)
        if key.expire_time <= now:
            await session.delete(key)
    source.write_key_hash = None
    return list(keys)


async def _repeated(session: AsyncSession, request_id: str) -> Source:
    caller = auth.caller()
    rows = await session.scalars(
        select(Source).where(
            Source.workspace_id == caller.workspace_id,
            Source.creator_id == caller.user_id,
            Source.request_id == request_id,
        )
    )
    return rows.one()


def grants_on_sources(
    db: async_sessionmaker[AsyncSession],
    user: Peer,
    pages: Pages,
    *,
    now: Callable[[], datetime],
    new_id: Callable[[], str],
) -> Grants:
    """The grants on sources."""
    return Grants(
        db,
        SOURCE,
        user,
        pages,
        created=lambda row: events_pb2.SourceGrantCreated(
            workspace_id=row.workspace_id, source_id=row.resource_id, grant=grant_to_pb(row)
        ),
        deleted=lambda row: events_pb2.SourceGrantDeleted(
            workspace_id=row.workspace_id, source_id=row.resource_id, grant_id=row.grant_id
        ),
        now=now,
        new_id=new_id,
    )


def _absent(source_id: str) -> errors.Error:
    return errors.not_found("SOURCE_NOT_FOUND", "There is no such source.", source_id=source_id)
