"""Who may do what: roles, grants, and the one function that decides.

A permission on a resource is decided on the nearest level that says something: grants to the user, then to its teams,
then to the whole workspace, then the role in the workspace. On one level DENY outweighs ALLOW. Who may not view a
resource may do nothing with it. The same rule is written twice, here as `decide` and as SQL in `visible`, so that lists
are filtered in the database; a property test holds the two together.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, and_, false, func, or_, select, true
from sqlalchemy.orm import InstrumentedAttribute

from services.chassis.db import GrantRow

USER, TEAM, WORKSPACE = "user", "team", "workspace"
ALLOW, DENY = "ALLOW", "DENY"

_VIEWER = frozenset(
    {
        "workspaces.view",
        "members.view",
        "teams.view",
        "sources.list",
        "sources.view",
        "sources.query",
        "dashboards.list",
        "dashboards.view",
        "folders.list",
        "folders.view",
        "roles.view",
    }
)
_EDITOR = _VIEWER | {
    "sources.create",
    "sources.edit",
    "dashboards.create",
    "dashboards.edit",
    "folders.create",
    "folders.edit",
}
_ADMIN = _EDITOR | {
    "workspaces.edit",
    "members.edit",
    "members.manage",
    "teams.create",
    "teams.edit",
    "teams.delete",
    "invitations.view",
    "invitations.edit",
    "roles.edit",
    "access.explain",
    "sources.delete",
    "sources.grant",
    "dashboards.delete",
    "dashboards.grant",
    "folders.delete",
    "folders.grant",
    "service_accounts.view",
    "service_accounts.edit",
    "members.impersonate",
    "audit.view",
}
_OWNER = _ADMIN | {"workspaces.delete", "workspaces.transfer"}

# The built-in roles, each with all that the one before it has.
ROLES: dict[str, frozenset[str]] = {"viewer": _VIEWER, "editor": _EDITOR, "admin": _ADMIN, "owner": _OWNER}
PERMISSIONS = _OWNER
_BELOW = dict(zip(ROLES, [frozenset[str](), *ROLES.values()], strict=False))


@dataclass(frozen=True, slots=True)
class Rights:
    """What user_svc says of a user in a workspace. `version` grows with each change of rights in the workspace.

    `second_factor_required` says that the workspace wants its members to have signed in with one. `roles` are the
    custom roles of the workspace, by name. `expire_time` is when one of the memberships in `team_ids` ends.
    """

    user_id: str
    workspace_id: str
    role: str
    permissions: frozenset[str]
    team_ids: frozenset[str]
    version: int
    second_factor_required: bool = False
    roles: Mapping[str, frozenset[str]] = field(default_factory=dict)
    expire_time: datetime | None = None


@dataclass(frozen=True, slots=True)
class Grant:
    """A grant that applies to the user in question and has not expired."""

    subject_type: str
    role: str
    effect: str


def says(role: str, effect: str, permission: str) -> bool:
    """Whether a grant of this role and effect says anything about the permission.

    ALLOW gives what the role has. DENY withholds what the role has beyond the role below it, and all above: DENY editor
    leaves the sight of the resource, DENY viewer takes that too.
    """
    if effect == ALLOW:
        return permission in ROLES.get(role, ())
    return permission not in _BELOW.get(role, frozenset())


def _level(rights: Rights, grants: Iterable[Grant], permission: str) -> bool:
    relevant = [g for g in grants if says(g.role, g.effect, permission)]
    for subject_type in (USER, TEAM, WORKSPACE):
        effects = {g.effect for g in relevant if g.subject_type == subject_type}
        if effects:
            return DENY not in effects
    return permission in rights.permissions


def decide(rights: Rights, grants: Iterable[Grant], permission: str) -> bool:
    """Whether the user may do this on a resource with these grants (those that apply to the user)."""
    grants = list(grants)
    view = view_of(permission)
    return _level(rights, grants, permission) and (permission == view or _level(rights, grants, view))


def view_of(permission: str) -> str:
    """The permission to see what this one acts on: `dashboards.view` for `dashboards.edit`."""
    return f"{permission.partition('.')[0]}.view"


def applies(rights: Rights, now: datetime) -> ColumnElement[bool]:
    """SQL: the grant is for this user, a team of the user's or the workspace, and has not expired."""
    return and_(
        GrantRow.workspace_id == rights.workspace_id,
        or_(GrantRow.expire_time.is_(None), GrantRow.expire_time > now),
        or_(
            and_(GrantRow.subject_type == USER, GrantRow.subject_id == rights.user_id),
            and_(GrantRow.subject_type == TEAM, GrantRow.subject_id.in_(sorted(rights.team_ids))),
            GrantRow.subject_type == WORKSPACE,
        ),
    )


