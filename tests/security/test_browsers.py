"""Sessions in cookies: what other pages, other people and those who were there before cannot do with them."""

from __future__ import annotations

import json
from http.cookies import Morsel, SimpleCookie
from typing import Any

import aiohttp
import pytest

from tests.conditions import eventually
from tests.mesh.people import Answer, Person
from tests.parts import Mesh
from tests.security.forging import claims_of

pytestmark = pytest.mark.xdist_group("mesh")

REFRESH = "/v1/auth:refresh"
ATTRIBUTES = {  # SameSite and Path
    "mb_session": ("Lax", "/"),
    "mb_refresh": ("Strict", REFRESH),
    "mb_refresh_key": ("Strict", REFRESH),
    "mb_device": ("Strict", "/v1"),
}


class Browser:
    """Keeps cookies, sends them where they belong, and says which page calls."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self.http = http
        self.url = url
        self.cookies: dict[str, Morsel[str]] = {}
        self.received: dict[str, Morsel[str]] = {}

    def value(self, name: str) -> str:
        """The value of a cookie."""
        return self.cookies[name].value

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        page: str | None = "",
        without: str = "",
        **headers: str,
    ) -> Answer:
        """Makes a call from a page: by default one of the gateway's own origin; None for none that is told."""
        sent = {
            name: morsel.value
            for name, morsel in self.cookies.items()
            if path.startswith(morsel["path"]) and name != without
        }
        if sent:
            headers["cookie"] = "; ".join(f"{name}={value}" for name, value in sent.items())
        if page is not None:
            headers["origin"] = page or self.url
        headers["content-type"] = "application/json"
        data = None if body is None else json.dumps(body)
        async with self.http.request(method, self.url + path, data=data, headers=headers) as response:
            text = await response.text()
            given = response.headers.getall("set-cookie", [])
            answer_headers = {key.lower(): value for key, value in response.headers.items()}
        self.received = {}
        for cookie in given:
            self.received.update(SimpleCookie(cookie))
        for name, morsel in self.received.items():
            if morsel["max-age"] == "0":
                self.cookies.pop(name, None)
            else:
                self.cookies[name] = morsel
        return Answer(response.status, json.loads(text) if text else None, answer_headers)

    async def sign_in(self, person: Person, **headers: str) -> Answer:
        """Signs in with cookies."""
        body = {"email": person.email, "password": person.password, "cookies": True}
        answer = await self.call("POST", "/v1/auth:signIn", body, **headers)
        assert answer.status == 200, answer
        return answer


@pytest.fixture
def browser(mesh: Mesh, http: aiohttp.ClientSession) -> Browser:
    return Browser(http, mesh.gateway_url)


async def test_no_script_no_plain_line_and_no_other_page_gets_the_cookies(browser: Browser, ann: Person):
    answer = await browser.sign_in(ann)
    secrets = {"accessToken", "refreshToken", "refreshKey", "deviceToken", "mfaToken"}
    assert {answer.body.get(name, "") for name in secrets} == {""}
    assert browser.received.keys() == ATTRIBUTES.keys()
    for name, (same_site, path) in ATTRIBUTES.items():
        cookie = browser.received[name]
        assert (cookie["samesite"], cookie["path"]) == (same_site, path)
        assert cookie["httponly"] is True
        assert cookie["secure"] is True
        assert cookie["domain"] == "", "for this host alone"
        assert int(cookie["max-age"]) > 0
    me = await browser.call("GET", "/v1/users/me", page=None)
    assert me.body["user"]["userId"] == ann.user_id


@pytest.mark.parametrize("page", ["https://evil.example", "null", "http://127.0.0.1:1", None])
async def test_another_page_signs_nobody_in(browser: Browser, ann: Person, page: str | None):
    body = {"email": ann.email, "password": ann.password, "cookies": True}
    answer = await browser.call("POST", "/v1/auth:signIn", body, page=page)
    assert (answer.status, answer.body["code"], answer.reason) == (403, 7, "ORIGIN_REFUSED")
    assert not browser.received


async def test_a_refresh_by_cookie(browser: Browser, ann: Person):
    await browser.sign_in(ann)
    before = {name: browser.value(name) for name in ATTRIBUTES}
    # The first time as when the access token has expired, and its cookie with it.
    for without in ("mb_session", ""):
        answer = await browser.call("POST", REFRESH, {}, without=without)
        assert answer.status == 200, answer
        assert (answer.body["accessToken"], answer.body["refreshToken"]) == ("", "")
        assert browser.received.keys() == {"mb_session", "mb_refresh"}
        assert browser.value("mb_refresh") != before["mb_refresh"]
        before["mb_refresh"] = browser.value("mb_refresh")
        assert (await browser.call("GET", "/v1/users/me")).status == 200


@pytest.mark.parametrize("page", ["https://evil.example", "null", "http://127.0.0.1:1", None])
@pytest.mark.parametrize("without", ["", "mb_session"])
async def test_another_page_refreshes_nothing(browser: Browser, ann: Person, page: str | None, without: str):
    await browser.sign_in(ann)
    answer = await browser.call("POST", REFRESH, {}, page=page, without=without)
    assert (answer.status, answer.body["code"], answer.reason) == (403, 7, "ORIGIN_REFUSED")
    assert not browser.received
    assert (await browser.call("POST", REFRESH, {})).status == 200, "nothing was used up"


