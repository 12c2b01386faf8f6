"""Links to dashboards, for those who make them and those who have them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import structlog
from google.api.httpbody_pb2 import HttpBody
from meshboard.analytics.v1.query_pb2 import Filter, Query, TimeRange
from meshboard.dashboard.v1 import share_service_pb2 as pb
from meshboard.dashboard.v1.annotation_service_pb2 import ListAnnotationsRequest
from meshboard.dashboard.v1.dashboard_pb2 import Dashboard, DashboardContent, Variable, WidgetData
from meshboard.dashboard.v1.events_pb2 import ShareLinkCreated, ShareLinkDeleted, ShareLinkUpdated
from meshboard.dashboard.v1.share_link_pb2 import LockedVariable, SnapshotContent
from meshboard.dashboard.v1.share_link_pb2 import ShareLink as ShareLinkMessage
from meshboard.dashboard.v1.share_service_pb2_grpc import ShareServiceServicer
from meshboard.dashboard.v1.variable_service_pb2 import VariableValue
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import auth, errors, outbox, times
from services.chassis.db import new_id
from services.chassis.guesses import Count, Counts
from services.chassis.masks import changed_fields
from services.chassis.origins import address_of, headers_of
from services.chassis.paging import Pages
from services.chassis.passwords import Passwords
from services.chassis.rechecks import Span
from services.chassis.texts import clean_name
from services.chassis.times import time_of, timestamp_of
from services.dashboard_svc import share_links, shared_page
from services.dashboard_svc.annotations import Annotations
from services.dashboard_svc.answers import Answers
from services.dashboard_svc.boards import Boards, locked
from services.dashboard_svc.convert import share_link_to_pb
from services.dashboard_svc.dashboards import CATCH_UP_SECONDS
from services.dashboard_svc.definitions import sources_of
from services.dashboard_svc.feeds import LEAST_SECONDS, Feeds
from services.dashboard_svc.models import ShareLink, Snapshot
from services.dashboard_svc.questions import Tiles
from services.dashboard_svc.scopes import Scope, scope_of
from services.dashboard_svc.settings import Settings
from services.dashboard_svc.share_links import Link, ShareLinks
from services.dashboard_svc.shared import (
    SharedNews,
    bound,
    free_variables,
    frozen_dashboard,
    scope_of_link,
    shared_annotation,
    shared_dashboard,
    shared_data,
)
from services.dashboard_svc.snapshots import Frozen, Snapshots
from services.dashboard_svc.sources import Sources
from services.dashboard_svc.streams import stream
from services.dashboard_svc.variables import values_to_choose

log = structlog.get_logger(__name__)

Context = Any
MUTABLE_OF_SNAPSHOT = ("title", "expire_time", "password", "paused", "allowed_origins")
MUTABLE = (
    *MUTABLE_OF_SNAPSHOT,
    "locked_variables",
    "filters",
    "refresh_seconds",
    "show_annotations",
    "allow_time_range",
)
# What stands in a column of its own; the rest is in `content`.
_COLUMNS = {"title", "expire_time", "password", "paused"}
MAX_LINKS = 200
MAX_CONTENT_BYTES = 65_536
MAX_SNAPSHOT_BYTES = 4 << 20
# Those of the latest time.
MAX_ANNOTATIONS = 1000
_SOURCES_OF_A_QUERY = 100
# In how many ways a link is watched at once in one process.
MAX_SCOPES = 100
# Answers that are kept for links whose data need not be live.
_AGED_KEPT = 256


class ShareServicer(ShareServiceServicer):
    """meshboard.dashboard.v1.ShareService. `draining` says whether the process is going down."""

    def __init__(
        self,
        *,
        db: async_sessionmaker[AsyncSession],
        settings: Settings,
        boards: Boards,
        pages: Pages,
        answers: Answers,
        annotations: Annotations,
        feeds: Feeds,
        links: ShareLinks,
        snapshots: Snapshots,
        passwords: Passwords,
        guesses: Counts,
        sources: Sources,
        span: Span,
        draining: Callable[[], bool],
        now: Callable[[], datetime] = times.now,
    ) -> None:
        self.db = db
        self.settings = settings
        self.boards = boards
        self.pages = pages
        self.answers = answers
        self.tiles = Tiles()
        self.annotations = annotations
        self.feeds = feeds
        self.links = links
        self.snapshots = snapshots
        self.passwords = passwords
        self.guesses = guesses
        self.sources = sources
        self.span = span
        self.draining = draining
        self.now = now
        self._news = SharedNews()
        self._watched: dict[str, Counter[Scope]] = {}
        self._aged: OrderedDict[tuple[str, str, str, Scope], tuple[float, list[WidgetData]]] = OrderedDict()

    async def CreateShareLink(
        self, request: pb.CreateShareLinkRequest, context: Context
    ) -> pb.CreateShareLinkResponse:
        """Makes the link; its token is in no other answer."""
        workspace_id, dashboard_id = auth.caller().workspace_id, request.dashboard_id.lower()
        await self._check_binding(workspace_id, dashboard_id, request.locked_variables, request.filters)
        content = ShareLinkMessage(
            locked_variables=request.locked_variables,
            filters=request.filters,
            refresh_seconds=request.refresh_seconds,
            allowed_origins=request.allowed_origins,
            show_annotations=request.show_annotations,
            allow_time_range=request.allow_time_range,
        )
        token, token_hash = share_links.new_token()
        row = await self._new_row(request, "Link", content, token_hash, paused=request.paused)
        async with self.db.begin() as session:
            link, is_new = await self._add(session, row)
        return pb.CreateShareLinkResponse(
            share_link=link, token=token if is_new else "", url=self._url(token) if is_new else ""
        )

    async def CreateSnapshot(
        self, request: pb.CreateSnapshotRequest, context: Context
    ) -> pb.CreateSnapshotResponse:
        """Asks everything once more, and keeps the answers."""
        workspace_id, dashboard_id = auth.caller().workspace_id, request.dashboard_id.lower()
        await self._check_binding(workspace_id, dashboard_id, request.locked_variables, request.filters)
        content = ShareLinkMessage(
            locked_variables=request.locked_variables,
            filters=request.filters,
            allowed_origins=request.allowed_origins,
            show_annotations=request.show_annotations,
        )
        content.snapshot.data_time.CopyFrom(timestamp_of(self.now()))
        kept = (await self._freeze(content, workspace_id, dashboard_id, request)).SerializeToString()
        if len(kept) > MAX_SNAPSHOT_BYTES:
            raise errors.failed_precondition(
                "SNAPSHOT_TOO_LARGE", "There is more than a snapshot keeps.", limit_bytes=MAX_SNAPSHOT_BYTES
            )
        content.snapshot.size_bytes = len(kept)
        token, token_hash = share_links.new_token()
        row = await self._new_row(request, "Snapshot", content, token_hash)
        async with self.db.begin() as session:
            link, is_new = await self._add(session, row)
            if is_new:
                key = {name: row[name] for name in ("workspace_id", "dashboard_id", "share_link_id")}
                session.add(Snapshot(**key, content=kept))
        return pb.CreateSnapshotResponse(
            share_link=link, token=token if is_new else "", url=self._url(token) if is_new else ""
        )

    async def GetShareLink(
        self, request: pb.GetShareLinkRequest, context: Context
    ) -> pb.GetShareLinkResponse:
        """Finds the link by its id."""
        workspace_id = auth.caller().workspace_id
        async with self.db() as session:
            await self.boards.dashboard(workspace_id, request.dashboard_id.lower())
            row = await _link(session, workspace_id, request.dashboard_id, request.share_link_id)
        return pb.GetShareLinkResponse(share_link=share_link_to_pb(row))

    async def ListShareLinks(
        self, request: pb.ListShareLinksRequest, context: Context
    ) -> pb.ListShareLinksResponse:
        """Lists the newest first."""
        workspace_id = auth.caller().workspace_id
        page = self.pages.open(request, workspace_id)
        await self.boards.dashboard(workspace_id, request.dashboard_id.lower())
        async with self.db() as session:
            rows = await session.scalars(
                select(ShareLink)
                .where(
                    ShareLink.workspace_id == workspace_id,
                    ShareLink.dashboard_id == request.dashboard_id,
                    page.after(ShareLink.share_link_id, descending=True),
                )
                .order_by(ShareLink.share_link_id.desc())
                .limit(page.limit)
            )
        links, next_page_token = page.close(rows.all(), lambda row: (row.share_link_id,))
        return pb.ListShareLinksResponse(
            share_links=map(share_link_to_pb, links), next_page_token=next_page_token
        )

    async def UpdateShareLink(
        self, request: pb.UpdateShareLinkRequest, context: Context
    ) -> pb.UpdateShareLinkResponse:
        """Changes what the mask names."""
        caller, wanted = auth.caller(), request.share_link
        fields = changed_fields(wanted, request.update_mask, MUTABLE)
        title = clean_name(wanted.title, "share_link.title") if "title" in fields else ""
        await self._check_binding(
            caller.workspace_id,
            wanted.dashboard_id.lower(),
            wanted.locked_variables if "locked_variables" in fields else (),
            wanted.filters if "filters" in fields else (),
        )
        password_hash = await self._hash(wanted.password) if "password" in fields else None
        async with self.db.begin() as session:
            await locked(session, caller.workspace_id, wanted.dashboard_id, share=True)
            row = await _link(
                session,
                caller.workspace_id,
                wanted.dashboard_id,
                wanted.share_link_id,
                etag=wanted.etag,
                for_update=True,
            )
            content = ShareLinkMessage.FromString(row.content)
            if content.HasField("snapshot"):
                changed_fields(wanted, request.update_mask, MUTABLE_OF_SNAPSHOT)
            if "title" in fields:
                row.title = title
            if "expire_time" in fields:
                row.expire_time = _expire_time(wanted, "share_link.expire_time")
            if "password" in fields:
                row.password_hash = password_hash
            if "paused" in fields:
                row.paused = wanted.paused
            row.content = _changed(content, wanted, fields - _COLUMNS)
            row.version += 1
            row.update_time = self.now()
            updated = ShareLinkUpdated(share_link=share_link_to_pb(row), fields=sorted(fields))
            outbox.add(session, updated, workspace_id=caller.workspace_id)
        self.links.forget()
        return pb.UpdateShareLinkResponse(share_link=updated.share_link)

    async def DeleteShareLink(
        self, request: pb.DeleteShareLinkRequest, context: Context
    ) -> pb.DeleteShareLinkResponse:
        """Ends the link."""
        caller = auth.caller()
        async with self.db.begin() as session:
            await locked(session, caller.workspace_id, request.dashboard_id, share=True)
            row = await _link(
                session,
                caller.workspace_id,
                request.dashboard_id,
                request.share_link_id,
                etag=request.etag,
                for_update=True,
            )
            await session.delete(row)
            gone = ShareLinkDeleted(
                workspace_id=row.workspace_id, dashboard_id=row.dashboard_id, share_link_id=row.share_link_id
            )
            outbox.add(session, gone, workspace_id=caller.workspace_id)
        self.links.forget()
        return pb.DeleteShareLinkResponse()

    # By a link

    async def GetSharedPage(
        self, request: pb.GetSharedPageRequest, context: Context
    ) -> pb.GetSharedPageResponse:
        """Gives everyone the page; who may frame it depends on the link."""
        try:
            origins: Sequence[str] = (await self.links.find(request.token)).link.allowed_origins
        except errors.Error as error:
            if error.reason != "SHARE_LINK_NOT_FOUND":
                raise
            origins = ()
        await context.send_initial_metadata(shared_page.headers(origins))
        page = HttpBody(content_type="text/html; charset=utf-8", data=shared_page.PAGE)
        return pb.GetSharedPageResponse(page=page)

    async def GetSharedDashboard(
        self, request: pb.GetSharedDashboardRequest, context: Context
    ) -> pb.GetSharedDashboardResponse:
        """Says all but the data."""
        found = share_links.current()
        if found.link.HasField("snapshot"):
            shown = (await self.snapshots.content(found)).dashboard
        else:
            widgets = await self.boards.widgets(found.link.workspace_id, found.link.dashboard_id)
            shown = shared_dashboard(found.link, found.dashboard, widgets)
        self.links.viewed(found)
        return pb.GetSharedDashboardResponse(dashboard=shown)

    async def GetSharedDashboardData(
        self, request: pb.GetSharedDashboardDataRequest, context: Context
    ) -> pb.GetSharedDashboardDataResponse:
        """Asks what the widgets ask, by the dashboard's right."""
        found, scope = share_links.current(), _scope(request)
        if found.link.HasField("snapshot"):
            data = list((await self.snapshots.content(found)).widgets)
        elif found.link.refresh_seconds:
            data = await self._aged_data(found, scope)
        else:
            data = await self._data(found, scope)
        self.links.viewed(found)
        return pb.GetSharedDashboardDataResponse(widgets=data)

    async def WatchSharedDashboard(
        self, request: pb.WatchSharedDashboardRequest, context: Context
    ) -> AsyncIterator[pb.WatchSharedDashboardResponse]:
        """Streams the dashboard's feed in the scope of the link, or the one state of a snapshot."""
        found, scope = share_links.current(), _scope(request)
        self.links.viewed(found, 0)
        least_seconds = max(LEAST_SECONDS, found.link.refresh_seconds)
        draining, form = self.draining, self._news.of
        if found.link.HasField("snapshot"):
            frozen = Frozen(
                await self.snapshots.content(found), found.link.dashboard_id, self.feeds.cursor_key
            )
            has = frozen.read_cursor(request.cursor) if request.cursor else None
            async for news in stream(frozen, has, self.span, _recheck(found), draining, form=form):
                yield news
            return
        with (
            self._room(found, scope),
            self.feeds.watch(found.link.workspace_id, found.link.dashboard_id, scope) as feed,
        ):
            has = feed.read_cursor(request.cursor) if request.cursor else None
            async with asyncio.timeout(CATCH_UP_SECONDS):
                await feed.catch_up()
            recheck = _recheck(found, lambda: feed.gone)
            async for news in stream(
                feed, has, self.span, recheck, draining, least_seconds=least_seconds, form=form
            ):
                yield news

    async def UnlockSharedDashboard(
        self, request: pb.UnlockSharedDashboardRequest, context: Context
    ) -> pb.UnlockSharedDashboardResponse:
        """Gives a ticket; wrong passwords cost time."""
        found = share_links.current()
        if found.password_hash is not None:
            address = address_of(context, headers_of(context))
            async with self.guesses.attempt(self._counts(found, address)) as attempt:
                right = await self.passwords.verify(found.password_hash, request.password)
                attempt.settle(right)
            if not right:
                raise errors.unauthenticated("SHARE_PASSWORD_WRONG", "This is not the password of the link.")
        ticket, expire_time = self.links.tickets.give(found)
        return pb.UnlockSharedDashboardResponse(ticket=ticket, expire_time=timestamp_of(expire_time))

    async def ListSharedVariableValues(
        self, request: pb.ListSharedVariableValuesRequest, context: Context
    ) -> pb.ListSharedVariableValuesResponse:
        """Asks by the dashboard's right, within what the link shows."""
        found, scope = share_links.current(), _scope(request)
        page = self.pages.open(request, found.link.share_link_id)
        if request.name not in {variable.name for variable in free_variables(found.link, found.dashboard)}:
            raise errors.invalid_argument("CHOICE_INVALID", "This cannot be chosen.", variable=request.name)
        values = await self._values(found, request.name, scope, request.query)
        shown, next_page_token = page.close(page.rest(list(enumerate(values)), _place), _place)
        return pb.ListSharedVariableValuesResponse(
            values=[Variable.Option(value=one.value, title=one.title) for _, one in shown],
            next_page_token=next_page_token,
        )

    async def ListSharedAnnotations(
        self, request: pb.ListSharedAnnotationsRequest, context: Context
    ) -> pb.ListSharedAnnotationsResponse:
        """Lists those made by hand and those of events, within what the link shows."""
        found, scope = share_links.current(), _scope(request)
        page = self.pages.open(request, found.link.share_link_id)
        if not found.link.show_annotations:
            return pb.ListSharedAnnotationsResponse()
        if found.link.HasField("snapshot"):
            kept = (await self.snapshots.content(found)).annotations
            shown, next_page_token = page.close(page.rest(list(enumerate(kept)), _place), _place)
            annotations = [annotation for _, annotation in shown]
        else:
            listed, next_page_token, _ = await self.annotations.page_of(found.dashboard, scope, page)
            annotations = [shared_annotation(annotation) for annotation in listed]
        return pb.ListSharedAnnotationsResponse(annotations=annotations, next_page_token=next_page_token)

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

    async def _check_binding(
        self,
        workspace_id: str,
        dashboard_id: str,
        locked_variables: Iterable[LockedVariable],
        filters: Sequence[Filter],
    ) -> None:
        """Fails for values that variables cannot have, and for filters that the caller may not ask the sources with."""
        dashboard = await self.boards.dashboard(workspace_id, dashboard_id)
        names = [variable.name for variable in locked_variables]
        if len(names) != len(set(names)):
            raise errors.invalid_fields([("locked_variables", "names a variable twice")])
        scope_of(
            dashboard.variables, [f"{one.name}={value}" for one in locked_variables for value in one.values]
        )
        if filters:
            await self._check_filters(dashboard, filters)

    async def _check_filters(self, dashboard: Dashboard, filters: Iterable[Filter]) -> None:
        """Fails as `ValidateQuery` does on the sources that the dashboard looks at, but for those that are gone."""
        content = DashboardContent(
            variables=dashboard.variables,
            annotation_queries=dashboard.annotation_queries,
            widgets=await self.boards.widgets(dashboard.workspace_id, dashboard.dashboard_id),
        )
        _, gone = await self.sources.problems(dashboard.workspace_id, content)
        source_ids = sorted(sources_of(content) - gone)
        await self.sources.validate(
            Query(source_ids=source_ids[start : start + _SOURCES_OF_A_QUERY], filters=filters)
            for start in range(0, len(source_ids), _SOURCES_OF_A_QUERY)
        )

    async def _new_row(
        self,
        request: pb.CreateShareLinkRequest | pb.CreateSnapshotRequest,
        title: str,
        content: ShareLinkMessage,
        token_hash: bytes,
        *,
        paused: bool = False,
    ) -> dict[str, Any]:
        caller, now = auth.caller(), self.now()
        return {
            "workspace_id": caller.workspace_id,
            "dashboard_id": request.dashboard_id.lower(),
            "share_link_id": new_id(),
            "token_hash": token_hash,
            "title": clean_name(request.title or title, "title"),
            "expire_time": _expire_time(request, "expire_time"),
            "password_hash": await self._hash(request.password),
            "paused": paused,
            "content": _serialized(content),
            "view_count": 0,
            "version": 1,
            "creator_id": caller.user_id,
            "request_id": request.request_id or None,
            "create_time": now,
            "update_time": now,
        }

    async def _add(self, session: AsyncSession, row: dict[str, Any]) -> tuple[ShareLinkMessage, bool]:
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

    async def _hash(self, password: str) -> str | None:
        return await self.passwords.hash(password) if password else None

    def _url(self, token: str) -> str:
        return f"{self.settings.public_url}/shared/{token}"

    def _counts(self, found: Link, address: str) -> list[Count]:
        s, link_id = self.settings, found.link.share_link_id
        longest, longest_of_link = s.guess_longest_delay_seconds, s.guess_longest_delay_of_account_seconds
        return [
            Count(f"link {link_id} from {address}", s.guess_free_failures, longest, 16, True),
            Count(f"link {link_id}", s.guess_free_failures_of_account, longest_of_link, 32, True),
            Count(f"links from {address}", s.guess_free_failures_of_address, longest, 64, False),
        ]

    async def _data(self, found: Link, scope: Scope) -> list[WidgetData]:
        workspace_id, dashboard_id = found.link.workspace_id, found.link.dashboard_id
        widgets = await self.boards.widgets(workspace_id, dashboard_id)
        data = await self.answers.data_of(workspace_id, self.tiles.of(widgets, found.dashboard, scope))
        return [shared_data(one) for one in data]

    async def _values(self, found: Link, name: str, scope: Scope, query: str) -> Sequence[VariableValue]:
        try:
            return await values_to_choose(self.answers, found.dashboard, name, scope, query)
        except errors.Error as error:
            # Why the source does not answer is none of the viewers' business.
            log.info("no_values_to_choose", error=error.reason)
            return ()

    async def _aged_data(self, found: Link, scope: Scope) -> list[WidgetData]:
        """Answers that may be as old as the link says."""
        key = (found.link.share_link_id, found.link.etag, found.dashboard.etag, scope)
        until, data = self._aged.get(key, (0.0, []))
        if time.monotonic() >= until:
            until = time.monotonic() + found.link.refresh_seconds
            data = await self._data(found, scope)
            self._aged[key] = (until, data)
            self._aged.move_to_end(key)
            if len(self._aged) > _AGED_KEPT:
                self._aged.popitem(last=False)
        return data

    async def _freeze(
        self,
        link: ShareLinkMessage,
        workspace_id: str,
        dashboard_id: str,
        request: pb.CreateSnapshotRequest,
    ) -> SnapshotContent:
        dashboard = await self.boards.dashboard(workspace_id, dashboard_id)
        widgets = await self.boards.widgets(workspace_id, dashboard_id)
        scope = bound(
            scope_of(dashboard.variables, (), _time_range(request)), request.locked_variables, request.filters
        )
        data = await self.answers.data_of(workspace_id, self.tiles.of(widgets, dashboard, scope))
        content = SnapshotContent(
            dashboard=frozen_dashboard(link, dashboard, widgets), widgets=map(shared_data, data)
        )
        if link.show_annotations:
            page = self.pages.open(ListAnnotationsRequest(page_size=MAX_ANNOTATIONS), workspace_id)
            listed, _, _ = await self.annotations.page_of(dashboard, scope, page)
            content.annotations.extend(map(shared_annotation, listed))
        return content


