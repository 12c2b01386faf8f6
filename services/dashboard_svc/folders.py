"""Folders of dashboards, and the grants on them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from meshboard.dashboard.v1 import folder_service_pb2 as pb
from meshboard.dashboard.v1.events_pb2 import (
    FolderCreated,
    FolderDeleted,
    FolderGrantCreated,
    FolderGrantDeleted,
    FolderMoved,
    FolderUpdated,
)
from meshboard.dashboard.v1.folder_service_pb2_grpc import FolderServiceServicer
from sqlalchemy import func, literal, select, true
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import auth, errors, outbox, times
from services.chassis.clients import Peer
from services.chassis.db import lock, new_id
from services.chassis.grants import Grants, grant_to_pb
from services.chassis.masks import changed_fields
from services.chassis.paging import Pages
from services.chassis.resources import Resource, visible
from services.chassis.texts import clean_name
from services.dashboard_svc.convert import folder_to_pb
from services.dashboard_svc.models import Dashboard, Folder

Context = Any
FOLDER = Resource(
    "folder", Folder.workspace_id, Folder.folder_id, parent_id=Folder.parent_folder_id, holds=("dashboard",)
)
MUTABLE = ("title",)
MAX_DEPTH = 8
MAX_FOLDERS = 5000
# The lock under which a workspace's tree of folders changes: two moves, each fine by itself, can make a cycle together.
# "fold" in ASCII.
_TREE_LOCK = 0x666F6C64


class FolderServicer(FolderServiceServicer):
    """meshboard.dashboard.v1.FolderService."""

    def __init__(
        self,
        *,
        db: async_sessionmaker[AsyncSession],
        pages: Pages,
        grants: Grants,
        now: Callable[[], datetime] = times.now,
    ) -> None:
        self.db = db
        self.pages = pages
        self.grants = grants
        self.now = now

    async def CreateFolder(
        self, request: pb.CreateFolderRequest, context: Context
    ) -> pb.CreateFolderResponse:
        """Creates the folder and the creator's grant."""
        caller = auth.caller()
        title, now = clean_name(request.title, "title"), self.now()
        async with self.db.begin() as session:
            await lock(session, _TREE_LOCK, caller.workspace_id)
            folder = await session.scalar(
                insert(Folder)
                .values(
                    workspace_id=caller.workspace_id,
                    folder_id=new_id(),
                    title=title,
                    parent_folder_id=await held_folder(
                        session, caller.workspace_id, request.parent_folder_id
                    ),
                    version=1,
                    creator_id=caller.user_id,
                    request_id=request.request_id or None,
                    create_time=now,
                    update_time=now,
                )
                .on_conflict_do_nothing(constraint="folders_request_once")
                .returning(Folder)
            )
            if folder is None:
                first = await session.scalars(
                    select(Folder).where(
                        Folder.workspace_id == caller.workspace_id,
                        Folder.creator_id == caller.user_id,
                        Folder.request_id == request.request_id,
                    )
                )
                return pb.CreateFolderResponse(folder=folder_to_pb(first.one()))
            await _check_tree(session, folder)
            self.grants.own(session, folder.folder_id)
            created = folder_to_pb(folder)
            outbox.add(session, FolderCreated(folder=created), workspace_id=caller.workspace_id)
        return pb.CreateFolderResponse(folder=created)

    async def GetFolder(self, request: pb.GetFolderRequest, context: Context) -> pb.GetFolderResponse:
        """Reads the row."""
        async with self.db() as session:
            folder = await session.get(Folder, (auth.caller().workspace_id, request.folder_id.lower()))
        if folder is None:
            raise FOLDER.absent()
        return pb.GetFolderResponse(folder=folder_to_pb(folder))

    async def ListFolders(self, request: pb.ListFoldersRequest, context: Context) -> pb.ListFoldersResponse:
        """Filters by the caller's rights in SQL."""
        caller = auth.caller()
        assert caller.rights is not None, "the access stage settles the rights"
        page = self.pages.open(request, caller.workspace_id)
        inside = Folder.parent_folder_id == request.parent_folder_id if request.parent_folder_id else true()
        async with self.db() as session:
            rows = await session.scalars(
                select(Folder)
                .where(
                    Folder.workspace_id == caller.workspace_id,
                    inside,
                    visible(FOLDER, caller.rights, self.now()),
                    page.after(Folder.folder_id, descending=True),
                )
                .order_by(Folder.folder_id.desc())
                .limit(page.limit)
            )
        folders, next_page_token = page.close(rows.all(), lambda row: (row.folder_id,))
        return pb.ListFoldersResponse(folders=map(folder_to_pb, folders), next_page_token=next_page_token)

    async def UpdateFolder(
        self, request: pb.UpdateFolderRequest, context: Context
    ) -> pb.UpdateFolderResponse:
        """Changes what the mask names."""
        caller = auth.caller()
        wanted = request.folder
        fields = changed_fields(wanted, request.update_mask, MUTABLE)
        changes = {field: getattr(wanted, field) for field in fields}
        if "title" in fields:
            changes["title"] = clean_name(wanted.title, "folder.title")
        async with self.db.begin() as session:
            folder = await _locked(session, caller.workspace_id, wanted.folder_id, wanted.etag)
            for field, value in changes.items():
                setattr(folder, field, value)
            updated = self._changed(folder)
            outbox.add(session, FolderUpdated(folder=updated), workspace_id=caller.workspace_id)
        return pb.UpdateFolderResponse(folder=updated)

    async def MoveFolder(self, request: pb.MoveFolderRequest, context: Context) -> pb.MoveFolderResponse:
        """Moves the folder, one after the other of a workspace's moves."""
        caller = auth.caller()
        async with self.db.begin() as session:
            await lock(session, _TREE_LOCK, caller.workspace_id)
            folder = await _locked(session, caller.workspace_id, request.folder_id, request.etag)
            before = folder.parent_folder_id
            folder.parent_folder_id = await held_folder(
                session, caller.workspace_id, request.parent_folder_id
            )
            await session.flush()
            await _check_tree(session, folder)
            moved = self._changed(folder)
            event = FolderMoved(folder=moved, from_parent_folder_id=before or "")
            outbox.add(session, event, workspace_id=caller.workspace_id)
        return pb.MoveFolderResponse(folder=moved)

    async def DeleteFolder(
        self, request: pb.DeleteFolderRequest, context: Context
    ) -> pb.DeleteFolderResponse:
        """Deletes the folder and its grants; the lock keeps anything from being put into it meanwhile."""
        caller = auth.caller()
        async with self.db.begin() as session:
            folder = await _locked(session, caller.workspace_id, request.folder_id, request.etag)
            if await _holds_anything(session, folder):
                raise errors.failed_precondition("FOLDER_NOT_EMPTY", "Something lies in the folder.")
            await session.delete(folder)
            await self.grants.forget(session, folder.folder_id)
            gone = FolderDeleted(workspace_id=caller.workspace_id, folder_id=folder.folder_id)
            outbox.add(session, gone, workspace_id=caller.workspace_id)
        return pb.DeleteFolderResponse()

    async def CreateFolderGrant(
        self, request: pb.CreateFolderGrantRequest, context: Context
    ) -> pb.CreateFolderGrantResponse:
        """Makes the grant."""
        return pb.CreateFolderGrantResponse(grant=await self.grants.create(request.folder_id, request))

    async def ListFolderGrants(
        self, request: pb.ListFolderGrantsRequest, context: Context
    ) -> pb.ListFolderGrantsResponse:
        """Lists all grants, expired ones too."""
        grants, next_page_token = await self.grants.list(request.folder_id, request)
        return pb.ListFolderGrantsResponse(grants=grants, next_page_token=next_page_token)

    async def DeleteFolderGrant(
        self, request: pb.DeleteFolderGrantRequest, context: Context
    ) -> pb.DeleteFolderGrantResponse:
        """Takes the grant back."""
        await self.grants.delete(request.folder_id, request.grant_id)
        return pb.DeleteFolderGrantResponse()

    async def BatchUpdateFolderGrants(
        self, request: pb.BatchUpdateFolderGrantsRequest, context: Context
    ) -> pb.BatchUpdateFolderGrantsResponse:
        """Changes the grants together."""
        grants = await self.grants.batch_update(request.folder_id, request)
        return pb.BatchUpdateFolderGrantsResponse(grants=grants)

    def _changed(self, folder: Folder) -> Any:
        folder.version += 1
        folder.update_time = self.now()
        return folder_to_pb(folder)


