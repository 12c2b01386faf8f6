"""What people meet at the gateway of the whole mesh."""

from __future__ import annotations

import asyncio
import gzip
import io
import json

import aiohttp
import grpc
import grpc.aio
import pytest
from meshboard.dashboard.v1 import dashboard_service_pb2, dashboard_service_pb2_grpc
from meshboard.user.v1 import (
    internal_user_service_pb2,
    internal_user_service_pb2_grpc,
    user_service_pb2,
    user_service_pb2_grpc,
)

from tests.conditions import eventually
from tests.harness import new_id, reason_of
from tests.mesh.memberships import admit
from tests.mesh.people import Person
from tests.parts import Mesh

pytestmark = pytest.mark.xdist_group("mesh")

COUNT = {"measures": [{"aggregation": "COUNT"}]}


def number(source_id: str, **query: object) -> dict[str, object]:
    return {"title": "Events", "kind": "NUMBER", "query": {"sourceIds": [source_id], **COUNT, **query}}


async def test_sign_up_and_three_ways_to_call(mesh: Mesh, ann: Person):
    by_json = await ann.get("/v1/users/me")
    metadata = (("authorization", ann.headers["authorization"]),)
    async with (
        grpc.aio.insecure_channel(mesh.gateway_url.removeprefix("http://")) as gateway,
        grpc.aio.insecure_channel(mesh.address("user")) as direct,
    ):
        for channel in (gateway, direct):
            stub = user_service_pb2_grpc.UserServiceStub(channel)
            answer = await stub.GetMe(user_service_pb2.GetMeRequest(), metadata=metadata)
            assert answer.user.user_id == by_json["user"]["userId"] == ann.user_id
    assert by_json["user"]["email"] == ann.email


async def test_an_event_reaches_a_watcher_within_a_second(ann: Person):
    source_id, write_key = await ann.new_source()
    dashboard_id = await ann.new_dashboard(number(source_id))
    await ann.send(write_key, {"event": "first", "distinctId": "a"})

    async def counted() -> bool:
        data = await ann.get(f"/v1/dashboards/{dashboard_id}:data")
        return bool(data["widgets"][0]["result"]["rows"] == [[1]])

    await eventually(counted)
    async with ann.watch(dashboard_id) as watch:
        snapshot = await watch.next()
        assert snapshot["snapshot"]["widgets"][0]["result"]["rows"] == [[1]]
        await ann.send(write_key, {"event": "second", "distinctId": "b"})
        change = await watch.next()
        assert change["changes"][0]["result"]["rows"] == [[2]]
        cursor = change["cursor"]
    await ann.send(write_key, {"event": "third", "distinctId": "c"})
    async with ann.watch(dashboard_id, cursor) as watch:
        change = await watch.next()
        if not change["changes"]:  # the event is still on its way, and the client up to date
            change = await watch.next()
        assert "snapshot" not in change
        assert change["changes"][0]["result"]["rows"] == [[3]]


async def test_a_new_widget_reaches_a_watcher(ann: Person):
    source_id, _ = await ann.new_source()
    dashboard_id = await ann.new_dashboard()
    async with ann.watch(dashboard_id) as watch:
        await watch.next()
        widget = await ann.post(f"/v1/dashboards/{dashboard_id}/widgets", number(source_id))
        change = await watch.next()
        assert [c["widgetId"] for c in change["changes"]] == [widget["widget"]["widgetId"]]


async def test_a_stream_ends_with_its_session(ann: Person):
    dashboard_id = await ann.new_dashboard()
    async with ann.watch(dashboard_id) as watch:
        await watch.next()
        await ann.post("/v1/auth:signOut", {})
        assert (await watch.next(seconds=10))["end"] == {"reason": "SESSION_REVOKED"}


async def test_no_token(stranger: Person):
    answer = await stranger.call("GET", "/v1/users/me")
    assert (answer.status, answer.body["code"]) == (401, 16)
    assert answer.reason == "TOKEN_MISSING"


