"""Profiles, pictures, managed accounts and erasures, as they pass through the gateway of the whole mesh."""

from __future__ import annotations

import io
from typing import Any

import aiohttp
import pytest
from PIL import Image

from tests.conditions import eventually
from tests.mesh.people import Person
from tests.parts import Mesh

pytestmark = pytest.mark.xdist_group("mesh")


def png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (300, 200), "teal").save(out, "PNG")
    return out.getvalue()


async def send(http: aiohttp.ClientSession, person: Person, data: bytes, kind: str) -> tuple[int, Any]:
    url, headers = f"{person.url}/v1/users/me/avatar", {**person.headers, "content-type": kind}
    async with http.post(url, data=data, headers=headers) as response:
        return response.status, await response.json()


async def test_a_picture_is_the_body_of_the_request_and_of_the_answer(mesh: Mesh, ann: Person) -> None:
    status, answer = await send(ann.http, ann, png(), "image/png")
    assert status == 200, answer
    url = answer["user"]["avatarUrl"]
    assert (await ann.get("/v1/users/me"))["user"]["avatarUrl"] == url
    async with ann.http.get(ann.url + url, headers=ann.headers) as response:
        assert response.status == 200
        body, headers = await response.read(), response.headers
    assert Image.open(io.BytesIO(body)).size == (256, 171)
    assert headers["content-type"] == "image/webp"
    assert headers.getall("x-content-type-options") == ["nosniff"]
    assert headers.getall("cache-control") == ["private, max-age=31536000, immutable"]
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert headers["content-disposition"].startswith("inline")
    for data, kind in ((b"<svg/>", "image/svg+xml"), (b"GIF89a" + bytes(50), "image/png")):
        status, answer = await send(ann.http, ann, data, kind)
        assert (status, answer["details"][0]["reason"]) == (400, "AVATAR_INVALID")
    async with ann.http.get(ann.url + url) as response:
        assert response.status == 401


async def test_a_profile_is_changed_by_paths(ann: Person) -> None:
    path = "/v1/users/me/profile?updateMask=notifications.productNews,theme"
    body = {"theme": "DARK", "notifications": {"productNews": True, "reports": False}}
    answer = await ann.call("PATCH", path, body)
    assert answer.status == 200, answer
    profile = (await ann.get("/v1/users/me"))["profile"]
    assert profile["theme"] == "DARK"
    assert profile["notifications"] == {"productNews": True, "reports": True, "alerts": True}


async def test_a_deleted_person_is_gone_from_all_four_services(mesh: Mesh, ann: Person) -> None:
    dashboard_id = await ann.new_dashboard()
    await ann.new_source()
    answer = await ann.call("DELETE", f"/v1/users/{ann.user_id}")
    assert answer.status == 200, answer
    erasure_id, token = answer.body["erasure"]["erasureId"], answer.body["erasureToken"]
    nobody = Person(ann.http, ann.url)
    found: list[dict[str, Any]] = []

    async def done() -> bool:
        found[:] = [(await nobody.get(f"/v1/erasures/{erasure_id}?erasureToken={token}"))["erasure"]]
        return bool(found[0]["state"] == "DONE")

    await eventually(done)
    assert [each["service"] for each in found[0]["services"]] == ["analytics", "auth", "dashboard", "user"]
    assert found[0]["receipt"].count(".") == 2
    wrong = await nobody.call("GET", f"/v1/erasures/{erasure_id}?erasureToken=x")
    assert (wrong.status, wrong.reason) == (404, "ERASURE_NOT_FOUND")

    async def signed_out() -> bool:
        return (await ann.call("GET", f"/v1/dashboards/{dashboard_id}")).status == 401

    await eventually(signed_out)
    for log in (mesh.stack.data_dir / "logs").glob("*.log"):
        text = log.read_text(errors="replace")
        assert token not in text, log
        assert ann.email not in text, log
    ann.headers.clear()
    await ann.sign_up()
