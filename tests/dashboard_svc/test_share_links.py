"""Links as those who make them see them."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from meshboard.analytics.v1.query_pb2 import Filter, Query
from meshboard.dashboard.v1 import share_service_pb2 as pb
from meshboard.dashboard.v1.events_pb2 import ShareLinkCreated, ShareLinkDeleted, ShareLinkUpdated
from meshboard.dashboard.v1.share_link_pb2 import LockedVariable, ShareLink
from sqlalchemy import select, text

from services.chassis import errors
from services.chassis.db import OutboxRow
from services.dashboard_svc import new_links
from services.dashboard_svc.models import ShareLink as Row
from services.dashboard_svc.share_links import hash_of
from tests.dashboard_svc.conftest import Mesh
from tests.dashboard_svc.links import NO_LINK, change, counted, delete, share
from tests.harness import ISSUER, Member, new_id, refused

SHOP = Filter(property="properties.shop", operator=Filter.EQUAL)
SHOP.values.add(string_value="north")


async def events(mesh: Mesh, member: Member) -> list[object]:
    """What was told of links of the workspace."""
    kinds = {
        kind.DESCRIPTOR.full_name: kind for kind in (ShareLinkCreated, ShareLinkUpdated, ShareLinkDeleted)
    }
    async with mesh.db() as session:
        rows = await session.scalars(
            select(OutboxRow).where(OutboxRow.subject.in_(kinds)).order_by(OutboxRow.id)
        )
        told = [(row.headers["Workspace-Id"], kinds[row.subject].FromString(row.payload)) for row in rows]
    return [event for workspace_id, event in told if workspace_id == member.workspace_id]


async def test_shows_the_token_once_and_keeps_its_hash(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    dashboard, _, _ = await counted(mesh, ann)
    request = pb.CreateShareLinkRequest(
        dashboard_id=dashboard.dashboard_id, title="Screen", password="open sesame", request_id="once"
    )
    made = await mesh.shares.CreateShareLink(request, metadata=ann.metadata)
    assert made.token.startswith("mbs_")
    assert made.url == f"{ISSUER}/shared/{made.token}"
    again = await mesh.shares.CreateShareLink(request, metadata=ann.metadata)
    assert (again.share_link, again.token, again.url) == (made.share_link, "", "")
    link = made.share_link
    assert (link.title, link.has_password, link.password, link.creator_id) == (
        "Screen",
        True,
        "",
        ann.user_id,
    )
    async with mesh.db() as session:
        row = (await session.scalars(select(Row).where(Row.share_link_id == link.share_link_id))).one()
        everything = str(await session.scalar(text("SELECT string_agg(t::text, '') FROM share_links t")))
        told = str(await session.scalar(text("SELECT string_agg(encode(payload, 'escape'), '') FROM outbox")))
    assert row.token_hash == hash_of(made.token)
    assert row.password_hash is not None
    assert row.password_hash.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    for secret in (made.token, "open sesame"):
        assert secret not in everything + told + str(link)
    assert row.password_hash not in told
    assert await events(mesh, ann) == [ShareLinkCreated(share_link=link)]


async def test_takes_the_permission_to_share(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    dashboard, _, _ = await counted(mesh, ann)
    link, _ = await share(mesh, ann, dashboard)
    key: dict[str, Any] = {"dashboard_id": dashboard.dashboard_id, "share_link_id": link.share_link_id}
    for role in ("viewer", "editor"):
        other = mesh.identity.member(role, ann.workspace_id)
        for call in (
            mesh.shares.CreateShareLink(
                pb.CreateShareLinkRequest(dashboard_id=dashboard.dashboard_id), metadata=other.metadata
            ),
            mesh.shares.CreateSnapshot(
                pb.CreateSnapshotRequest(dashboard_id=dashboard.dashboard_id), metadata=other.metadata
            ),
            mesh.shares.GetShareLink(pb.GetShareLinkRequest(**key), metadata=other.metadata),
            mesh.shares.ListShareLinks(
                pb.ListShareLinksRequest(dashboard_id=dashboard.dashboard_id), metadata=other.metadata
            ),
            mesh.shares.DeleteShareLink(pb.DeleteShareLinkRequest(**key), metadata=other.metadata),
        ):
            assert await refused(call) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")
    stranger = mesh.identity.member("owner")
    call = mesh.shares.GetShareLink(pb.GetShareLinkRequest(**key), metadata=stranger.metadata)
    assert await refused(call) == (grpc.StatusCode.NOT_FOUND, "DASHBOARD_NOT_FOUND")


async def test_a_link_belongs_to_one_dashboard(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    (first, _, _), (second, _, _) = await counted(mesh, ann), await counted(mesh, ann)
    link, _ = await share(mesh, ann, first)
    key: dict[str, Any] = {"dashboard_id": second.dashboard_id, "share_link_id": link.share_link_id}
    for call in (
        mesh.shares.GetShareLink(pb.GetShareLinkRequest(**key), metadata=ann.metadata),
        mesh.shares.DeleteShareLink(pb.DeleteShareLinkRequest(**key), metadata=ann.metadata),
        mesh.shares.UpdateShareLink(
            pb.UpdateShareLinkRequest(share_link=ShareLink(**key, title="t")), metadata=ann.metadata
        ),
    ):
        assert await refused(call) == (grpc.StatusCode.NOT_FOUND, NO_LINK)


async def test_lists_the_newest_first_in_pages(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    dashboard, _, _ = await counted(mesh, ann)
    made = [(await share(mesh, ann, dashboard, title=f"Link {n}"))[0] for n in range(5)]
    await share(mesh, ann, (await counted(mesh, ann))[0])
    found, token = [], ""
    while True:
        request = pb.ListShareLinksRequest(dashboard_id=dashboard.dashboard_id, page_size=2, page_token=token)
        page = await mesh.shares.ListShareLinks(request, metadata=ann.metadata)
        found += page.share_links
        token = page.next_page_token
        if not token:
            break
    assert found == made[::-1]


async def test_changes_what_the_mask_names(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    dashboard, _, _ = await counted(mesh, ann)
    link, _ = await share(mesh, ann, dashboard, filters=[SHOP], allow_time_range=True, password="open sesame")
    changed = await change(
        mesh, ann, link, title="Lobby", allow_time_range=False, refresh_seconds=60, password="", paused=True
    )
    assert (changed.title, changed.allow_time_range, changed.refresh_seconds) == ("Lobby", False, 60)
    assert (changed.has_password, changed.paused, list(changed.filters)) == (False, True, [SHOP])
    changed = await change(mesh, ann, changed, filters=[], allowed_origins=["https://*.shop.example"])
    assert not changed.filters
    assert changed.allowed_origins == ["https://*.shop.example"]
    key: dict[str, Any] = {"dashboard_id": dashboard.dashboard_id, "share_link_id": link.share_link_id}
    found = await mesh.shares.GetShareLink(pb.GetShareLinkRequest(**key), metadata=ann.metadata)
    assert found.share_link == changed
    await delete(mesh, ann, link)
    assert [type(event) for event in await events(mesh, ann)] == [
        ShareLinkCreated,
        ShareLinkUpdated,
        ShareLinkUpdated,
        ShareLinkDeleted,
    ]


async def test_two_editors_at_once(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    dashboard, _, _ = await counted(mesh, ann)
    link, _ = await share(mesh, ann, dashboard)

    async def rename(title: str) -> None:
        wanted = ShareLink(
            dashboard_id=link.dashboard_id, share_link_id=link.share_link_id, etag=link.etag, title=title
        )
        await mesh.shares.UpdateShareLink(pb.UpdateShareLinkRequest(share_link=wanted), metadata=ann.metadata)

    outcomes = await asyncio.gather(*(rename(f"T{n}") for n in range(4)), return_exceptions=True)
    assert sum(outcome is None for outcome in outcomes) == 1
    request = pb.DeleteShareLinkRequest(
        dashboard_id=link.dashboard_id, share_link_id=link.share_link_id, etag=link.etag
    )
    call = mesh.shares.DeleteShareLink(request, metadata=ann.metadata)
    assert await refused(call) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")


async def test_filters_take_the_writers_right_to_ask_the_sources(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    dashboard, source_id, _ = await counted(mesh, ann)
    other = new_id()
    await mesh.widget(ann, dashboard, Query(source_ids=[other, source_id]))
    mesh.analytics.validated.clear()
    link, _ = await share(mesh, ann, dashboard)
    assert mesh.analytics.validated == []
    await share(mesh, ann, dashboard, filters=[SHOP])
    ((query, metadata),) = mesh.analytics.validated
    assert query == Query(source_ids=sorted([source_id, other]), filters=[SHOP])
    assert metadata["authorization"] == f"Bearer {ann.token}"
    mesh.analytics.refused = errors.not_found("SOURCE_NOT_FOUND", "There is no such source.")
    request = pb.CreateShareLinkRequest(dashboard_id=dashboard.dashboard_id, filters=[SHOP])
    call = mesh.shares.CreateShareLink(request, metadata=ann.metadata)
    assert await refused(call) == (grpc.StatusCode.NOT_FOUND, "SOURCE_NOT_FOUND")
    assert await refused(change(mesh, ann, link, filters=[SHOP])) == (
        grpc.StatusCode.NOT_FOUND,
        "SOURCE_NOT_FOUND",
    )


async def test_refuses_what_cannot_be(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    ann = mesh.identity.member("admin")
    dashboard, _, _ = await counted(mesh, ann)
    link, _ = await share(mesh, ann, dashboard)
    for fields, reason in (
        ({"locked_variables": [LockedVariable(name="land", values=["de"])]}, "CHOICE_INVALID"),
        ({"allowed_origins": ["https://shop.example; script-src *"]}, "VALIDATION_FAILED"),
        ({"allowed_origins": ["*"]}, "VALIDATION_FAILED"),
        ({"password": "abc"}, "VALIDATION_FAILED"),
        ({"title": "\u202egnp.exe"}, "VALIDATION_FAILED"),
        ({"refresh_seconds": -1}, "VALIDATION_FAILED"),
    ):
        for call in (share(mesh, ann, dashboard, **fields), change(mesh, ann, link, **fields)):
            assert await refused(call) == (grpc.StatusCode.INVALID_ARGUMENT, reason), fields
    large = Filter(property="url", operator=Filter.EQUAL)
    large.values.add(string_value="x" * 70_000)
    assert (await refused(share(mesh, ann, dashboard, filters=[large])))[1] == "VALIDATION_FAILED"
    assert (await refused(change(mesh, ann, link, view_count=7)))[1] == "UPDATE_MASK_INVALID"
    monkeypatch.setattr(new_links, "MAX_LINKS", 1)
    assert await refused(share(mesh, ann, dashboard)) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "TOO_MANY_SHARE_LINKS",
    )


async def test_links_go_with_their_dashboard(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    dashboard, _, _ = await counted(mesh, ann)
    await share(mesh, ann, dashboard)
    async with mesh.db.begin() as session:
        await session.execute(
            text("DELETE FROM dashboards WHERE dashboard_id = :it"), {"it": dashboard.dashboard_id}
        )
        left = await session.scalar(
            text("SELECT count(*) FROM share_links WHERE dashboard_id = :it"), {"it": dashboard.dashboard_id}
        )
    assert left == 0
