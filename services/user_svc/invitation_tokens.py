"""Tokens of invitations: kept nowhere, because each one can be computed again from the invitation and our key.

A token is the id of the invitation and a MAC over everything that it promises: it holds for no other address, role or
team than it was made for, and when the generation grows, it holds no more.
"""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence
from datetime import UTC
from uuid import UUID

from services.user_svc.models import Invitation

PREFIX = "mbi_"

_ID_BYTES = 16
_MAC_BYTES = 32


def token_of(key: bytes, invitation: Invitation) -> str:
    """The token of an invitation as it is now; `key` are 32 bytes."""
    return _spell(UUID(invitation.invitation_id).bytes + _mac(key, invitation))


def invitation_id_of(token: str) -> str | None:
    """The invitation that a token says it is of; None when it is no token, or spelled otherwise than we do."""
    content = _read(token)
    return str(UUID(bytes=content[:_ID_BYTES])) if content else None


def is_genuine(keys: Sequence[bytes], invitation: Invitation, token: str) -> bool:
    """Whether the token is that of the invitation as it is now, made with one of the keys."""
    content = _read(token)
    if content is None or content[:_ID_BYTES] != UUID(invitation.invitation_id).bytes:
        return False
    return any(hmac.compare_digest(content[_ID_BYTES:], _mac(key, invitation)) for key in keys)


def _mac(key: bytes, invitation: Invitation) -> bytes:
    parts = (
        invitation.invitation_id,
        invitation.workspace_id,
        invitation.email_key,
        invitation.role,
        " ".join(invitation.team_ids),
        invitation.inviter_id,
        invitation.expire_time.astimezone(UTC).isoformat(),
        str(invitation.generation),
    )
    encoded = [part.encode() for part in parts]
    # With their lengths, so that no two rows give the same bytes.
    content = b"".join(len(part).to_bytes(4, "big") + part for part in encoded)
    return hmac.new(key, content, hashlib.sha256).digest()


def _spell(content: bytes) -> str:
    return PREFIX + base64.urlsafe_b64encode(content).decode()  # of 48 bytes, without padding


def _read(token: str) -> bytes | None:
    try:
        content = base64.urlsafe_b64decode(token.removeprefix(PREFIX))
    except (binascii.Error, ValueError):
        return None
    # A decoder ignores foreign characters: only the one spelling that we write counts.
    if len(content) != _ID_BYTES + _MAC_BYTES or _spell(content) != token:
        return None
    return content
