"""Searching the members of a workspace, by name and address."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import Uuid, func, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis.indexing import Corpus
from services.chassis.search import Document, Engine, Found, Index, Key, Place, Query, Search, Within
from services.user_svc.models import Member, User

MEMBERS = Index("members", {"display_name": 4, "email": 3})


class MemberSearch:
    """Finds members."""

    def __init__(self, db: async_sessionmaker[AsyncSession], engine: Engine) -> None:
        self._db = db
        self._search = Search(engine, MEMBERS)

    async def find(self, workspace_id: str, query: str, after: Place | None, limit: int) -> list[Found[User]]:
        """The next hits. Raises INVALID_ARGUMENT (SEARCH_QUERY_INVALID), and UNAVAILABLE."""

        async def load(user_ids: list[str]) -> Mapping[str, User]:
            async with self._db() as session:
                users = await session.scalars(
                    select(User)
                    .join(Member, Member.user_id == User.user_id)
                    .where(Member.workspace_id == workspace_id, User.user_id.in_(user_ids))
                )
            return {user.user_id: user for user in users}

        return await self._search.find(Query.of(query), Within(workspace_id), load, after, limit)


async def _read(session: AsyncSession, keys: Sequence[Key]) -> list[Document]:
    rows = await session.execute(
        select(Member.workspace_id, User.user_id, User.display_name, User.email)
        .join(User, User.user_id == Member.user_id)
        .where(tuple_(Member.workspace_id, Member.user_id).in_(keys))
    )
    return [
        Document(workspace_id, user_id, {"display_name": display_name, "email": email})
        for workspace_id, user_id, display_name, email in rows
    ]


async def _scan(session: AsyncSession, after: Key | None, limit: int) -> list[Key]:
    key = (Member.workspace_id, Member.user_id)
    keys = select(*key).order_by(*key).limit(limit)
    if after is not None:
        keys = keys.where(tuple_(*key) > tuple_(*after, types=[Uuid(as_uuid=False)] * 2))
    return [(workspace_id, user_id) for workspace_id, user_id in await session.execute(keys)]


async def _count(session: AsyncSession) -> int:
    return await session.scalar(select(func.count()).select_from(Member)) or 0


CORPUS = Corpus(MEMBERS, _read, _scan, _count)
