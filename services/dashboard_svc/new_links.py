"""Links to dashboards that are being made, and what they bind their viewers to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any

from meshboard.analytics.v1.query_pb2 import Filter, Query
from meshboard.dashboard.v1 import share_service_pb2 as pb
from meshboard.dashboard.v1.annotation_service_pb2 import ListAnnotationsRequest
from meshboard.dashboard.v1.dashboard_pb2 import Dashboard, DashboardContent
from meshboard.dashboard.v1.events_pb2 import ShareLinkCreated
from meshboard.dashboard.v1.share_link_pb2 import LockedVariable, SnapshotContent
from meshboard.dashboard.v1.share_link_pb2 import ShareLink as ShareLinkMessage
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from services.chassis import auth, errors, outbox
from services.chassis.db import new_id
from services.chassis.paging import Pages
from services.chassis.passwords import Passwords
from services.chassis.texts import clean_name
from services.chassis.times import time_of
from services.dashboard_svc.annotations import Annotations
from services.dashboard_svc.answers import Answers
from services.dashboard_svc.boards import Boards, locked
from services.dashboard_svc.convert import share_link_to_pb
from services.dashboard_svc.definitions import sources_of
from services.dashboard_svc.models import ShareLink
from services.dashboard_svc.questions import resolve
from services.dashboard_svc.scopes import scope_of
from services.dashboard_svc.shared import bound, frozen_dashboard, shared_annotation, shared_data
from services.dashboard_svc.sources import SOURCES_OF_A_QUERY, Sources

MAX_LINKS = 200
MAX_CONTENT_BYTES = 65_536
# Those of the latest time.
MAX_ANNOTATIONS = 1000


class NewLinks:
    """Judges what links are to show, and makes their rows. `add` alone belongs inside a transaction."""

    def __init__(
        self,
        *,
        boards: Boards,
        pages: Pages,
        answers: Answers,
        annotations: Annotations,
        passwords: Passwords,
        sources: Sources,
        now: Callable[[], datetime],
    ) -> None:
        self._boards = boards
        self._pages = pages
        self._answers = answers
        self._annotations = annotations
        self._passwords = passwords
        self._sources = sources
        self._now = now

    async def check_binding(
        self,
        workspace_id: str,
        dashboard_id: str,
        locked_variables: Iterable[LockedVariable],
        filters: Sequence[Filter],
    ) -> None:
        """Fails for values that variables cannot have, and for filters that the caller may not ask the sources with."""
        dashboard = await self._boards.dashboard(workspace_id, dashboard_id)
        names = [variable.name for variable in locked_variables]
        if len(names) != len(set(names)):
            raise errors.invalid_fields([("locked_variables", "names a variable twice")])
        scope_of(
            dashboard.variables, [f"{one.name}={value}" for one in locked_variables for value in one.values]
        )
        if filters:
            await self._check_filters(dashboard, filters)

    async def frozen(
        self,
        link: ShareLinkMessage,
        workspace_id: str,
        dashboard_id: str,
        request: pb.CreateSnapshotRequest,
    ) -> SnapshotContent:
        """What the dashboard shows now, as a snapshot keeps it."""
        dashboard = await self._boards.dashboard(workspace_id, dashboard_id)
        widgets = await self._boards.widgets(workspace_id, dashboard_id)
        time_range = request.time_range if request.HasField("time_range") else None
        scope = bound(
            scope_of(dashboard.variables, (), time_range), request.locked_variables, request.filters
        )
        data = await self._answers.data_of(workspace_id, resolve(widgets, dashboard, scope))
        content = SnapshotContent(
            dashboard=frozen_dashboard(link, dashboard, widgets), widgets=map(shared_data, data)
        )
        if link.show_annotations:
            page = self._pages.open(ListAnnotationsRequest(page_size=MAX_ANNOTATIONS), workspace_id)
            listed, _, _ = await self._annotations.page_of(dashboard, scope, page)
            content.annotations.extend(map(shared_annotation, listed))
        return content

    async def row(
        self,
        request: pb.CreateShareLinkRequest | pb.CreateSnapshotRequest,
        title: str,
        content: ShareLinkMessage,
        token_hash: bytes,
        *,
        paused: bool = False,
    ) -> dict[str, Any]:
        """The columns of a new link."""
        caller, now = auth.caller(), self._now()
        return {
            "workspace_id": caller.workspace_id,
            "dashboard_id": request.dashboard_id.lower(),
            "share_link_id": new_id(),
            "token_hash": token_hash,
            "title": clean_name(request.title or title, "title"),
            "expire_time": expire_time_of(request, "expire_time"),
            "password_hash": await self.hash_of(request.password),
            "paused": paused,
            "content": serialized(content),
            "view_count": 0,
            "version": 1,
            "creator_id": caller.user_id,
            "request_id": request.request_id or None,
            "create_time": now,
            "update_time": now,
        }

    async def hash_of(self, password: str) -> str | None:
        """What is kept of a password; None for none."""
        return await self._passwords.hash(password) if password else None

    async def _check_filters(self, dashboard: Dashboard, filters: Iterable[Filter]) -> None:
        """Fails as `ValidateQuery` does on the sources that the dashboard looks at, but for those that are gone."""
        content = DashboardContent(
            variables=dashboard.variables,
            annotation_queries=dashboard.annotation_queries,
            widgets=await self._boards.widgets(dashboard.workspace_id, dashboard.dashboard_id),
        )
        found = await self._sources.look_through(dashboard.workspace_id, content)
        source_ids = sorted(sources_of(content) - found.absent_source_ids)
        await self._sources.validate(
            Query(source_ids=source_ids[start : start + SOURCES_OF_A_QUERY], filters=filters)
            for start in range(0, len(source_ids), SOURCES_OF_A_QUERY)
        )


async def add(session: AsyncSession, row: dict[str, Any]) -> tuple[ShareLinkMessage, bool]:
    """Adds the link, or finds the one of an earlier call; and says which."""
    workspace_id, dashboard_id = row["workspace_id"], row["dashboard_id"]
    await locked(session, workspace_id, dashboard_id)
    of_dashboard = (ShareLink.workspace_id == workspace_id, ShareLink.dashboard_id == dashboard_id)
    if row["request_id"]:
        first = await session.scalar(
            select(ShareLink).where(
                *of_dashboard,
                ShareLink.creator_id == row["creator_id"],
                ShareLink.request_id == row["request_id"],
            )
        )
        if first is not None:
            return share_link_to_pb(first), False
    count = await session.scalar(select(func.count()).select_from(ShareLink).where(*of_dashboard))
    if (count or 0) >= MAX_LINKS:
        raise errors.failed_precondition(
            "TOO_MANY_SHARE_LINKS", f"A dashboard has at most {MAX_LINKS} links.", limit=MAX_LINKS
        )
    added = ShareLink(**row)
    session.add(added)
    await session.flush()
    created = ShareLinkCreated(share_link=share_link_to_pb(added))
    outbox.add(session, created, workspace_id=workspace_id)
    return created.share_link, True


def expire_time_of(
    message: pb.CreateShareLinkRequest | pb.CreateSnapshotRequest | ShareLinkMessage, field: str
) -> datetime | None:
    """When the link ends by itself; None: never. Raises INVALID_ARGUMENT, naming the field."""
    return time_of(message.expire_time, field) if message.HasField("expire_time") else None


def changed(content: ShareLinkMessage, wanted: ShareLinkMessage, fields: Iterable[str]) -> bytes:
    """What is kept of a link, with these fields of another."""
    for field in fields:
        content.ClearField(field)  # type: ignore[arg-type]  # of a whitelist
    kept = ShareLinkMessage()
    for field in fields:
        descriptor = ShareLinkMessage.DESCRIPTOR.fields_by_name[field]
        if descriptor.is_repeated:
            getattr(kept, field).extend(getattr(wanted, field))
        else:
            setattr(kept, field, getattr(wanted, field))
    content.MergeFrom(kept)
    return serialized(content)


def serialized(content: ShareLinkMessage) -> bytes:
    """What the column `content` holds of a link. Raises INVALID_ARGUMENT beyond MAX_CONTENT_BYTES."""
    if content.ByteSize() > MAX_CONTENT_BYTES:
        raise errors.invalid_fields(
            [("filters", f"and what else the link says are larger than {MAX_CONTENT_BYTES} bytes")]
        )
    return content.SerializeToString()
