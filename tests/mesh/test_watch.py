"""Live dashboards through the gateway: server-sent events, lines of JSON, gRPC."""

from __future__ import annotations

import secrets

import pytest

from tests.mesh.people import Person

LINES = "application/x-ndjson"
FORMS = ("text/event-stream", LINES)
TALLY = {
    "title": "Tally",
    "optionsSchema": {
        "type": "object",
        "properties": {name: {"type": "string"} for name in ("source", "event", "title")},
        "required": ["source", "event"],
    },
    "queryTemplate": {
        "sourceIds": [{"$option": "source"}],
        "filters": [{"property": "event", "values": [{"$option": "event"}]}],
    },
    "spec": {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "title": {"$option": "title"},
        "data": {"name": "rows"},
        "mark": "bar",
    },
}


def number(source_id: str) -> dict[str, object]:
    return {"title": "Events", "kind": "NUMBER", "query": {"sourceIds": [source_id]}}


@pytest.mark.parametrize("accept", FORMS)
async def test_a_browser_and_a_program_are_told_the_same(ann: Person, accept: str):
    source_id, write_key = await ann.new_source()
    dashboard_id = await ann.new_dashboard(number(source_id))
    async with ann.watch(dashboard_id, accept=accept) as watch:
        first = await watch.next()
        (widget,) = first["snapshot"]["widgets"]
        assert widget["result"]["rows"] == [[0]]
        await ann.send(write_key, {"event": "seen", "distinctId": "a"})
        change = await watch.next()
        assert change["changes"][0]["result"]["rows"] == [[1]]
    async with ann.watch(dashboard_id, change["cursor"], accept=accept) as watch:
        again = await watch.next()
        assert (again["changes"], again["removedWidgetIds"]) == ([], [])
        await ann.post("/v1/auth:signOut", {})
        assert (await watch.next())["end"] == {"reason": "SESSION_REVOKED"}


@pytest.mark.parametrize("accept", FORMS)
async def test_who_has_a_link_is_told_in_the_same_forms(ann: Person, accept: str):
    source_id, write_key = await ann.new_source()
    dashboard_id = await ann.new_dashboard(number(source_id))
    made = await ann.post(f"/v1/dashboards/{dashboard_id}/shareLinks", {})
    stranger = Person(ann.http, ann.url)
    path = f"/v1/shared/{made['token']}:watch"
    async with stranger.watch_at(path, accept=accept) as watch:
        first = await watch.next()
        assert first["snapshot"]["widgets"][0]["result"]["rows"] == [[0]]
        assert not first["snapshot"]["widgets"][0]["result"]["watermark"]
        await ann.send(write_key, {"event": "seen", "distinctId": "a"})
        change = await watch.next()
        assert change["changes"][0]["result"]["rows"] == [[1]]
    async with stranger.watch_at(path, change["cursor"], accept) as watch:
        again = await watch.next()
        assert (again["changes"], again["removedWidgetIds"]) == ([], [])
        link_id = made["shareLink"]["shareLinkId"]
        await ann.call("DELETE", f"/v1/dashboards/{dashboard_id}/shareLinks/{link_id}")
        assert (await watch.next())["end"] == {"reason": "LINK_ENDED"}
    answer = await stranger.call("GET", path, accept=accept)
    assert (answer.status, answer.reason) == (404, "SHARE_LINK_NOT_FOUND")
    answer = await stranger.call("GET", f"{path}?unknown=1", accept=accept)
    assert answer.status == 400


async def test_a_widget_of_a_kind_that_the_workspace_has_made_is_live_too(ann: Person):
    source_id, write_key = await ann.new_source()
    made = await ann.post("/v1/widgetKinds", {**TALLY, "name": f"tally-{secrets.token_hex(4)}"})
    kind_id = made["widgetKind"]["widgetKindId"]
    options = {"source": source_id, "event": "seen", "title": "<b>Seen</b>"}
    dashboard_id = await ann.new_dashboard(
        {"title": "Tally", "kind": "CUSTOM", "custom": {"widgetKindId": kind_id, "options": options}}
    )
    (widget,) = (await ann.get(f"/v1/dashboards/{dashboard_id}/widgets"))["widgets"]
    assert widget["custom"]["spec"]["title"] == "<b>Seen</b>"
    async with ann.watch(dashboard_id) as watch:
        first = await watch.next()
        assert first["snapshot"]["widgets"][0]["result"]["rows"] == [[0]]
        await ann.send(write_key, {"event": "seen", "distinctId": "a"}, {"event": "other", "distinctId": "a"})
        assert (await watch.next())["changes"][0]["result"]["rows"] == [[1]]


@pytest.mark.parametrize("accept", FORMS)
async def test_errors_have_the_one_shape(ann: Person, accept: str):
    dashboard_id = await ann.new_dashboard()
    path = f"/v1/dashboards/{dashboard_id}:watch"
    answer = await ann.call("GET", f"{path}?cursor=nonsense", accept=accept)
    assert (answer.status, answer.reason) == (400, "CURSOR_INVALID")
    answer = await ann.call("GET", f"{path}?unknown=1", accept=accept)
    assert answer.status == 400
    answer = await ann.call("GET", path, accept=accept, authorization="Bearer x")
    assert answer.status == 401
