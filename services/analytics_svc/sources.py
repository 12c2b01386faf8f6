"""Sources, their write keys, and the grants on them."""

from collections.abc import Callable
from datetime import datetime
from typing import Any

import grpc.aio
from meshboard.analytics.v1 import events_pb2
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
    RotateWriteKeyRequest,
    RotateWriteKeyResponse,
    UpdateSourceRequest,
    UpdateSourceResponse,
)
from meshboard.analytics.v1.source_service_pb2_grpc import SourceServiceServicer
from sqlalchemy import Text, cast, delete, select, true, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.analytics_svc.convert import source_to_pb
from services.analytics_svc.failures import forget_source
from services.analytics_svc.models import Source
from services.analytics_svc.write_keys import WriteKeys, new_write_key
from services.chassis import auth, errors, outbox
from services.chassis.clients import Peer
from services.chassis.grants import Grants, grant_to_pb
from services.chassis.masks import changed_fields
from services.chassis.paging import Pages
from services.chassis.resources import Resource, visible

Context = grpc.aio.ServicerContext[Any, Any]

SOURCE = Resource("source", Source.workspace_id, Source.source_id)


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
                    write_key_hash=key.hash,
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
        fields = changed_fields(request.source, request.update_mask, {"title"})
        changes = {field: getattr(request.source, field) for field in fields}
        if changes.get("title") == "":
            raise errors.invalid_fields([("source.title", "must have at least 1 character")])
        etag = request.source.etag
        async with self.db.begin() as session:
            source = await self._change(
                session,
                request.source.source_id,
                changes,
                cast(Source.version, Text) == etag if etag else true(),
            )
            if source is None:
                raise errors.etag_mismatch() if etag else _absent(request.source.source_id)
            event = events_pb2.SourceUpdated(source=source_to_pb(source))
            outbox.add(session, event, workspace_id=source.workspace_id)
        await self.write_keys.forget(source.write_key_hash)
        return UpdateSourceResponse(source=source_to_pb(source))

    async def RotateWriteKey(
        self, request: RotateWriteKeyRequest, context: Context
    ) -> RotateWriteKeyResponse:
        workspace_id = auth.caller().workspace_id
        key = new_write_key()
        async with self.db.begin() as session:
            old_hash = await session.scalar(
                select(Source.write_key_hash)
                .where(Source.workspace_id == workspace_id, Source.source_id == request.source_id)
                .with_for_update()
            )
            source = await self._change(
                session, request.source_id, {"write_key_hash": key.hash, "write_key_prefix": key.prefix}
            )
            if source is None or old_hash is None:
                raise _absent(request.source_id)
            event = events_pb2.WriteKeyRotated(workspace_id=workspace_id, source_id=source.source_id)
            outbox.add(session, event, workspace_id=workspace_id)
        await self.write_keys.forget(old_hash)
        return RotateWriteKeyResponse(source=source_to_pb(source), write_key=key.secret)

    async def DeleteSource(self, request: DeleteSourceRequest, context: Context) -> DeleteSourceResponse:
        workspace_id = auth.caller().workspace_id
        async with self.db.begin() as session:
            key_hash = await session.scalar(
                delete(Source)
                .where(Source.workspace_id == workspace_id, Source.source_id == request.source_id)
                .returning(Source.write_key_hash)
            )
            if key_hash is None:
                raise _absent(request.source_id)
            await self.grants.forget(session, request.source_id)
            await forget_source(session, workspace_id, request.source_id)
            event = events_pb2.SourceDeleted(workspace_id=workspace_id, source_id=request.source_id)
            outbox.add(session, event, workspace_id=workspace_id)
        await self.write_keys.forget(key_hash)
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

    async def _change(
        self, session: AsyncSession, source_id: str, changes: dict[str, Any], *conditions: Any
    ) -> Source | None:
        return await session.scalar(
            update(Source)
            .where(
                Source.workspace_id == auth.caller().workspace_id, Source.source_id == source_id, *conditions
            )
            .values(**changes, version=Source.version + 1, update_time=self.now())
            .returning(Source)
        )


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
