"""Lists of dashboards in other orders than that of their age."""

from __future__ import annotations

import itertools
from typing import Any

import grpc
import pytest
from meshboard.dashboard.v1 import dashboard_service_pb2 as pb
from meshboard.dashboard.v1.draft_service_pb2 import DiscardDraftRequest
from meshboard.user.v1.grant_pb2 import Grant, Subject
from sqlalchemy import text

from tests.dashboard_svc.boards import delete, listed, publish, start_draft, update
from tests.dashboard_svc.conftest import Mesh
from tests.dashboard_svc.test_grants import grant
from tests.dashboard_svc.test_statements import statements
from tests.harness import Member, refused

KEYS: dict[str, Any] = {
    "title": lambda each: (each.title.lower(), each.dashboard_id),
    "create_time": lambda each: (each.create_time.ToNanoseconds(), each.dashboard_id),
    "update_time": lambda each: (each.update_time.ToNanoseconds(), each.dashboard_id),
}
ORDERS = [f"{name}{direction}" for name in KEYS for direction in ("", " desc")]


async def boards(mesh: Mesh, member: Member) -> list[str]:
    """Some dashboards, changed in another order than they were made."""
    titles = ["beta", "Alpha", "alpha", "Gamma 10", "gamma 2", "beta", "Éclair"]
    made = [(await mesh.dashboard(member, title)).dashboard_id for title in titles]
    for dashboard_id in (made[3], made[0], made[5]):
        await update(mesh, member, dashboard_id, description="Changed")
    return made


@pytest.mark.parametrize("order_by", ORDERS)
async def test_pages_are_complete_and_in_order(mesh: Mesh, order_by: str) -> None:
    admin = mesh.identity.member("admin")
    guest = mesh.identity.member("viewer", admin.workspace_id)
    made = await boards(mesh, admin)
    hidden = (await listed(mesh, admin))[2]
    await grant(mesh, admin, hidden, Subject(workspace=True), "viewer", Grant.DENY)
    name, _, direction = order_by.partition(" ")
    for member, expected in ((admin, set(made)), (guest, {*made} - {hidden.dashboard_id})):
        for page_size in (1, 2, 50):
            found = await listed(mesh, member, page_size, order_by=order_by)
            assert {each.dashboard_id for each in found} == expected
            assert len(found) == len(expected)
            pairs = list(itertools.pairwise(map(KEYS[name], found)))
            # Of titles only what needs no collation is judged here: the database has its own.
            if name == "title":
                pairs = [
                    (a, b)
                    for a, b in pairs
                    if a[0] == b[0] or ((a[0] + b[0]).isalpha() and (a[0] + b[0]).isascii())
                ]
            assert all(before > after if direction else before < after for before, after in pairs)


async def test_filters_and_the_bin_have_orders_too(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    made = await boards(mesh, ann)
    await update(mesh, ann, made[0], tags=["x"])
    await update(mesh, ann, made[1], tags=["x"])
    found = await listed(mesh, ann, 1, order_by="title", tags=["x"])
    assert [each.title for each in found] == ["Alpha", "beta"]
    for dashboard_id in made[:2]:
        await delete(mesh, ann, dashboard_id)
    found = await listed(mesh, ann, 1, order_by="title desc", deleted=True)
    assert [each.title for each in found] == ["beta", "Alpha"]


async def test_drafts_stand_where_viewers_see_them(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    a, b = await mesh.dashboard(ann, "a"), await mesh.dashboard(ann, "b")
    await start_draft(mesh, ann, a.dashboard_id)
    await update(mesh, ann, a.dashboard_id, title="z")
    for order_by in ("title", "update_time"):
        assert [each.title for each in await listed(mesh, ann, order_by=order_by)] == ["a", "b"]
    await publish(mesh, ann, a.dashboard_id)
    for order_by in ("title", "update_time"):
        assert [each.title for each in await listed(mesh, ann, order_by=order_by)] == ["b", "z"]
    await start_draft(mesh, ann, b.dashboard_id)
    await update(mesh, ann, b.dashboard_id, title="zz")
    await mesh.drafts.DiscardDraft(DiscardDraftRequest(dashboard_id=b.dashboard_id), metadata=ann.metadata)
    assert [each.title for each in await listed(mesh, ann, order_by="title")] == ["b", "z"]


async def test_a_token_holds_for_its_order(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    await boards(mesh, ann)
    request = pb.ListDashboardsRequest(page_size=2, order_by="title")
    page = await mesh.dashboards.ListDashboards(request, metadata=ann.metadata)
    request.page_token = page.next_page_token
    request.order_by = "title desc"
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    call = mesh.dashboards.ListDashboards(request, metadata=ann.metadata)
    assert await refused(call) == (invalid, "PAGE_TOKEN_INVALID")
    for order_by in ("name", "title asc", "title, name", "title desc; DROP TABLE dashboards", " title"):
        request = pb.ListDashboardsRequest(order_by=order_by)
        call = mesh.dashboards.ListDashboards(request, metadata=ann.metadata)
        assert await refused(call) == (invalid, "VALIDATION_FAILED")


async def test_an_order_costs_one_statement_that_follows_an_index(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    made = await boards(mesh, ann)
    async with mesh.db.begin() as session:
        await session.execute(
            text(
                "INSERT INTO dashboards (workspace_id, dashboard_id, title, description, version, creator_id,"
                " create_time, update_time) SELECT workspace_id, gen_random_uuid(), 'More ' || n, '', 1, creator_id,"
                " create_time, update_time FROM dashboards, generate_series(1, 3000) AS n WHERE dashboard_id = :id"
            ),
            {"id": made[0]},
        )
    async with mesh.db() as session:
        await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        await session.execute(text("ANALYZE dashboards"))
    for order_by in ORDERS:
        request = pb.ListDashboardsRequest(page_size=2, order_by=order_by)
        with statements() as asked:
            await mesh.dashboards.ListDashboards(request, metadata=ann.metadata)
        assert len(asked) == 1
    for name in ("title", "update_time"):
        column = {"title": "lower({})", "update_time": "{}"}[name]
        shown = column.format(
            f"CASE WHEN published_version IS NULL THEN {name} ELSE coalesce(published_{name}, {name}) END"
        )
        async with mesh.db() as session:
            plan = await session.scalars(
                text(
                    f"EXPLAIN SELECT * FROM dashboards WHERE workspace_id = '{ann.workspace_id}'"
                    f" ORDER BY {shown}, dashboard_id LIMIT 3"
                )
            )
            assert f"dashboards_by_{name}" in "\n".join(plan)
