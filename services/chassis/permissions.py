"""The names of permissions, and sets of them."""

import difflib
from functools import lru_cache

from services.chassis import errors
from services.chassis.rights import PERMISSIONS, ROLES

# What only owners have: no custom role can.
RESERVED = ROLES["owner"] - ROLES["admin"]


def require_known(permission: str, field: str) -> None:
    """Raises INVALID_ARGUMENT (PERMISSION_UNKNOWN) with the nearest names when there is no such permission."""
    if permission not in PERMISSIONS:
        nearest = difflib.get_close_matches(permission, sorted(PERMISSIONS))
        raise errors.invalid_argument(
            "PERMISSION_UNKNOWN",
            f"There is no permission {permission!r}."
            + (f" Did you mean {' or '.join(nearest)}?" if nearest else ""),
            field=field,
            permission=permission,
            nearest=", ".join(nearest),
        )


@lru_cache(maxsize=4096)
def permission_set(names: tuple[str, ...]) -> frozenset[str]:
    """The permissions as a set: equal ones are one object, so that thousands of remembered rights stay small."""
    return frozenset(names)
