"""The page that the links of mails lead to: edge/account.html, and what the gateway serves it with."""

import base64
import hashlib
import re

from cli.envoy_config import REPOSITORY
from services.auth_svc.tickets import Purpose
from tests.contract.gateway import RPCS
from tests.contract.test_gateway import MANAGER, is_open, route_of

PAGE = (REPOSITORY / "edge" / "account.html").read_text()
ROUTE = route_of("/account")
HEADERS = {each["header"]["key"]: each["header"]["value"] for each in ROUTE["response_headers_to_add"]}
POLICY = dict(
    directive.strip().split(" ", 1)  # each has a value
    for directive in HEADERS["content-security-policy"].split(";")
)


def hash_of(tag: str) -> str:
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, flags=re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def test_the_gateway_answers_it_itself_without_a_token() -> None:
    assert ROUTE["direct_response"]["body"] == {"filename": "edge/account.html"}
    assert is_open(ROUTE)
    assert len(PAGE.encode()) <= MANAGER["route_config"]["max_direct_response_body_size_bytes"]


def test_only_the_script_and_the_style_of_the_file_run() -> None:
    assert POLICY["script-src"] == hash_of("script"), f"put {hash_of('script')} into edge/envoy.yaml"
    assert POLICY["style-src"] == hash_of("style"), f"put {hash_of('style')} into edge/envoy.yaml"
    assert POLICY["default-src"] == "'none'"
    assert POLICY["connect-src"] == "'self'"
    for directive in ("base-uri", "form-action", "frame-ancestors"):
        assert POLICY[directive] == "'none'"


def test_it_cannot_be_framed_and_tells_nobody_where_it_was() -> None:
    assert HEADERS["x-frame-options"] == "DENY"
    assert HEADERS["referrer-policy"] == "no-referrer"
    assert HEADERS["content-type"] == "text/html; charset=utf-8"


def test_it_is_all_in_one_file() -> None:
    assert re.findall(r"(?:src|href|action)=(\S+)", PAGE) == ['"data:,">']
    assert not re.search(r"https?:|url\(|@import", PAGE)
    assert re.findall(r" on\w+=|innerHTML|eval\(|document\.write", PAGE) == []


def test_it_knows_every_link_and_calls_routes_that_exist() -> None:
    written = (REPOSITORY / "services" / "auth_svc" / "links.py").read_text()
    mailed = set(re.findall(r'_link\(settings, "([a-z-]+)"', written))
    known = dict(re.findall(r'^  "([a-z-]+)": \{.*?method: "(\w+)"', PAGE, flags=re.MULTILINE | re.DOTALL))
    assert set(known) == mailed
    assert mailed <= {purpose.label for purpose in Purpose} | {"invitation"}  # whose tokens user_svc makes
    public = {path for rpc in RPCS.values() if rpc.rule == "public" for _, path in rpc.bindings}
    assert {f"/v1/auth:{method}" for method in known.values()} <= public
    called = set(re.findall(r'post\("(/v1/[^"]+)"', PAGE))
    assert called - {"/v1/invitations:accept"} <= public
    assert called <= {path for rpc in RPCS.values() for _, path in rpc.bindings}


def test_every_field_has_a_label() -> None:
    fields = re.findall(r'<input id="(\w+)"', PAGE)
    assert fields
    for field in fields:
        assert f'for="{field}"' in PAGE or re.search(rf'<label[^>]*><input id="{field}"', PAGE)
