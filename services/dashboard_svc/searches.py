"""Searching everything in a workspace at once."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from meshboard.dashboard.v1 import dashboard_pb2
from meshboard.dashboard.v1 import search_service_pb2 as pb
from meshboard.dashboard.v1.search_service_pb2_grpc import SearchServiceServicer
from meshboard.user.v1.internal_user_service_pb2 import MemberHit, SearchMembersRequest, SearchPlace
from meshboard.user.v1.internal_user_service_pb2_grpc import InternalUserServiceStub
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import auth
from services.chassis.clients import Peer
from services.chassis.paging import Pages
from services.chassis.search import Found, Place, Query, highlight, place_of
from services.dashboard_svc.boards import seen_widgets, shown
from services.dashboard_svc.dashboard_search import DashboardSearch, texts_of
from services.dashboard_svc.favourites import tell_caller
from services.dashboard_svc.models import Dashboard

Context = Any
MAX_HIGHLIGHTS = 10


class SearchServicer(SearchServiceServicer):
    """meshboard.dashboard.v1.SearchService. Scores mean the same in all services, so lists are merged by them."""

    def __init__(
        self, db: async_sessionmaker[AsyncSession], dashboards: DashboardSearch, user: Peer, pages: Pages
    ) -> None:
        self.db = db
        self.dashboards = dashboards
        self.users = user.stub(InternalUserServiceStub)
        self.pages = pages

    async def Search(self, request: pb.SearchRequest, context: Context) -> pb.SearchResponse:
        """Asks for as many dashboards and users as the page could need, from where the last one ended."""
        query = Query.of(request.query)
        page = self.pages.open(request, auth.caller().workspace_id)
        dashboards, users = await asyncio.gather(
            self._dashboards(request.query, place_of(page), page.limit),
            self._users(request.query, place_of(page), page.limit),
        )
        hits = [_Hit(found.score, found.id, found.row) for found in dashboards]
        hits += [_Hit(found.score, found.user.user_id, found) for found in users]
        hits.sort(key=lambda hit: (hit.score, hit.id), reverse=True)
        shown_hits, next_page_token = page.close(hits[: page.limit], lambda hit: (hit.score, hit.id))
        found = [hit.row for hit in shown_hits if isinstance(hit.row, Dashboard)]
        async with self.db() as session:
            widgets = await seen_widgets(session, found)
            seen = {each.dashboard_id: each for each in await shown(session, found)}
            await tell_caller(session, seen.values())
        return pb.SearchResponse(
            hits=[_hit_to_pb(query, hit.row, seen, widgets) for hit in shown_hits],
            next_page_token=next_page_token,
        )

    async def _dashboards(self, query: str, after: Place | None, limit: int) -> list[Found[Dashboard]]:
        rights = auth.caller().rights
        assert rights is not None, "the access stage settles the rights"
        if not auth.caller().may("dashboards.list"):
            return []
        return await self.dashboards.find(rights, query, after, limit)

    async def _users(self, query: str, after: Place | None, limit: int) -> list[MemberHit]:
        caller = auth.caller()
        if not caller.may("members.view"):
            return []
        place = SearchPlace(score=after[0], id=after[1]) if after else None
        found = await self.users.SearchMembers(
            SearchMembersRequest(workspace_id=caller.workspace_id, query=query, after=place, limit=limit)
        )
        return list(found.hits)


@dataclass(frozen=True, slots=True)
class _Hit:
    score: int
    id: str
    row: Dashboard | MemberHit


def _hit_to_pb(
    query: Query,
    row: Dashboard | MemberHit,
    dashboards: Mapping[str, dashboard_pb2.Dashboard],
    widgets: Mapping[str, list[dashboard_pb2.Widget]],
) -> pb.SearchHit:
    if isinstance(row, Dashboard):
        dashboard = dashboards[row.dashboard_id]
        own = [("title", dashboard.title), ("description", dashboard.description)]
        return pb.SearchHit(
            dashboard=dashboard, highlights=_highlights(query, own + texts_of(widgets[row.dashboard_id]))
        )
    texts = [("display_name", row.user.display_name), ("email", row.user.email)]
    return pb.SearchHit(user=row.user, highlights=_highlights(query, texts))


def _highlights(query: Query, texts: list[tuple[str, str]]) -> list[pb.Highlight]:
    found = ((field, highlight(query, text)) for field, text in texts)
    highlights = (
        pb.Highlight(
            field=field, fragments=[pb.Fragment(text=text, matched=matched) for text, matched in pieces]
        )
        for field, pieces in found
        if pieces
    )
    return list(islice(highlights, MAX_HIGHLIGHTS))
