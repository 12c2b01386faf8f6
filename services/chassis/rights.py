"""Who may do what: roles, grants, and the one function that decides.

A permission on a resource is settled by the nearest level that says something about it. Nearest are the grants on the
resource itself, then those on the folder that it lies in, then those on the folder around that, and so on; in each of
these first the grants to the user, then those to its teams, then those to the whole workspace. Where no grant says
anything, the role in the workspace does. On one level DENY outweighs ALLOW. Who may not view a resource may do nothing
with it.

The rule is written twice, here as `explain` and as SQL in `resources`, so that lists are filtered in the database; a
property test holds both to a third writing of it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from services.chassis import errors
from services.chassis.deadline import set_deadline

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
        "cohorts.list",
        "cohorts.view",
        "dashboards.list",
        "dashboards.view",
        "folders.list",
        "folders.view",
        "library_widgets.list",
        "library_widgets.view",
        "widget_kinds.list",
        "widget_kinds.view",
        "roles.view",
    }
)
_EDITOR = _VIEWER | {
    "sources.create",
    "sources.edit",
    "cohorts.edit",
    "dashboards.create",
    "dashboards.edit",
    "folders.create",
    "folders.edit",
    "library_widgets.edit",
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
    "dashboards.share",
    "folders.delete",
    "folders.grant",
    "widget_kinds.edit",
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
    grant_id: str = ""


@dataclass(frozen=True, slots=True)
class Level:
    """The grants on the resource itself, or on something that it lies in; `alive`: it is there, and not in a bin."""

    grants: Sequence[Grant]
    resource_type: str = ""
    resource_id: str = ""
    alive: bool = True


@dataclass(frozen=True, slots=True)
class Step:
    """What settles one permission: the grants that outweigh all others, or, without any, the role in the workspace.

    `subject_type` is that of the grants, and empty for the role.
    """

    permission: str
    allowed: bool
    resource_type: str = ""
    resource_id: str = ""
    subject_type: str = ""
    grant_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether something is allowed, and why: the step about seeing the resource, then the one about the permission."""

    allowed: bool
    steps: tuple[Step, ...]


def says(grant: Grant, permission: str, roles: Mapping[str, frozenset[str]]) -> bool:
    """Whether a grant says anything about a permission; `roles` are the custom ones of the workspace.

    ALLOW gives what the role has. DENY of a built-in role withholds what the role has beyond the role below it, and all
    above: DENY editor leaves the sight of the resource, DENY viewer takes that too. DENY of a custom role withholds
    what the role has; with the sight goes everything. Of a role that is not there ALLOW gives nothing, and DENY
    withholds everything.
    """
    built_in = ROLES.get(grant.role)
    role = roles.get(grant.role) if built_in is None else built_in
    if grant.effect == ALLOW:
        return role is not None and permission in role
    if built_in is not None:
        return permission not in _BELOW[grant.role]
    return role is None or permission in role or view_of(permission) in role


def explain(rights: Rights, levels: Sequence[Level], permission: str) -> Decision:
    """Whether and why the user may do this on a resource, or, without levels, in the workspace itself.

    `levels` begin with the resource itself, and hold the grants that apply to the user.
    """
    view = view_of(permission)
    steps = [_step(rights, levels, view if levels else permission)]
    if levels and steps[0].allowed and permission != view:
        steps.append(_step(rights, levels, permission))
    return Decision(steps[-1].allowed, tuple(steps))


def decide(rights: Rights, levels: Sequence[Level], permission: str) -> bool:
    """Whether the user may do this: `explain` without the reasons."""
    return explain(rights, levels, permission).allowed


