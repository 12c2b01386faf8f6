"""The service of links to dashboards: what makers of links ask, and what those ask who have one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from datetime import datetime
from typing import Any, cast

from google.api.httpbody_pb2 import HttpBody
from meshboard.dashboard.v1 import share_service_pb2 as pb
from meshboard.dashboard.v1.dashboard_pb2 import Variable
from meshboard.dashboard.v1.events_pb2 import ShareLinkDeleted, ShareLinkUpdated
from meshboard.dashboard.v1.share_link_pb2 import ShareLink as ShareLinkMessage
from meshboard.dashboard.v1.share_service_pb2_grpc import ShareServiceServicer
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import auth, errors, outbox, times
from services.chassis.guesses import Count, Counts
from services.chassis.masks import changed_fields
from services.chassis.origins import address_of, headers_of
from services.chassis.paging import Pages
from services.chassis.passwords import Passwords
from services.chassis.rechecks import Span
from services.chassis.texts import clean_name
from services.chassis.times import timestamp_of
from services.dashboard_svc import new_links, share_links, shared_page
from services.dashboard_svc.annotations import Annotations
from services.dashboard_svc.answers import Answers
from services.dashboard_svc.boards import Boards, locked
from services.dashboard_svc.convert import share_link_to_pb
from services.dashboard_svc.feeds import Feeds
from services.dashboard_svc.models import ShareLink, Snapshot
from services.dashboard_svc.new_links import NewLinks
from services.dashboard_svc.settings import Settings
from services.dashboard_svc.share_links import Link, ShareLinks
from services.dashboard_svc.shared import free_variables, shared_annotation
from services.dashboard_svc.shared_views import SharedViews, scope_of_request
from services.dashboard_svc.snapshots import Snapshots
from services.dashboard_svc.sources import Sources

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
MAX_SNAPSHOT_BYTES = 4 << 20


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
        self.annotations = annotations
        self.links = links
        self.snapshots = snapshots
        self.passwords = passwords
        self.guesses = guesses
        self.now = now
        self.new_links = NewLinks(
            boards=boards,
            pages=pages,
            answers=answers,
            annotations=annotations,
            passwords=passwords,
            sources=sources,
            now=now,
        )
        self.views = SharedViews(
            boards=boards,
            answers=answers,
            feeds=feeds,
            snapshots=snapshots,
            span=span,
            draining=draining,
        )

    async def CreateShareLink(
        self, request: pb.CreateShareLinkRequest, context: Context
    ) -> pb.CreateShareLinkResponse:
        """Makes the link; its token is in no other answer."""
        workspace_id, dashboard_id = auth.caller().workspace_id, request.dashboard_id.lower()
        await self.new_links.check_binding(
            workspace_id, dashboard_id, request.locked_variables, request.filters
        )
        content = ShareLinkMessage(
            locked_variables=request.locked_variables,
            filters=request.filters,
            refresh_seconds=request.refresh_seconds,
            allowed_origins=request.allowed_origins,
            show_annotations=request.show_annotations,
            allow_time_range=request.allow_time_range,
        )
        token, token_hash = share_links.new_token()
        row = await self.new_links.row(request, "Link", content, token_hash, paused=request.paused)
        async with self.db.begin() as session:
            link, is_new = await new_links.add(session, row)
        return pb.CreateShareLinkResponse(
            share_link=link, token=token if is_new else "", url=self._url(token) if is_new else ""
        )

    async def CreateSnapshot(
        self, request: pb.CreateSnapshotRequest, context: Context
    ) -> pb.CreateSnapshotResponse:
        """Asks everything once more, and keeps the answers."""
        workspace_id, dashboard_id = auth.caller().workspace_id, request.dashboard_id.lower()
        await self.new_links.check_binding(
            workspace_id, dashboard_id, request.locked_variables, request.filters
        )
        content = ShareLinkMessage(
            locked_variables=request.locked_variables,
            filters=request.filters,
            allowed_origins=request.allowed_origins,
            show_annotations=request.show_annotations,
        )
        content.snapshot.data_time.CopyFrom(timestamp_of(self.now()))
        kept = (await self.new_links.frozen(content, workspace_id, dashboard_id, request)).SerializeToString()
        if len(kept) > MAX_SNAPSHOT_BYTES:
            raise errors.failed_precondition(
                "SNAPSHOT_TOO_LARGE", "There is more than a snapshot keeps.", limit_bytes=MAX_SNAPSHOT_BYTES
            )
        content.snapshot.size_bytes = len(kept)
        token, token_hash = share_links.new_token()
        row = await self.new_links.row(request, "Snapshot", content, token_hash)
        async with self.db.begin() as session:
            link, is_new = await new_links.add(session, row)
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
        await self.new_links.check_binding(
            caller.workspace_id,
            wanted.dashboard_id.lower(),
            wanted.locked_variables if "locked_variables" in fields else (),
            wanted.filters if "filters" in fields else (),
        )
        password_hash = await self.new_links.hash_of(wanted.password) if "password" in fields else None
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
                row.expire_time = new_links.expire_time_of(wanted, "share_link.expire_time")
            if "password" in fields:
                row.password_hash = password_hash
            if "paused" in fields:
                row.paused = wanted.paused
            row.content = new_links.changed(content, wanted, fields - _COLUMNS)
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
        shown = await self.views.dashboard(found)
        self.links.viewed(found)
        return pb.GetSharedDashboardResponse(dashboard=shown)

    async def GetSharedDashboardData(
        self, request: pb.GetSharedDashboardDataRequest, context: Context
    ) -> pb.GetSharedDashboardDataResponse:
        """Asks what the widgets ask, by the dashboard's right."""
        found = share_links.current()
        data = await self.views.data(found, scope_of_request(request))
        self.links.viewed(found)
        return pb.GetSharedDashboardDataResponse(widgets=data)

    async def WatchSharedDashboard(
        self, request: pb.WatchSharedDashboardRequest, context: Context
    ) -> AsyncIterator[pb.WatchSharedDashboardResponse]:
        """Streams what the link shows."""
        found, scope = share_links.current(), scope_of_request(request)
        self.links.viewed(found, 0)
        async for message in self.views.watch(found, scope, request.cursor):
            # Made as bytes, once for all who are sent it.
            yield cast("pb.WatchSharedDashboardResponse", message)

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
        found, scope = share_links.current(), scope_of_request(request)
        page = self.pages.open(request, found.link.share_link_id)
        if request.name not in {variable.name for variable in free_variables(found.link, found.dashboard)}:
            raise errors.invalid_argument("CHOICE_INVALID", "This cannot be chosen.", variable=request.name)
        values = await self.views.values(found, request.name, scope, request.query)
        shown, next_page_token = page.close(page.rest(list(enumerate(values)), _place), _place)
        return pb.ListSharedVariableValuesResponse(
            values=[Variable.Option(value=one.value, title=one.title) for _, one in shown],
            next_page_token=next_page_token,
        )

    async def ListSharedAnnotations(
        self, request: pb.ListSharedAnnotationsRequest, context: Context
    ) -> pb.ListSharedAnnotationsResponse:
        """Lists those made by hand and those of events, within what the link shows."""
        found, scope = share_links.current(), scope_of_request(request)
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


def password_delayed(seconds: float) -> errors.Error:
    """What is said to who has to wait after wrong passwords."""
    return errors.resource_exhausted(
        "SHARE_PASSWORD_DELAYED", "Too many wrong passwords: wait.", retry_seconds=seconds
    )


def _place(placed: tuple[int, Any]) -> tuple[int]:
    return (placed[0],)


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
