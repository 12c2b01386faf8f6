"""What whoever has a share link can find out, through the gateway."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import aiohttp
import pytest

from tests.conditions import eventually
from tests.mesh.people import Person, Watch
from tests.parts import Mesh

pytestmark = [pytest.mark.xdist_group("mesh"), pytest.mark.timeout(240)]

_ID = re.compile(r"[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}", re.IGNORECASE)
NORTH = {"property": "properties.shop", "operator": "EQUAL", "values": ["north"]}


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    jar = aiohttp.DummyCookieJar()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60), cookie_jar=jar) as session:
        yield session


@pytest.fixture
async def ann(mesh: Mesh, http: aiohttp.ClientSession) -> Person:
    return await Person(http, mesh.gateway_url).sign_up()


@pytest.fixture
def stranger(mesh: Mesh, http: aiohttp.ClientSession) -> Person:
    return Person(http, mesh.gateway_url)


async def shop(ann: Person) -> tuple[str, str, str]:
    """A source with sales of two shops, its write key, and a dashboard that counts them, one query of which fails."""
    source_id, write_key = await ann.new_source()
    await ann.send(
        write_key,
        *(
            {"event": "sale", "distinctId": f"d{n}", "properties": {"shop": name}}
            for n, name in enumerate(("north", "north", "south"))
        ),
    )
    gone, _ = await ann.new_source()
    widgets: list[dict[str, Any]] = [
        {"title": "Sales", "kind": "NUMBER", "query": {"sourceIds": [source_id]}},
        {
            "title": "Shops",
            "kind": "BAR",
            "query": {"sourceIds": [source_id], "breakdowns": [{"property": "properties.shop"}]},
        },
        {"title": "Gone", "kind": "NUMBER", "query": {"sourceIds": [gone]}},
    ]
    dashboard_id = await ann.new_dashboard(*widgets, title="Shop")
    assert (await ann.call("DELETE", f"/v1/sources/{gone}")).status == 200

    async def counted() -> bool:
        data = await ann.get(f"/v1/dashboards/{dashboard_id}:data")
        return bool(data["widgets"][0]["result"]["rows"] == [[3]])

    await eventually(counted)
    return source_id, write_key, dashboard_id


async def share(ann: Person, dashboard_id: str, **more: Any) -> dict[str, Any]:
    made: dict[str, Any] = await ann.post(f"/v1/dashboards/{dashboard_id}/shareLinks", more)
    return made


async def watch(person: Person, token: str) -> tuple[aiohttp.ClientResponse, Watch]:
    response = await person.http.get(
        f"{person.url}/v1/shared/{token}:watch", headers={"accept": "text/event-stream"}
    )
    assert response.status == 200
    return response, Watch(response, "data:")


async def test_no_answer_has_an_id_but_those_of_widgets(ann: Person, stranger: Person) -> None:
    source_id, _, dashboard_id = await shop(ann)
    made = await share(
        ann, dashboard_id, filters=[NORTH], showAnnotations=True, allowTimeRange=True, title="For the screen"
    )
    frozen = await ann.post(f"/v1/dashboards/{dashboard_id}/snapshots", {"filters": [NORTH]})
    listed = await ann.get(f"/v1/dashboards/{dashboard_id}/widgets")
    widget_ids = {UUID(widget["widgetId"]) for widget in listed["widgets"]}
    known = {
        UUID(one)
        for one in (source_id, dashboard_id, ann.user_id, ann.workspace_id, made["shareLink"]["shareLinkId"])
    }
    for token in (made["token"], frozen["token"]):
        answers = [
            await stranger.call(method, path, body)
            for method, path, body in (
                ("GET", f"/v1/shared/{token}", None),
                ("GET", f"/v1/shared/{token}:data", None),
                ("GET", f"/v1/shared/{token}:data?choices=land=de", None),
                ("GET", f"/v1/shared/{token}/annotations", None),
                ("GET", f"/v1/shared/{token}/variables/land/values", None),
                ("POST", f"/v1/shared/{token}:unlock", {"password": "anything"}),
                ("GET", f"/v1/shared/{token}:data?cursor=x", None),
                ("DELETE", f"/v1/shared/{token}", None),
            )
        ]
        assert [answer.status for answer in answers[:2]] == [200, 200]
        response, stream = await watch(stranger, token)
        message = await stream.next()
        response.close()
        told = json.dumps([[answer.body, answer.headers] for answer in answers] + [message])
        told = re.sub(r'"x-request-id": "[^"]*"', "", told)
        assert {UUID(one) for one in _ID.findall(told)} == widget_ids
        for word in ("For the screen", 'north", "op', 'properties.shop", "operator'):
            assert word not in told
        # Signed things are no hiding place either: the cursor names the dashboard, and that is all.
        raw = base64.urlsafe_b64decode(message["cursor"] + "==")
        assert [one for one in known if one.bytes in raw] == [UUID(dashboard_id)]
    data = await stranger.get(f"/v1/shared/{made['token']}:data")
    assert data["widgets"][0]["result"]["rows"] == [[2]]
    assert data["widgets"][1]["result"]["rows"] == [["north", 2]]
    assert data["widgets"][2]["error"]["message"] == "There is no data for this widget."
    assert data["widgets"][2]["error"]["details"] == []


async def test_a_link_is_live_until_it_is_taken_back(ann: Person, stranger: Person) -> None:
    _, write_key, dashboard_id = await shop(ann)
    made = await share(ann, dashboard_id, filters=[NORTH])
    token, link = made["token"], made["shareLink"]
    response, stream = await watch(stranger, token)
    first = await stream.next()
    assert first["snapshot"]["widgets"][0]["result"]["rows"] == [[2]]
    await ann.send(write_key, {"event": "sale", "distinctId": "d9", "properties": {"shop": "north"}})
    while True:
        message = await stream.next()
        if message["changes"] and message["changes"][0]["result"]["rows"] == [[3]]:
            break
    path = f"/v1/dashboards/{dashboard_id}/shareLinks/{link['shareLinkId']}"
    assert (await ann.call("PATCH", f"{path}?updateMask=paused", {"paused": True})).status == 200
    while "end" not in message:
        message = await stream.next()
    assert message["end"] == {"reason": "LINK_ENDED"}
    response.close()
    paused = await stranger.call("GET", f"/v1/shared/{token}:data")
    unknown = await stranger.call("GET", "/v1/shared/mbs_unknown:data")
    assert (paused.status, paused.body) == (unknown.status, unknown.body)
    assert (paused.status, paused.reason) == (404, "SHARE_LINK_NOT_FOUND")
    found = await ann.get(path)

    async def counted() -> bool:
        return bool((await ann.get(path))["shareLink"].get("lastViewTime"))

    assert found["shareLink"]["paused"] is True
    await eventually(counted)

    async def audited() -> bool:
        entries = await ann.get(f"/v1/workspaces/{ann.workspace_id}/auditEntries?pageSize=100")
        assert token not in json.dumps(entries)
        kinds = {entry["kind"] for entry in entries["auditEntries"]}
        return {"share_link.created", "share_link.updated"} <= kinds

    await eventually(audited)


async def test_a_token_opens_nothing_else(ann: Person, stranger: Person) -> None:
    _, _, dashboard_id = await shop(ann)
    other = await ann.new_dashboard(title="Secret")
    token = (await share(ann, dashboard_id))["token"]
    for path, headers in (
        (f"/v1/dashboards/{dashboard_id}", {"authorization": f"Bearer {token}"}),
        (f"/v1/dashboards/{dashboard_id}:data", {"x-share-ticket": token}),
        (f"/v1/dashboards/{other}:data?token={token}", {}),
        (f"/v1/shared/{token}/widgets", {}),
        (f"/v1/shared/{token}/shareLinks", {}),
        (f"/v1/shared/{dashboard_id}:data", {}),
        (f"/v1/shared/{token}%2F..%2F{other}:data", {}),
        (f"/v1/shared/{token}/../{other}:data", {}),
        (f"/v1/shared/{token}:data?dashboardId={other}", {}),
        (f"/v1/shared/{token}:data?token={other}", {}),
    ):
        answer = await stranger.call("GET", path, **headers)
        assert answer.status in {400, 401, 404}, path
        assert "Secret" not in json.dumps(answer.body)