def password_delayed(seconds: float) -> errors.Error:
    """What is said to who has to wait after wrong passwords."""
    return errors.resource_exhausted(
        "SHARE_PASSWORD_DELAYED", "Too many wrong passwords: wait.", retry_seconds=seconds
    )


def _time_range(
    request: pb.CreateSnapshotRequest
    | pb.GetSharedDashboardDataRequest
    | pb.WatchSharedDashboardRequest
    | pb.ListSharedVariableValuesRequest
    | pb.ListSharedAnnotationsRequest,
) -> TimeRange | None:
    return request.time_range if request.HasField("time_range") else None


def _scope(
    request: pb.GetSharedDashboardDataRequest
    | pb.WatchSharedDashboardRequest
    | pb.ListSharedVariableValuesRequest
    | pb.ListSharedAnnotationsRequest,
) -> Scope:
    found = share_links.current()
    return scope_of_link(found.link, found.dashboard, request.choices, _time_range(request))


def _place(placed: tuple[int, Any]) -> tuple[int]:
    return (placed[0],)


def _recheck(
    found: Link, is_gone: Callable[[], bool] = lambda: False
) -> Callable[[], Coroutine[Any, Any, None]]:
    """Fails also when the link was changed: who watches by it must take it up as it is now."""

    async def recheck() -> None:
        await auth.recheck()
        if is_gone() or share_links.current().link.etag != found.link.etag:
            raise share_links.absent()

    return recheck


