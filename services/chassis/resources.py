"""The rule of `rights` as SQL: the grants that decide about a resource, and which rows of a list somebody may see.

Grants hold for all that lies in what they are on. So to see a row is settled by the grants on the row itself, else by
the verdict on the place that it lies in, else by the role. There are few places and many rows: the verdict on each
place is computed once for a statement, and grants on rows are looked up for as few rows as can be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import (
    CTE,
    ColumnElement,
    Select,
    Text,
    Uuid,
    and_,
    any_,
    case,
    column,
    exists,
    false,
    func,
    literal,
    null,
    or_,
    select,
    true,
    union_all,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute, aliased

from services.chassis import errors
from services.chassis.db import GrantRow
from services.chassis.rights import ALLOW, DENY, ROLES, TEAM, USER, WORKSPACE, Grant, Level, Rights, says

Column = ColumnElement[str] | InstrumentedAttribute[str]


@dataclass(frozen=True, slots=True, eq=False)
class Resource:
    """Where the resources of a type are: `dashboard` in the column `Dashboard.dashboard_id`.

    `type` is also what the grants' `resource_type` says, and the field `<type>_id` (or `<type>_ids`, or
    `parent_<type>_id`) what names one. `parent_id` names what a resource lies in, or is null: a `parent`, or, without
    one, another resource of this type. `holds` are the types of what may lie in it, beside its own.
    """

    type: str
    workspace_id: InstrumentedAttribute[str]
    resource_id: InstrumentedAttribute[str]
    parent_id: Any = None  # InstrumentedAttribute[str | None]
    parent: Resource | None = None
    holds: tuple[str, ...] = ()

    @property
    def place(self) -> Resource | None:
        """The resources that this one may lie in; they lie in one another."""
        return self.parent or (self if self.parent_id is not None else None)

    @property
    def view(self) -> str:
        """The permission to see one."""
        return f"{self.type}s.view"

    def absent(self) -> errors.Error:
        """What is said of one that does not exist, or that the caller may not see."""
        return errors.not_found(f"{self.type.upper()}_NOT_FOUND", f"There is no such {self.type}.")


def levels_above(resource: Resource, workspace_ids: Iterable[str], resource_ids: Iterable[str]) -> CTE:
    """SQL: the resources among these that exist, and all that they lie in.

    Columns: `workspace_id`, `asked_id`, `depth` (0 for the resource itself), `resource_type`, `resource_id`.
    """
    levels = (
        select(
            resource.workspace_id.label("workspace_id"),
            resource.resource_id.label("asked_id"),
            literal(0).label("depth"),
            literal(resource.type, Text).label("resource_type"),
            resource.resource_id.label("resource_id"),
            _parent_of(resource).label("parent_id"),
        )
        .where(resource.workspace_id == _any(workspace_ids), resource.resource_id == _any(resource_ids))
        .cte("levels", recursive=resource.place is not None)
    )
    if (place := resource.place) is None:
        return levels
    return levels.union_all(
        select(
            levels.c.workspace_id,
            levels.c.asked_id,
            levels.c.depth + 1,
            literal(place.type, Text),
            place.resource_id,
            _parent_of(place),
        ).where(
            place.workspace_id == levels.c.workspace_id,
            place.resource_id == levels.c.parent_id,
        )
    )


@dataclass(frozen=True, slots=True)
class Place:
    """One level as it was found, with the grants and their expiry by subject."""

    resource_type: str
    resource_id: str
    grants: dict[tuple[str, str | None], list[tuple[Grant, datetime | None]]]


# By workspace and resource, the resource and what it lies in, by depth.
Found = dict[tuple[str, str], dict[int, Place]]


async def find(
    session: AsyncSession,
    resource: Resource,
    workspace_ids: Iterable[str],
    resource_ids: Iterable[str],
    subject_ids: Iterable[str],
) -> Found:
    """The resources among these that exist, with the grants to these subjects and to everyone, in one statement."""
    levels = levels_above(resource, workspace_ids, resource_ids)
    rows = await session.execute(
        select(
            levels.c.workspace_id,
            levels.c.asked_id,
            levels.c.depth,
            levels.c.resource_type,
            levels.c.resource_id,
            GrantRow.subject_type,
            GrantRow.subject_id,
            GrantRow.role,
            GrantRow.effect,
            GrantRow.grant_id,
            GrantRow.expire_time,
        ).outerjoin_from(
            levels,
            GrantRow,
            and_(
                GrantRow.workspace_id == levels.c.workspace_id,
                GrantRow.resource_type == levels.c.resource_type,
                GrantRow.resource_id == levels.c.resource_id,
                or_(GrantRow.subject_id.is_(None), GrantRow.subject_id == _any(subject_ids)),
            ),
        )
    )
    found: Found = {}
    for workspace_id, asked_id, depth, resource_type, resource_id, subject_type, subject_id, *grant in rows:
        places = found.setdefault((workspace_id, asked_id), {})
        if (place := places.get(depth)) is None:
            place = places[depth] = Place(resource_type, resource_id, {})
        if subject_type is not None:
            role, effect, grant_id, expire_time = grant
            place.grants.setdefault((subject_type, subject_id), []).append(
                (Grant(subject_type, role, effect, grant_id), expire_time)
            )
    return found


def levels_for(places: dict[int, Place], rights: Rights, now: datetime) -> list[Level]:
    """The levels of a decision about a user, the nearest first."""
    subjects: list[tuple[str, str | None]] = [
        (USER, rights.user_id),
        *((TEAM, team_id) for team_id in rights.team_ids),
        (WORKSPACE, None),
    ]
    return [
        Level(
            [
                grant
                for subject in subjects
                for grant, expire_time in place.grants.get(subject, ())
                if expire_time is None or expire_time > now
            ],
            place.resource_type,
            place.resource_id,
        )
        for _, place in sorted(places.items())
    ]


def visible(resource: Resource, rights: Rights, now: datetime) -> ColumnElement[bool]:
    """SQL: whether the user may view the row. For lists of many rows see `visible_ids`."""
    view = resource.view
    return func.coalesce(_said_of(resource, rights, now, view), _place_allows(resource, rights, now, view))


def visible_ids(
    resource: Resource,
    rights: Rights,
    now: datetime,
    after: Callable[[Column], ColumnElement[bool]],
    limit: int,
) -> Select[str]:
    """SQL: the ids of the last `limit` rows before a page's end that the user may view, in no order.

    `after(id)` is the condition that a row comes after the last page, in the order of falling ids. The cost is that of
    the rows on the page and of grants which say otherwise than the place: a row is visible because of its place (then
    it is met on the way through the table), or because of a grant to the user, to one of its teams or to the workspace
    (then it is met on the way through the grants of that subject); the nearest of each way are enough.
    """
    view = resource.view
    said = _said_of(resource, rights, now, view)
    in_order: Any = (
        select(resource.resource_id)
        .where(
            resource.workspace_id == rights.workspace_id,
            after(resource.resource_id),
            # In a CASE, so that grants are looked up only in places that are visible.
            case((_place_allows(resource, rights, now, view), func.coalesce(said, true())), else_=false()),
        )
        .order_by(resource.resource_id.desc())
        .limit(limit)
    )
    unnested = func.unnest(
        literal([USER, *(TEAM for _ in rights.team_ids)], ARRAY(Text)),
        literal([rights.user_id, *sorted(rights.team_ids)], ARRAY(Uuid(as_uuid=False))),
    )
    subjects = unnested.table_valued(column("type", Text), column("id", Uuid(as_uuid=False)))
    subjects = subjects.render_derived(name="subjects")

    row = aliased(GrantRow)

    def granted(*to: ColumnElement[bool]) -> Select[str]:
        return (
            select(row.resource_id)
            .where(
                row.workspace_id == rights.workspace_id,
                *to,
                row.resource_type == resource.type,
                row.effect == ALLOW,
                row.role.in_(_saying(rights, ALLOW, view)),
                after(row.resource_id),
                exists()
                .where(resource.workspace_id == rights.workspace_id, resource.resource_id == row.resource_id)
                .correlate(row),
                _said_of(resource, rights, now, view, row.resource_id),
            )
            .order_by(row.resource_id.desc())
            .limit(limit)
        )

    to_me = granted(row.subject_type == subjects.c.type, row.subject_id == subjects.c.id)
    mine = to_me.correlate(subjects).lateral()
    to_all = granted(row.subject_type == WORKSPACE, row.subject_id.is_(None))
    return select(
        union_all(
            select(in_order.subquery()),
            select(mine.c.resource_id).select_from(subjects).join(mine, true()),
            select(to_all.subquery()),
        ).subquery()
    )


@dataclass(frozen=True, slots=True)
class Reach:
    """What a user may see of one type of resource, told by the places and what differs from them.

    Visible is a row that is in `allowed`, or that is not in `denied` and lies in one of `parents`, or, with `top`, in
    none.
    """

    parents: frozenset[str]
    allowed: frozenset[str]
    denied: frozenset[str]
    top: bool


async def reach(session: AsyncSession, resource: Resource, rights: Rights, now: datetime) -> Reach:
    """The user's reach now, for a search engine that filters by it. It reads all grants on rows to the user."""
    view = resource.view
    parents: frozenset[str] = frozenset()
    if resource.place is not None:
        verdicts = _verdicts(resource.place, rights, now, view)
        rows = await session.scalars(select(verdicts.c.resource_id).where(verdicts.c.allowed))
        parents = frozenset(rows)
    said = _said(resource, rights, now, view)
    exceptions = await session.execute(
        select(said.c.resource_id, said.c.allowed)
        .join(resource.resource_id.class_, resource.resource_id == said.c.resource_id)
        .where(
            resource.workspace_id == rights.workspace_id,
            said.c.allowed != _place_allows(resource, rights, now, view),
        )
    )
    by_verdict: dict[bool, set[str]] = {True: set(), False: set()}
    for resource_id, allowed in exceptions:
        by_verdict[allowed].add(resource_id)
    return Reach(
        parents, frozenset(by_verdict[True]), frozenset(by_verdict[False]), view in rights.permissions
    )