@pytest.mark.parametrize("token", ["nonsense", "a.b.c", ""])
async def test_a_wrong_token(stranger: Person, token: str):
    answer = await stranger.call("GET", "/v1/users/me", authorization=f"Bearer {token}")
    assert (answer.status, answer.body["code"]) == (401, 16)
    assert answer.reason


async def test_foreign_and_absent_are_alike(ann: Person, bob: Person):
    source_id, _ = await ann.new_source()
    dashboard_id = await ann.new_dashboard(number(source_id))
    await ann.get(f"/v1/dashboards/{dashboard_id}")
    for suffix in ("", ":data", ":watch", "/widgets", "/grants"):
        foreign = await bob.call("GET", f"/v1/dashboards/{dashboard_id}{suffix}")
        absent = await bob.call("GET", f"/v1/dashboards/{new_id()}{suffix}")
        assert (foreign.status, foreign.body) == (absent.status, absent.body)
        assert foreign.status == 404
        assert foreign.reason == "DASHBOARD_NOT_FOUND"
    answer = await bob.call("GET", f"/v1/dashboards/{dashboard_id}", **{"x-workspace-id": ann.workspace_id})
    assert (answer.status, answer.reason) == (404, "WORKSPACE_NOT_FOUND")
    query = {"query": {"sourceIds": [source_id]}}
    answer = await bob.call("POST", "/v1/queries:run", query)
    assert (answer.status, answer.reason) == (404, "SOURCE_NOT_FOUND")


async def test_a_widget_needs_the_right_to_its_sources(ann: Person, bob: Person):
    source_id, _ = await ann.new_source()
    dashboard_id = await bob.new_dashboard()
    answer = await bob.call("POST", f"/v1/dashboards/{dashboard_id}/widgets", number(source_id))
    assert (answer.status, answer.reason) == (404, "SOURCE_NOT_FOUND")


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/dashboards", {"title": ""}, "title"),
        ("/v1/dashboards", {"title": 5}, "title"),
        ("/v1/dashboards", '{"title": ', ""),
        ("/v1/queries:run", {"query": {"sourceIds": ["x"]}}, "query.source_ids[0]"),
        ("/v1/queries:run", {"query": {"sourceIds": [], "limit": "many"}}, "limit"),
    ],
)
async def test_a_malformed_body_names_the_field(ann: Person, path: str, body: object, field: str):
    answer = await ann.call("POST", path, body)
    assert (answer.status, answer.body["code"]) == (400, 3)
    assert answer.reason
    assert field in json.dumps(answer.body)


@pytest.mark.parametrize("path", ["/", "/v1/nothing", "/v2/users/me", "/v1/users/me/more", "/graphql"])
async def test_an_unknown_route(ann: Person, stranger: Person, path: str):
    answer = await ann.call("GET", path)
    assert (answer.status, answer.body["code"]) == (404, 5)
    assert answer.reason
    assert (await stranger.call("GET", path)).status in {401, 404}


async def test_too_many_requests(ann: Person, bob: Person):
    answers = await asyncio.gather(*(ann.call("GET", "/v1/users/me") for _ in range(300)))
    refused = [answer for answer in answers if answer.status == 429]
    assert refused, "100 calls a second are allowed to a user"
    assert {answer.status for answer in answers} == {200, 429}
    assert refused[0].body["code"] == 8
    assert refused[0].reason
    assert int(refused[0].headers["retry-after"]) >= 1
    assert (await bob.call("GET", "/v1/users/me")).status == 200, "each user has a bucket"

    async def served_again() -> bool:
        return (await ann.call("GET", "/v1/users/me")).status == 200

    await eventually(served_again)


