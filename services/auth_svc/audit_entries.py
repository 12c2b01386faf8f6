"""Reading the audit log."""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc.aio
from meshboard.auth.v1.audit_pb2 import AuditEntry
from meshboard.auth.v1.audit_service_pb2 import (
    AuditFilter,
    ExportAuditEntriesRequest,
    ExportAuditEntriesResponse,
    ListAuditEntriesRequest,
    ListAuditEntriesResponse,
    ListOwnAuditEntriesRequest,
    ListOwnAuditEntriesResponse,
)
from meshboard.auth.v1.audit_service_pb2_grpc import AuditServiceServicer
from sqlalchemy import ColumnElement, Select, literal, or_, select, tuple_, union
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.auth_svc.audit import entry_to_pb
from services.auth_svc.models import AuditEntryRow, AuditSeal
from services.chassis import auth
from services.chassis.paging import Page, Pages
from services.chassis.times import time_of

Context = grpc.aio.ServicerContext[Any, Any]

_CHUNK = 500
_RECHECK_SECONDS = 1.0
_NEWEST_FIRST = (AuditEntryRow.time.desc(), AuditEntryRow.audit_entry_id.desc())


@dataclass(frozen=True)
class AuditServicer(AuditServiceServicer):
    """Lists and exports; entries are added by whoever does what they tell."""

    db: async_sessionmaker[AsyncSession]
    pages: Pages

    async def ListAuditEntries(
        self, request: ListAuditEntriesRequest, context: Context
    ) -> ListAuditEntriesResponse:
        workspace_id = auth.caller().workspace_id
        page = self.pages.open(request, workspace_id)
        conditions = [*_conditions(request.filter), _after(page)]
        entries, next_page_token = await self._page(
            page,
            _with_positions()
            .where(AuditEntryRow.workspace_id == workspace_id, *conditions)
            .order_by(*_NEWEST_FIRST)
            .limit(page.limit),
        )
        return ListAuditEntriesResponse(audit_entries=entries, next_page_token=next_page_token)

    async def ListOwnAuditEntries(
        self, request: ListOwnAuditEntriesRequest, context: Context
    ) -> ListOwnAuditEntriesResponse:
        user_id = auth.caller().user_id
        page = self.pages.open(request, user_id)
        conditions = [*_conditions(request.filter), _after(page)]
        # Each half from the end of its own index, and not all of somebody's entries sorted for each page.
        halves = [
            select(AuditEntryRow.audit_entry_id)
            .where(column == user_id, *conditions)
            .order_by(*_NEWEST_FIRST)
            .limit(page.limit)
            .subquery()
            for column in (AuditEntryRow.actor_id, AuditEntryRow.subject_id)
        ]
        newest = union(*(select(half.c.audit_entry_id) for half in halves))
        entries, next_page_token = await self._page(
            page,
            _with_positions()
            .where(AuditEntryRow.audit_entry_id.in_(newest))
            .order_by(*_NEWEST_FIRST)
            .limit(page.limit),
        )
        return ListOwnAuditEntriesResponse(
            audit_entries=[_for_own_eyes(entry, user_id) for entry in entries],
            next_page_token=next_page_token,
        )

    async def ExportAuditEntries(
        self, request: ExportAuditEntriesRequest, context: Context
    ) -> AsyncIterator[ExportAuditEntriesResponse]:
        conditions = [
            AuditEntryRow.workspace_id == auth.caller().workspace_id,
            AuditSeal.position.is_not(None),
            *_conditions(request.filter),
        ]
        place = tuple_(AuditEntryRow.time, AuditEntryRow.audit_entry_id)
        after: list[ColumnElement[bool]] = []
        next_check = time.monotonic() + _RECHECK_SECONDS
        while True:
            if time.monotonic() >= next_check:
                await auth.recheck()
                next_check = time.monotonic() + _RECHECK_SECONDS
            async with self.db() as session:
                rows = (
                    await session.execute(
                        _with_positions()
                        .where(*conditions, *after)
                        .order_by(AuditEntryRow.time, AuditEntryRow.audit_entry_id)
                        .limit(_CHUNK)
                    )
                ).all()
            if rows:
                yield ExportAuditEntriesResponse(audit_entries=[entry_to_pb(*row) for row in rows])
            if len(rows) < _CHUNK:
                return
            last = rows[-1][0]
            after = [
                place
                > tuple_(
                    literal(last.time, AuditEntryRow.time.type),
                    literal(last.audit_entry_id, AuditEntryRow.audit_entry_id.type),
                )
            ]

    async def _page(self, page: Page, statement: Select[AuditEntryRow, int]) -> tuple[list[AuditEntry], str]:
        async with self.db() as session:
            rows = (await session.execute(statement)).all()
        shown, next_page_token = page.close(rows, lambda row: (row[0].time, row[0].audit_entry_id))
        return [entry_to_pb(*row) for row in shown], next_page_token


def _with_positions() -> Select[AuditEntryRow, int]:
    return select(AuditEntryRow, AuditSeal.position).outerjoin(
        AuditSeal, AuditSeal.audit_entry_id == AuditEntryRow.audit_entry_id
    )


def _after(page: Page) -> ColumnElement[bool]:
    return page.after(AuditEntryRow.time, AuditEntryRow.audit_entry_id, descending=True)


def _conditions(wanted: AuditFilter) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if wanted.kinds:
        beginnings = [kind[:-1] for kind in wanted.kinds if kind.endswith(".*")]
        conditions.append(
            or_(
                AuditEntryRow.kind.in_(wanted.kinds),
                *(AuditEntryRow.kind.startswith(beginning, autoescape=True) for beginning in beginnings),
            )
        )
    if wanted.actor_id:
        conditions.append(AuditEntryRow.actor_id == wanted.actor_id.lower())
    if wanted.subject_id:
        conditions.append(AuditEntryRow.subject_id == wanted.subject_id.lower())
    if wanted.outcome:
        conditions.append(AuditEntryRow.outcome == AuditEntry.Outcome.Name(wanted.outcome))
    if wanted.HasField("start_time"):
        conditions.append(AuditEntryRow.time >= time_of(wanted.start_time, "filter.start_time"))
    if wanted.HasField("end_time"):
        conditions.append(AuditEntryRow.time < time_of(wanted.end_time, "filter.end_time"))
    return conditions


def _for_own_eyes(entry: AuditEntry, user_id: str) -> AuditEntry:
    """What an admin did to somebody is theirs to know; where the admin sits, and in which workspace, is not."""
    by_another = entry.impersonator_id or (entry.actor_id and entry.actor_id != user_id)
    if by_another:
        for name in ("workspace_id", "session_id", "address"):
            entry.ClearField(name)
    return entry
