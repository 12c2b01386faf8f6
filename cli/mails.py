"""Where mails land on a machine without a mail server: `python -m cli.mails --port 8094 --folder .data/mails`.

Each mail is a file, named by the time of its arrival; the newest 500 stay. `./dev mails` shows them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from pathlib import Path
from typing import Any

from cli import parts

KEPT = 500
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Landed:
    """A mail that has landed."""

    time: datetime
    to: str
    subject: str
    text: str

    def summary(self) -> dict[str, str]:
        """What a list shows of it."""
        return {"time": self.time.isoformat(timespec="seconds"), "to": self.to, "subject": self.subject}


def read(folder: Path) -> list[Landed]:
    """Returns the mails in `folder`, the newest first."""
    found = []
    for file in reversed(_files(folder)):
        with suppress(FileNotFoundError):  # the sink has just removed it
            found.append(_read(file))
    return found


def _read(file: Path) -> Landed:
    message = message_from_bytes(file.read_bytes().replace(b"\r\n", b"\n"), policy=default)
    assert isinstance(message, EmailMessage)
    body = message.get_body(("plain",))
    return Landed(
        time=datetime.fromtimestamp(int(file.name.partition("-")[0]) / 1e9, UTC),
        to=str(message["to"] or ""),
        subject=str(message["subject"] or ""),
        text=str(body.get_content()) if isinstance(body, EmailMessage) else "",
    )


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.eml"))


def keep(folder: Path, content: bytes, *, kept: int = KEPT) -> None:
    """Writes a mail to `folder`, whole or not at all, and removes those that are too many."""
    name = f"{time.time_ns():020d}-{secrets.token_hex(4)}"
    parts.write_private(folder / f"{name}.part", content)
    (folder / f"{name}.part").rename(folder / f"{name}.eml")
    for old in _files(folder)[:-kept]:
        old.unlink(missing_ok=True)


class _Sink:
    """What aiosmtpd asks for (see its documentation, "Handlers")."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:
        keep(self._folder, envelope.original_content)
        return "250 OK"


async def serve(port: int, folder: Path) -> None:
    """Takes mails on 127.0.0.1:`port` until the process is told to stop."""
    # Found at the call: who only reads mails does not need it.
    from aiosmtpd.smtp import SMTP  # noqa: PLC0415

    parts.private_directory(folder)
    sink = _Sink(folder)
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)

    def protocol() -> asyncio.Protocol:
        return SMTP(
            sink,
            hostname="localhost",
            data_size_limit=_MAX_BYTES,
            enable_SMTPUTF8=True,
            decode_data=False,
        )

    server = await loop.create_server(protocol, "127.0.0.1", port)
    await stopped.wait()
    server.close()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args(arguments)
    os.umask(0o077)
    asyncio.run(serve(options.port, options.folder))


if __name__ == "__main__":
    main()
