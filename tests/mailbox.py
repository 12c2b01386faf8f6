"""A real mail server that keeps what it gets, and tells the links in it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from typing import Any

from aiosmtpd.smtp import SMTP

from tests.conditions import eventually
from tests.parts import free_port


@dataclass
class Mailbox:
    """The mails of everybody. `refuse` is what recipients are refused with, as long as it is set."""

    port: int
    refuse: str = ""
    mails: list[EmailMessage] = field(default_factory=list)
    envelopes: list[tuple[str, list[str]]] = field(default_factory=list)

    @property
    def url(self) -> str:
        """For MESHBOARD_SMTP_URL."""
        return f"smtp://127.0.0.1:{self.port}"

    def of(self, to: str, subject: str = "") -> list[EmailMessage]:
        """The mails to an address, the oldest first."""
        return [mail for mail in self.mails if mail["to"] == to and subject in mail["subject"]]

    async def mail(self, to: str, subject: str, count: int = 1) -> EmailMessage:
        """The mail with this number to an address; waits for it."""
        await eventually(lambda: len(self.of(to, subject)) >= count)
        return self.of(to, subject)[count - 1]

    async def token(self, to: str, what: str, count: int = 1) -> str:
        """The token of the newest of so many links `#what=…` to an address; waits for them."""
        found: list[str] = []

        def arrived() -> bool:
            text = "".join(mail.get_content() for mail in self.of(to))
            found[:] = re.findall(rf"^http://127\.0\.0\.1:\d+/account#{what}=(\S+)$", text, re.MULTILINE)
            return len(found) >= count

        await eventually(arrived)
        return found[count - 1]

    async def handle_RCPT(
        self, _server: Any, _session: Any, envelope: Any, address: str, _options: Any
    ) -> str:
        """For aiosmtpd."""
        if self.refuse:
            return f"{self.refuse} <{address}>"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:
        """For aiosmtpd."""
        message = message_from_bytes(envelope.original_content.replace(b"\r\n", b"\n"), policy=default)
        assert isinstance(message, EmailMessage)
        self.envelopes.append((envelope.mail_from, envelope.rcpt_tos))
        self.mails.append(message)
        return "250 OK"


@asynccontextmanager
async def serving(mailbox: Mailbox) -> AsyncIterator[None]:
    """Runs the server until the block ends."""

    def protocol() -> asyncio.Protocol:
        return SMTP(mailbox, hostname="localhost", loop=asyncio.get_running_loop())

    server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", mailbox.port)
    try:
        yield
    finally:
        server.close()


def new_mailbox() -> Mailbox:
    """A mailbox whose server does not run yet."""
    return Mailbox(free_port())
