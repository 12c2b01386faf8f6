from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from meshboard.analytics.v1.query_pb2 import Filter, Query
from meshboard.dashboard.v1 import dashboard_service_pb2, widget_service_pb2
from meshboard.dashboard.v1 import library_service_pb2 as pb
from meshboard.dashboard.v1.dashboard_pb2 import Dashboard, Display, Layout, Widget
from meshboard.dashboard.v1.library_pb2 import LibraryWidget
from meshboard.user.v1.grant_pb2 import Grant, Subject
from sqlalchemy import delete, text

from services.chassis import errors
from services.chassis.times import now
from services.dashboard_svc import models
from services.dashboard_svc.convert import fill_widget
from services.dashboard_svc.library import held
from services.dashboard_svc.library_widgets import MAX_LIBRARY_WIDGETS
from tests.conditions import eventually
from tests.dashboard_svc.boards import publish, start_draft
from tests.dashboard_svc.conftest import Mesh
from tests.harness import Member, new_id, refused

NOT_FOUND = (grpc.StatusCode.NOT_FOUND, "LIBRARY_WIDGET_NOT_FOUND")


async def create(mesh: Mesh, member: Member, **fields: Any) -> LibraryWidget:
    """A library widget, by default the count of a source of its own."""
    request = pb.CreateLibraryWidgetRequest(
        **{"title": "Revenue", "kind": Widget.TABLE, "query": Query(source_ids=[new_id()]), **fields}
    )
    response = await mesh.library.CreateLibraryWidget(request, metadata=member.metadata)
    made: LibraryWidget = response.library_widget
    return made


async def update(
    mesh: Mesh, member: Member, widget: LibraryWidget, *paths: str, **fields: Any
) -> LibraryWidget:
    request = pb.UpdateLibraryWidgetRequest(
        library_widget=LibraryWidget(**{"library_widget_id": widget.library_widget_id, **fields}),
        update_mask=FieldMask(paths=paths),
    )
    response = await mesh.library.UpdateLibraryWidget(request, metadata=member.metadata)
    updated: LibraryWidget = response.library_widget
    return updated


async def place(
    mesh: Mesh, member: Member, dashboard: Dashboard, library_widget_id: str, **more: Any
) -> Widget:
    request = widget_service_pb2.CreateWidgetRequest(
        dashboard_id=dashboard.dashboard_id, library_widget_id=library_widget_id, **more
    )
    placed: Widget = (await mesh.widgets.CreateWidget(request, metadata=member.metadata)).widget
    return placed


async def widgets_of(mesh: Mesh, member: Member, dashboard: Dashboard) -> list[Widget]:
    request = widget_service_pb2.ListWidgetsRequest(dashboard_id=dashboard.dashboard_id)
    return list((await mesh.widgets.ListWidgets(request, metadata=member.metadata)).widgets)


async def uses(mesh: Mesh, member: Member, widget: LibraryWidget) -> tuple[list[tuple[str, list[str]]], int]:
    """All that uses it, page by page, and how many others."""
    request = pb.ListLibraryWidgetUsesRequest(library_widget_id=widget.library_widget_id, page_size=1)
    found: list[tuple[str, list[str]]] = []
    while True:
        page = await mesh.library.ListLibraryWidgetUses(request, metadata=member.metadata)
        found += [(use.title, list(use.widget_ids)) for use in page.uses]
        if not page.next_page_token:
            return found, page.hidden_count
        request.page_token = page.next_page_token


