"""The page that share links lead to, and what it is sent with."""

import re

from services.dashboard_svc import shared_page
from tests.contract.gateway import RPCS

PAGE = shared_page.PAGE.decode()
HEADERS = dict(shared_page.headers(["https://shop.example", "https://*.intranet.example:8443"]))
POLICY = dict(one.strip().split(" ", 1) for one in HEADERS["content-security-policy"].split(";"))


def test_only_the_script_and_the_style_of_the_file_run() -> None:
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", POLICY["script-src"])
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", POLICY["style-src"])
    assert POLICY["default-src"] == "'none'"
    assert POLICY["connect-src"] == "'self'"
    for directive in ("base-uri", "form-action"):
        assert POLICY[directive] == "'none'"


def test_only_pages_of_allowed_origins_frame_it() -> None:
    assert POLICY["frame-ancestors"] == "'self' https://shop.example https://*.intranet.example:8443"
    assert dict(shared_page.headers([]))["content-security-policy"].endswith("; frame-ancestors 'none'")


def test_it_tells_nobody_where_it_was() -> None:
    assert HEADERS["referrer-policy"] == "no-referrer"


def test_it_is_all_in_one_file_and_writes_text_as_text() -> None:
    assert re.findall(r"<[^>]*(?:src|href|action)=(\S+)", PAGE) == ['"data:,">']
    assert set(re.findall(r"https?://[^\s\"']+", PAGE)) == {"http://www.w3.org/2000/svg"}
    assert re.findall(r"url\(|@import| on\w+=|(?:inner|outer)HTML|eval\(|document\.write", PAGE) == []


def test_what_it_does_not_know_is_a_table() -> None:
    (drawn,) = re.findall(r"const kinds = \{(.*)\};", PAGE)
    assert "CUSTOM" not in drawn
    assert "(kinds[widget.kind] || table)" in PAGE
    assert "spec" not in re.findall(r"\w+", PAGE)


def test_it_calls_routes_that_exist() -> None:
    paths = {path for rpc in RPCS.values() if rpc.rule == "share_link" for _, path in rpc.bindings}
    assert 'const base = "/v1/shared/"' in PAGE
    for called in re.findall(r'ask\("([^"]*)"', PAGE):
        assert any(path.startswith("/v1/shared/{token}" + called) for path in paths), called


def test_every_field_has_a_label() -> None:
    for field in re.findall(r'<input id="(\w+)"', PAGE):
        assert f'for="{field}"' in PAGE
