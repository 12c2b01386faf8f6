"""Which data a watcher has: what a stream is taken up with, after a lost connection, at any replica.

A cursor is base64url of: a format byte, the dashboard's id, a digest of the scope, for each widget its id and the
digest of its data, and an HMAC-SHA256, cut to 16 bytes, over all of this. It says nothing that the watcher does not
know, and is good only in the scope that it was made for.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Iterable, Mapping
from uuid import UUID

from meshboard.dashboard.v1.dashboard_pb2 import WidgetData

from services.chassis import errors
from services.dashboard_svc.scopes import Scope

DIGEST_BYTES = 8
_FORMAT = b"\x02"
_ID_BYTES = 16
_MAC_BYTES = 16
_ENTRY_BYTES = _ID_BYTES + DIGEST_BYTES

# Of those that choose nothing.
ANY = Scope()

# The digest of each widget's data, by widget id.
Digests = Mapping[str, bytes]


def digest(data: WidgetData) -> bytes:
    """Differs when what is shown differs: `watermark` and `cached` tell of the query, not of its answer."""
    outcome = WidgetData()
    outcome.CopyFrom(data)
    outcome.ClearField("widget_id")
    for name in ("result", "funnel", "retention", "sparkline"):
        if outcome.HasField(name):
            answer = getattr(outcome, name)
            answer.ClearField("watermark")
            answer.ClearField("cached")
    return hashlib.blake2b(outcome.SerializeToString(deterministic=True), digest_size=DIGEST_BYTES).digest()


def digest_of_all(digests: Iterable[bytes]) -> bytes:
    """Differs when one of them does."""
    return hashlib.blake2b(b"".join(digests), digest_size=DIGEST_BYTES).digest()


def encode(key: bytes, dashboard_id: str, digests: Digests, scope: Scope = ANY) -> str:
    """Makes a cursor."""
    body = _head(dashboard_id, scope)
    body += b"".join(UUID(widget_id).bytes + value for widget_id, value in digests.items())
    return base64.urlsafe_b64encode(body + _mac(key, body)).rstrip(b"=").decode()


def decode(key: bytes, dashboard_id: str, cursor: str, scope: Scope = ANY) -> dict[str, bytes]:
    """Reads a cursor. Raises INVALID_ARGUMENT (CURSOR_INVALID) when it was not made here for this and in this scope."""
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise _invalid() from error
    body, mac = raw[:-_MAC_BYTES], raw[-_MAC_BYTES:]
    head = _head(dashboard_id, scope)
    entries = body[len(head) :]
    if not hmac.compare_digest(mac, _mac(key, body)) or not body.startswith(head):
        raise _invalid()
    if len(entries) % _ENTRY_BYTES:
        raise _invalid()
    return {
        str(UUID(bytes=entries[at : at + _ID_BYTES])): entries[at + _ID_BYTES : at + _ENTRY_BYTES]
        for at in range(0, len(entries), _ENTRY_BYTES)
    }


def _head(dashboard_id: str, scope: Scope) -> bytes:
    parts = repr((scope.choices, scope.time_range, scope.filters)).encode()
    return _FORMAT + UUID(dashboard_id).bytes + hashlib.blake2b(parts, digest_size=DIGEST_BYTES).digest()


def _mac(key: bytes, body: bytes) -> bytes:
    return hmac.digest(key, body, "sha256")[:_MAC_BYTES]


def _invalid() -> errors.Error:
    return errors.invalid_argument(
        "CURSOR_INVALID",
        "The cursor is not one of this dashboard's with these choices: start without one.",
        field="cursor",
    )