def applies(rights: Rights, now: datetime) -> ColumnElement[bool]:
    """SQL: the grant is for this user, a team of the user's or the workspace, and has not expired."""
    return and_(
        GrantRow.workspace_id == rights.workspace_id,
        or_(GrantRow.expire_time.is_(None), GrantRow.expire_time > now),
        or_(
            and_(GrantRow.subject_type == USER, GrantRow.subject_id == rights.user_id),
            and_(GrantRow.subject_type == TEAM, GrantRow.subject_id == _any(rights.team_ids)),
            and_(GrantRow.subject_type == WORKSPACE, GrantRow.subject_id.is_(None)),
        ),
    )


def _saying(rights: Rights, effect: str, permission: str) -> list[str]:
    """The roles of which a grant of this effect says something about the permission."""
    return [
        role
        for role in (*ROLES, *sorted(rights.roles))
        if says(Grant(USER, role, effect), permission, rights.roles)
    ]


def _verdict(rights: Rights, permission: str) -> ColumnElement[bool | None]:
    """SQL, over grants on one resource that apply: what they say of the permission; null: nothing."""
    relevant = or_(
        and_(GrantRow.effect == ALLOW, GrantRow.role.in_(_saying(rights, ALLOW, permission))),
        and_(
            GrantRow.effect == DENY,
            or_(
                GrantRow.role.in_(_saying(rights, DENY, permission)),
                GrantRow.role.not_in([*ROLES, *sorted(rights.roles)]),
            ),
        ),
    )

    def level(subject_type: str) -> Any:
        return func.bool_and(GrantRow.effect == ALLOW).filter(GrantRow.subject_type == subject_type, relevant)

    return func.coalesce(level(USER), level(TEAM), level(WORKSPACE))


