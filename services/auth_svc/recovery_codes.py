"""Recovery codes: for when the other factors are lost. Their owner holds them on paper, the table has hashes."""

import secrets

from services.auth_svc.refresh_tokens import fingerprint

COUNT = 10
_LENGTH = 16  # of 5 bits each
# Crockford's base32: without I, L, O and U.
_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_MISREAD = str.maketrans({"O": "0", "I": "1", "L": "1", "-": None, " ": None})


def new_codes() -> list[str]:
    """Ten codes of 80 random bits each, as `XXXX-XXXX-XXXX-XXXX`."""
    return [_new_code() for _ in range(COUNT)]


def fingerprint_of(code: str) -> bytes:
    """What is stored of a code: the same for every way to type it. It has enough entropy for a plain hash."""
    return fingerprint(code.upper().translate(_MISREAD))


def _new_code() -> str:
    code = "".join(secrets.choice(_ALPHABET) for _ in range(_LENGTH))
    return "-".join(code[at : at + 4] for at in range(0, _LENGTH, 4))
