"""The routes of edge/envoy.yaml against the contracts, read as Envoy reads them: the first match counts."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from meshboard.options.v1 import error_reason_pb2

from cli.envoy_config import REPOSITORY
from tests.contract.gateway import RPCS, Rpc

CONFIG = yaml.safe_load((REPOSITORY / "edge" / "envoy.yaml").read_text())
LISTENERS = {listener["name"]: listener for listener in CONFIG["static_resources"]["listeners"]}
MANAGER = LISTENERS["gateway"]["filter_chains"][0]["filters"][0]["typed_config"]
(HOST,) = MANAGER["route_config"]["virtual_hosts"]
FILTERS = {each["name"]: each["typed_config"] for each in MANAGER["http_filters"]}
JWT = "envoy.filters.http.jwt_authn"

OURS = [rpc for rpc in RPCS.values() if rpc.service.startswith("meshboard.")]
OUTSIDE = [rpc for rpc in OURS if rpc.rule != "internal"]
INTERNAL = [rpc for rpc in OURS if rpc.rule == "internal"]
# An id that could be mistaken for a verb, a path or a pattern must not lead to another route; the plain one is enough
# for the services.
IDS = ("0190a1b2-0000-7000-8000-000000000001", "me", "x.y-z~1")


def matches(match: dict[str, Any], path: str) -> bool:
    """Whether a request without further headers matches, by the rules of config.route.v3.RouteMatch."""
    unknown = match.keys() - {"prefix", "path", "safe_regex", "headers"}
    assert not unknown, f"this test does not know {unknown}"
    if any(not header.get("invert_match") for header in match.get("headers", ())):
        return False
    if "prefix" in match:
        return path.startswith(match["prefix"])
    if "path" in match:
        return bool(path == match["path"])
    return re.fullmatch(match["safe_regex"]["regex"], path) is not None


def route_of(path: str) -> dict[str, Any]:
    found: dict[str, Any] = next(route for route in HOST["routes"] if matches(route["match"], path))
    return found


def is_open(route: dict[str, Any]) -> bool:
    return bool(route.get("typed_per_filter_config", {}).get(JWT, {}).get("disabled"))


def paths_of(rpc: Rpc) -> list[str]:
    """All paths under which an RPC can be asked for."""
    paths = [rpc.path]
    for _, template in rpc.bindings:
        paths += [re.sub(r"\{[^}]+\}", value, template) for value in IDS]
    return paths


@pytest.mark.parametrize("rpc", OUTSIDE, ids=lambda rpc: rpc.path)
def test_a_token_is_needed_unless_the_contract_says_otherwise(rpc: Rpc) -> None:
    assert rpc.bindings
    for path in paths_of(rpc):
        assert is_open(route_of(path)) == (rpc.rule in {"public", "write_key", "share_link"}), path


@pytest.mark.parametrize("rpc", OUTSIDE, ids=lambda rpc: rpc.path)
def test_every_form_goes_to_the_service_that_owns_it(rpc: Rpc) -> None:
    for path in paths_of(rpc):
        assert route_of(path)["route"]["cluster"] == rpc.owner, path


@pytest.mark.parametrize("rpc", INTERNAL, ids=lambda rpc: rpc.path)
def test_internal_rpcs_are_refused(rpc: Rpc) -> None:
    assert not rpc.bindings
    assert route_of(rpc.path)["direct_response"]["status"] == 404


@pytest.mark.parametrize(
    "path",
    [
        "/meshboard.auth.v1.AuthService/SignUpX",
        "/meshboard.auth.v1.AuthService/SignOut",
        "/v1/auth:signInX",
        "/v1/auth:signIn/x",
        "/v1/events:ingestX",
        "/meshboard.analytics.v1.IngestService/IngestX",
        "/v1/dashboards/x/v1/auth:signIn",
    ],
)
def test_open_routes_are_exact(path: str) -> None:
    assert not is_open(route_of(path))


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/nope",
        "/v2/dashboards",
        "/v1/nope",
        "/v1/dashboardsX",
        "/v1/trackX",
        "/v1/batch/x",
        "/v1/x",
        "/meshboard.nope.v1.X/Y",
    ],
)
def test_what_is_unknown_reaches_no_service(path: str) -> None:
    assert route_of(path)["direct_response"]["status"] == 404


def test_health_and_reflection_are_open() -> None:
    for path in (
        "/grpc.health.v1.Health/Check",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    ):
        assert is_open(route_of(path))


def test_routes_without_a_service_let_nothing_through() -> None:
    for route in HOST["routes"]:
        assert ("route" in route) != ("direct_response" in route)
    assert HOST["routes"][-1]["match"] == {"prefix": "/"}


def test_what_routes_do_not_say_needs_a_token() -> None:
    assert FILTERS[JWT]["rules"] == [{"match": {"prefix": "/"}, "requires": {"provider_name": "meshboard"}}]
    assert JWT not in HOST["typed_per_filter_config"]


def test_the_transcoder_knows_every_service_of_the_contracts() -> None:
    transcoder = FILTERS["envoy.filters.http.grpc_json_transcoder"]
    assert sorted(transcoder["services"]) == sorted({rpc.service for rpc in OUTSIDE})


@pytest.mark.parametrize("rpc", OUTSIDE, ids=lambda rpc: rpc.path)
def test_only_streams_live_without_a_deadline(rpc: Rpc) -> None:
    for path in paths_of(rpc):
        route = route_of(path)
        added = {each["header"]["key"] for each in route.get("request_headers_to_add", ())}
        assert (route["route"]["timeout"] == "0s") == rpc.streams
        assert ("grpc-timeout" in added) == (not rpc.streams)


@pytest.mark.parametrize("path", [path for rpc in OUTSIDE if "Shared" in rpc.name for path in paths_of(rpc)])
def test_share_links_have_limits_of_their_own(path: str) -> None:
    assert route_of(path)["metadata"]["filter_metadata"]["edge"]["limit"] == "shared"
    limits = FILTERS["envoy.filters.http.local_ratelimit"]["descriptors"]
    buckets = [
        {entry["key"]: entry.get("value", "") for entry in limit["entries"]}
        for limit in limits
        if {"key": "limit", "value": "shared"} in limit["entries"]
    ]
    assert buckets == [
        {"user": "none", "limit": "shared", "masked_remote_address": ""},
        {"limit": "shared", "share_link": ""},
    ]


@pytest.mark.parametrize(
    ("path", "told", "token"),
    [
        ("/v1/shared/mbs_a-1:watch?cursor=c", "/v1/shared/:watch", "mbs_a-1"),
        ("/v1/shared/mbs_a/variables/v/values?query=q", "/v1/shared//variables/v/values", "mbs_a"),
        ("/shared/mbs_a", "/shared/", "mbs_a"),
        ("/shared/other?x", "/shared/", "other"),
        ("/V1/SHARED/mbs_a:data", "/V1/SHARED/:data", ""),
        ("/nope/MBS%5Fa/x", "/nope//x", ""),
        ("/v1/dashboards/x:data", "/v1/dashboards/x:data", ""),
    ],
)
def test_the_log_and_the_limits_read_paths_apart(path: str, told: str, token: str) -> None:
    """As Envoy's rules rewrite them, here by Python's regular expressions."""
    rules = {
        rule["on_header_present"]["key"]: rule["on_header_present"]["regex_value_rewrite"]
        for rule in FILTERS["envoy.filters.http.header_to_metadata"]["request_rules"]
        if rule.get("header") == ":path"
    }
    log, limit = rules["path"], rules["share_link"]
    assert re.sub(log["pattern"]["regex"], lambda found: found[1] or "", path) == told
    if token:
        assert re.sub(limit["pattern"]["regex"], r"\1", path) == token


def test_only_reads_are_tried_again() -> None:
    (header,) = HOST["retry_policy"]["retriable_request_headers"]
    assert header["name"] == ":path"
    retried = [
        rpc for rpc in RPCS.values() if re.fullmatch(header["string_match"]["safe_regex"]["regex"], rpc.path)
    ]
    # A list may be asked for with a POST too, when its filters are too much for a URL: it is a read all the same.
    assert {rpc.bindings[0][0] for rpc in retried if rpc.rule != "internal"} == {"GET"}
    assert len(retried) > 10


def test_the_filters_are_in_order() -> None:
    names = [name.removeprefix("envoy.filters.http.") for name in FILTERS]
    assert names == [
        "header_to_metadata",  # reads the path for the log, before anything refuses
        "cors",  # answers preflights, which carry no token
        "csrf",  # sees the cookie before it becomes a header
        "session-cookie",
        "grpc_web",
        "jwt_authn",
        "local_ratelimit",  # knows the user
        "decompressor",  # from here on bodies are read: only of callers that were let in
        "buffer",  # what was unpacked
        "lines",  # names the type of what the transcoder has made
        "grpc_json_transcoder",
        "router",
    ]


def test_every_reason_of_the_gateway_is_in_the_catalogue() -> None:
    replies = [
        mapper["body_format_override"]["json_format"]
        for mapper in MANAGER["local_reply_config"]["mappers"]
        if "body_format_override" in mapper
    ]
    reasons = {reply["details"][0]["reason"] for reply in replies}
    assert reasons <= set(error_reason_pb2.ErrorReason.keys())
    assert {reply["details"][0]["domain"] for reply in replies} == {"meshboard"}
    assert {type(reply["code"]) for reply in replies} == {int}


def test_the_admin_port_and_the_keys_stay_on_this_machine() -> None:
    for address in (CONFIG["admin"]["address"], LISTENERS["jwks"]["address"]):
        assert address["socket_address"]["address"] == "127.0.0.1"