def _said_of(
    resource: Resource,
    rights: Rights,
    now: datetime,
    permission: str,
    resource_id: Column | None = None,
) -> ColumnElement[bool | None]:
    """SQL: what the grants on one row say; null: nothing."""
    return (
        select(_verdict(rights, permission))
        .where(
            applies(rights, now),
            GrantRow.resource_type == resource.type,
            GrantRow.resource_id == (resource.resource_id if resource_id is None else resource_id),
        )
        .correlate_except(GrantRow)
        .scalar_subquery()
    )


def _said(resource: Resource, rights: Rights, now: datetime, permission: str) -> CTE:
    """SQL: what the grants say, by the resources that they are on."""
    return (
        select(GrantRow.resource_id, _verdict(rights, permission).label("allowed"))
        .where(applies(rights, now), GrantRow.resource_type == resource.type)
        .group_by(GrantRow.resource_id)
        .cte(f"said_of_{resource.type}s")
    )


def _verdicts(place: Resource, rights: Rights, now: datetime, permission: str) -> CTE:
    """SQL: for each place of the workspace, whether the grants on it and above, or the role, allow the permission."""
    said = _said(place, rights, now, permission)
    assert place.parent_id is not None, "places lie in one another"
    verdicts = (
        select(
            place.resource_id.label("resource_id"),
            func.coalesce(said.c.allowed, _by_role(rights, permission)).label("allowed"),
        )
        .outerjoin(said, said.c.resource_id == place.resource_id)
        .where(place.workspace_id == rights.workspace_id, place.parent_id.is_(None))
        .cte("verdicts", recursive=True)
    )
    return verdicts.union_all(
        select(place.resource_id, func.coalesce(said.c.allowed, verdicts.c.allowed))
        .join(verdicts, verdicts.c.resource_id == place.parent_id)
        .outerjoin(said, said.c.resource_id == place.resource_id)
        .where(place.workspace_id == rights.workspace_id)
    )


def _place_allows(resource: Resource, rights: Rights, now: datetime, permission: str) -> ColumnElement[bool]:
    """SQL: what holds for a row that no grant is on."""
    by_role = _by_role(rights, permission)
    if resource.place is None or resource.parent_id is None:
        return by_role
    verdicts = _verdicts(resource.place, rights, now, permission)
    allowing = select(verdicts.c.resource_id).where(verdicts.c.allowed)
    return case((resource.parent_id.is_(None), by_role), else_=resource.parent_id.in_(allowing))


def _by_role(rights: Rights, permission: str) -> ColumnElement[bool]:
    return true() if permission in rights.permissions else false()


def _parent_of(resource: Resource) -> ColumnElement[Any]:
    return null().cast(Uuid(as_uuid=False)) if resource.parent_id is None else resource.parent_id


def _any(ids: Iterable[str]) -> Any:
    # An array and not IN: the statement's text stays the same, however many ask.
    return any_(literal(sorted(ids), ARRAY(Uuid(as_uuid=False))))
