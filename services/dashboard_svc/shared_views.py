"""Dashboards as those look at them who have a link."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import structlog
from meshboard.dashboard.v1 import share_service_pb2 as pb
from meshboard.dashboard.v1.dashboard_pb2 import WidgetData
from meshboard.dashboard.v1.share_link_pb2 import SharedDashboard
from meshboard.dashboard.v1.variable_service_pb2 import VariableValue

from services.chassis import auth, errors
from services.chassis.rechecks import Span
from services.dashboard_svc import share_links
from services.dashboard_svc.answers import Answers
from services.dashboard_svc.boards import Boards
from services.dashboard_svc.dashboards import CATCH_UP_SECONDS
from services.dashboard_svc.feeds import LEAST_SECONDS, Feeds
from services.dashboard_svc.questions import Tiles
from services.dashboard_svc.scopes import Scope
from services.dashboard_svc.share_links import Link
from services.dashboard_svc.shared import (
    scope_of_link,
    shared_dashboard,
    shared_data,
    shared_news,
    shared_news_without_annotations,
)
from services.dashboard_svc.snapshots import Frozen, Snapshots
from services.dashboard_svc.streams import stream
from services.dashboard_svc.variables import values_to_choose

log = structlog.get_logger(__name__)

# In how many ways a link is watched at once in one process.
MAX_SCOPES = 100
# Answers that are kept for links whose data need not be live.
_AGED_KEPT = 256


class SharedViews:
    """What links show, once or live. `draining` says whether the process is going down."""

    def __init__(
        self,
        *,
        boards: Boards,
        answers: Answers,
        feeds: Feeds,
        snapshots: Snapshots,
        span: Span,
        draining: Callable[[], bool],
    ) -> None:
        self._boards = boards
        self._answers = answers
        self._tiles = Tiles()
        self._feeds = feeds
        self._snapshots = snapshots
        self._span = span
        self._draining = draining
        self._watched: dict[str, Counter[Scope]] = {}
        self._aged: OrderedDict[tuple[str, str, str, Scope], tuple[float, list[WidgetData]]] = OrderedDict()

    async def dashboard(self, found: Link) -> SharedDashboard:
        """All but the data."""
        if found.link.HasField("snapshot"):
            return (await self._snapshots.content(found)).dashboard
        widgets = await self._boards.widgets(found.link.workspace_id, found.link.dashboard_id)
        return shared_dashboard(found.link, found.dashboard, widgets)

    async def data(self, found: Link, scope: Scope) -> list[WidgetData]:
        """The data, as old as the link says that it may be."""
        if found.link.HasField("snapshot"):
            return list((await self._snapshots.content(found)).widgets)
        if not found.link.refresh_seconds:
            return await self._live_data(found, scope)
        key = (found.link.share_link_id, found.link.etag, found.dashboard.etag, scope)
        until, data = self._aged.get(key, (0.0, []))
        if time.monotonic() >= until:
            until = time.monotonic() + found.link.refresh_seconds
            data = await self._live_data(found, scope)
            self._aged[key] = (until, data)
            self._aged.move_to_end(key)
            if len(self._aged) > _AGED_KEPT:
                self._aged.popitem(last=False)
        return data

    async def watch(self, found: Link, scope: Scope, cursor: str) -> AsyncIterator[bytes]:
        """The feed of the dashboard in the scope of the link, or the one state of a snapshot: serialized messages.

        The etag stands in the key because a link that was changed must be taken up as it is now.
        """
        key = (found.link.share_link_id, found.link.etag, found.ticket)
        form = shared_news if found.link.show_annotations else shared_news_without_annotations
        if found.link.HasField("snapshot"):
            content = await self._snapshots.content(found)
            frozen = Frozen(content, found.link.dashboard_id, self._feeds.cursor_key)
            has = frozen.read_cursor(cursor) if cursor else None
            async for message in stream(
                frozen, has, self._span, _recheck(found), self._draining, form=form, key=key
            ):
                yield message
            return
        with (
            self._room(found, scope),
            self._feeds.watch(found.link.workspace_id, found.link.dashboard_id, scope) as feed,
        ):
            has = feed.read_cursor(cursor) if cursor else None
            async with asyncio.timeout(CATCH_UP_SECONDS):
                await feed.catch_up()
            async for message in stream(
                feed,
                has,
                self._span,
                _recheck(found, lambda: feed.gone),
                self._draining,
                least_seconds=max(LEAST_SECONDS, found.link.refresh_seconds),
                form=form,
                key=key,
            ):
                yield message

    async def values(self, found: Link, name: str, scope: Scope, query: str) -> Sequence[VariableValue]:
        """What can be chosen for a variable; nothing where its source does not answer."""
        try:
            return await values_to_choose(self._answers, found.dashboard, name, scope, query)
        except errors.Error as error:
            # Why the source does not answer is none of the viewers' business.
            log.info("no_values_to_choose", error=error.reason)
            return ()

    async def _live_data(self, found: Link, scope: Scope) -> list[WidgetData]:
        workspace_id, dashboard_id = found.link.workspace_id, found.link.dashboard_id
        widgets = await self._boards.widgets(workspace_id, dashboard_id)
        tiles = self._tiles.of(widgets, found.dashboard, scope)
        return [shared_data(one) for one in await self._answers.data_of(workspace_id, tiles)]

    @contextmanager
    def _room(self, found: Link, scope: Scope) -> Iterator[None]:
        """Bounds in how many ways a link is watched at once: each asks the sources for itself."""
        scopes = self._watched.setdefault(found.link.share_link_id, Counter())
        if scope not in scopes and len(scopes) >= MAX_SCOPES:
            raise errors.resource_exhausted(
                "SHARE_LINK_BUSY", "The link is watched with too many different choices.", retry_seconds=10
            )
        scopes[scope] += 1
        try:
            yield
        finally:
            scopes[scope] -= 1
            if not scopes[scope]:
                del scopes[scope]
            if not scopes:
                self._watched.pop(found.link.share_link_id, None)


def scope_of_request(
    request: pb.GetSharedDashboardDataRequest
    | pb.WatchSharedDashboardRequest
    | pb.ListSharedVariableValuesRequest
    | pb.ListSharedAnnotationsRequest,
) -> Scope:
    """The scope of a call by the current link. Raises INVALID_ARGUMENT (CHOICE_INVALID)."""
    found = share_links.current()
    time_range = request.time_range if request.HasField("time_range") else None
    return scope_of_link(found.link, found.dashboard, request.choices, time_range)


def _recheck(
    found: Link, is_gone: Callable[[], bool] = lambda: False
) -> Callable[[], Coroutine[Any, Any, None]]:
    """Fails also when the link was changed: who watches by it must take it up as it is now."""

    async def recheck() -> None:
        await auth.recheck()
        if is_gone() or share_links.current().link.etag != found.link.etag:
            raise share_links.absent()

    return recheck
