"""The kinds of widgets that workspaces make."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from typing import Any

from meshboard.dashboard.v1 import widget_kind_pb2
from meshboard.dashboard.v1 import widget_kind_service_pb2 as pb
from meshboard.dashboard.v1.events_pb2 import WidgetKindCreated, WidgetKindDeleted, WidgetKindUpdated
from meshboard.dashboard.v1.widget_kind_service_pb2_grpc import WidgetKindServiceServicer
from sqlalchemy import ColumnElement, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import auth, errors, outbox, times
from services.chassis.db import lock, new_id
from services.chassis.masks import changed_fields
from services.chassis.paging import Pages
from services.chassis.texts import clean_name
from services.dashboard_svc.contents import only
from services.dashboard_svc.convert import copy_field, widget_kind_to_pb
from services.dashboard_svc.custom_widgets import absent, read_version
from services.dashboard_svc.models import LibraryWidget, Widget, WidgetKind, WidgetKindVersion
from services.dashboard_svc.widget_definitions import WidgetDefinition
from services.dashboard_svc.widget_upgrades import WidgetUpgrades

Context = Any
MAX_WIDGET_KINDS = 100
MAX_VERSIONS = 1000
# What a version has.
VERSIONED = ("options_schema", "query_template", "spec")
MUTABLE = ("title", "description", *VERSIONED)
# The lock under which a workspace's kinds become more: "kind" in ASCII.
_KINDS_LOCK = 0x6B696E64


class WidgetKindServicer(WidgetKindServiceServicer):
    """meshboard.dashboard.v1.WidgetKindService."""

    def __init__(
        self,
        db: async_sessionmaker[AsyncSession],
        pages: Pages,
        upgrades: WidgetUpgrades,
        *,
        now: Callable[[], datetime] = times.now,
    ) -> None:
        self.db = db
        self.pages = pages
        self.upgrades = upgrades
        self.now = now

    async def CreateWidgetKind(
        self, request: pb.CreateWidgetKindRequest, context: Context
    ) -> pb.CreateWidgetKindResponse:
        """Makes the kind and its first version."""
        caller, now = auth.caller(), self.now()
        kind = _fields_of(request)
        kind.title = clean_name(request.title, "title")
        await asyncio.to_thread(WidgetDefinition, kind)
        async with self.db.begin() as session:
            await lock(session, _KINDS_LOCK, caller.workspace_id)
            row = await session.scalar(
                insert(WidgetKind)
                .values(
                    workspace_id=caller.workspace_id,
                    widget_kind_id=new_id(),
                    name=request.name,
                    title=kind.title,
                    description=kind.description,
                    number=1,
                    version=1,
                    creator_id=caller.user_id,
                    request_id=request.request_id or None,
                    create_time=now,
                    update_time=now,
                )
                .on_conflict_do_nothing()
                .returning(WidgetKind)
            )
            if row is None:
                return pb.CreateWidgetKindResponse(widget_kind=await _repeated(session, request))
            await _check_room(session, caller.workspace_id)
            created = widget_kind_to_pb(row, await self._add_version(session, row, kind))
            outbox.add(session, WidgetKindCreated(widget_kind=created), workspace_id=caller.workspace_id)
        return pb.CreateWidgetKindResponse(widget_kind=created)

    async def GetWidgetKind(
        self, request: pb.GetWidgetKindRequest, context: Context
    ) -> pb.GetWidgetKindResponse:
        """Reads the rows of the kind and the version."""
        async with self.db() as session:
            row = await _kind(session, request.widget_kind_id)
            version = await read_version(session, row, request.version)
        return pb.GetWidgetKindResponse(widget_kind=widget_kind_to_pb(row, version))

    async def ListWidgetKinds(
        self, request: pb.ListWidgetKindsRequest, context: Context
    ) -> pb.ListWidgetKindsResponse:
        """Lists by names."""
        workspace_id = auth.caller().workspace_id
        page = self.pages.open(request, workspace_id)
        async with self.db() as session:
            rows = await session.scalars(
                select(WidgetKind)
                .where(WidgetKind.workspace_id == workspace_id, page.after(WidgetKind.name))
                .order_by(WidgetKind.name)
                .limit(page.limit)
            )
        found, next_page_token = page.close(rows.all(), lambda row: (row.name,))
        return pb.ListWidgetKindsResponse(
            widget_kinds=map(widget_kind_to_pb, found), next_page_token=next_page_token
        )

    async def UpdateWidgetKind(
        self, request: pb.UpdateWidgetKindRequest, context: Context
    ) -> pb.UpdateWidgetKindResponse:
        """Changes what the mask names; adds a version when that is to be another."""
        caller, wanted = auth.caller(), request.widget_kind
        fields = changed_fields(wanted, request.update_mask, MUTABLE)
        title = clean_name(wanted.title, "widget_kind.title") if "title" in fields else ""
        async with self.db() as session:
            judged = await _kind(session, wanted.widget_kind_id)
            before = widget_kind_to_pb(judged, await read_version(session, judged, 0))
        kind = _with(before, wanted, fields)
        await asyncio.to_thread(WidgetDefinition, kind)
        async with self.db.begin() as session:
            # What was judged is what is there, or nothing is done.
            row = await _locked(session, wanted.widget_kind_id, wanted.etag or before.etag)
            row.title, row.description = title or row.title, kind.description
            row.version += 1
            row.update_time = self.now()
            if only(kind, VERSIONED) == only(before, VERSIONED):
                version = await read_version(session, row, 0)
            else:
                row.number += 1
                version = await self._add_version(session, row, kind)
            updated = widget_kind_to_pb(row, version)
            outbox.add(session, WidgetKindUpdated(widget_kind=updated), workspace_id=caller.workspace_id)
        return pb.UpdateWidgetKindResponse(widget_kind=updated)

    async def DeleteWidgetKind(
        self, request: pb.DeleteWidgetKindRequest, context: Context
    ) -> pb.DeleteWidgetKindResponse:
        """Deletes the row; the lock keeps widgets from being made of the kind meanwhile."""
        async with self.db.begin() as session:
            row = await _locked(session, request.widget_kind_id, request.etag)
            counts = await _widgets_by_version(session, row)
            if count := sum(counts.values()):
                raise errors.failed_precondition(
                    "WIDGET_KIND_IN_USE", f"There are {count} widgets of this kind.", widgets=count
                )
            await session.delete(row)
            gone = WidgetKindDeleted(
                workspace_id=row.workspace_id, widget_kind_id=row.widget_kind_id, name=row.name
            )
            outbox.add(session, gone, workspace_id=row.workspace_id)
        return pb.DeleteWidgetKindResponse()

    async def ListWidgetKindVersions(
        self, request: pb.ListWidgetKindVersionsRequest, context: Context
    ) -> pb.ListWidgetKindVersionsResponse:
        """Lists without the contents."""
        page = self.pages.open(request, auth.caller().workspace_id)
        async with self.db() as session:
            kind = await _kind(session, request.widget_kind_id)
            rows = await session.execute(
                select(WidgetKindVersion.number, WidgetKindVersion.creator_id, WidgetKindVersion.create_time)
                .where(
                    WidgetKindVersion.workspace_id == kind.workspace_id,
                    WidgetKindVersion.widget_kind_id == kind.widget_kind_id,
                    page.after(WidgetKindVersion.number, descending=True),
                )
                .order_by(WidgetKindVersion.number.desc())
                .limit(page.limit)
            )
            counts = await _widgets_by_version(session, kind)
        found, next_page_token = page.close(rows.all(), lambda row: (row.number,))
        return pb.ListWidgetKindVersionsResponse(
            versions=[
                widget_kind_pb2.WidgetKindVersion(
                    version=number,
                    creator_id=creator_id,
                    create_time=times.timestamp_of(create_time),
                    widgets=counts.get(number, 0),
                )
                for number, creator_id, create_time in found
            ],
            next_page_token=next_page_token,
        )

    async def CheckWidgetKindUpgrade(
        self, request: pb.CheckWidgetKindUpgradeRequest, context: Context
    ) -> pb.CheckWidgetKindUpgradeResponse:
        """Makes of each widget's options what the version would, and tells of which it cannot."""
        async with self.db() as session:
            row = await _kind(session, request.widget_kind_id)
            kind = widget_kind_to_pb(row, await read_version(session, row, request.version))
        given = {field.name for field, _ in request.ListFields()}
        proposed = [field for field in VERSIONED if field in given]
        if proposed:
            kind = _with(kind, request, proposed)
            kind.version = 0
        return await self.upgrades.check(kind, request)

    async def UpgradeWidgets(
        self, request: pb.UpgradeWidgetsRequest, context: Context
    ) -> pb.UpgradeWidgetsResponse:
        """Moves the widgets of one page, dashboard by dashboard."""
        async with self.db() as session:
            row = await _kind(session, request.widget_kind_id)
            kind = widget_kind_to_pb(row, await read_version(session, row, request.version))
        return await self.upgrades.upgrade(kind, request)

    async def _add_version(
        self, session: AsyncSession, row: WidgetKind, kind: widget_kind_pb2.WidgetKind
    ) -> WidgetKindVersion:
        if row.number > MAX_VERSIONS:
            raise errors.failed_precondition(
                "TOO_MANY_WIDGET_KINDS", f"A kind has at most {MAX_VERSIONS} versions.", limit=MAX_VERSIONS
            )
        version = WidgetKindVersion(
            workspace_id=row.workspace_id,
            widget_kind_id=row.widget_kind_id,
            number=row.number,
            content=only(kind, VERSIONED).SerializeToString(deterministic=True),
            creator_id=auth.caller().user_id,
            create_time=self.now(),
        )
        session.add(version)
        await session.flush()
        return version


