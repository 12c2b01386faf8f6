"""What a file of a dashboard is compared with: what it said when it was given out, or applied, last.

A file that was given out names the version that it was made of, as `version-content-folder`: the number of the
version, and digests of its content and of the titles of its folder. So a file of another dashboard, here or
elsewhere, is not taken for one of this, and what it says of the folder can be compared too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from meshboard.dashboard.v1.dashboard_pb2 import DashboardContent
from meshboard.dashboard.v1.file_service_pb2 import DashboardFile
from sqlalchemy import select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import load_only

from services.dashboard_svc.contents import versions_of
from services.dashboard_svc.models import AppliedFile, Dashboard, Version

_DIGEST_BYTES = 8


@dataclass(frozen=True, slots=True)
class Base:
    """What a file said before. `folder` is a digest of the titles of the folder; None: it is not known."""

    content: DashboardContent
    folder: str | None

    def said(self, folder: Sequence[str]) -> bool:
        """Whether the file named this folder then; of files from before that was kept it is taken to be so."""
        return self.folder is None or self.folder == _digest_of_folder(folder)


async def exported(
    session: AsyncSession, dashboard: Dashboard, content: DashboardContent, folder: Sequence[str]
) -> str:
    """The `base_version` of a file that says this; "" when there is no version of it.

    Keeps the version from being put together with later ones.
    """
    found = await session.scalar(
        select(Version)
        .options(load_only(Version.number, Version.exported))
        .where(*versions_of(dashboard), Version.content == _serialized(content))
        .order_by(Version.number.desc())
        .limit(1)
    )
    if found is None:
        return ""
    if not found.exported:
        await session.execute(
            update(Version)
            .where(*versions_of(dashboard), Version.number == found.number)
            .values(exported=True)
            .execution_options(synchronize_session=False)
        )
    return f"{found.number}-{_digest(_serialized(content))}-{_digest_of_folder(folder)}"


async def base_of(session: AsyncSession, dashboard: Dashboard, file: DashboardFile) -> Base:
    """What the file said when it was applied last; when it was not, when it was given out; nothing when neither.

    That it was is told by the version that it was made of: one that was given out at another time is another file.
    """
    applied = await session.get(AppliedFile, (dashboard.workspace_id, dashboard.dashboard_id))
    if file.base_version and (applied is None or applied.base_version != file.base_version):
        number, digest, folder = file.base_version.split("-")
        content = await session.scalar(
            select(Version.content).where(*versions_of(dashboard), Version.number == int(number))
        )
        if content is not None and _digest(content) == digest:
            return Base(DashboardContent.FromString(content), folder)
    if applied is None:
        return Base(DashboardContent(), "")
    known = applied.folder is not None
    return Base(
        DashboardContent.FromString(applied.content),
        _digest_of_folder(applied.folder or ()) if known else None,
    )


async def keep(
    session: AsyncSession, dashboard: Dashboard, file: DashboardFile, content: DashboardContent
) -> None:
    """Remembers the file that was applied just now; the content is what it says, with the ids that are here."""
    kept = {
        "content": _serialized(content),
        "base_version": file.base_version,
        "folder": list(file.folder),
    }
    await session.execute(
        insert(AppliedFile)
        .values(workspace_id=dashboard.workspace_id, dashboard_id=dashboard.dashboard_id, **kept)
        .on_conflict_do_update(index_elements=[AppliedFile.workspace_id, AppliedFile.dashboard_id], set_=kept)
    )


def _serialized(content: DashboardContent) -> bytes:
    return content.SerializeToString(deterministic=True)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()


def _digest_of_folder(titles: Sequence[str]) -> str:
    return _digest(repr(list(titles)).encode())