def _step(rights: Rights, levels: Iterable[Level], permission: str) -> Step:
    for level in levels:
        said = [grant for grant in level.grants if says(grant, permission, rights.roles)]
        for subject_type in (USER, TEAM, WORKSPACE) if said else ():
            if here := [grant for grant in said if grant.subject_type == subject_type]:
                denying = [grant for grant in here if grant.effect == DENY]
                return Step(
                    permission,
                    not denying,
                    level.resource_type,
                    level.resource_id,
                    subject_type,
                    tuple(grant.grant_id for grant in denying or here),
                )
    return Step(permission, permission in rights.permissions)


def view_of(permission: str) -> str:
    """The permission to see what this one acts on: `dashboards.view` for `dashboards.edit`."""
    return f"{permission.partition('.')[0]}.view"


Fetch = Callable[[str, str], Awaitable[Rights]]


@dataclass(eq=False, slots=True)
class _Flight:
    """A fetch under way, for all who want these rights now. `number` says when it began."""

    number: int
    task: asyncio.Task[Rights] | None = None
    outdated: bool = False


class RightsCache:
    """Rights by user and workspace, remembered while announcements of changes arrive.

    `fresh` says whether the announcements can be relied on; when not, each call asks user_svc. `fetch(user_id,
    workspace_id)` asks it, and raises NOT_FOUND for who is not a member. A version that a caller carries and that is
    higher than the remembered one makes the cache ask again. At most one fetch runs for a key at a time.
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
        self._flights: dict[tuple[str, str], _Flight] = {}
        self._asked = 0

    async def get(self, user_id: str, workspace_id: str, at_least: int = 0) -> Rights:
        """The rights, of version `at_least` or newer. Raises NOT_FOUND, or UNAVAILABLE without such an answer."""
        key = (user_id, workspace_id)
        self._asked += 1
        asked = self._asked
        while True:
            entry = self._entries.get(key)
            if entry and self._fresh() and entry[1] > time.monotonic() and entry[0].version >= at_least:
                return entry[0]
            flight = self._flights.get(key) or self._take_off(key)
            assert flight.task is not None
            try:
                rights = await asyncio.shield(flight.task)
            except errors.Error:
                if flight.number < asked and not self._holds(flight):
                    continue
                raise
            if flight.number >= asked:
                if rights.version < at_least:
                    raise errors.unavailable("The newest rights are not known yet.")
                return rights
            # Its answer may be older than the call: it holds unless a change was, or could have been, missed.
            if self._holds(flight) and rights.version >= at_least:
                return rights

    def _holds(self, flight: _Flight) -> bool:
        return self._fresh() and not flight.outdated

    def _take_off(self, key: tuple[str, str]) -> _Flight:
        async def fly() -> Rights:
            set_deadline(math.inf)  # it runs for several calls, and has none's
            try:
                rights = await self._fetch(*key)
                if rights.version >= self._newest.get(key[1], 0) and not flight.outdated:
                    self._keep(key, rights)
                return rights
            finally:
                del self._flights[key]

        flight = self._flights[key] = _Flight(self._asked)
        flight.task = asyncio.create_task(fly())
        return flight

    def _keep(self, key: tuple[str, str], rights: Rights) -> None:
        seconds = self._ttl
        if rights.expire_time:
            seconds = min(seconds, rights.expire_time.timestamp() - time.time())
        self._entries[key] = (rights, time.monotonic() + seconds)
        self._entries.move_to_end(key)
        while len(self._entries) > self._size:
            self._entries.popitem(last=False)

    def changed(self, workspace_id: str, version: int) -> None:
        """Forgets what is older than this version of the workspace's rights."""
        self._newest[workspace_id] = max(version, self._newest.get(workspace_id, 0))
        for key in [
            k for k, (rights, _) in self._entries.items() if k[1] == workspace_id and rights.version < version
        ]:
            del self._entries[key]
        for key, flight in self._flights.items():
            flight.outdated = flight.outdated or key[1] == workspace_id

    def clear(self) -> None:
        """Forgets everything: announcements may have been missed."""
        self._entries.clear()
        self._newest.clear()
        for flight in self._flights.values():
            flight.outdated = True