async def test_internal_methods_are_out_of_reach(mesh: Mesh, ann: Person):
    async with grpc.aio.insecure_channel(mesh.gateway_url.removeprefix("http://")) as channel:
        stub = internal_user_service_pb2_grpc.InternalUserServiceStub(channel)
        request = internal_user_service_pb2.GetRightsRequest(
            user_id=ann.user_id, workspace_id=ann.workspace_id
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetRights(request, metadata=(("authorization", ann.headers["authorization"]),))
    assert caught.value.code() in {grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.NOT_FOUND}


async def test_native_grpc_errors_keep_their_details(mesh: Mesh, ann: Person):
    async with grpc.aio.insecure_channel(mesh.gateway_url.removeprefix("http://")) as channel:
        stub = dashboard_service_pb2_grpc.DashboardServiceStub(channel)
        request = dashboard_service_pb2.GetDashboardRequest(dashboard_id=new_id())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetDashboard(request, metadata=(("authorization", ann.headers["authorization"]),))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert reason_of(caught.value) == "DASHBOARD_NOT_FOUND"


async def test_refresh_and_sign_out(ann: Person):
    first = ann.account
    body = {"refreshToken": first["refreshToken"]}
    second = await ann.post("/v1/auth:refresh", body)
    assert second["expiresInSeconds"] == 600
    ann.headers["authorization"] = f"Bearer {second['accessToken']}"
    await ann.get("/v1/users/me")
    again = await ann.post("/v1/auth:refresh", {**body, "refreshKey": first["refreshKey"]})
    assert again["refreshToken"] == second["refreshToken"]
    await ann.post("/v1/auth:signOut", {})

    async def refused() -> bool:
        return (await ann.call("GET", "/v1/users/me")).status == 401

    await eventually(refused, seconds=2)
    answer = await ann.call("POST", "/v1/auth:refresh", {"refreshToken": second["refreshToken"]})
    assert (answer.status, answer.reason) == (401, "REFRESH_TOKEN_INVALID")


async def test_good_neighbours_survive_a_bad_event(ann: Person):
    source_id, write_key = await ann.new_source()
    answer = await ann.send(
        write_key,
        {"event": "good", "distinctId": "a", "properties": {"n": 1, "nested": {"a": [1]}, "yes": True}},
        {"event": "", "distinctId": "a"},
        {"event": "good", "distinctId": ""},
        {"event": "old", "distinctId": "a", "time": "1960-01-01T00:00:00Z"},
    )
    assert answer["acceptedCount"] == 1
    assert [(r["index"], r["reason"]) for r in answer["refused"]] == [
        (1, "EVENT_NAME_INVALID"),
        (2, "DISTINCT_ID_INVALID"),
        (3, "TIME_INVALID"),
    ]

    async def counted() -> bool:
        result = await ann.run_query(sourceIds=[source_id], breakdowns=[{"property": "properties.yes"}])
        return bool(result["rows"] == [["true", 1]])

    await eventually(counted)


async def test_gzip_and_the_write_key_in_the_body(ann: Person, stranger: Person):
    _, write_key = await ann.new_source()
    body = json.dumps({"writeKey": write_key, "events": [{"event": "a", "distinctId": "b"}]}).encode()
    answer = await stranger.call(
        "POST", "/v1/events:ingest", gzip.compress(body), **{"content-encoding": "gzip"}
    )
    assert (answer.status, answer.body["acceptedCount"]) == (200, 1)


async def test_a_wrong_or_rotated_write_key(ann: Person, stranger: Person):
    source_id, write_key = await ann.new_source()
    events = {"events": [{"event": "a", "distinctId": "b"}]}
    await stranger.post("/v1/events:ingest", events, **{"x-write-key": write_key})
    await ann.post(f"/v1/sources/{source_id}:rotateWriteKey", {})

    async def refused() -> bool:
        answer = await stranger.call("POST", "/v1/events:ingest", events, **{"x-write-key": write_key})
        return answer.status == 401 and answer.reason == "WRITE_KEY_INVALID"

    await eventually(refused, seconds=4)
    for wrong in ("", "mbw_wrong"):
        answer = await stranger.call("POST", "/v1/events:ingest", events, **{"x-write-key": wrong})
        assert (answer.status, answer.reason) == (401, "WRITE_KEY_INVALID")


async def test_grants_open_and_close_a_dashboard(mesh: Mesh, ann: Person, bob: Person):
    await admit(mesh, ann, bob, "viewer")
    bob.headers["x-workspace-id"] = ann.workspace_id
    dashboard_id = await ann.new_dashboard()
    path = f"/v1/dashboards/{dashboard_id}"
    found = (await bob.get(path))["dashboard"]
    assert found["dashboardId"] == dashboard_id
    answer = await bob.call("PATCH", path, {"title": "Mine"})
    assert (answer.status, answer.reason) == (403, "PERMISSION_MISSING")
    grant = await ann.post(f"{path}/grants", {"subject": {"userId": bob.user_id}, "role": "editor"})
    answer = await bob.call("PATCH", path, {"title": "Mine"})
    assert answer.status == 200, answer
    answer = await bob.call("PATCH", path, {"title": "Mine", "etag": found["etag"]})
    assert (answer.status, answer.reason) == (409, "ETAG_MISMATCH")
    await ann.call("DELETE", f"{path}/grants/{grant['grant']['grantId']}")
    team = await ann.post(f"/v1/workspaces/{ann.workspace_id}/teams", {"title": "All"})
    team_id = team["team"]["teamId"]
    await ann.post(f"/v1/workspaces/{ann.workspace_id}/teams/{team_id}/members", {"userId": bob.user_id})
    async with bob.watch(dashboard_id) as watch:
        await watch.next()
        deny = {"subject": {"teamId": team_id}, "role": "viewer", "effect": "DENY"}
        await ann.post(f"{path}/grants", deny)
        assert (await watch.next(seconds=10))["end"] == {"reason": "ACCESS_LOST"}
    answer = await bob.call("GET", path)
    assert (answer.status, answer.reason) == (404, "DASHBOARD_NOT_FOUND")
    assert dashboard_id not in json.dumps(await bob.get("/v1/dashboards"))


async def test_a_member_who_is_removed_is_out_at_once(mesh: Mesh, ann: Person, bob: Person):
    members = f"/v1/workspaces/{ann.workspace_id}/members"
    await admit(mesh, ann, bob, "editor")
    bob.headers["x-workspace-id"] = ann.workspace_id
    await bob.get("/v1/dashboards")
    await ann.call("DELETE", f"{members}/{bob.user_id}")

    async def out() -> bool:
        return (await bob.call("GET", "/v1/dashboards")).status == 404

    await eventually(out, seconds=2)


async def test_a_create_can_be_repeated(ann: Person):
    body = {"title": "Once"}
    first = await ann.post("/v1/dashboards", body, **{"idempotency-key": "k1"})
    second = await ann.post("/v1/dashboards", body, **{"idempotency-key": "k1"})
    third = await ann.post("/v1/dashboards", body, **{"idempotency-key": "k2"})
    assert first["dashboard"]["dashboardId"] == second["dashboard"]["dashboardId"]
    assert first["dashboard"]["dashboardId"] != third["dashboard"]["dashboardId"]


async def test_a_body_that_is_too_large(ann: Person):
    body = io.BytesIO(json.dumps({"title": "x" * 20_000_000}).encode())
    answer = await ann.call("POST", "/v1/dashboards", body)
    assert answer.status == 413
    assert answer.reason


async def test_logs_hold_no_secrets(mesh: Mesh, http: aiohttp.ClientSession):
    person = await Person(http, mesh.gateway_url).sign_up()
    _, write_key = await person.new_source()
    await person.send(write_key, {"event": "e", "distinctId": "d"})
    await person.call("POST", "/v1/auth:signIn", {"email": person.email, "password": person.password + "x"})
    await person.post("/v1/auth:refresh", {"refreshToken": person.account["refreshToken"]})
    secrets = [
        person.password,
        write_key,
        person.account["accessToken"].split(".")[2],
        person.account["refreshToken"],
        person.account["refreshKey"],
    ]
    marker = new_id()
    await person.call("GET", f"/v1/dashboards/{marker}")
    logs = mesh.stack.data_dir / "logs"

    async def written() -> bool:
        return marker in (logs / "envoy.log").read_text()

    await eventually(written)
    for path in logs.iterdir():
        text = path.read_text()
        for secret in secrets:
            assert secret not in text, f"{path.name} holds a secret"
