from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import MessageToDict
from meshboard.dashboard.v1 import widget_kind_service_pb2 as pb
from meshboard.dashboard.v1.dashboard_pb2 import Widget
from meshboard.dashboard.v1.widget_kind_pb2 import WidgetKind
from sqlalchemy import text

from services.chassis import errors
from services.chassis.times import now
from services.dashboard_svc import models, widget_kinds
from services.dashboard_svc.convert import fill_widget
from services.dashboard_svc.custom_widgets import hold
from tests.conditions import eventually
from tests.dashboard_svc import boards
from tests.dashboard_svc.conftest import Mesh
from tests.dashboard_svc.custom import (
    QUERY,
    SCHEMA,
    SPEC,
    change_kind,
    custom,
    kind_request,
    make_kind,
    place,
)
from tests.harness import Member, new_id, refused

NOT_FOUND = (grpc.StatusCode.NOT_FOUND, "WIDGET_KIND_NOT_FOUND")
INVALID = (grpc.StatusCode.INVALID_ARGUMENT, "WIDGET_KIND_INVALID")


async def get(mesh: Mesh, member: Member, kind: WidgetKind, version: int = 0) -> WidgetKind:
    request = pb.GetWidgetKindRequest(widget_kind_id=kind.widget_kind_id, version=version)
    found: WidgetKind = (await mesh.kinds.GetWidgetKind(request, metadata=member.metadata)).widget_kind
    return found


async def delete(mesh: Mesh, member: Member, kind: WidgetKind, etag: str = "") -> None:
    request = pb.DeleteWidgetKindRequest(widget_kind_id=kind.widget_kind_id, etag=etag)
    await mesh.kinds.DeleteWidgetKind(request, metadata=member.metadata)


async def versions(mesh: Mesh, member: Member, kind: WidgetKind) -> list[tuple[int, int]]:
    """The versions, each with the number of its widgets, page by page."""
    request = pb.ListWidgetKindVersionsRequest(widget_kind_id=kind.widget_kind_id, page_size=1)
    found: list[tuple[int, int]] = []
    while True:
        page = await mesh.kinds.ListWidgetKindVersions(request, metadata=member.metadata)
        found += [(version.version, version.widgets) for version in page.versions]
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


