"""How an API key is spelled: `mba_`, 32 random characters, and 6 that are the CRC-32 of all before.

The prefix and the checksum let scanners for leaked secrets recognise a key, and let a typo be told without looking
anything up. Digits of base 62 are 0-9, A-Z, a-z.
"""

import secrets
import string
import zlib

PREFIX = "mba_"
SHOWN_CHARACTERS = 10

_DIGITS = string.digits + string.ascii_uppercase + string.ascii_lowercase
_RANDOM_CHARACTERS = 32
_CHECKSUM_CHARACTERS = 6  # 62 ** 6 is more than 2 ** 32
_CHARACTERS = len(PREFIX) + _RANDOM_CHARACTERS + _CHECKSUM_CHARACTERS


def new_api_key() -> str:
    """A key with 190 random bits."""
    body = PREFIX + "".join(secrets.choice(_DIGITS) for _ in range(_RANDOM_CHARACTERS))
    return body + checksum(body)


def is_well_formed(api_key: str) -> bool:
    """Whether this could be a key of ours; one that was mistyped or cut could not."""
    if len(api_key) != _CHARACTERS or not api_key.isascii() or not api_key.startswith(PREFIX):
        return False
    body = api_key[:-_CHECKSUM_CHARACTERS]
    return api_key == body + checksum(body)


def checksum(body: str) -> str:
    """The CRC-32 of the text in base 62, with leading zeros."""
    rest, digits = zlib.crc32(body.encode()), ""
    for _ in range(_CHECKSUM_CHARACTERS):
        rest, digit = divmod(rest, len(_DIGITS))
        digits = _DIGITS[digit] + digits
    return digits
