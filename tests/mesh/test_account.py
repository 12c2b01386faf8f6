"""Mails and their links, as they pass through the gateway of the whole mesh."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import pytest

from cli import mails
from cli.mails import Landed
from tests.conditions import eventually
from tests.mesh.people import Person
from tests.parts import Mesh

pytestmark = pytest.mark.xdist_group("mesh")


async def mail_to(mesh: Mesh, person: Person, subject: str, count: int = 1) -> Landed:
    """The newest mail to a person; waits until there are so many."""
    found: list[Landed] = []

    def arrived() -> bool:
        landed = mails.read(mesh.stack.mails_dir)
        found[:] = [mail for mail in landed if mail.to == person.email and subject in mail.subject]
        return len(found) >= count

    await eventually(arrived)
    return found[0]


def link_in(mail: Landed) -> str:
    (link,) = re.findall(r"^http\S+#\S+$", mail.text, flags=re.MULTILINE)
    return str(link)


async def test_a_mailed_link_leads_to_the_page_and_works(mesh: Mesh, ann: Person) -> None:
    link = link_in(await mail_to(mesh, ann, "Confirm your address"))
    async with ann.http.get(link.partition("#")[0]) as page:
        assert page.status == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert "script-src 'sha256-" in page.headers["content-security-policy"]
        assert page.headers["referrer-policy"] == "no-referrer"
        assert page.headers["x-frame-options"] == "DENY"
        assert page.headers["cache-control"] == "no-store"
        assert "verifyEmail" in await page.text()
    token = link.partition("=")[2]
    await ann.post("/v1/auth:verifyEmail", {"token": token})
    assert (await ann.get("/v1/auth/account"))["account"]["emailVerified"]
    again = await ann.call("POST", "/v1/auth:verifyEmail", {"token": token})
    assert (again.status, again.reason) == (401, "LINK_INVALID")


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"forwarded": "host=evil.example;proto=https"},
        {"x-forwarded-host": "evil.example", "x-forwarded-proto": "https"},
        {"x-original-host": "evil.example", "x-host": "evil.example", "origin": "https://evil.example"},
    ],
)
async def test_links_begin_with_the_configured_address_whatever_the_request_says(
    mesh: Mesh, ann: Person, headers: dict[str, str]
) -> None:
    answer = await ann.call("POST", "/v1/auth:requestPasswordReset", {"email": ann.email}, **headers)
    assert answer.status == 200, answer
    mail = await mail_to(mesh, ann, "Choose a new password")
    assert "evil.example" not in mail.text
    link = urlsplit(link_in(mail))
    assert f"{link.scheme}://{link.netloc}" == mesh.stack.public_url


async def test_a_reset_by_link_ends_what_was_signed_in(mesh: Mesh, ann: Person, stranger: Person) -> None:
    await stranger.post("/v1/auth:requestPasswordReset", {"email": ann.email})
    token = link_in(await mail_to(mesh, ann, "Choose a new password")).partition("=")[2]
    await stranger.post("/v1/auth:resetPassword", {"token": token, "newPassword": "another good phrase"})

    async def ended() -> bool:
        return (await ann.call("GET", "/v1/users/me")).status == 401

    await eventually(ended)
    await stranger.post("/v1/auth:signIn", {"email": ann.email, "password": "another good phrase"})


async def test_no_link_is_in_any_log(mesh: Mesh, ann: Person) -> None:
    token = link_in(await mail_to(mesh, ann, "Confirm your address")).partition("=")[2]
    await ann.post("/v1/auth:verifyEmail", {"token": token})
    for log in (mesh.stack.data_dir / "logs").glob("*.log"):
        text = log.read_text(errors="replace")
        assert token not in text, log
        assert ann.email not in text, log
