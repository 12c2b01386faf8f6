"""Refuses the passwords that everyone tries first."""

from functools import cache
from pathlib import Path

from services.chassis import errors
from services.chassis.passwords import normalized

_FILE = Path(__file__).with_name("common_passwords.txt")


def is_common(password: str) -> bool:
    """Whether the password is among the most used ones, whatever its case."""
    return normalized(password).casefold() in _common()


def refuse_common(password: str, field: str) -> None:
    """Raises INVALID_ARGUMENT (PASSWORD_COMMON), naming the field, for one of the most used passwords."""
    if is_common(password):
        raise errors.invalid_argument(
            "PASSWORD_COMMON", "The password is among the most used ones: choose another.", field=field
        )


@cache
def _common() -> frozenset[str]:
    lines = _FILE.read_text(encoding="utf-8").splitlines()
    return frozenset(line for line in lines if not line.startswith("#"))
