"""The data of dashboards that someone watches: kept current once, however many watch.

A `Feed` is the present state of a dashboard in one scope, put together of the answers that its lines keep. Watchers are
not sent to: each compares what its client has with the present state whenever that has changed, so a slow one skips
states instead of queueing them. What those in the same state are sent is made once.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import structlog
from meshboard.dashboard.v1 import events_pb2
from meshboard.dashboard.v1.dashboard_pb2 import Dashboard, Widget, WidgetData
from meshboard.dashboard.v1.dashboard_service_pb2 import WatchDashboardResponse
from prometheus_client import Gauge
from sqlalchemy.exc import SQLAlchemyError

from services.chassis.bus import Bus, Received
from services.dashboard_svc import cursors
from services.dashboard_svc.answers import Answers, data_of_tile
from services.dashboard_svc.lines import Line, Lines
from services.dashboard_svc.questions import Tile, resolve
from services.dashboard_svc.scopes import Scope

log = structlog.get_logger(__name__)

# Between two changes that a watcher is sent.
LEAST_SECONDS = 0.1
# What answers that come right after one another wait for each other: a tick changes several widgets.
GATHER_SECONDS = 0.02
_NEWS_KEPT = 64
# Each client that has come with a cursor has its own, though they may be equal.
_DIGESTS_KEPT = 1_000

_watchers = Gauge("meshboard_watchers", "Open streams of live dashboards.", multiprocess_mode="livesum")
_feeds = Gauge("meshboard_feeds", "Dashboards that are watched.", multiprocess_mode="livesum")

Load = Callable[[str, str], Awaitable[tuple[Dashboard, list[Widget]] | None]]

# Stands for the annotations among the widgets whose data a client has.
_ANNOTATIONS = str(UUID(int=0))

# What changes what viewers see of a dashboard, or, with a draft, may.
_CHANGES = {
    kind.DESCRIPTOR.full_name: kind
    for kind in (
        events_pb2.DashboardUpdated,
        events_pb2.DashboardDeleted,
        events_pb2.DashboardPublished,
        events_pb2.WidgetCreated,
        events_pb2.WidgetUpdated,
        events_pb2.WidgetDeleted,
        events_pb2.LibraryWidgetUpdated,
    )
}

_ANNOTATED = {
    kind.DESCRIPTOR.full_name: kind
    for kind in (
        events_pb2.AnnotationCreated,
        events_pb2.AnnotationUpdated,
        events_pb2.AnnotationDeleted,
    )
}

_GRANTS = {
    kind.DESCRIPTOR.full_name: kind
    for kind in (events_pb2.DashboardGrantCreated, events_pb2.DashboardGrantDeleted)
}

# What changes who may see any dashboard that lies below.
_PLACED = {
    kind.DESCRIPTOR.full_name: kind
    for kind in (
        events_pb2.DashboardMoved,
        events_pb2.FolderMoved,
        events_pb2.FolderGrantCreated,
        events_pb2.FolderGrantDeleted,
    )
}


@dataclass(frozen=True, eq=False)
class News:
    """What leads a client to the present state, and what data it has then.

    The message is shared by all watchers in the same state: not to be changed.
    """

    message: WatchDashboardResponse
    has: cursors.Digests
    _formed: dict[Any, Any] = field(default_factory=dict)

    def formed(self, form: Callable[[WatchDashboardResponse], Any]) -> Any:
        """The message in the form in which it is sent, made once for all who are sent it."""
        if form not in self._formed:
            self._formed[form] = form(self.message)
        return self._formed[form]


class _Shown:
    """What a widget shows: the answers of its lines, together."""

    def __init__(self, tile: Tile, lines: dict[bytes, Line]) -> None:
        self.tile = tile
        self.lines = [lines[question.key] for question in tile.questions]
        self._fixed = b"" if self.lines else cursors.digest(self.data)

    @property
    def ready(self) -> bool:
        return all(line.answer is not None for line in self.lines)

    @property
    def data(self) -> WidgetData:
        answers = {line.question.key: line.answer for line in self.lines if line.answer is not None}
        return WidgetData.FromString(data_of_tile(self.tile, answers))

    @property
    def digest(self) -> bytes:
        if len(self.lines) == 1:
            return self.lines[0].digest
        return cursors.digest_of_all(line.digest for line in self.lines) if self.lines else self._fixed


class Feed:
    """The present state of one dashboard, in one scope.

    Those in `told` are called when the state has changed, and `changes` has grown. `doubts` grows when watchers have
    reason to check at once whether they may still watch. `gone` says that the dashboard was deleted. Each watcher
    enters the feed, which ends when the last has left it.
    """

    def __init__(self, workspace_id: str, dashboard_id: str, scope: Scope, feeds: Feeds) -> None:
        self.workspace_id = workspace_id
        self.dashboard_id = dashboard_id
        self.scope = scope
        self.told: set[Callable[[], None]] = set()
        self.changes = 0
        self.doubts = 0
        self.gone = False
        self.watchers = 0
        self._feeds = feeds
        self._outdated = asyncio.Event()
        self._begun = 0  # loads of the widgets, by number
        self._loaded = 0
        self._caught_up = asyncio.Event()  # set, and replaced, after each load
        self._lines: dict[bytes, Line] = {}
        self._tiles: dict[str, _Shown] = {}
        self._news: dict[tuple[tuple[str, bytes], ...] | None, News | None] = {}
        self._annotations = b""  # another digest with each change of them; empty before the first
        self._news_by_id: dict[int, tuple[cursors.Digests | None, News | None]] = {}
        self._complete = False  # whether there has been data for all widgets
        self._gathering: asyncio.TimerHandle | None = None
        self._failure: BaseException | None = None
        # In an empty context: the work belongs to no call, has no caller's token and no call's deadline.
        self._task = asyncio.create_task(self._follow(), context=Context())
        self._task.add_done_callback(self._done)

    def __enter__(self) -> Feed:
        self.watchers += 1
        _watchers.inc()
        return self

    def __exit__(self, *_failure: object) -> None:
        _watchers.dec()
        self.watchers -= 1
        if not self.watchers:
            self._feeds.forget(self)
            self.close()

    async def catch_up(self) -> None:
        """Returns when the feed has the widgets that were committed before the call; many callers share one load."""
        load = self._begun + 1
        self._outdated.set()
        while self._loaded < load:
            self._check()
            await self._caught_up.wait()

    @property
    def ready(self) -> bool:
        """Whether there is data, or an error, for each widget."""
        self._check()
        return all(shown.ready for shown in self._tiles.values())

    def _check(self) -> None:
        if self._failure:
            raise RuntimeError("the feed has failed") from self._failure

    def news(self, has: cursors.Digests | None) -> News | None:
        """What leads a client that has this data (None: nothing) to the present state; None when nothing is new."""
        self._check()
        # Those who were sent the same have the very same digests: to compare them would cost more than the rest.
        found = self._news_by_id.get(id(has))
        if found is None:
            key = None if has is None else tuple(has.items())
            if key not in self._news:
                if len(self._news) >= _NEWS_KEPT:
                    self._forget_news()
                self._news[key] = self._make_news(has)
            if len(self._news_by_id) >= _DIGESTS_KEPT:
                self._news_by_id.clear()
            found = self._news_by_id[id(has)] = (has, self._news[key])
        return found[1]

    def _forget_news(self) -> None:
        self._news.clear()
        self._news_by_id.clear()

    def _make_news(self, has: cursors.Digests | None) -> News | None:
        known = has or {}
        now_has = {
            widget_id: shown.digest if shown.ready else known[widget_id]
            for widget_id, shown in self._tiles.items()
            if shown.ready or widget_id in known
        }
        different = [
            shown.data
            for widget_id, shown in self._tiles.items()
            if shown.ready and shown.digest != known.get(widget_id)
        ]
        removed = [
            widget_id for widget_id in known if widget_id not in self._tiles and widget_id != _ANNOTATIONS
        ]
        annotations = self._annotations or known.get(_ANNOTATIONS)
        annotated = has is not None and known.get(_ANNOTATIONS) != annotations
        if annotations:
            now_has[_ANNOTATIONS] = annotations
        cursor = self.cursor(now_has)
        if has is None:
            snapshot = WatchDashboardResponse.Snapshot(widgets=different)
            return News(WatchDashboardResponse(cursor=cursor, snapshot=snapshot), now_has)
        if not different and not removed and not annotated:
            return None
        message = WatchDashboardResponse(
            cursor=cursor, changes=different, removed_widget_ids=removed, annotations_changed=annotated
        )
        return News(message, now_has)

    def cursor(self, has: cursors.Digests) -> str:
        """What a client that has this data takes the stream up with, here or at another replica."""
        return cursors.encode(self._feeds.cursor_key, self.dashboard_id, has, self.scope)

    def read_cursor(self, cursor: str) -> cursors.Digests:
        """The opposite. Raises INVALID_ARGUMENT (CURSOR_INVALID)."""
        return cursors.decode(self._feeds.cursor_key, self.dashboard_id, cursor, self.scope)

    def wake(self) -> None:
        """Has all watchers look at it."""
        for told in tuple(self.told):
            told()

    # Called by Feeds

    def reload(self) -> None:
        """Notes that the widgets may have changed."""
        self._outdated.set()

    def annotated(self) -> None:
        """Notes that the annotations may have changed."""
        self._annotations = os.urandom(cursors.DIGEST_BYTES)
        self._announce()

    def doubt(self) -> None:
        """Has watchers check at once that they may still watch."""
        self.doubts += 1
        self._announce()

    def mistrust(self) -> None:
        """Notes that ticks and events may have been missed."""
        self.reload()
        self.annotated()
        self.doubt()
        for line in self._lines.values():
            line.stale.set()

    def close(self) -> None:
        """Stops asking."""
        for line in self._lines.values():
            self._feeds.lines.leave(line, self._told)
        if self._gathering is not None:
            self._gathering.cancel()
        self._feeds.let_end(self._task)

    # The work

    async def _follow(self) -> None:
        while True:
            self._outdated.clear()
            self._begun += 1
            try:
                loaded = await self._feeds.load(self.workspace_id, self.dashboard_id)
            except (OSError, TimeoutError, SQLAlchemyError) as error:
                log.warning("feed_waits_for_postgres", error=repr(error))
                await asyncio.sleep(0.5)
                continue
            self.gone = loaded is None
            if loaded is None:
                self.doubt()
            else:
                self._adopt(*loaded)
            self._loaded = self._begun
            self._caught_up = _replace(self._caught_up)
            await self._outdated.wait()

    def _adopt(self, dashboard: Dashboard, widgets: list[Widget]) -> None:
        tiles = resolve(widgets, dashboard, self.scope)
        questions = {question.key: question for tile in tiles for question in tile.questions}
        for key, question in questions.items():
            if key not in self._lines:
                self._lines[key] = self._feeds.lines.join(self.workspace_id, question, self._told)
        for key in self._lines.keys() - questions.keys():
            self._feeds.lines.leave(self._lines.pop(key), self._told)
        before = [shown.tile for shown in self._tiles.values()]
        self._tiles = {tile.widget_id: _Shown(tile, self._lines) for tile in tiles}
        if before != tiles:
            self._announce()

    def _told(self, failure: BaseException | None) -> None:
        if failure is not None:
            self._fail(failure)
        elif not self._complete and self.ready:
            self._complete = True
            self._announce()
        elif self._gathering is None:
            self._gathering = asyncio.get_running_loop().call_later(GATHER_SECONDS, self._announce)

    def _announce(self) -> None:
        if self._gathering is not None:
            self._gathering.cancel()
            self._gathering = None
        self._forget_news()
        self.changes += 1
        self.wake()

    def _done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (failure := task.exception()):
            log.error("feed_failed", dashboard_id=self.dashboard_id, exc_info=failure)
            self._fail(failure)

    def _fail(self, failure: BaseException) -> None:
        self._failure = failure
        self._feeds.forget(self)
        self._announce()
        self._caught_up = _replace(self._caught_up)


class Feeds:
    """The feeds of this process, and what they are told."""

    def __init__(self, load: Load, answers: Answers, cursor_key: bytes) -> None:
        self.load = load
        self.lines = Lines(answers)
        self.cursor_key = cursor_key
        self._feeds: dict[tuple[str, str, Scope], Feed] = {}
        self._ending: set[asyncio.Task[None]] = set()

    async def listen(self, bus: Bus) -> None:
        """Follows ticks, and what other replicas change."""
        await bus.listen("tick.*", self._ticked)
        await bus.listen("meshboard.dashboard.v1.>", self._happened)
        bus.on_gap(self.mistrust)

    def watch(self, workspace_id: str, dashboard_id: str, scope: Scope) -> Feed:
        """The dashboard's feed in a scope, for a watcher to enter at once."""
        key = (workspace_id, dashboard_id, scope)
        feed = self._feeds.get(key)
        if feed is None:
            feed = self._feeds[key] = Feed(*key, self)
            _feeds.inc()
        return feed

    def __len__(self) -> int:
        return len(self._feeds)

    # Called by feeds

    def let_end(self, task: asyncio.Task[None]) -> None:
        """Cancels a task, and holds it until it has ended."""
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        task.cancel()

    def forget(self, feed: Feed) -> None:
        """Gives the feed to nobody else."""
        key = (feed.workspace_id, feed.dashboard_id, feed.scope)
        if self._feeds.get(key) is feed:
            del self._feeds[key]
            _feeds.dec()

    # Called by the bus

    def _ticked(self, message: Received) -> None:
        self.lines.ticked(message.subject.removeprefix("tick."))

    def _happened(self, message: Received) -> None:
        known = (_CHANGES, _ANNOTATED, _GRANTS, _PLACED)
        kind = next((kinds[message.subject] for kinds in known if message.subject in kinds), None)
        if kind is None or not self._feeds:
            return
        event: Any = kind.FromString(message.payload)
        if isinstance(event, events_pb2.LibraryWidgetUpdated):
            for feed in self._feeds.values():
                if feed.dashboard_id in event.dashboard_ids:
                    feed.reload()
            return
        if message.subject in _PLACED:
            for feed in self._feeds.values():
                if feed.workspace_id == _workspace_of(event):
                    feed.doubt()
            return
        place = (_workspace_of(event), _dashboard_of(event))
        for feed in self._feeds.values():
            if (feed.workspace_id, feed.dashboard_id) != place:
                continue
            if message.subject in _GRANTS:
                feed.doubt()
            elif message.subject in _ANNOTATED:
                feed.annotated()
            else:
                feed.reload()

    def mistrust(self) -> None:
        """Notes that ticks and events may have been missed."""
        for feed in self._feeds.values():
            feed.mistrust()


def _replace(event: asyncio.Event) -> asyncio.Event:
    """Wakes all who wait; who waits next, waits for the next time."""
    event.set()
    return asyncio.Event()


def _dashboard_of(event: Any) -> str:
    fields = event.DESCRIPTOR.fields_by_name
    about = next(
        (getattr(event, name) for name in ("widget", "dashboard", "annotation") if name in fields), event
    )
    return str(about.dashboard_id)


def _workspace_of(event: Any) -> str:
    fields = event.DESCRIPTOR.fields_by_name
    about = event.dashboard if "dashboard" in fields else event.folder if "folder" in fields else event
    return str(about.workspace_id)