async def test_makes_once_and_lists_by_names(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    request = kind_request("bars", request_id="once")
    first = (await mesh.kinds.CreateWidgetKind(request, metadata=ann.metadata)).widget_kind
    again = (await mesh.kinds.CreateWidgetKind(request, metadata=ann.metadata)).widget_kind
    assert first == again == await get(mesh, ann, first)
    assert (first.name, first.title, first.version) == ("bars", "Bars", 1)
    assert MessageToDict(first.spec) == SPEC
    await make_kind(mesh, ann, "areas")

    listed = pb.ListWidgetKindsRequest(page_size=1)
    page = await mesh.kinds.ListWidgetKinds(listed, metadata=ann.metadata)
    assert [kind.name for kind in page.widget_kinds] == ["areas"]
    assert not page.widget_kinds[0].HasField("options_schema")
    listed.page_token = page.next_page_token
    page = await mesh.kinds.ListWidgetKinds(listed, metadata=ann.metadata)
    assert [kind.name for kind in page.widget_kinds] == ["bars"]
    assert await boards.events(mesh, ann) == ["WidgetKindCreated", "WidgetKindCreated"]


async def test_names_are_unique_in_a_workspace_alone(mesh: Mesh) -> None:
    ann, bob = mesh.identity.member("admin"), mesh.identity.member("admin")
    await make_kind(mesh, ann)
    assert await refused(make_kind(mesh, ann)) == (
        grpc.StatusCode.ALREADY_EXISTS,
        "WIDGET_KIND_NAME_TAKEN",
    )
    theirs = await make_kind(mesh, bob)
    assert await refused(get(mesh, ann, theirs)) == NOT_FOUND
    assert await refused(change_kind(mesh, ann, theirs, title="Mine")) == NOT_FOUND
    assert await refused(delete(mesh, ann, theirs)) == NOT_FOUND
    assert await refused(versions(mesh, ann, theirs)) == NOT_FOUND


async def test_another_schema_template_or_spec_is_another_version(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    kind = await make_kind(mesh, ann)
    titled = await change_kind(mesh, ann, kind, title="Top", description="Bars of the top")
    assert (titled.version, titled.title, titled.description) == (1, "Top", "Bars of the top")
    assert titled.etag != kind.etag
    same = await change_kind(mesh, ann, kind, options_schema=SCHEMA)
    assert same.version == 1
    second = await change_kind(mesh, ann, kind, spec={})
    assert (second.version, second.HasField("spec")) == (2, False)
    assert (await get(mesh, ann, kind)).version == 2
    assert MessageToDict((await get(mesh, ann, kind, 1)).spec) == SPEC
    assert await refused(get(mesh, ann, kind, 3)) == (
        grpc.StatusCode.NOT_FOUND,
        "WIDGET_KIND_VERSION_NOT_FOUND",
    )
    assert await versions(mesh, ann, kind) == [(2, 0), (1, 0)]
    assert (await boards.events(mesh, ann))[1:] == ["WidgetKindUpdated"] * 3
    assert await refused(change_kind(mesh, ann, kind, etag=kind.etag, title="Late")) == (
        grpc.StatusCode.ABORTED,
        "ETAG_MISMATCH",
    )
    assert await refused(change_kind(mesh, ann, kind, name="other")) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "UPDATE_MASK_INVALID",
    )


async def test_deletes_only_what_no_widget_has(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    kind, dashboard = await make_kind(mesh, ann), await mesh.dashboard(ann)
    await place(mesh, ann, dashboard, kind)
    assert await versions(mesh, ann, kind) == [(1, 1)]
    used = (grpc.StatusCode.FAILED_PRECONDITION, "WIDGET_KIND_IN_USE")
    assert await refused(delete(mesh, ann, kind)) == used
    await boards.delete(mesh, ann, dashboard.dashboard_id)
    assert await refused(delete(mesh, ann, kind)) == used

    unused = await make_kind(mesh, ann, "unused")
    assert await refused(delete(mesh, ann, unused, "77")) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    await delete(mesh, ann, unused)
    assert await refused(get(mesh, ann, unused)) == NOT_FOUND
    assert (await boards.events(mesh, ann))[-1] == "WidgetKindDeleted"
    await make_kind(mesh, ann, "unused")


async def test_what_becomes_a_widget_meanwhile_is_not_deleted(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    kind, dashboard = await make_kind(mesh, ann), await mesh.dashboard(ann)
    made = await place(mesh, ann, dashboard, kind)
    waits = text(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE :looking"
    )

    async def waiting() -> bool:
        async with mesh.db() as session:
            return bool(await session.scalar(waits, {"looking": "%FROM widget_kinds%FOR UPDATE%"}))

    async with mesh.db.begin() as session:
        row = await session.get_one(models.Widget, (ann.workspace_id, made.dashboard_id, made.widget_id))
        await session.delete(row)
    async with mesh.db.begin() as session:
        await hold(session, ann.workspace_id, made)
        deletion = asyncio.create_task(refused(delete(mesh, ann, kind)))
        await eventually(waiting)
        again = models.Widget(
            workspace_id=ann.workspace_id,
            dashboard_id=made.dashboard_id,
            widget_id=new_id(),
            version=1,
            creator_id=ann.user_id,
            create_time=now(),
            update_time=now(),
        )
        fill_widget(again, made)
        session.add(again)
    assert await deletion == (grpc.StatusCode.FAILED_PRECONDITION, "WIDGET_KIND_IN_USE")

    # Who comes too late finds no kind.
    other = await make_kind(mesh, ann, "other")
    gone = custom(other)
    await delete(mesh, ann, other)
    async with mesh.db.begin() as session:
        with pytest.raises(errors.Error) as refusal:
            await hold(session, ann.workspace_id, Widget(custom=gone))
    assert refusal.value.reason == "WIDGET_KIND_NOT_FOUND"


async def test_a_workspace_has_so_many_kinds(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    ann = mesh.identity.member("admin")
    monkeypatch.setattr(widget_kinds, "MAX_WIDGET_KINDS", 1)
    monkeypatch.setattr(widget_kinds, "MAX_VERSIONS", 1)
    kind = await make_kind(mesh, ann)
    full = (grpc.StatusCode.FAILED_PRECONDITION, "TOO_MANY_WIDGET_KINDS")
    assert await refused(make_kind(mesh, ann, "more")) == full
    assert await refused(change_kind(mesh, ann, kind, spec={})) == full


NO_KINDS: dict[str, dict[str, Any]] = {
    "a schema of a text": {"options_schema": {"type": "string"}},
    "another draft": {"options_schema": {**SCHEMA, "$schema": "http://json-schema.org/draft-07/schema#"}},
    "no schema": {"options_schema": {**SCHEMA, "minProperties": -1}},
    "an unknown field": {"query_template": {**QUERY, "nonsense": 1}},
    "an unknown field with a place": {"query_template": {**QUERY, "nonsense": {"$option": "top"}}},
    "an unknown option": {"query_template": {**QUERY, "limit": {"$option": "absent"}}},
    "a place with more": {"query_template": {**QUERY, "limit": {"$option": "top", "default": 1}}},
    "a column in a query": {"query_template": {**QUERY, "timeZone": {"$column": "by"}}},
    "a place as a whole": {"query_template": {"$option": "top"}},
    "another Vega-Lite": {"spec": {**SPEC, "$schema": "https://vega.github.io/schema/vega-lite/v4.json"}},
    "other data": {"spec": {**SPEC, "data": {"url": "https://a.example/x.json"}}},
    "a number as a column": {"spec": {**SPEC, "title": {"$column": "top"}}},
    "an unknown condition": {"spec": {**SPEC, "title": {"$if": "absent", "text": "x"}}},
}


@pytest.mark.parametrize("name", NO_KINDS)
async def test_refuses_what_is_no_kind(mesh: Mesh, name: str) -> None:
    ann, parts = mesh.identity.member("admin"), NO_KINDS[name]
    assert await refused(make_kind(mesh, ann, **parts)) == INVALID
    kind = await make_kind(mesh, ann)
    assert await refused(change_kind(mesh, ann, kind, **parts)) == INVALID
    assert (await get(mesh, ann, kind)).version == 1


async def test_only_admins_make_kinds(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    kind = await make_kind(mesh, ann)
    eve = mesh.identity.member("editor", workspace_id=ann.workspace_id)
    assert (await get(mesh, eve, kind)) == kind
    denied = (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")
    assert await refused(make_kind(mesh, eve, "mine")) == denied
    assert await refused(delete(mesh, eve, kind)) == denied
    absent = WidgetKind(widget_kind_id=new_id())
    assert await refused(get(mesh, eve, absent)) == NOT_FOUND
