"""Requests that no client library would send: HTTP/1.1, written by hand."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from urllib.parse import urlsplit

from tests.mesh.people import Answer


async def exchange(url: str, method: str, path: str, *lines: str, body: str = "") -> Answer:
    """What comes back for a request with these header lines, in whatever characters; status 0 for nothing at all."""
    address = urlsplit(url)
    assert address.hostname is not None
    head = [f"{method} {path} HTTP/1.1", f"Host: {address.netloc}", "Connection: close"]
    if body:
        head += ["Content-Type: application/json", f"Content-Length: {len(body.encode())}"]
    raw = "\r\n".join([*head, *lines, "", body]).encode()
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    received = b""
    # Who sends too much is hung up on: before it has sent everything, and perhaps before it has read the answer.
    with suppress(ConnectionError):
        writer.write(raw)
        await writer.drain()
    with suppress(ConnectionError):
        while not _is_whole(received) and (chunk := await reader.read(65536)):
            received += chunk
    writer.close()
    return _parse(received)


def _is_whole(received: bytes) -> bool:
    """Whether the answer has ended; the connection stays open a little longer."""
    head, end, body = received.partition(b"\r\n\r\n")
    for field in head.lower().split(b"\r\n"):
        if field.startswith(b"content-length:"):
            return len(body) >= int(field.partition(b":")[2])
    return bool(end) and body.endswith(b"0\r\n\r\n")


def _parse(received: bytes) -> Answer:
    head, _, body = received.partition(b"\r\n\r\n")
    if not head:
        return Answer(0, None, {})
    status, *fields = head.decode("latin-1").split("\r\n")
    pairs = (field.partition(":") for field in fields)
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    if headers.get("transfer-encoding") == "chunked":
        body = _unchunked(body)
    is_json = headers.get("content-type", "").startswith("application/json")
    return Answer(int(status.split()[1]), json.loads(body) if is_json and body else None, headers)


def _unchunked(body: bytes) -> bytes:
    whole = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        whole += body[: int(size, 16)]
        body = body[int(size, 16) + 2 :]
    return whole
