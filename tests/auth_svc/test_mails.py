"""Mails leave once what they tell is committed, whatever becomes of the mail server."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import pytest
from aiosmtpd.smtp import SMTP, AuthResult
from prometheus_client import REGISTRY
from pydantic import SecretStr, ValidationError
from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.auth_svc import mails as sending
from services.auth_svc.mails import Mails, compose
from services.auth_svc.models import Mail
from services.auth_svc.settings import AuthSettings
from services.chassis import db as database
from services.chassis.db import migrate
from services.chassis.sealing import Seals
from services.chassis.times import now
from tests import mailbox as mailboxes
from tests.conditions import eventually
from tests.harness import make_keys, make_settings, new_id
from tests.mailbox import Mailbox
from tests.parts import Parts

Db = async_sessionmaker[AsyncSession]


async def write_nothing(session: AsyncSession, email: str, address: str) -> None:
    """Nobody asks for a new password here."""
    raise AssertionError(email)


class Post:
    """A database with mails, and a mail server that may be away."""

    def __init__(self, db: Db, settings: AuthSettings, box: Mailbox) -> None:
        self.db = db
        self.settings = settings
        self.box = box
        self.mails = Mails(Seals([b"k" * 32]))

    async def add(self, to: str, subject: str = "Hello", text: str = "World\n") -> None:
        async with self.db.begin() as session:
            self.mails.add(session, now(), to, subject, text)

    @asynccontextmanager
    async def sending(self) -> AsyncIterator[None]:
        task = asyncio.create_task(sending.run(self.db, self.settings, self.mails, write_nothing, now))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def count(self) -> int:
        async with self.db() as session:
            return await session.scalar(select(func.count()).select_from(Mail)) or 0

    async def is_empty(self) -> bool:
        return await self.count() == 0

    async def was_tried(self, times: int = 1) -> bool:
        async with self.db() as session:
            return (await session.scalar(select(func.min(Mail.try_count))) or 0) >= times

    async def age(self, **columns: timedelta) -> None:
        async with self.db.begin() as session:
            values: dict[str, Any] = {name: getattr(Mail, name) - by for name, by in columns.items()}
            await session.execute(update(Mail).values(**values))


@pytest.fixture
async def post(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Post]:
    url = await parts.fresh_database("auth")
    await migrate(url, "services.auth_svc")
    db, box = database.connect(url), mailboxes.new_mailbox()
    keys = make_keys(tmp_path_factory.mktemp("mail-keys"))
    yield Post(db, make_settings(AuthSettings, parts, keys, url, smtp_url=box.url), box)
    await database.engine(db).dispose()


async def test_a_mail_is_what_it_should_be(post: Post):
    to = f"{new_id()}@example.org"
    text = "Open this:\n\nhttp://127.0.0.1:8080/account#reset-password=mbt_" + "x" * 90 + "\n"
    async with mailboxes.serving(post.box), post.sending():
        await post.add(to, "Choose", text)
        await eventually(post.is_empty)
    (mail,) = post.box.mails
    assert post.box.envelopes == [("meshboard@localhost", [to])]
    assert (mail["from"], mail["to"], mail["subject"]) == ("Meshboard <meshboard@localhost>", to, "Choose")
    assert mail["auto-submitted"] == "auto-generated"
    assert mail["message-id"].endswith("@localhost>")
    assert abs(parsedate_to_datetime(mail["date"]) - datetime.now(UTC)) < timedelta(minutes=5)
    assert mail.get_content_type() == "text/plain"
    assert mail.get_content() == text
    assert text in mail.as_string()  # whole lines: a link can be seen by whoever looks at the source


async def test_what_was_rolled_back_is_not_sent(post: Post):
    async with mailboxes.serving(post.box), post.sending():
        async with post.db() as session, session.begin() as transaction:
            post.mails.add(session, now(), "a@example.org", "Never", "")
            await session.flush()
            await transaction.rollback()
        await post.add("b@example.org")
        await eventually(lambda: bool(post.box.mails))
    assert [mail["to"] for mail in post.box.mails] == ["b@example.org"]


async def test_a_commit_wakes_the_sending(post: Post):
    await post.add("a@example.org")
    assert post.mails.added.is_set()


async def test_a_mail_that_cannot_be_made_holds_up_no_other(post: Post):
    await post.add("a@example.org\r\nBcc: everyone@example.org")
    async with post.db.begin() as session:  # of another master key
        Mails(Seals([b"o" * 32])).add(session, now(), "b@example.org", "Hello", "World")
    await post.add("c@example.org")
    async with mailboxes.serving(post.box), post.sending():
        await eventually(lambda: bool(post.box.mails))
        await eventually(lambda: post.was_tried(1))

        async def two_are_left() -> bool:
            return await post.count() == 2

        await eventually(two_are_left)
    assert {mail["to"] for mail in post.box.mails} == {"c@example.org"}


def tries(outcome: str) -> float:
    return REGISTRY.get_sample_value("meshboard_mails_total", {"outcome": outcome}) or 0


async def test_is_measured(post: Post):
    sent, failed = tries("sent"), tries("failed")
    await post.add("a@example.org")
    async with post.sending():
        await eventually(lambda: REGISTRY.get_sample_value("meshboard_mails_waiting") == 1)
        await eventually(lambda: tries("failed") > failed)
        async with mailboxes.serving(post.box):
            await eventually(lambda: tries("sent") > sent)


async def test_mails_wait_for_a_server_that_is_away(post: Post, caplog: Any, capfd: Any):
    to = f"{new_id()}@example.org"
    await post.add(to, "Secret", "mbt_secret")
    failed = tries("failed")
    async with post.sending():
        # Once a try has failed: for one that has only begun, the server could still be there in time.
        await eventually(lambda: tries("failed") > failed)
        assert not await post.is_empty()
        async with mailboxes.serving(post.box):
            await eventually(post.is_empty)
    (mail,) = post.box.mails
    assert mail["to"] == to
    written = "".join(capfd.readouterr()) + caplog.text
    assert "mail_not_sent" in written
    assert to not in written
    assert "mbt_secret" not in written


async def test_delays_grow_up_to_an_hour(post: Post):
    await post.add("a@example.org")
    async with post.db.begin() as session:
        await session.execute(update(Mail).values(try_count=30))
    async with post.sending():
        await eventually(lambda: post.was_tried(31))

        async def is_put_back() -> bool:
            async with post.db() as session:
                row = (await session.scalars(select(Mail))).one()
            return timedelta(minutes=59) < row.try_time - now() <= timedelta(hours=1)

        await eventually(is_put_back)


async def test_gives_up_after_a_day_and_says_so_without_the_address(post: Post, caplog: Any, capfd: Any):
    to = f"{new_id()}@example.org"
    post.box.refuse = "550 no such person"  # and the answer quotes the address
    async with mailboxes.serving(post.box), post.sending():
        await post.add(to)
        await eventually(post.was_tried)
        assert not await post.is_empty()
        await post.age(create_time=timedelta(days=1), try_time=timedelta(hours=1))
        post.mails.added.set()
        await eventually(post.is_empty)
    assert post.box.mails == []
    written = "".join(capfd.readouterr()) + caplog.text
    assert "mail_given_up" in written
    assert to not in written


async def test_what_a_crash_has_left_is_sent_after_a_minute(post: Post):
    await post.add("a@example.org")
    assert len(await sending._claim(post.db, now())) == 1
    assert list(await sending._claim(post.db, now())) == []
    (again,) = await sending._claim(post.db, now() + timedelta(seconds=61))
    assert again.try_count == 2


async def test_many_senders_send_each_mail_once(post: Post):
    people = {f"{n}@example.org" for n in range(40)}
    for to in people:
        await post.add(to)
    async with mailboxes.serving(post.box), post.sending(), post.sending(), post.sending():
        await eventually(post.is_empty)
    assert sorted(mail["to"] for mail in post.box.mails) == sorted(people)


async def test_mails_are_encrypted_while_they_wait(post: Post):
    await post.add("ada@example.org", "Subject", "mbt_secret")
    async with post.db() as session:
        (row,) = (await session.scalars(select(Mail))).all()
    for secret in (b"ada@example.org", b"Subject", b"mbt_secret"):
        assert secret not in row.sealed_mail
    assert post.mails.read(row)["to"] == "ada@example.org"


@pytest.mark.parametrize("field", ["to", "subject"])
def test_a_line_break_makes_no_header(post: Post, field: str):
    row = Mail(mail_id=new_id(), create_time=now())
    content = {"to": "a@example.org", "subject": "Hello", "text": "World"}
    content[field] += "\r\nBcc: everyone@example.org"
    with pytest.raises(ValueError, match="Header values may not"):
        compose(post.settings, row, content)


@pytest.mark.parametrize("url", ["http://mail.example", "smtp://", "mail.example:25"])
def test_another_kind_of_server_is_refused_at_the_start_without_its_password(post: Post, url: str):
    values = post.settings.model_dump() | {"smtp_url": url.replace("//", "//user:canary@")}
    with pytest.raises(ValidationError) as failure:
        AuthSettings(**values)
    (problem,) = failure.value.errors()  # of which `load` shows place and message
    assert problem["loc"] == ("smtp_url",)
    assert problem["msg"].endswith("must be smtp://host:port or smtps://host:port")


async def test_a_password_is_not_shown_to_a_server_without_tls(post: Post):
    shown: list[object] = []

    def authenticate(*arguments: object) -> AuthResult:
        shown.append(arguments)
        return AuthResult(success=True)

    def protocol() -> asyncio.Protocol:
        return SMTP(post.box, hostname="localhost", authenticator=authenticate, auth_require_tls=False)

    url = post.box.url.replace("//", "//user:canary@")
    post.settings = post.settings.model_copy(update={"smtp_url": SecretStr(url)})
    server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", post.box.port)
    async with post.sending():
        await post.add("a@example.org")
        await eventually(lambda: post.was_tried(2))  # the first try has ended
    server.close()
    assert shown == []
    assert post.box.mails == []