def _fields_of(request: pb.CreateWidgetKindRequest) -> widget_kind_pb2.WidgetKind:
    return _with(widget_kind_pb2.WidgetKind(), request, MUTABLE)


def _with(kind: widget_kind_pb2.WidgetKind, other: Any, fields: Any) -> widget_kind_pb2.WidgetKind:
    """A copy of the kind with these fields of another message; an empty spec is none."""
    copy = widget_kind_pb2.WidgetKind()
    copy.CopyFrom(kind)
    for field in fields:
        copy_field(other, copy, field)
    if not copy.spec.fields:
        copy.ClearField("spec")
    return copy


async def _kind(session: AsyncSession, widget_kind_id: str) -> WidgetKind:
    row = await session.get(WidgetKind, (auth.caller().workspace_id, widget_kind_id.lower()))
    if row is None:
        raise absent()
    return row


async def _locked(session: AsyncSession, widget_kind_id: str, etag: str) -> WidgetKind:
    key = (auth.caller().workspace_id, widget_kind_id.lower())
    row = await session.get(WidgetKind, key, with_for_update=True)
    if row is None:
        raise absent()
    if etag and etag != str(row.version):
        raise errors.etag_mismatch()
    return row


async def _repeated(session: AsyncSession, request: pb.CreateWidgetKindRequest) -> widget_kind_pb2.WidgetKind:
    """The kind that the caller has made with this request. Raises ALREADY_EXISTS when another has the name."""
    caller = auth.caller()
    row = (
        await session.scalar(
            select(WidgetKind).where(
                WidgetKind.workspace_id == caller.workspace_id,
                WidgetKind.creator_id == caller.user_id,
                WidgetKind.request_id == request.request_id,
            )
        )
        if request.request_id
        else None
    )
    if row is None:
        raise errors.already_exists(
            "WIDGET_KIND_NAME_TAKEN", "Another kind of widgets has this name.", name=request.name
        )
    return widget_kind_to_pb(row, await read_version(session, row, 0))


async def _check_room(session: AsyncSession, workspace_id: str) -> None:
    count = await session.scalar(select(func.count()).where(WidgetKind.workspace_id == workspace_id))
    if count and count > MAX_WIDGET_KINDS:
        raise errors.failed_precondition(
            "TOO_MANY_WIDGET_KINDS",
            f"A workspace has at most {MAX_WIDGET_KINDS} kinds of widgets.",
            limit=MAX_WIDGET_KINDS,
        )


async def _widgets_by_version(session: AsyncSession, kind: WidgetKind) -> dict[int, int]:
    """How many widgets have each version."""
    counts: dict[int, int] = {}
    for table in (Widget, LibraryWidget):
        of_kind: ColumnElement[bool] = (table.workspace_id == kind.workspace_id) & (
            table.widget_kind_id == kind.widget_kind_id
        )
        rows = await session.execute(
            select(table.kind_number, func.count()).where(of_kind).group_by(table.kind_number)
        )
        for number, count in rows:
            counts[number or 0] = counts.get(number or 0, 0) + count
    return counts
