"""Secrets at rest: AES-256-GCM, under a key derived from the master key.

What is sealed begins with a fingerprint of its key, so that it can be opened after the master key has changed, and be
found and sealed anew. The context (a table, an id) is authenticated: a value moved to another row does not open.
"""

import hashlib
import os
from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_FINGERPRINT_BYTES = 4
_NONCE_BYTES = 12


class WrongKey(RuntimeError):
    """A value was sealed with a key that is not at hand, or has been tampered with."""


class Seals:
    """Seals with the first of the keys (32 bytes each), and opens with any of them."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._ciphers = {hashlib.sha256(key).digest()[:_FINGERPRINT_BYTES]: AESGCM(key) for key in keys}
        self._current = next(iter(self._ciphers))

    def seal(self, plain: bytes, context: str) -> bytes:
        """The value as it is stored."""
        nonce = os.urandom(_NONCE_BYTES)
        return self._current + nonce + self._ciphers[self._current].encrypt(nonce, plain, context.encode())

    def open(self, sealed: bytes, context: str) -> bytes:
        """The value itself. Raises WrongKey."""
        cipher = self._ciphers.get(sealed[:_FINGERPRINT_BYTES])
        nonce, content = (
            sealed[_FINGERPRINT_BYTES:][:_NONCE_BYTES],
            sealed[_FINGERPRINT_BYTES + _NONCE_BYTES :],
        )
        try:
            if cipher is not None:
                return cipher.decrypt(nonce, content, context.encode())
        except (InvalidTag, ValueError):
            pass
        raise WrongKey(f"{context} was encrypted with another master key, or has been changed")

    def is_current(self, sealed: bytes) -> bool:
        """Whether the value was sealed with the key that seals now."""
        return sealed.startswith(self._current)
