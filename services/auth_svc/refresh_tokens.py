"""Refresh tokens: which one comes next, and which one somebody holds.

The tokens of a session are a family. Each is made of the family, a secret of 16 bytes, and its generation, under an
HMAC with a key of the server: so a successor can be given again without having been stored, and no one makes a token
from what the database holds, which is a hash of the family.
"""

import base64
import binascii
import hashlib
import hmac
import secrets
from dataclasses import dataclass

TOKEN_PREFIX = "mbr_"  # noqa: S105 - what secret scanners look for
KEY_PREFIX = "mbk_"
_FAMILY_BYTES = 16
_GENERATION_BYTES = 4


@dataclass(frozen=True, slots=True)
class RefreshToken:
    """The token of one generation of a family."""

    family: bytes
    generation: int

    def successor(self) -> "RefreshToken":
        """The token that this one is exchanged for."""
        return RefreshToken(self.family, self.generation + 1)


def first_token() -> RefreshToken:
    """The first token of a new family."""
    return RefreshToken(secrets.token_bytes(_FAMILY_BYTES), 1)


def spell(token: RefreshToken, server_key: bytes) -> str:
    """The token as clients hold it."""
    content = token.family + token.generation.to_bytes(_GENERATION_BYTES, "big")
    return TOKEN_PREFIX + _base64url(content + hmac.digest(server_key, content, "sha256"))


def read(spelled: str, server_key: bytes) -> RefreshToken | None:
    """The inverse of `spell`; None for what it has not made with this key, to the letter."""
    try:
        raw = base64.urlsafe_b64decode(spelled.removeprefix(TOKEN_PREFIX) + "==")
    except (binascii.Error, ValueError):
        return None
    generation = raw[_FAMILY_BYTES : _FAMILY_BYTES + _GENERATION_BYTES]
    token = RefreshToken(raw[:_FAMILY_BYTES], int.from_bytes(generation, "big"))
    return token if hmac.compare_digest(spell(token, server_key).encode(), spelled.encode()) else None


def new_refresh_key() -> str:
    """The secret that lets a refresh be repeated."""
    return KEY_PREFIX + _base64url(secrets.token_bytes(32))


def fingerprint(secret: bytes | str) -> bytes:
    """What is stored of a secret. It has enough entropy for a plain hash."""
    return hashlib.sha256(secret.encode() if isinstance(secret, str) else secret).digest()


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