@pytest.mark.parametrize("page", ["https://evil.example", None])
async def test_another_page_changes_nothing(browser: Browser, ann: Person, page: str | None):
    await browser.sign_in(ann)
    for path, body in (("/v1/auth:signOut", {}), ("/v1/dashboards", {"title": "Mine"})):
        answer = await browser.call("POST", path, body, page=page)
        assert (answer.status, answer.reason) == (403, "ORIGIN_REFUSED")
    assert (await browser.call("GET", "/v1/users/me")).status == 200


async def test_signing_out_takes_the_cookies_back(browser: Browser, ann: Person):
    await browser.sign_in(ann)
    session, refresh, key = (browser.value(n) for n in ("mb_session", "mb_refresh", "mb_refresh_key"))
    assert (await browser.call("POST", "/v1/auth:signOut", {})).status == 200
    assert browser.cookies.keys() == {"mb_device"}
    for name in ("mb_session", "mb_refresh", "mb_refresh_key"):
        cookie = browser.received[name]
        assert (cookie.value, cookie["path"]) == ("", ATTRIBUTES[name][1])
    answer = await browser.call("POST", REFRESH, {"refreshToken": refresh, "refreshKey": key})
    assert (answer.status, answer.reason) == (401, "REFRESH_TOKEN_INVALID")

    async def revoked() -> bool:
        answer = await browser.call("GET", "/v1/users/me", authorization=f"Bearer {session}")
        return answer.status == 401 and answer.reason == "SESSION_REVOKED"

    await eventually(revoked, 2)


async def test_nobody_chooses_the_session_of_who_signs_in(browser: Browser, ann: Person, bob: Person):
    """Session fixation: the attacker's own session is in the browser, or in the header, when the victim signs in."""
    planted = Browser(browser.http, browser.url)
    await planted.sign_in(bob)
    fixed = claims_of(planted.value("mb_session"))["sid"]
    for headers in ({}, {"authorization": f"Bearer {planted.value('mb_session')}"}):
        browser.cookies = dict(planted.cookies)
        await browser.sign_in(ann, **headers)
        claims = claims_of(browser.value("mb_session"))
        assert claims["sub"] == ann.user_id
        assert claims["sid"] != fixed
        for name in ATTRIBUTES:
            assert browser.value(name) != planted.value(name), name
    # What was planted is the attacker's as before.
    assert (await planted.call("GET", "/v1/users/me")).body["user"]["userId"] == bob.user_id
    await planted.call("POST", REFRESH, {})
    claims = claims_of(planted.value("mb_session"))
    assert (claims["sub"], claims["sid"]) == (bob.user_id, fixed)


@pytest.mark.parametrize("field", ["sessionId", "session_id", "sid"])
async def test_no_field_names_a_session(ann: Person, field: str):
    sid = claims_of(ann.account["accessToken"])["sid"]
    body = {"email": ann.email, "password": ann.password, field: sid}
    answer = await ann.call("POST", "/v1/auth:signIn", body, **{"x-session-id": sid})
    assert answer.status == 400 or claims_of(answer.body["accessToken"])["sid"] != sid


async def test_of_who_was_there_before_nothing_is_left(browser: Browser, ann: Person, bob: Person):
    await browser.sign_in(ann)
    first = {name: browser.value(name) for name in ATTRIBUTES}
    await browser.call("POST", "/v1/auth:signOut", {})
    assert browser.value("mb_device") == first["mb_device"]
    await browser.sign_in(bob)
    assert browser.received.keys() == ATTRIBUTES.keys()
    assert {name for name in ATTRIBUTES if browser.value(name) == first[name]} == set()
    assert claims_of(browser.value("mb_session"))["sub"] == bob.user_id
    await browser.call("POST", REFRESH, {})
    assert claims_of(browser.value("mb_session"))["sub"] == bob.user_id
    # The device was one of Ann's alone: it becomes one of Bob's by its own right, and is known again from then on.
    known = browser.value("mb_device")
    await browser.sign_in(bob)
    assert browser.value("mb_device") == known


async def test_the_device_of_one_is_not_known_to_another(browser: Browser, ann: Person, bob: Person):
    await browser.sign_in(ann)
    wrong = {"email": bob.email, "password": "not the password", "cookies": True}
    answers = [await browser.call("POST", "/v1/auth:signIn", wrong) for _ in range(7)]
    assert answers[-1].reason == "SIGN_IN_DELAYED"
    # As if the device had shown nothing: without it the delay is the same one.
    body = {"email": bob.email, "password": bob.password}
    answer = await Browser(browser.http, browser.url).call("POST", "/v1/auth:signIn", body)
    assert (answer.status, answer.reason) == (429, "SIGN_IN_DELAYED")
    own = {**body, "deviceToken": bob.account["deviceToken"]}
    assert (await browser.call("POST", "/v1/auth:signIn", own)).status == 200
