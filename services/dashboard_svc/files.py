"""Dashboards as files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain, islice
from typing import Any

from meshboard.dashboard.v1 import file_service_pb2 as pb
from meshboard.dashboard.v1.dashboard_pb2 import DashboardContent
from meshboard.dashboard.v1.events_pb2 import DashboardCreated
from meshboard.dashboard.v1.file_service_pb2_grpc import FileServiceServicer
from meshboard.dashboard.v1.version_service_pb2 import Change
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import auth, errors, outbox, times
from services.chassis.db import new_id
from services.chassis.grants import Grants
from services.chassis.interceptor import validate
from services.chassis.resources import visible
from services.chassis.rights import Rights
from services.dashboard_svc import bases, layouts, library
from services.dashboard_svc.bases import Base
from services.dashboard_svc.boards import Boards, absent, locked
from services.dashboard_svc.content_checks import ContentChecks, check_names, hold_uses, settle_layouts
from services.dashboard_svc.contents import (
    FIELDS,
    MAX_CONTENT_BYTES,
    content_of,
    record,
    shown_content,
    write_content,
)
from services.dashboard_svc.convert import dashboard_to_pb
from services.dashboard_svc.custom_widgets import CustomWidgets, as_said, with_versions
from services.dashboard_svc.dashboards import DASHBOARD
from services.dashboard_svc.definitions import clean
from services.dashboard_svc.diffs import changes
from services.dashboard_svc.favourites import for_caller
from services.dashboard_svc.file_names import identify_widgets, name_from, name_widgets
from services.dashboard_svc.folders import FOLDER
from services.dashboard_svc.merges import Merge, merge
from services.dashboard_svc.models import Dashboard, Folder
from services.dashboard_svc.moves import move
from services.dashboard_svc.new_dashboards import insert_dashboard, name_taken
from services.dashboard_svc.validation import require_unused

Context = Any
MAX_CHANGES = 1000
MAX_PATHS = 20
# What a file cannot say of a widget: it is made here.
_MADE_HERE = ("dashboard_id", "create_time", "update_time", "etag", "html")


@dataclass(frozen=True, slots=True)
class _Move:
    """That a file names another folder than before; a conflict when people have moved the dashboard, too."""

    folder_id: str
    change: Change
    is_conflict: bool


class FileServicer(FileServiceServicer):
    """meshboard.dashboard.v1.FileService."""

    def __init__(
        self,
        db: async_sessionmaker[AsyncSession],
        boards: Boards,
        grants: Grants,
        checks: ContentChecks,
        custom: CustomWidgets,
        *,
        now: Callable[[], datetime] = times.now,
    ) -> None:
        self.db = db
        self.boards = boards
        self.grants = grants
        self.checks = checks
        self.custom = custom
        self.now = now

    async def ExportDashboard(
        self, request: pb.ExportDashboardRequest, context: Context
    ) -> pb.ExportDashboardResponse:
        """Reads what viewers see, takes the ids out, and keeps the version that the file was made of."""
        key = (auth.caller().workspace_id, request.dashboard_id.lower())
        async with self.db.begin() as session:
            dashboard = await session.get(Dashboard, key)
            if dashboard is None or dashboard.delete_time:
                raise absent()
            content = await shown_content(session, dashboard)
            folder = await self._titles(session, dashboard.folder_id)
            base_version = await bases.exported(session, dashboard, content, folder)
            await library.name_in_file(session, dashboard.workspace_id, content)
        name_widgets(content)
        content = as_said(content)
        for widget in content.widgets:
            widget.ClearField("widget_id")
        name = dashboard.name or name_from(content.title, "dashboard")
        file = pb.DashboardFile(name=name, folder=folder, content=content, base_version=base_version)
        return pb.ExportDashboardResponse(file=file, named=dashboard.name is not None)

    async def ApplyDashboard(
        self, request: pb.ApplyDashboardRequest, context: Context
    ) -> pb.ApplyDashboardResponse:
        """Finds the dashboard by its name, and changes it; or creates it."""
        content = _cleaned(request.file.content)
        async with self.db() as session:
            await library.find_from_file(session, auth.caller().workspace_id, content)
            dashboard = await self._find(session, request.file.name)
            if dashboard is not None:
                here = await content_of(session, dashboard)
                base = await bases.base_of(session, dashboard, request.file)
        if dashboard is None:
            return await self._create(request, content)
        await auth.require("dashboards.edit", "dashboard_id", dashboard.dashboard_id)
        if request.etag and request.etag != str(dashboard.version):
            raise errors.etag_mismatch()
        return await self._change(request, dashboard, content, here, base)

    async def _create(
        self, request: pb.ApplyDashboardRequest, content: DashboardContent
    ) -> pb.ApplyDashboardResponse:
        caller, now, nothing = auth.caller(), self.now(), DashboardContent()
        folder_id = await self._folder_id(request.file.folder)
        await auth.require("dashboards.create", "folder_id", folder_id)
        if request.etag:
            raise errors.etag_mismatch()
        identify_widgets(content, nothing, nothing)
        settle_layouts(content)
        said = _copy(content)
        await self.custom.complete(caller.workspace_id, content, nothing)
        await self.checks.check(caller.workspace_id, content, nothing)
        answer = pb.ApplyDashboardResponse(
            outcome=pb.ApplyDashboardResponse.CREATED, changes=_told(nothing, content)
        )
        if request.dry_run:
            async with self.db() as session:
                if await _is_taken(session, request.file.name):
                    raise name_taken(request.file.name)
            return answer
        async with self.db.begin() as session:
            await hold_uses(session, caller.workspace_id, content, nothing)
            dashboard = await insert_dashboard(
                session, self.grants, content, folder_id=folder_id, now=now, name=request.file.name
            )
            if dashboard is None:
                raise name_taken(request.file.name)
            created = DashboardCreated(dashboard=dashboard_to_pb(dashboard))
            outbox.add(session, created, workspace_id=caller.workspace_id)
            await write_content(session, dashboard, content, author_id=caller.user_id, now=now)
            await record(session, dashboard, caller.user_id, request.reason)
            await bases.keep(session, dashboard, request.file, said)
            answer.dashboard.CopyFrom(await for_caller(session, dashboard_to_pb(dashboard)))
        return answer

    async def _change(
        self,
        request: pb.ApplyDashboardRequest,
        dashboard: Dashboard,
        theirs: DashboardContent,
        here: DashboardContent,
        base: Base,
    ) -> pb.ApplyDashboardResponse:
        identify_widgets(theirs, base.content, here)
        pinned = {widget.widget_id for widget in theirs.widgets if widget.custom.version}
        said = as_said(here, pinned)
        before = with_versions(as_said(base.content, pinned), said)
        merged = _merged(before, said, theirs)
        moved = await self._move(request.file.folder, dashboard, base)
        if moved is not None and moved.is_conflict:
            merged.conflicts.insert(0, "folder")
        refused = bool(merged.conflicts) and not request.force
        if refused and not request.dry_run:
            raise _conflict(merged.conflicts)
        await self.custom.complete(auth.caller().workspace_id, merged.content, here)
        await self.checks.check(auth.caller().workspace_id, merged.content, here)
        async with self.db() as session:
            asking = await library.resolved(session, dashboard.workspace_id, merged.content)
        require_unused(here.variables, asking)
        told = _told(here, merged.content, moved)
        is_new = theirs != before or not base.said(request.file.folder)
        if not request.dry_run and (told or is_new):
            dashboard = await self._write(
                request, dashboard, merged.content, here=here, theirs=theirs, moved=moved
            )
        async with self.db() as session:
            answer = await for_caller(session, dashboard_to_pb(dashboard))
        return pb.ApplyDashboardResponse(
            outcome=_outcome(refused=refused, changed=bool(told)),
            dashboard=answer,
            changes=told,
            conflicts=_conflicts(merged, said, theirs, moved),
        )

    async def _move(self, titles: Sequence[str], dashboard: Dashboard, base: Base) -> _Move | None:
        """The move that the file asks for, once it is settled that the caller may make it."""
        if not titles or base.said(titles):
            return None
        folder_id = await self._folder_id(titles)
        if folder_id == (dashboard.folder_id or ""):
            return None
        await auth.require("dashboards.grant", "dashboard_id", dashboard.dashboard_id)
        await auth.require("dashboards.create", "folder_id", folder_id)
        async with self.db() as session:
            before = await self._titles(session, dashboard.folder_id)
        change = Change(path="folder")
        change.before.list_value.extend(before)
        change.after.list_value.extend(titles)
        return _Move(folder_id, change, is_conflict=not base.said(before))

    async def _write(
        self,
        request: pb.ApplyDashboardRequest,
        judged: Dashboard,
        content: DashboardContent,
        *,
        here: DashboardContent,
        theirs: DashboardContent,
        moved: _Move | None,
    ) -> Dashboard:
        """The dashboard with the content and in its folder, and with the file kept."""
        caller, now = auth.caller(), self.now()
        async with self.db.begin() as session:
            # What was judged is what is there, or nothing is done.
            etag = str(judged.version)
            dashboard = await locked(session, caller.workspace_id, judged.dashboard_id, etag)
            await hold_uses(session, caller.workspace_id, content, here)
            if moved is not None:
                await move(session, dashboard, moved.folder_id, now)
            if await write_content(session, dashboard, content, author_id=caller.user_id, now=now):
                await record(session, dashboard, caller.user_id, request.reason)
            await bases.keep(session, dashboard, request.file, theirs)
        await self.boards.changed(dashboard.workspace_id, dashboard.dashboard_id)
        return dashboard

    async def _find(self, session: AsyncSession, name: str) -> Dashboard | None:
        """The dashboard that has the name, when the caller may see it."""
        rights = _rights()
        found: Dashboard | None = await session.scalar(
            select(Dashboard).where(
                Dashboard.workspace_id == rights.workspace_id,
                Dashboard.name == name,
                visible(DASHBOARD, rights, self.now()),
            )
        )
        return found

    async def _folder_id(self, titles: Sequence[str]) -> str:
        """The folder that a path of titles leads to, by way of folders that the caller may see; "" for none."""
        found: set[str] = {""}
        folders = await self._folders(titles) if titles else []
        for title in titles:
            found = {
                folder.folder_id
                for folder in folders
                if folder.title == title and (folder.parent_folder_id or "") in found
            }
        if not found:
            raise FOLDER.absent()
        if len(found) > 1:
            raise errors.failed_precondition(
                "FOLDER_AMBIGUOUS", "Several folders are called so.", folder=" / ".join(titles)
            )
        return found.pop()

    async def _folders(self, titles: Sequence[str]) -> Sequence[Folder]:
        rights = _rights()
        async with self.db() as session:
            rows = await session.scalars(
                select(Folder).where(
                    Folder.workspace_id == rights.workspace_id,
                    Folder.title.in_(titles),
                    visible(FOLDER, rights, self.now()),
                )
            )
            return rows.all()

    async def _titles(self, session: AsyncSession, folder_id: str | None) -> list[str]:
        """The titles from the top down to the folder; none when the caller may not see one of these folders."""
        rights = _rights()
        titles: list[str] = []
        while folder_id is not None:
            folder = await session.scalar(
                select(Folder).where(
                    Folder.workspace_id == rights.workspace_id,
                    Folder.folder_id == folder_id,
                    visible(FOLDER, rights, self.now()),
                )
            )
            if folder is None:
                return []
            titles.insert(0, folder.title)
            folder_id = folder.parent_folder_id
        return titles


def _rights() -> Rights:
    rights = auth.caller().rights
    assert rights is not None, "the access stage settles the rights"
    return rights


def _cleaned(content: DashboardContent) -> DashboardContent:
    """The content of a file, with names for all widgets. Raises INVALID_ARGUMENT."""
    if content.ByteSize() > MAX_CONTENT_BYTES:
        raise errors.invalid_fields([("file.content", f"has more than {MAX_CONTENT_BYTES} bytes")])
    cleaned = _copy(content)
    for widget in cleaned.widgets:
        for field in _MADE_HERE:
            widget.ClearField(field)  # type: ignore[arg-type]
        widget.library_widget_id = widget.library_widget_id.lower()
    cleaned = as_said(cleaned, {widget.widget_id for widget in cleaned.widgets})
    _validate(cleaned)
    clean(cleaned, FIELDS, "content.")
    check_names(cleaned)
    name_widgets(cleaned)
    return cleaned


def _copy(content: DashboardContent) -> DashboardContent:
    copy = DashboardContent()
    copy.CopyFrom(content)
    return copy


def _validate(content: DashboardContent) -> None:
    """Checks the rules of the contract, once there are the ids that they ask for."""
    whole = _copy(content)
    for widget in whole.widgets:
        widget.dashboard_id = new_id()
        widget.widget_id = widget.widget_id or new_id()
    validate(whole)


def _merged(base: DashboardContent, here: DashboardContent, theirs: DashboardContent) -> Merge:
    """Puts together what the file says and what is here; the widgets of the file have the ids of those they are."""
    # A widget whose place the file leaves open stays where it is; a new one stands below what is here.
    known = {widget.widget_id: widget.layout for content in (here, base) for widget in content.widgets}
    for widget in theirs.widgets:
        if not widget.HasField("layout") and widget.widget_id in known:
            widget.layout.CopyFrom(known[widget.widget_id])
    new = settle_layouts(theirs)
    merged = merge(base, here, theirs)
    places = [widget.layout for widget in merged.content.widgets if widget.widget_id not in new]
    for widget in merged.content.widgets:
        if widget.widget_id in new:
            widget.layout.CopyFrom(layouts.below(places))
            places.append(widget.layout)
    return merged


def _outcome(*, refused: bool, changed: bool) -> pb.ApplyDashboardResponse.Outcome.ValueType:
    if refused:
        return pb.ApplyDashboardResponse.REFUSED
    return pb.ApplyDashboardResponse.CHANGED if changed else pb.ApplyDashboardResponse.UNCHANGED


def _told(before: DashboardContent, after: DashboardContent, moved: _Move | None = None) -> list[Change]:
    return list(islice(chain(_of_move(moved), changes(before, after)), MAX_CHANGES))


def _of_move(moved: _Move | None) -> list[Change]:
    return [] if moved is None else [moved.change]


def _conflicts(
    merged: Merge, here: DashboardContent, theirs: DashboardContent, moved: _Move | None
) -> list[Change]:
    """The differences that lie where there is a conflict."""
    if not merged.conflicts:
        return []
    found = (
        change
        for change in chain(_of_move(moved), changes(here, theirs))
        if any(change.path == path or change.path.startswith(f"{path}.") for path in merged.conflicts)
    )
    return list(islice(found, MAX_CHANGES))


def _conflict(paths: Sequence[str]) -> errors.Error:
    return errors.aborted(
        "FILE_CONFLICT",
        "The file and what was changed here say different things.",
        paths=", ".join(paths[:MAX_PATHS]),
        count=len(paths),
    )


async def _is_taken(session: AsyncSession, name: str) -> bool:
    found = await session.scalar(
        select(Dashboard.dashboard_id).where(
            Dashboard.workspace_id == auth.caller().workspace_id,
            Dashboard.name == name,
            Dashboard.delete_time.is_(None),
        )
    )
    return found is not None