def visible(
    resource_type: str, resource_id: InstrumentedAttribute[str], rights: Rights, now: datetime
) -> ColumnElement[bool]:
    """SQL: whether the user may view the row; the same rule as `decide` for `<resources>.view`."""
    permission = f"{resource_type}s.view"
    allowing = [role for role in ROLES if says(role, ALLOW, permission)]
    denying = [role for role in ROLES if says(role, DENY, permission)]

    def level(subject_type: str) -> Any:
        """True or false when grants of this level say so; null when none does."""
        relevant = or_(
            and_(GrantRow.effect == ALLOW, GrantRow.role.in_(allowing)),
            and_(GrantRow.effect == DENY, GrantRow.role.in_(denying)),
        )
        return func.bool_and(GrantRow.effect == ALLOW).filter(GrantRow.subject_type == subject_type, relevant)

    by_role = true() if permission in rights.permissions else false()
    return (
        select(func.coalesce(level(USER), level(TEAM), level(WORKSPACE), by_role))
        .where(
            GrantRow.resource_type == resource_type,
            GrantRow.resource_id == resource_id,
            applies(rights, now),
        )
        .scalar_subquery()
    )


Fetch = Callable[[str, str], Awaitable[Rights]]


class RightsCache:
    """Rights by user and workspace, remembered while announcements of changes arrive.

    `fresh` says whether the announcements can be relied on; when not, each call asks user_svc. `fetch(user_id,
    workspace_id)` asks it, and raises NOT_FOUND for who is not a member. A version that a caller carries and that is
    higher than the remembered one makes the cache ask again.
    """

    def __init__(
        self, fetch: Fetch, fresh: Callable[[], bool], *, size: int = 10_000, ttl_seconds: float = 60
    ) -> None:
        self._fetch = fetch
        self._fresh = fresh
        self._size = size
        self._ttl = ttl_seconds
        self._entries: OrderedDict[tuple[str, str], tuple[Rights, float]] = OrderedDict()
        # The newest version heard of, by workspace: an answer below it was on its way while the change happened.
        self._newest: dict[str, int] = {}

    async def get(self, user_id: str, workspace_id: str, at_least: int = 0) -> Rights:
        """The rights, of version `at_least` or newer. Raises NOT_FOUND, or UNAVAILABLE without an answer."""
        key = (user_id, workspace_id)
        entry = self._entries.get(key)
        if entry and self._fresh() and entry[1] > time.monotonic() and entry[0].version >= at_least:
            return entry[0]
        rights = await self._fetch(user_id, workspace_id)
        if rights.version >= self._newest.get(workspace_id, 0):
            seconds = self._ttl
            if rights.expire_time:
                seconds = min(seconds, rights.expire_time.timestamp() - time.time())
            self._entries[key] = (rights, time.monotonic() + seconds)
            self._entries.move_to_end(key)
            while len(self._entries) > self._size:
                self._entries.popitem(last=False)
        return rights

    def changed(self, workspace_id: str, version: int) -> None:
        """Forgets what is older than this version of the workspace's rights."""
        self._newest[workspace_id] = max(version, self._newest.get(workspace_id, 0))
        for key in [
            k for k, (rights, _) in self._entries.items() if k[1] == workspace_id and rights.version < version
        ]:
            del self._entries[key]

    def clear(self) -> None:
        """Forgets everything: announcements may have been missed."""
        self._entries.clear()
        self._newest.clear()