async def held_folder(session: AsyncSession, workspace_id: str, folder_id: str) -> str | None:
    """The id of a folder that something is put into, kept from being deleted meanwhile; None for "".

    Raises NOT_FOUND.
    """
    if not folder_id:
        return None
    found = await session.scalar(
        select(Folder.folder_id)
        .where(Folder.workspace_id == workspace_id, Folder.folder_id == folder_id)
        .with_for_update(read=True, key_share=True)
    )
    if found is None:
        raise FOLDER.absent()
    return found


async def _locked(session: AsyncSession, workspace_id: str, folder_id: str, etag: str) -> Folder:
    folder = await session.get(Folder, (workspace_id, folder_id.lower()), with_for_update=True)
    if folder is None:
        raise FOLDER.absent()
    if etag and etag != str(folder.version):
        raise errors.etag_mismatch()
    return folder


async def _check_tree(session: AsyncSession, folder: Folder) -> None:
    """Raises FAILED_PRECONDITION when the folder lies in itself, or is too deep, or one too many."""
    above = select(Folder.folder_id, Folder.parent_folder_id, literal(1).label("depth"))
    above = above.where(Folder.workspace_id == folder.workspace_id, Folder.folder_id == folder.folder_id)
    up = above.cte("up", recursive=True)
    up = up.union_all(
        select(Folder.folder_id, Folder.parent_folder_id, up.c.depth + 1).where(
            Folder.workspace_id == folder.workspace_id,
            Folder.folder_id == up.c.parent_folder_id,
            up.c.depth <= MAX_DEPTH,
        )
    )
    below = select(Folder.folder_id, literal(0).label("depth"))
    below = below.where(Folder.workspace_id == folder.workspace_id, Folder.folder_id == folder.folder_id)
    down = below.cte("down", recursive=True)
    down = down.union_all(
        select(Folder.folder_id, down.c.depth + 1).where(
            Folder.workspace_id == folder.workspace_id,
            Folder.parent_folder_id == down.c.folder_id,
            down.c.depth <= MAX_DEPTH,
        )
    )
    row = await session.execute(
        select(
            select(func.count()).where(up.c.folder_id == folder.folder_id).scalar_subquery(),
            select(func.max(up.c.depth)).scalar_subquery() + select(func.max(down.c.depth)).scalar_subquery(),
            select(func.count()).where(Folder.workspace_id == folder.workspace_id).scalar_subquery(),
        )
    )
    times_met, depth, count = row.one()
    if times_met > 1:
        raise errors.failed_precondition("FOLDER_CYCLE", "A folder cannot lie in itself.")
    if depth > MAX_DEPTH:
        raise errors.failed_precondition(
            "FOLDER_TOO_DEEP", f"Folders nest at most {MAX_DEPTH} deep.", max_depth=MAX_DEPTH
        )
    if count > MAX_FOLDERS:
        raise errors.failed_precondition(
            "TOO_MANY_FOLDERS", f"A workspace has at most {MAX_FOLDERS} folders.", max_folders=MAX_FOLDERS
        )


async def _holds_anything(session: AsyncSession, folder: Folder) -> bool:
    inside = [
        select(literal(1)).where(
            Folder.workspace_id == folder.workspace_id, Folder.parent_folder_id == folder.folder_id
        ),
        select(literal(1)).where(
            Dashboard.workspace_id == folder.workspace_id, Dashboard.folder_id == folder.folder_id
        ),
    ]
    return bool(await session.scalar(select(inside[0].exists() | inside[1].exists())))


def grants_on_folders(
    db: async_sessionmaker[AsyncSession],
    user: Peer,
    pages: Pages,
    now: Callable[[], datetime] = times.now,
) -> Grants:
    """The grants on folders."""
    return Grants(
        db,
        FOLDER,
        user,
        pages,
        created=lambda row: FolderGrantCreated(
            workspace_id=row.workspace_id, folder_id=row.resource_id, grant=grant_to_pb(row)
        ),
        deleted=lambda row: FolderGrantDeleted(
            workspace_id=row.workspace_id, folder_id=row.resource_id, grant_id=row.grant_id
        ),
        now=now,
        new_id=new_id,
    )