def _expire_time(
    message: pb.CreateShareLinkRequest | pb.CreateSnapshotRequest | ShareLinkMessage, field: str
) -> datetime | None:
    return time_of(message.expire_time, field) if message.HasField("expire_time") else None


def _changed(content: ShareLinkMessage, wanted: ShareLinkMessage, fields: Iterable[str]) -> bytes:
    """What is kept of a link, with these fields of another."""
    for field in fields:
        content.ClearField(field)  # type: ignore[arg-type]  # of the whitelist MUTABLE
    kept = ShareLinkMessage()
    for field in fields:
        descriptor = ShareLinkMessage.DESCRIPTOR.fields_by_name[field]
        if descriptor.is_repeated:
            getattr(kept, field).extend(getattr(wanted, field))
        else:
            setattr(kept, field, getattr(wanted, field))
    content.MergeFrom(kept)
    return _serialized(content)


def _serialized(content: ShareLinkMessage) -> bytes:
    if content.ByteSize() > MAX_CONTENT_BYTES:
        raise errors.invalid_fields(
            [("filters", f"and what else the link says are larger than {MAX_CONTENT_BYTES} bytes")]
        )
    return content.SerializeToString()


async def _link(
    session: AsyncSession,
    workspace_id: str,
    dashboard_id: str,
    share_link_id: str,
    *,
    etag: str = "",
    for_update: bool = False,
) -> ShareLink:
    key = (workspace_id, dashboard_id.lower(), share_link_id.lower())
    row = await session.get(ShareLink, key, with_for_update=for_update)
    if row is None:
        raise share_links.absent()
    if etag and etag != str(row.version):
        raise errors.etag_mismatch()
    return row