async def test_creates_once_and_lists_the_newest_first(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    made = await asyncio.gather(*(create(mesh, ann, request_id="once") for _ in range(3)))
    assert len({widget.library_widget_id for widget in made}) == 1
    first = made[0]
    second = await create(mesh, ann, title="  Words ", kind=Widget.TEXT, markdown="*a*", query=None)
    assert (second.title, second.html) == ("Words", "<p><em>a</em></p>\n")
    request = pb.ListLibraryWidgetsRequest(page_size=1)
    pages = []
    for _ in range(2):
        page = await mesh.library.ListLibraryWidgets(request, metadata=ann.metadata)
        pages += page.library_widgets
        request.page_token = page.next_page_token
    assert pages == [second, first]
    assert not request.page_token
    got = await mesh.library.GetLibraryWidget(
        pb.GetLibraryWidgetRequest(library_widget_id=second.library_widget_id), metadata=ann.metadata
    )
    assert got.library_widget == second


async def test_names_are_made_of_titles_and_unique(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    made = [(await create(mesh, ann, title=title)).name for title in ("Top pages!", "Top pages", "Ü", "日本")]
    assert made == ["top-pages", "top-pages-2", "u", "table"]
    both = await asyncio.gather(*(create(mesh, ann, title="At once") for _ in range(3)))
    assert {widget.name for widget in both} == {"at-once", "at-once-2", "at-once-3"}

    taken = (grpc.StatusCode.ALREADY_EXISTS, "LIBRARY_WIDGET_NAME_TAKEN")
    assert await refused(create(mesh, ann, name="top-pages")) == taken
    assert await refused(update(mesh, ann, both[0], name="u")) == taken
    assert (await refused(create(mesh, ann, name="Not a name")))[1] == "VALIDATION_FAILED"
    assert (await create(mesh, ann, name="mine", request_id="once")).name == "mine"
    assert (await create(mesh, ann, name="mine", request_id="once")).name == "mine"
    assert (await update(mesh, ann, both[0], name="pages")).name == "pages"
    # A title that changes leaves the name: files say it.
    assert (await update(mesh, ann, both[0], title="Other")).name == "pages"
    assert (await update(mesh, ann, both[0], "name")).name == "other"
    assert (await create(mesh, mesh.identity.member("editor"), name="mine")).name == "mine"


async def test_the_writer_needs_the_right_and_sense(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    widget = await create(mesh, ann)
    assert await refused(create(mesh, ann, kind=Widget.TIMESERIES)) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "WIDGET_QUERY_UNFIT",
    )
    assert await refused(create(mesh, ann, title="\u202e")) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "VALIDATION_FAILED",
    )
    mesh.analytics.refused = errors.not_found("SOURCE_NOT_FOUND", "No.")
    for call in (create(mesh, ann), update(mesh, ann, widget, query=Query(source_ids=[new_id()]))):
        assert await refused(call) == (grpc.StatusCode.NOT_FOUND, "SOURCE_NOT_FOUND")
    assert (await update(mesh, ann, widget, title="Without a question")).query == widget.query


async def test_updates_what_the_mask_names(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    widget = await create(mesh, ann, description="Old", display=Display(decimals=1))
    renamed = await update(mesh, ann, widget, "title", title="New", description="not this")
    assert (renamed.title, renamed.description, renamed.query) == ("New", "Old", widget.query)
    words = await update(mesh, ann, widget, kind=Widget.TEXT, markdown="# Words", etag=renamed.etag)
    assert (words.html, words.HasField("query"), words.display.decimals) == ("<h1>Words</h1>\n", False, 1)
    for paths, fields, reason in (
        ((), {"etag": renamed.etag, "title": "Late"}, "ETAG_MISMATCH"),
        (("creator_id",), {}, "UPDATE_MASK_INVALID"),
        (("title",), {}, "VALIDATION_FAILED"),
        ((), {"query": widget.query}, "VALIDATION_FAILED"),
        (("title",), {"library_widget_id": new_id(), "title": "Nobody's"}, "LIBRARY_WIDGET_NOT_FOUND"),
    ):
        assert (await refused(update(mesh, ann, widget, *paths, **fields)))[1] == reason


async def test_a_change_is_seen_wherever_it_is_shown(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    library = await create(mesh, ann)
    one, two = await mesh.dashboard(ann, "One"), await mesh.dashboard(ann, "Two")
    await mesh.widget(ann, one, title="Its own")
    placed = await place(mesh, ann, one, library.library_widget_id, name="revenue")
    assert (placed.title, placed.kind, placed.query) == ("Revenue", Widget.TABLE, library.query)
    assert (placed.name, placed.layout.y) == ("revenue", 8)
    for _ in range(2):
        await place(mesh, ann, two, library.library_widget_id)
    request = dashboard_service_pb2.WatchDashboardRequest(dashboard_id=one.dashboard_id)
    stream = mesh.dashboards.WatchDashboard(request, metadata=ann.metadata)
    assert len((await stream.read()).snapshot.widgets) == 2
    before = [await widgets_of(mesh, ann, dashboard) for dashboard in (one, two)]
    changed = await update(mesh, ann, library, title="Turnover", query=Query(source_ids=[new_id()]))
    after = [await widgets_of(mesh, ann, dashboard) for dashboard in (one, two)]
    assert [[widget.title for widget in widgets] for widgets in after] == [
        ["Its own", "Turnover"],
        ["Turnover", "Turnover"],
    ]
    assert [widget.etag for widget in after[0]] == [widget.etag for widget in before[0]]
    (source_id,) = changed.query.source_ids
    await eventually(lambda: source_id in mesh.feeds.lines.followed_sources)
    stream.cancel()


async def test_who_places_it_needs_the_right_to_its_sources(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    library = await create(mesh, ann)
    dashboard = await mesh.dashboard(ann)
    own = await mesh.widget(ann, dashboard)
    mesh.analytics.refused = errors.permission_denied("PERMISSION_MISSING", "Not yours.")
    update_own = widget_service_pb2.UpdateWidgetRequest(
        widget=Widget(
            dashboard_id=own.dashboard_id,
            widget_id=own.widget_id,
            library_widget_id=library.library_widget_id.upper(),
        )
    )
    for call in (
        place(mesh, ann, dashboard, library.library_widget_id),
        place(mesh, ann, dashboard, library.library_widget_id.upper()),
        mesh.widgets.UpdateWidget(update_own, metadata=ann.metadata),
    ):
        assert await refused(call) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")
        assert mesh.analytics.validated[-1][0] == library.query
    mesh.analytics.refused = None
    linked = await mesh.widgets.UpdateWidget(update_own, metadata=ann.metadata)
    assert (linked.widget.title, linked.widget.query) == ("Revenue", library.query)
    assert linked.widget.library_widget_id == library.library_widget_id


async def test_its_variables_are_those_of_the_dashboard(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    query = Query(source_ids=[new_id()], filters=[Filter(property="path")])
    query.filters[0].values.add(string_value="$path")
    library = await create(mesh, ann, query=query)
    query.filters[0].operator = Filter.EXISTS
    del query.filters[0].values[:]
    assert mesh.analytics.validated[-1][0] == query
    assert await refused(place(mesh, ann, await mesh.dashboard(ann), library.library_widget_id)) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "VARIABLE_UNKNOWN",
    )


async def test_a_widget_leaves_the_library_as_a_copy(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    library = await create(mesh, ann, description="All of it")
    dashboard = await mesh.dashboard(ann)
    placed = await place(mesh, ann, dashboard, library.library_widget_id, name="revenue")

    async def change(*paths: str, **fields: Any) -> Widget:
        ids = {"dashboard_id": placed.dashboard_id, "widget_id": placed.widget_id}
        request = widget_service_pb2.UpdateWidgetRequest(
            widget=Widget(**{**ids, **fields}), update_mask=FieldMask(paths=paths)
        )
        response = await mesh.widgets.UpdateWidget(request, metadata=ann.metadata)
        widget: Widget = response.widget
        return widget

    assert await refused(change(title="Mine")) == (grpc.StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")
    assert (await change(own_time_range=True)).title == "Revenue"
    copy = await change("library_widget_id", "title", title="Mine")
    assert (copy.title, copy.description, copy.query) == ("Mine", "All of it", library.query)
    assert (copy.library_widget_id, copy.name, copy.own_time_range) == ("", "revenue", True)
    await update(mesh, ann, library, title="Turnover")
    assert await widgets_of(mesh, ann, dashboard) == [copy]
    assert await uses(mesh, ann, library) == ([], 0)


async def test_where_used_tells_of_dashboards_that_the_caller_may_see(mesh: Mesh) -> None:
    ann = mesh.identity.member("admin")
    bob = mesh.identity.member("viewer", ann.workspace_id)
    library, other = await create(mesh, ann), await create(mesh, ann)
    dashboards = [await mesh.dashboard(ann, title) for title in ("First", "Second", "Hidden", "Without")]
    placed = [
        await place(mesh, ann, each, library.library_widget_id) for each in (*dashboards[:3], dashboards[0])
    ]
    await place(mesh, ann, dashboards[3], other.library_widget_id)
    await mesh.dashboards.CreateDashboardGrant(
        dashboard_service_pb2.CreateDashboardGrantRequest(
            dashboard_id=dashboards[2].dashboard_id,
            subject=Subject(workspace=True),
            role="viewer",
            effect=Grant.DENY,
        ),
        metadata=ann.metadata,
    )
    first = [placed[0].widget_id, placed[3].widget_id]
    assert await uses(mesh, bob, library) == (
        [("Second", [placed[1].widget_id]), ("First", first)],
        1,
    )
    assert (await uses(mesh, ann, library))[1] == 0
    stranger = mesh.identity.member("owner")
    assert await refused(uses(mesh, stranger, library)) == NOT_FOUND


async def test_what_is_used_is_not_deleted(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    library = await create(mesh, ann)
    dashboard = await mesh.dashboard(ann)
    placed = await place(mesh, ann, dashboard, library.library_widget_id)
    request = pb.DeleteLibraryWidgetRequest(library_widget_id=library.library_widget_id)
    assert await refused(mesh.library.DeleteLibraryWidget(request, metadata=ann.metadata)) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "LIBRARY_WIDGET_IN_USE",
    )
    await mesh.widgets.DeleteWidget(
        widget_service_pb2.DeleteWidgetRequest(
            dashboard_id=dashboard.dashboard_id, widget_id=placed.widget_id
        ),
        metadata=ann.metadata,
    )
    request.etag = "no"
    assert (await refused(mesh.library.DeleteLibraryWidget(request, metadata=ann.metadata)))[
        1
    ] == "ETAG_MISMATCH"
    request.etag = library.etag
    await mesh.library.DeleteLibraryWidget(request, metadata=ann.metadata)
    get = pb.GetLibraryWidgetRequest(library_widget_id=library.library_widget_id)
    for call in (
        mesh.library.DeleteLibraryWidget(request, metadata=ann.metadata),
        mesh.library.GetLibraryWidget(get, metadata=ann.metadata),
        place(mesh, ann, dashboard, library.library_widget_id),
    ):
        assert await refused(call) == NOT_FOUND


async def test_what_viewers_see_is_not_deleted_under_a_draft(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    library, dashboard = await create(mesh, ann), await mesh.dashboard(ann)
    placed = await place(mesh, ann, dashboard, library.library_widget_id)
    await start_draft(mesh, ann, dashboard.dashboard_id)
    gone = widget_service_pb2.DeleteWidgetRequest(
        dashboard_id=dashboard.dashboard_id, widget_id=placed.widget_id
    )
    await mesh.widgets.DeleteWidget(gone, metadata=ann.metadata)
    request = pb.DeleteLibraryWidgetRequest(library_widget_id=library.library_widget_id)
    in_use = (grpc.StatusCode.FAILED_PRECONDITION, "LIBRARY_WIDGET_IN_USE")
    assert await refused(mesh.library.DeleteLibraryWidget(request, metadata=ann.metadata)) == in_use
    assert [widget.title for widget in await widgets_of(mesh, ann, dashboard)] == ["Revenue"]
    # Viewers see a change of it, too.
    await update(mesh, ann, library, title="Turnover")
    assert [widget.title for widget in await widgets_of(mesh, ann, dashboard)] == ["Turnover"]
    await publish(mesh, ann, dashboard.dashboard_id)
    await mesh.library.DeleteLibraryWidget(request, metadata=ann.metadata)


async def test_none_is_deleted_while_it_is_placed(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    library, dashboard = await create(mesh, ann), await mesh.dashboard(ann)
    request = pb.DeleteLibraryWidgetRequest(library_widget_id=library.library_widget_id)
    waits = text(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE :looking"
    )

    async def waiting() -> bool:
        async with mesh.db() as session:
            return bool(await session.scalar(waits, {"looking": "%FROM library_widgets%FOR UPDATE%"}))

    async with mesh.db.begin() as session:
        await held(session, ann.workspace_id, library.library_widget_id)
        deletion = asyncio.create_task(
            refused(mesh.library.DeleteLibraryWidget(request, metadata=ann.metadata))
        )
        await eventually(waiting)
        row = models.Widget(
            workspace_id=ann.workspace_id,
            dashboard_id=dashboard.dashboard_id,
            widget_id=new_id(),
            version=1,
            creator_id=ann.user_id,
            create_time=now(),
            update_time=now(),
        )
        layout = Layout(width=1, height=1)
        fill_widget(row, Widget(library_widget_id=library.library_widget_id, layout=layout))
        session.add(row)
    assert await deletion == (grpc.StatusCode.FAILED_PRECONDITION, "LIBRARY_WIDGET_IN_USE")


async def test_a_widget_outlives_what_it_shows(mesh: Mesh) -> None:
    """As after the restore of an old version."""
    ann = mesh.identity.member("editor")
    library = await create(mesh, ann)
    dashboard = await mesh.dashboard(ann)
    placed = await place(mesh, ann, dashboard, library.library_widget_id, name="revenue")
    async with mesh.db.begin() as session:
        await session.execute(
            delete(models.LibraryWidget).where(
                models.LibraryWidget.library_widget_id == library.library_widget_id
            )
        )
    (widget,) = await widgets_of(mesh, ann, dashboard)
    assert (widget.widget_id, widget.name) == (placed.widget_id, "revenue")
    assert (widget.kind, widget.title, widget.HasField("query")) == (Widget.KIND_UNSPECIFIED, "", False)
    move = widget_service_pb2.ArrangeWidgetsRequest(dashboard_id=dashboard.dashboard_id)
    move.placements.add(widget_id=placed.widget_id).layout.x = 12
    await mesh.widgets.ArrangeWidgets(move, metadata=ann.metadata)


async def test_the_library_has_bounds(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    library = await create(mesh, ann)
    async with mesh.db.begin() as session:
        await session.execute(
            text(
                "INSERT INTO library_widgets SELECT workspace_id, gen_random_uuid(), title, kind, content, version,"
                " creator_id, NULL, create_time, update_time FROM library_widgets, generate_series(2, :count)"
                " WHERE library_widget_id = :id"
            ),
            {"id": library.library_widget_id, "count": MAX_LIBRARY_WIDGETS},
        )
    assert await refused(create(mesh, ann)) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "TOO_MANY_LIBRARY_WIDGETS",
    )


async def test_viewers_look_and_others_do_not_even_do_that(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    viewer, stranger = mesh.identity.member("viewer", ann.workspace_id), mesh.identity.member("owner")
    library = await create(mesh, ann)
    get = pb.GetLibraryWidgetRequest(library_widget_id=library.library_widget_id)
    gone = pb.DeleteLibraryWidgetRequest(library_widget_id=library.library_widget_id)
    got = await mesh.library.GetLibraryWidget(get, metadata=viewer.metadata)
    assert got.library_widget == library
    for call in (
        create(mesh, viewer),
        update(mesh, viewer, library, title="Mine"),
        mesh.library.DeleteLibraryWidget(gone, metadata=viewer.metadata),
    ):
        assert await refused(call) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")
    theirs = await mesh.dashboard(stranger)
    for call in (
        mesh.library.GetLibraryWidget(get, metadata=stranger.metadata),
        update(mesh, stranger, library, title="Mine"),
        mesh.library.DeleteLibraryWidget(gone, metadata=stranger.metadata),
        place(mesh, stranger, theirs, library.library_widget_id),
    ):
        assert await refused(call) == NOT_FOUND


@pytest.mark.parametrize("kind", [Widget.CUSTOM, Widget.KIND_UNSPECIFIED])
async def test_refuses_what_is_no_kind(mesh: Mesh, kind: Widget.Kind.ValueType) -> None:
    ann = mesh.identity.member("editor")
    assert (await refused(create(mesh, ann, kind=kind)))[1] == "VALIDATION_FAILED"
