"""Variables that go while something on the dashboard names them."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.json_format import ParseDict
from meshboard.analytics.v1.query_pb2 import Query
from meshboard.dashboard.v1.dashboard_pb2 import AnnotationQuery, Dashboard, Variable

from services.chassis import errors
from tests.dashboard_svc.boards import get, update
from tests.dashboard_svc.conftest import Mesh
from tests.dashboard_svc.test_files import a_file, a_widget, apply
from tests.dashboard_svc.test_library_widgets import create, place
from tests.harness import Member, new_id, refused, status_of

IN_USE = (grpc.StatusCode.FAILED_PRECONDITION, "VARIABLE_IN_USE")


def variables(*names: str, **more: Any) -> list[Variable]:
    return [ParseDict({"name": name, **(more or {"text": {}})}, Variable()) for name in names]


def on_host() -> Query:
    condition = {"property": "host", "values": ["$host"]}
    return ParseDict({"sourceIds": [new_id()], "filters": [condition]}, Query())


async def board(mesh: Mesh, member: Member, *names: str) -> Dashboard:
    dashboard = await mesh.dashboard(member)
    return await update(mesh, member, dashboard.dashboard_id, variables=variables(*names))


async def test_what_a_widget_compares_with_does_not_go(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await board(mesh, ann, "host", "free")
    widget = await mesh.widget(ann, dashboard, on_host(), title="Top pages")
    before = await get(mesh, ann, dashboard.dashboard_id)
    for left in (("free",), ("free", "server"), ()):  # taken away, given another name, all of them
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await update(mesh, ann, dashboard.dashboard_id, variables=variables(*left))
        error = errors.from_status(status_of(failure.value))
        assert (error.code, error.reason) == IN_USE
        assert "'Top pages'" in error.message
        assert error.metadata["variable"] == "host"
        assert error.metadata["widgets"] == widget.widget_id
    assert await get(mesh, ann, dashboard.dashboard_id) == before
    # What nothing names goes, and so does all else.
    assert len((await update(mesh, ann, dashboard.dashboard_id, variables=variables("host"))).variables) == 1


async def test_what_says_a_time_range_stays_what_it_is(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    dashboard = await mesh.dashboard(ann)
    await update(mesh, ann, dashboard.dashboard_id, variables=variables("span", timeSpan={}))
    await mesh.widget(ann, dashboard, time_range_variable="span")
    for left in ([], variables("span")):
        assert await refused(update(mesh, ann, dashboard.dashboard_id, variables=left)) == IN_USE
    await update(mesh, ann, dashboard.dashboard_id, variables=variables("span", "more", timeSpan={}))


async def test_what_library_widgets_and_annotation_queries_name_does_not_go(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    by_library, by_marks = await board(mesh, ann, "host"), await board(mesh, ann, "host")
    library = await create(mesh, ann, query=on_host())
    await place(mesh, ann, by_library, library.library_widget_id)
    marks = {"title": "Releases", "sourceId": new_id(), "selector": {"filters": [{"property": "host"}]}}
    query = ParseDict(marks, AnnotationQuery())
    query.selector.filters[0].values.add(string_value="$host")
    await update(mesh, ann, by_marks.dashboard_id, annotation_queries=[query])
    for dashboard in (by_library, by_marks):
        assert await refused(update(mesh, ann, dashboard.dashboard_id, variables=[])) == IN_USE
    # Both at once is fine.
    await update(mesh, ann, by_marks.dashboard_id, variables=[], annotation_queries=[])


async def test_a_file_does_not_take_away_what_is_named(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    query = {"sourceIds": [new_id()], "filters": [{"property": "host", "values": ["$host"]}]}
    asking = a_widget("orders", query=query)
    dashboard_id = (await apply(mesh, ann, a_file(widgets=[asking]))).dashboard.dashboard_id
    for dry_run in (True, False):
        without = a_file(widgets=[asking], variables=[])
        assert await refused(apply(mesh, ann, without, dry_run=dry_run)) == IN_USE
    # A new name, in both places at once.
    query["filters"][0]["values"] = ["$server"]  # type: ignore[index]
    renamed = a_file(widgets=[asking], variables=[{"name": "server", "text": {}}])
    await apply(mesh, ann, renamed)
    assert [each.name for each in (await get(mesh, ann, dashboard_id)).variables] == ["server"]
