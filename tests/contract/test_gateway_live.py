"""The real gateway: what it refuses, what it lets through, and in which form."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
import grpc.aio
import pytest
import yaml
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from tests.contract.gateway import RPCS, Context, Gateway, Reply, running, until
from tests.harness import Identity
from tests.parts import free_port

GET_ME = "/meshboard.user.v1.UserService/GetMe"
SIGN_IN = "/meshboard.auth.v1.AuthService/SignIn"
MIB = 1024 * 1024


@pytest.fixture(scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory, identity: Identity) -> AsyncIterator[Gateway]:
    async with running(tmp_path_factory.mktemp("gateway"), identity) as running_gateway:
        yield running_gateway


@pytest.fixture(scope="module")
async def limited(tmp_path_factory: pytest.TempPathFactory, identity: Identity) -> AsyncIterator[Gateway]:
    async with running(tmp_path_factory.mktemp("limited"), identity, limits=True) as running_gateway:
        yield running_gateway


@pytest.fixture(autouse=True)
def plain_answers(gateway: Gateway) -> None:
    gateway.services.answers.clear()
    gateway.services.go_on.set()


def assert_refused(reply: Reply, status: int, code: grpc.StatusCode, reason: str) -> None:
    """Checks that an answer has the one shape of errors."""
    assert (reply.status, reply.headers["content-type"]) == (status, "application/json")
    error = reply.json
    assert error.keys() == {"code", "message", "details"}
    assert (error["code"], bool(error["message"])) == (code.value[0], True)
    assert error["details"][0] == {
        "@type": "type.googleapis.com/google.rpc.ErrorInfo",
        "reason": reason,
        "domain": "meshboard",
        "metadata": {},
    }


async def native(
    gateway: Gateway, path: str, metadata: Mapping[str, str] | None = None, *, timeout: float = 20
) -> tuple[grpc.StatusCode, str]:
    """Calls an RPC by gRPC with an empty request; returns its code and message."""
    async with gateway.channel() as channel:
        call: Any = channel.unary_unary(path)
        try:
            await call(b"", metadata=tuple((metadata or {}).items()), timeout=timeout)
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


# --- tokens -----------------------------------------------------------------------------------------------


async def test_a_call_without_a_token_is_refused(gateway: Gateway) -> None:
    reply = await gateway.call("GET", "/v1/users/me")
    assert_refused(reply, 401, grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING")
    assert reply.headers["www-authenticate"].startswith("Bearer")
    assert await native(gateway, GET_ME) == (grpc.StatusCode.UNAUTHENTICATED, "Jwt is missing")


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"exp": 1}, "TOKEN_EXPIRED"),
        ({"exp": None}, "TOKEN_INVALID"),
        ({"aud": "another"}, "TOKEN_INVALID"),
        ({"iss": "https://another.example"}, "TOKEN_INVALID"),
    ],
)
async def test_a_wrong_token_is_refused(gateway: Gateway, claims: dict[str, Any], reason: str) -> None:
    reply = await gateway.call("GET", "/v1/users/me", headers=gateway.bearer(**claims))
    assert_refused(reply, 401, grpc.StatusCode.UNAUTHENTICATED, reason)


async def test_a_token_of_an_unknown_key_is_refused(gateway: Gateway) -> None:
    forged = Identity(gateway.identity.keys).token(iss=gateway.url)
    reply = await gateway.call("GET", "/v1/users/me", headers={"Authorization": f"Bearer {forged}"})
    assert_refused(reply, 401, grpc.StatusCode.UNAUTHENTICATED, "TOKEN_INVALID")


async def test_a_token_reaches_the_service_that_verifies_it_again(gateway: Gateway) -> None:
    headers = gateway.bearer(sub="someone")
    assert (await gateway.call("GET", "/v1/users/me", headers=headers)).status == 200
    assert gateway.last.path == GET_ME
    assert gateway.last.metadata["authorization"] == headers["Authorization"]


async def test_a_token_in_the_query_does_not_count(gateway: Gateway) -> None:
    reply = await gateway.call("GET", "/v1/users/me", params={"access_token": gateway.token()})
    assert_refused(reply, 401, grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING")


async def test_the_session_cookie_becomes_the_token(gateway: Gateway) -> None:
    token = gateway.token()
    cookie = {"Cookie": f"theme=dark; mb_session={token}; mb_other=1"}
    assert (await gateway.call("GET", "/v1/users/me", headers=cookie)).status == 200
    assert gateway.last.metadata["authorization"] == f"Bearer {token}"
    assert "cookie" not in gateway.last.metadata
    expired = {"Cookie": f"mb_session={gateway.token(exp=1)}"}
    reply = await gateway.call("GET", "/v1/users/me", headers=expired)
    assert_refused(reply, 401, grpc.StatusCode.UNAUTHENTICATED, "TOKEN_EXPIRED")
    other = {"Cookie": f"xmb_session={token}"}
    assert (await gateway.call("GET", "/v1/users/me", headers=other)).status == 401


async def test_two_tokens_are_refused(gateway: Gateway) -> None:
    headers = [("Authorization", f"Bearer {gateway.token()}") for _ in range(2)]
    reply = await gateway.call("GET", "/v1/users/me", headers=headers)
    assert_refused(reply, 400, grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_MALFORMED")


async def test_another_page_cannot_use_the_cookie(gateway: Gateway) -> None:
    def as_page(origin: str, **headers: str) -> dict[str, str]:
        return {"Origin": origin, "Cookie": f"mb_session={gateway.token()}", **headers}

    evil = "https://evil.example"
    reply = await gateway.call("POST", "/v1/sources", json={"title": "x"}, headers=as_page(evil))
    assert_refused(reply, 403, grpc.StatusCode.PERMISSION_DENIED, "ORIGIN_REFUSED")
    assert (await gateway.call("POST", "/v1/auth:signIn", json={}, headers=as_page(evil))).status == 403
    no_origin = {"Cookie": as_page(evil)["Cookie"]}
    assert (await gateway.call("POST", "/v1/sources", json={}, headers=no_origin)).status == 403
    assert (await gateway.call("POST", "/v1/sources", json={}, headers=as_page(gateway.url))).status == 200
    # A page cannot set this header without asking first (CORS), and then it is not the cookie that counts.
    with_token = as_page(evil, **gateway.bearer())
    assert (await gateway.call("POST", "/v1/sources", json={}, headers=with_token)).status == 200
    # Sending events takes a write key, not the session.
    assert (await gateway.call("POST", "/v1/events:ingest", json={}, headers=as_page(evil))).status == 200


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/nope", "/v1/nope", "/v2/dashboards", "/graphql"])
async def test_an_unknown_route_is_not_found(gateway: Gateway, path: str) -> None:
    for headers in ({}, gateway.bearer()):
        reply = await gateway.call("GET", path, headers=headers)
        assert_refused(reply, 404, grpc.StatusCode.NOT_FOUND, "ROUTE_UNKNOWN")


async def test_an_unknown_method_or_path_of_a_known_collection_is_not_found(gateway: Gateway) -> None:
    for method, path in (("PUT", "/v1/dashboards"), ("GET", "/v1/dashboards/x/nope"), ("POST", GET_ME)):
        reply = await gateway.call(method, path, headers=gateway.bearer())
        assert_refused(reply, 404, grpc.StatusCode.NOT_FOUND, "ROUTE_UNKNOWN")


@pytest.mark.parametrize("path", [path for path, rpc in RPCS.items() if rpc.rule == "internal"])
async def test_internal_rpcs_are_refused_in_any_form(gateway: Gateway, path: str) -> None:
    # By name: the gateway itself fetches keys now and then.
    before = [arrival.path for arrival in gateway.services.arrivals if "Internal" in arrival.path]
    token = gateway.bearer()
    reply = await gateway.call("POST", path, json={}, headers=token)
    assert_refused(reply, 404, grpc.StatusCode.NOT_FOUND, "ROUTE_UNKNOWN")
    code, message = await native(gateway, path, {"authorization": token["Authorization"]})
    assert (code, message) == (grpc.StatusCode.UNIMPLEMENTED, "No such method.")
    web = {**token, "Content-Type": "application/grpc-web+proto"}
    for spelling in (path, f"/{path}", f"/x/..{path}", path.replace("Internal", "%49nternal")):
        reply = await gateway.call("POST", spelling, data=bytes(5), headers=web)
        assert reply.headers["grpc-status"] == "12"
    assert [arrival.path for arrival in gateway.services.arrivals if "Internal" in arrival.path] == before


async def test_a_malformed_body_names_the_field(gateway: Gateway) -> None:
    reply = await gateway.call("POST", "/v1/events:ingest", json={"events": [{"event": "a", "time": "noon"}]})
    assert_refused(reply, 400, grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_MALFORMED")
    assert reply.json["message"].startswith("events[0].time: ")
    reply = await gateway.call(
        "POST", "/v1/events:ingest", data=b'{"events":', headers={"Content-Type": "application/json"}
    )
    assert_refused(reply, 400, grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_MALFORMED")
    reply = await gateway.call("GET", "/v1/dashboards?nope=1", headers=gateway.bearer())
    assert_refused(reply, 400, grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_MALFORMED")
    assert '"nope"' in reply.json["message"]


async def test_deep_nesting_is_refused(gateway: Gateway) -> None:
    body = b'{"events":[{"properties":{"a":' + b"[" * 200_000
    reply = await gateway.call(
        "POST", "/v1/events:ingest", data=body, headers={"Content-Type": "application/json"}
    )
    assert_refused(reply, 400, grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_MALFORMED")


async def test_a_body_does_not_override_the_path(gateway: Gateway) -> None:
    headers = gateway.bearer()
    reply = await gateway.call("POST", "/v1/dashboards/x/grants", json={"dashboard_id": "y"}, headers=headers)
    assert_refused(reply, 400, grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_MALFORMED")
    await gateway.call("POST", "/v1/dashboards/x/grants", json={"dashboardId": "y"}, headers=headers)
    assert gateway.last.request.dashboard_id == "x"


async def test_a_path_is_read_in_its_shortest_form(gateway: Gateway) -> None:
    for path in ("/v1/../v1/users/me", "//v1//users/./me", "/v1/%75sers/me"):
        assert (await gateway.call("GET", path, headers=gateway.bearer())).status == 200, path
        assert (await gateway.call("GET", path)).status == 401, path


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/v1/dashboards/a%2Fb", {}),
        ("/v1/dashboards/a%5Cb", {}),
        ("/v1/users/me", {"user_id": "1"}),
        ("/v1/users/me", {"X-HTTP-Method-Override": "DELETE"}),
    ],
)
async def test_what_could_be_read_in_two_ways_is_refused(
    gateway: Gateway, path: str, headers: dict[str, str]
) -> None:
    reply = await gateway.call("GET", path, headers={**gateway.bearer(), **headers})
    assert_refused(reply, 400, grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_MALFORMED")


async def test_headers_of_the_mesh_do_not_come_from_outside(gateway: Gateway) -> None:
    lies = {
        "X-Meshboard-User": "root",
        "X-Meshboard-Service-Token": "forged",
        "X-Meshboard-Rights-Version": "9",
        "X-Meshboard-Address": "192.0.2.1",
        "X-Envoy-Original-Path": "/elsewhere",
        "X-Envoy-External-Address": "192.0.2.1",
        "X-Envoy-Upstream-Rq-Timeout-Ms": "1",
    }
    for path, body in (("/v1/events:ingest", {}), ("/v1/sources", {"title": "x"})):
        assert (
            await gateway.call("POST", path, json=body, headers={**lies, **gateway.bearer()})
        ).status == 200
        arrived = gateway.last.metadata
        assert not {"root", "forged", "9", "192.0.2.1", "/elsewhere", "1"} & set(arrived.values())
        assert arrived["x-meshboard-address"] == "127.0.0.1"
        assert {key for key in arrived if key.startswith("x-meshboard-")} == {"x-meshboard-address"}
    # It would make a gRPC call look like one that came as JSON.
    code, message = await native(gateway, GET_ME, {"x-envoy-original-path": "/v1/users/me"})
    assert (code, message) == (grpc.StatusCode.UNAUTHENTICATED, "Jwt is missing")


async def test_headers_have_a_limit(gateway: Gateway) -> None:
    reply = await gateway.call("GET", "/v1/users/me", headers={"X-Long": "a" * 40_000})
    assert_refused(reply, 431, grpc.StatusCode.INVALID_ARGUMENT, "HEADERS_TOO_LARGE")


# --- bodies -----------------------------------------------------------------------------------------------


def batch(size: int) -> bytes:
    """A batch of one event in JSON, `size` bytes in all."""
    start, end = b'{"events":[{"event":"', b'"}]}'
    return start + b"a" * (size - len(start) - len(end)) + end


async def ingest(gateway: Gateway, body: bytes, **headers: str) -> Reply:
    return await gateway.call(
        "POST",
        "/v1/events:ingest",
        data=io.BytesIO(body),  # aiohttp warns of large bytes
        headers={"Content-Type": "application/json", **headers},
    )


async def test_a_batch_of_four_mebibytes_passes_and_more_does_not(gateway: Gateway) -> None:
    assert (await ingest(gateway, batch(4 * MIB))).status == 200
    assert len(gateway.last.request.events[0].event) > 4 * MIB - 100
    reply = await ingest(gateway, batch(4 * MIB + 1))
    assert_refused(reply, 413, grpc.StatusCode.INVALID_ARGUMENT, "BODY_TOO_LARGE")


async def test_gzip_bodies_pass_and_bombs_do_not(gateway: Gateway) -> None:
    alike = json.dumps({"events": [{"event": "request", "distinctId": "someone"}] * 5000}).encode()
    packed = gzip.compress(alike)
    assert len(alike) > 100 * len(packed)
    assert (await ingest(gateway, packed, **{"Content-Encoding": "gzip"})).status == 200
    assert len(gateway.last.request.events) == 5000
    reply = await ingest(gateway, gzip.compress(batch(100 * MIB)), **{"Content-Encoding": "gzip"})
    assert_refused(reply, 413, grpc.StatusCode.INVALID_ARGUMENT, "BODY_TOO_LARGE")


async def test_nothing_is_unpacked_for_callers_without_a_token(gateway: Gateway) -> None:
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    reply = await gateway.call("POST", "/v1/queries:run", data=gzip.compress(batch(MIB)), headers=headers)
    assert_refused(reply, 401, grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING")


async def test_large_answers_pass(gateway: Gateway) -> None:
    async def many_rows(_: Context) -> dict[str, Any]:
        return {"result": {"rows": [{"values": [{"string_value": "x" * 100}]}] * 50_000}}

    gateway.services.answers["RunQuery"] = many_rows
    reply = await gateway.call("POST", "/v1/queries:run", json={"query": {}}, headers=gateway.bearer())
    assert (reply.status, len(reply.json["result"]["rows"])) == (200, 50_000)


async def test_zero_values_are_in_the_answer(gateway: Gateway) -> None:
    assert (await ingest(gateway, batch(100))).json == {
        "acceptedCount": 0,
        "refused": [],
        "droppedCount": 0,
    }


# --- limits -----------------------------------------------------------------------------------------------


async def test_each_user_has_a_limit_of_their_own(limited: Gateway) -> None:
    busy, calm = limited.bearer(sub="busy"), limited.bearer(sub="calm")
    calls = [limited.call("GET", "/v1/users/me", headers=busy) for _ in range(600)]
    refused = [reply for reply in await asyncio.gather(*calls) if reply.status != 200]
    calm_reply = await limited.call("GET", "/v1/users/me", headers=calm)
    assert refused
    assert_refused(refused[0], 429, grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED")
    assert refused[0].json["details"][1]["retryDelay"] == "1s"
    assert refused[0].headers["retry-after"] == "1"
    assert refused[0].headers["x-ratelimit-limit"] == "100"
    # The bucket may be filled again between the refusal and its headers.
    assert int(refused[0].headers["x-ratelimit-remaining"]) < 10
    assert calm_reply.status == 200
    assert int(calm_reply.headers["x-ratelimit-remaining"]) > 90


async def test_each_share_link_has_a_limit_of_its_own(
    tmp_path_factory: pytest.TempPathFactory, identity: Identity
) -> None:
    """Over all its methods, and beside the one of the address; here of 5 calls in 10 minutes."""

    def few(text: str) -> str:
        config = yaml.safe_load(text)
        for limit in find_limits(config):
            if "share_link" in {entry["key"] for entry in limit["entries"]}:
                limit["token_bucket"] = {"max_tokens": 5, "tokens_per_fill": 5, "fill_interval": "600s"}
        return yaml.safe_dump(config)

    async with running(tmp_path_factory.mktemp("links"), identity, limits=True, change=few) as gateway:
        paths = ["/v1/shared/mbs_busy", "/v1/shared/mbs_busy:data?choices=a=b", "/shared/mbs_busy"] * 2
        replies = [await gateway.call("GET", path) for path in paths]
        assert [reply.status for reply in replies] == [200] * 5 + [429]
        assert_refused(replies[-1], 429, grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED")
        assert (await gateway.call("GET", "/v1/shared/mbs_calm")).status == 200


def find_limits(config: Any) -> list[Any]:
    """The limits in a configuration of the gateway."""
    listeners = {listener["name"]: listener for listener in config["static_resources"]["listeners"]}
    manager = listeners["gateway"]["filter_chains"][0]["filters"][0]["typed_config"]
    filters = {each["name"]: each["typed_config"] for each in manager["http_filters"]}
    limits: list[Any] = filters["envoy.filters.http.local_ratelimit"]["descriptors"]
    return limits


async def test_sign_in_and_sign_up_share_a_limit_per_address(limited: Gateway) -> None:
    paths = ["/v1/auth:signIn", "/v1/auth:signUp"] * 80
    replies = await asyncio.gather(*(limited.call("POST", path, json={}) for path in paths))
    refused = [reply for reply in replies if reply.status != 200]
    assert 0 < len(refused) <= 40  # the bucket fills while the test runs
    assert_refused(refused[0], 429, grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED")
    assert refused[0].headers["x-ratelimit-limit"] == "120"
    # Two calls a second have room again; twenty at once have not.
    natives = await asyncio.gather(*(native(limited, SIGN_IN) for _ in range(20)))
    assert (grpc.StatusCode.RESOURCE_EXHAUSTED, "local_rate_limited") in natives
    assert (await limited.call("POST", "/v1/auth:refresh", json={})).status == 200
    assert (await limited.call("GET", "/v1/users/me", headers=limited.bearer())).status == 200


async def test_each_write_key_has_a_limit_of_its_own(limited: Gateway) -> None:
    for key in ({"X-Write-Key": "first"}, {"X-Write-Key": "second"}):
        reply = await ingest(limited, batch(100), **key)
        assert reply.headers["x-ratelimit-limit"] == "1000"
        assert int(reply.headers["x-ratelimit-remaining"]) > 990
        assert limited.last.metadata["x-write-key"] == key["X-Write-Key"]
    assert (await ingest(limited, batch(100))).headers["x-ratelimit-limit"] == "1000"


async def test_messages_have_a_limit_per_write_key_and_per_address(limited: Gateway) -> None:
    for headers in ({"Authorization": "Basic azo="}, {"Authorization": "Bearer x"}, {}):
        reply = await limited.call("POST", "/v1/track", json={"event": "e"}, headers=headers)
        assert (reply.status, reply.headers["x-ratelimit-limit"]) == (200, "1000")


async def test_other_calls_without_a_token_have_a_limit_per_address(limited: Gateway) -> None:
    reply = await limited.call("GET", "/.well-known/jwks.json")
    assert reply.headers["x-ratelimit-limit"] == "100"
    (key,) = reply.json["keys"]
    assert key.items() >= {"kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig"}.items()


# --- the ways to call -------------------------------------------------------------------------------------


async def test_native_grpc_passes(gateway: Gateway) -> None:
    token = gateway.bearer()["Authorization"]
    assert await native(gateway, GET_ME, {"authorization": token}) == (grpc.StatusCode.OK, "")
    assert gateway.last.path == GET_ME
    assert await native(gateway, "/grpc.health.v1.Health/Check") == (grpc.StatusCode.OK, "")
    assert (await native(gateway, "/nope.Service/Nope"))[0] == grpc.StatusCode.UNIMPLEMENTED


async def test_grpc_web_passes(gateway: Gateway) -> None:
    headers = {**gateway.bearer(), "Content-Type": "application/grpc-web+proto"}
    reply = await gateway.call("POST", GET_ME, data=bytes(5), headers=headers)
    assert (reply.status, reply.headers["content-type"]) == (200, "application/grpc-web+proto")
    assert reply.body.startswith(bytes(5))
    assert b"grpc-status:0" in reply.body


async def test_a_stream_arrives_as_server_sent_events(gateway: Gateway) -> None:
    gateway.services.go_on.clear()
    headers = {**gateway.bearer(), "Accept": "text/event-stream"}
    url = f"{gateway.url}/v1/dashboards/some-id:watch?cursor=0"
    async with gateway.client.get(url, headers=headers) as response, asyncio.timeout(20):
        assert response.headers["content-type"] == "text/event-stream"
        first = await response.content.readline()  # while the stream is still open
        assert first.startswith(b"data: {")
        assert json.loads(first[6:])["cursor"] == "1"
        gateway.services.go_on.set()
        rest = (await response.content.read()).splitlines()
    assert [json.loads(line[6:])["cursor"] for line in rest if line] == ["2"]
    assert (gateway.last.request.dashboard_id, gateway.last.request.cursor) == ("some-id", "0")
    assert gateway.last.seconds_left is None


async def test_a_stream_that_is_refused_says_so_in_json(gateway: Gateway) -> None:
    async def refuse(context: Context) -> dict[str, Any]:
        await context.abort(grpc.StatusCode.NOT_FOUND, "There is no such dashboard.")

    gateway.services.answers["WatchDashboard"] = refuse
    headers = {**gateway.bearer(), "Accept": "text/event-stream"}
    reply = await gateway.call("GET", "/v1/dashboards/x:watch", headers=headers)
    assert (reply.status, reply.headers["content-type"]) == (404, "application/json")
    assert reply.json["code"] == 5


async def test_any_page_may_send_events(gateway: Gateway) -> None:
    asked = {
        "Origin": "https://shop.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type, x-write-key",
    }
    reply = await gateway.call("OPTIONS", "/v1/events:ingest", headers=asked)
    assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, "https://shop.example")
    assert "x-write-key" in reply.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in reply.headers


@pytest.mark.parametrize("path", ["/v1/events:ingest", "/v1/track", "/v1/t"])
async def test_beacons_arrive_without_a_preflight(gateway: Gateway, path: str) -> None:
    """As navigator.sendBeacon sends a text: as text/plain, with cookies, from any page."""
    body = {"writeKey": "k", "event": "e", "events": [{"event": "e", "unknown": {"to": ["us"]}}]}
    headers = {
        "Content-Type": "text/plain;charset=UTF-8",
        "Origin": "https://shop.example",
        "Cookie": "mb_session=nonsense",
    }
    reply = await gateway.call("POST", path, data=json.dumps(body), headers=headers)
    assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, "https://shop.example")
    request = gateway.last.request
    assert request == (
        RPCS[gateway.last.path].request(write_key="k", events=[{"event": "e"}])
        if path == "/v1/events:ingest"
        else RPCS[gateway.last.path].request(message={"write_key": "k", "event": "e"})
    )
    packed = gzip.compress(json.dumps(body).encode())
    reply = await gateway.call("POST", path, data=packed, headers={**headers, "Content-Encoding": "gzip"})
    assert (reply.status, gateway.last.request) == (200, request)


@pytest.mark.parametrize("path", ["/v1/batch", "/v1/track", "/v1/page"])
async def test_any_page_may_send_messages_with_basic_authentication(gateway: Gateway, path: str) -> None:
    asked = {
        "Origin": "https://shop.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
    }
    reply = await gateway.call("OPTIONS", path, headers=asked)
    assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, "https://shop.example")
    assert "authorization" in reply.headers["access-control-allow-headers"]
    headers = {"Authorization": "Basic azo="}
    assert (await gateway.call("POST", path, json={"batch": []}, headers=headers)).status == 200
    assert gateway.last.metadata["authorization"] == "Basic azo="


async def test_a_stream_of_requests_is_an_array_in_json(gateway: Gateway) -> None:
    body = [{"position": 5, "events": [{"event": "e"}]}, {"position": "6"}]
    reply = await gateway.call("POST", "/v1/events:ingestStream", json=body)
    assert (reply.status, reply.headers["content-type"]) == (200, "text/event-stream")
    lines = [json.loads(line[6:]) for line in reply.body.splitlines() if line]
    assert [line["position"] for line in lines] == ["5", "6"]
    assert gateway.last.seconds_left is None


async def test_a_stream_of_requests_passes_as_it_comes(gateway: Gateway) -> None:
    path = "/meshboard.analytics.v1.IngestService/IngestStream"
    rpc = RPCS[path]
    async with gateway.channel() as channel, asyncio.timeout(20):
        call: Any = channel.stream_stream(path, rpc.request.SerializeToString, rpc.response.FromString)()
        for position in range(1, 4):  # each is answered before the next is sent
            await call.write(rpc.request(position=position))
            assert (await call.read()).position == position
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF


@pytest.mark.parametrize("verb", ["", ":data", ":watch", ":unlock", "/annotations"])
async def test_pages_of_any_origin_may_ask_by_a_share_link(gateway: Gateway, verb: str) -> None:
    """Without cookies; which origins a link is for, the service knows."""
    asked = {
        "Origin": "https://intranet.example",
        "Access-Control-Request-Method": "POST" if verb == ":unlock" else "GET",
        "Access-Control-Request-Headers": "x-share-ticket",
    }
    reply = await gateway.call("OPTIONS", f"/v1/shared/mbs_x{verb}", headers=asked)
    assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, "https://intranet.example")
    assert "x-share-ticket" in reply.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in reply.headers
    headers = {
        "Origin": "https://intranet.example",
        "X-Share-Ticket": "mbu_x",
        "Cookie": "mb_session=nonsense",
    }
    body = {"json": {"password": "p"}} if verb == ":unlock" else {}
    gateway.services.go_on.set()
    reply = await gateway.call("POST" if body else "GET", f"/v1/shared/mbs_x{verb}", headers=headers, **body)
    gateway.services.go_on.clear()
    assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, "https://intranet.example")
    assert gateway.last.request.token == "mbs_x"
    assert gateway.last.metadata["x-share-ticket"] == "mbu_x"
    assert gateway.last.metadata["origin"] == "https://intranet.example"


async def test_the_shared_page_has_the_headers_of_the_service(gateway: Gateway) -> None:
    async def page(context: Context) -> dict[str, Any]:
        await context.send_initial_metadata((("content-security-policy", "default-src 'none'"),))
        return {"page": {"content_type": "text/html; charset=utf-8", "data": b"<p>hello"}}

    gateway.services.answers["GetSharedPage"] = page
    reply = await gateway.call("GET", "/shared/mbs_x")
    assert (reply.status, reply.body) == (200, b"<p>hello")
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert reply.headers["content-security-policy"] == "default-src 'none'"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["cache-control"] == "no-store"
    assert gateway.last.request.token == "mbs_x"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/shared/../dashboards",
        "/v1/shared/x/../../dashboards/y",
        "/v1/shared/%2e%2e/dashboards",
        "/v1/shared/x%2f..%2f..%2fdashboards",
        "/v1/shared/x/grants",
        "/v1/shared/x:data/../../../dashboards",
        "/shared/../v1/dashboards",
        "/shared/x/../../v1/dashboards",
        "/v1/shared/",
        "/shared/",
    ],
)
async def test_no_path_leads_from_a_share_link_to_anything_else(gateway: Gateway, path: str) -> None:
    before = len(gateway.services.arrivals)
    reply = await gateway.call("GET", path)
    assert reply.status in {400, 401, 404}
    arrived = {arrival.path for arrival in gateway.services.arrivals[before:]}
    assert not {one for one in arrived if not one.endswith("/GetJwks")}


async def test_other_calls_are_for_pages_of_the_same_origin(gateway: Gateway) -> None:
    asked = {"Access-Control-Request-Method": "POST"}
    own = await gateway.call("OPTIONS", "/v1/dashboards", headers={**asked, "Origin": gateway.url})
    assert own.headers["access-control-allow-origin"] == gateway.url
    assert own.headers["access-control-allow-credentials"] == "true"
    evil = await gateway.call(
        "OPTIONS", "/v1/dashboards", headers={**asked, "Origin": "https://evil.example"}
    )
    assert "access-control-allow-origin" not in evil.headers


# --- services ---------------------------------------------------------------------------------------------


async def test_calls_have_a_deadline(gateway: Gateway) -> None:
    await gateway.call("GET", "/v1/users/me", headers=gateway.bearer())
    assert gateway.last.seconds_left is not None
    assert gateway.last.seconds_left < 16
    await native(gateway, GET_ME, {"authorization": gateway.bearer()["Authorization"]}, timeout=3)
    assert gateway.last.seconds_left < 4


async def test_only_reads_are_tried_again(gateway: Gateway) -> None:
    async def unavailable(context: Context) -> dict[str, Any]:
        await context.abort(grpc.StatusCode.UNAVAILABLE, "Not now.")

    gateway.services.answers.update(ListWorkspaces=unavailable, CreateWorkspace=unavailable)
    gateway.services.arrivals.clear()
    assert (await gateway.call("GET", "/v1/workspaces", headers=gateway.bearer())).status == 503
    assert len(gateway.services.arrivals) == 3
    gateway.services.arrivals.clear()
    reply = await gateway.call("POST", "/v1/workspaces", json={}, headers=gateway.bearer())
    assert (reply.status, len(gateway.services.arrivals)) == (503, 1)


async def test_services_are_asked_for_their_health(gateway: Gateway) -> None:
    async def healthy() -> bool:
        async with gateway.client.get(
            f"http://127.0.0.1:{gateway.port + 1}/clusters?format=json"
        ) as response:
            clusters = {each["name"]: each for each in (await response.json())["cluster_statuses"]}
        hosts = [clusters[name]["host_statuses"] for name in gateway.services.ports]
        return all(host["health_status"] == {"eds_health_status": "HEALTHY"} for (host,) in hosts)

    await until(healthy)


async def test_a_service_that_is_away_is_unavailable_and_comes_back(gateway: Gateway) -> None:
    headers = gateway.bearer(sub="patient")
    await gateway.services.stop("user")
    try:
        reply = await gateway.call("GET", "/v1/users/me", headers=headers)
        assert_refused(reply, 503, grpc.StatusCode.UNAVAILABLE, "DEPENDENCY_UNAVAILABLE")
        code, message = await native(gateway, GET_ME, {"authorization": headers["Authorization"]})
        assert (code, "{" in message) == (grpc.StatusCode.UNAVAILABLE, False)
        assert (await gateway.call("GET", "/v1/dashboards", headers=headers)).status == 200
    finally:
        await gateway.services.start("user")

    async def back() -> bool:
        return (await gateway.call("GET", "/v1/users/me", headers=headers)).status == 200

    await until(back)


async def test_the_access_log_tells_who_called_what_and_no_secrets(gateway: Gateway) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    agent = {"User-Agent": "log-test"}
    headers = {**agent, **gateway.bearer(sub="logged"), "traceparent": trace}
    await gateway.call("GET", "/v1/dashboards?pageToken=secret-token", headers=headers)
    await gateway.call("GET", "/v1/shared/secret-share:data?a=secret-query", headers=agent)
    await gateway.call("GET", "/v1/users/me", headers={**agent, "Cookie": "mb_session=secret-cookie"})
    for path in (
        "/v1/shared/mbs_secret-1/variables/v/values",
        "/shared/mbs_secret-2?x=1",
        "/shared/secret-3/",
        "/V1/SHARED/mbs_secret-4:data",
        "/nope/mbs_secret-5",
        "/v1//shared///mbs_secret-6:watch",
        "/v1/%73hared/mbs%5fsecret-7",
        "/v1/shared%2fmbs_secret-8",
        "/v1/dashboards/mbs_secret-9",
        "/v1/shared/mbs_secret-10/../mbs_secret-11:data",
    ):
        await gateway.call("GET", path, headers={**agent, "User-Agent": "log-test-of-links"})

    def lines() -> dict[str, dict[str, Any]]:
        told = [json.loads(line) for line in gateway.log.read_text().splitlines() if line.startswith("{")]
        return {line["path"]: line for line in told if line["user_agent"] == "log-test"}

    async def written() -> bool:
        return len(lines()) == 3 and gateway.log.read_text().count("log-test-of-links") == 10

    await until(written)
    line = lines()["/v1/dashboards"]
    assert (line["method"], line["status"], line["grpc_status"]) == ("GET", 200, 0)
    assert (line["address"], line["route"], line["traceparent"]) == ("127.0.0.1", "dashboard", trace)
    assert line["user_id"] == "logged"
    assert lines()["/v1/shared/:data"]["status"] == 400
    assert lines()["/v1/users/me"]["reason"].startswith("jwt_authn_access_denied")
    text = gateway.log.read_text()
    assert "secret-" not in text
    assert headers["Authorization"].removeprefix("Bearer ") not in text


# --- traces -----------------------------------------------------------------------------------------------


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP receiver that keeps the spans."""

    def __init__(self) -> None:
        self.spans: list[Any] = []

    async def Export(self, request: Any, context: Any) -> trace_service_pb2.ExportTraceServiceResponse:
        self.spans += [
            span for each in request.resource_spans for scope in each.scope_spans for span in scope.spans
        ]
        return trace_service_pb2.ExportTraceServiceResponse()


async def test_a_trace_goes_through_the_gateway(
    tmp_path_factory: pytest.TempPathFactory, identity: Identity
) -> None:
    receiver, server, port = Receiver(), grpc.aio.server(), free_port()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        folder = tmp_path_factory.mktemp("traced")
        async with running(folder, identity, otlp=f"http://127.0.0.1:{port}") as gateway:
            trace_id = "0af7651916cd43dd8448eb211c80319c"
            headers = {**gateway.bearer(), "traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
            await gateway.call("GET", "/v1/users/me", headers=headers)
            _, arrived, parent, _ = gateway.last.metadata["traceparent"].split("-")
            assert arrived == trace_id

            async def exported() -> bool:
                return any(span.span_id.hex() == parent for span in receiver.spans)

            await until(exported)
            assert {span.trace_id.hex() for span in receiver.spans if span.span_id.hex() == parent} == {
                trace_id
            }
    finally:
        await server.stop(0)
