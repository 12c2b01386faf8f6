"""Sources, their write keys, and the grants on them."""

from collections.abc import Callable
from datetime import datetime
from typing import Any

import grpc.aio
from meshboard.analytics.v1 import events_pb2
from meshboard.analytics.v1.source_service_pb2 import (
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
from meshboard.user.v1 import grant_pb2
from meshboard.user.v1.internal_user_service_pb2 import CheckSubjectsRequest
from meshboard.user.v1.internal_user_service_pb2_grpc import InternalUserServiceStub
from sqlalchemy import Text, cast, delete, select, true, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.analytics_svc.convert import grant_to_pb, source_to_pb, subject_of, time_of
from services.analytics_svc.models import Source
from services.analytics_svc.write_keys import WriteKeys, new_write_key
from services.chassis import auth, errors, outbox, rights
from services.chassis.clients import Peer
from services.chassis.db import GrantRow
from services.chassis.masks import changed_fields
from services.chassis.paging import Pages

Context = grpc.aio.ServicerContext[Any, Any]

RESOURCE = "source"


class SourceServicer(SourceServiceServicer):
    """`new_id` gives UUIDv7s, whose order is that of creation."""

    def __init__(
        self,
        db: async_sessionmaker[AsyncSession],
        write_keys: WriteKeys,
        user: Peer,
        pages: Pages,
        *,
        now: Callable[[], datetime],
        new_id: Callable[[], str],
    ) -> None:
        self.db = db
        self.write_keys = write_keys
        self.subjects = user.stub(InternalUserServiceStub)
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
            session.add(
                GrantRow(
                    workspace_id=caller.workspace_id,
                    grant_id=self.new_id(),
                    resource_type=RESOURCE,
                    resource_id=source.source_id,
                    subject_type=rights.USER,
                    subject_id=caller.user_id,
                    role="owner",
                    effect=rights.ALLOW,
                    creator_id=caller.user_id,
                    create_time=now,
                )
            )
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
                    rights.visible(RESOURCE, Source.source_id, caller.rights, self.now()),
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
            await session.execute(
                delete(GrantRow).where(
                    GrantRow.workspace_id == workspace_id,
                    GrantRow.resource_type == RESOURCE,
                    GrantRow.resource_id == request.source_id,
                )
            )
            event = events_pb2.SourceDeleted(workspace_id=workspace_id, source_id=request.source_id)
            outbox.add(session, event, workspace_id=workspace_id)
        await self.write_keys.forget(key_hash)
        return DeleteSourceResponse()

    async def CreateSourceGrant(
        self, request: CreateSourceGrantRequest, context: Context
    ) -> CreateSourceGrantResponse:
        caller = auth.caller()
        if request.role not in rights.ROLES:
            raise errors.invalid_argument(
                "ROLE_UNKNOWN", f"There is no role {request.role}.", field="role", role=request.role
            )
        await self._require_subject(request.subject)
        subject_type, subject_id = subject_of(request.subject)
        expires = request.HasField("expire_time")
        async with self.db.begin() as session:
            grant = await session.scalar(
                insert(GrantRow)
                .values(
                    workspace_id=caller.workspace_id,
                    grant_id=self.new_id(),
                    resource_type=RESOURCE,
                    resource_id=request.source_id,
                    subject_type=subject_type,
                    subject_id=subject_id,
                    role=request.role,
                    effect=grant_pb2.Grant.Effect.Name(request.effect or grant_pb2.Grant.ALLOW),
                    expire_time=time_of(request.expire_time, "expire_time") if expires else None,
                    creator_id=caller.user_id,
                    request_id=request.request_id or None,
                    create_time=self.now(),
                )
                .on_conflict_do_nothing()
                .returning(GrantRow)
            )
            if grant is None:
                grant = await _repeated_grant(session, request)
        return CreateSourceGrantResponse(grant=grant_to_pb(grant))

    async def ListSourceGrants(
        self, request: ListSourceGrantsRequest, context: Context
    ) -> ListSourceGrantsResponse:
        workspace_id = auth.caller().workspace_id
        page = self.pages.open(request, workspace_id)
        async with self.db() as session:
            rows = await session.scalars(
                select(GrantRow)
                .where(
                    GrantRow.workspace_id == workspace_id,
                    GrantRow.resource_type == RESOURCE,
                    GrantRow.resource_id == request.source_id,
                    page.after(GrantRow.grant_id),
                )
                .order_by(GrantRow.grant_id)
                .limit(page.limit)
            )
        grants, next_page_token = page.close(rows.all(), lambda grant: (grant.grant_id,))
        return ListSourceGrantsResponse(grants=map(grant_to_pb, grants), next_page_token=next_page_token)

    async def DeleteSourceGrant(
        self, request: DeleteSourceGrantRequest, context: Context
    ) -> DeleteSourceGrantResponse:
        async with self.db.begin() as session:
            deleted = await session.scalar(
                delete(GrantRow)
                .where(
                    GrantRow.workspace_id == auth.caller().workspace_id,
                    GrantRow.resource_type == RESOURCE,
                    GrantRow.resource_id == request.source_id,
                    GrantRow.grant_id == request.grant_id,
                )
                .returning(GrantRow.grant_id)
            )
        if deleted is None:
            raise errors.not_found(
                "GRANT_NOT_FOUND", "The source has no such grant.", grant_id=request.grant_id
            )
        return DeleteSourceGrantResponse()

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

    async def _require_subject(self, subject: grant_pb2.Subject) -> None:
        """Raises INVALID_ARGUMENT unless the subject is of the caller's workspace, as user_svc says."""
        kind = subject.WhichOneof("subject")
        if kind not in {"user_id", "team_id"}:
            return
        subject_id = getattr(subject, kind)
        request = CheckSubjectsRequest(workspace_id=auth.caller().workspace_id)
        getattr(request, f"{kind}s").append(subject_id)
        found = await self.subjects.CheckSubjects(request)
        if not getattr(found, f"{kind}s"):
            what = kind.removesuffix("_id")
            raise errors.invalid_argument(
                "SUBJECT_UNKNOWN",
                f"The workspace has no such {what}.",
                field=f"subject.{kind}",
                subject_id=subject_id,
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


async def _repeated_grant(session: AsyncSession, request: CreateSourceGrantRequest) -> GrantRow:
    """The grant that an earlier call with this `request_id` made. Raises ALREADY_EXISTS when there was none."""
    caller = auth.caller()
    grant = await session.scalar(
        select(GrantRow).where(
            GrantRow.workspace_id == caller.workspace_id,
            GrantRow.resource_type == RESOURCE,
            GrantRow.resource_id == request.source_id,
            GrantRow.creator_id == caller.user_id,
            GrantRow.request_id == (request.request_id or None),
        )
    )
    if grant is None:
        raise errors.already_exists("GRANT_EXISTS", "The source has this grant already.")
    return grant


def _absent(source_id: str) -> errors.Error:
    return errors.not_found("SOURCE_NOT_FOUND", "There is no such source.", source_id=source_id)
