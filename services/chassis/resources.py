"""The rule of `rights` as SQL: the grants that decide about a resource, and which rows of a list somebody may see.

Grants hold for all that lies in what they are on. So to see a row is settled by the grants on the row itself, else by
the verdict on the place that it lies in, else by the role. There are few places and many rows: the verdict on each
place is computed once for a statement, and grants on rows are looked up for as few rows as can be.

The statements are texts, and made once for each type of resource: to build and compile expressions of this size for
every call would cost more than Postgres takes to answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any

import asyncpg
from sqlalchemy import Boolean, DateTime, Text, TextClause, Uuid, bindparam, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from services.chassis import errors
from services.chassis.rights import ALLOW, DENY, ROLES, TEAM, USER, WORKSPACE, Grant, Level, Rights, says

# Comes after all ids that are made.
_LAST_ID = "ffffffff-ffff-ffff-ffff-ffffffffffff"
_ID = Uuid(as_uuid=False)
_TYPES: dict[str, Any] = {
    "workspace_id": _ID,
    "user_id": _ID,
    "last_id": _ID,
    "now": DateTime(timezone=True),
    "by_role": Boolean(),
    **dict.fromkeys(("allowing", "denying", "known", "subject_types"), ARRAY(Text())),
    **dict.fromkeys(("team_ids", "subject_ids", "workspace_ids", "resource_ids"), ARRAY(_ID)),
}
_ASKED = ("workspace_ids", "resource_ids", "subject_ids")


@dataclass(frozen=True, eq=False)
class Resource:
    """Where the resources of a type are: `dashboard` in the column `Dashboard.dashboard_id`.

    `type` is also what the grants' `resource_type` says, and the field `<type>_id` (or `<type>_ids`, or
    `parent_<type>_id`) what names one. `parent_id` names what a resource lies in, or is null: a `parent`, or, without
    one, another resource of this type. `holds` are the types of what may lie in it, beside its own. `alive` is a
    condition on a row, as `{row}.delete_time IS NULL`: lists and searches hold only the rows that meet it. On others
    the access stage lets pass whoever has the permission, so that the grants on what is in a bin say who may take it
    out; to everybody else it is absent.
    """

    type: str
    workspace_id: InstrumentedAttribute[str]
    resource_id: InstrumentedAttribute[str]
    parent_id: Any = None  # InstrumentedAttribute[str | None]
    parent: Resource | None = None
    holds: tuple[str, ...] = ()
    alive: str = ""

    @property
    def place(self) -> Resource | None:
        """The resources that this one may lie in; they lie in one another."""
        return self.parent or (self if self.parent_id is not None else None)

    @property
    def view(self) -> str:
        """The permission to see one."""
        return f"{self.type}s.view"

    @property
    def table(self) -> str:
        """The name of the table."""
        return str(self.resource_id.class_.__tablename__)

    @cached_property
    def sql(self) -> _Sql:
        """The statements about resources of this type."""
        return _Sql(self)

    def is_alive(self, row: str) -> str:
        """SQL: whether a row, by the name of its table, is alive."""
        return f"({self.alive.format(row=row)})" if self.alive else "true"

    def absent(self) -> errors.Error:
        """What is said of one that does not exist, or that the caller may not see."""
        return errors.not_found(f"{self.type.upper()}_NOT_FOUND", f"There is no such {self.type}.")


@dataclass(frozen=True, slots=True)
class Place:
    """The resource, or something that it lies in, with the grants on it and their expiry by subject."""

    resource_type: str
    resource_id: str
    alive: bool
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
    asked = dict(zip(_ASKED, map(sorted, (workspace_ids, resource_ids, subject_ids)), strict=True))
    return _by_place(await session.execute(resource.sql.found, asked))


async def find_at_once(
    connection: asyncpg.Connection,
    resource: Resource,
    workspace_ids: Iterable[str],
    resource_ids: Iterable[str],
    subject_ids: Iterable[str],
) -> Found:
    """The same on a `driver_connection`: each call of a method that needs a permission on a resource asks this."""
    asked = map(sorted, (workspace_ids, resource_ids, subject_ids))
    return _by_place(
        await connection.fetch(resource.sql.found_by("$1::uuid[]", "$2::uuid[]", "$3::uuid[]"), *asked)
    )


def _by_place(rows: Iterable[Any]) -> Found:
    found: Found = {}
    for workspace_id, asked_id, depth, resource_type, resource_id, alive, *given in rows:
        places = found.setdefault((workspace_id, asked_id), {})
        if (place := places.get(depth)) is None:
            place = places[depth] = Place(resource_type, resource_id, alive, {})
        subject_type, subject_id, role, effect, grant_id, expire_time = given
        if subject_type is not None:
            place.grants.setdefault((subject_type, subject_id), []).append(
                (Grant(subject_type, role, effect, grant_id), expire_time)
            )
    return found


def levels_for(places: dict[int, Place], user_id: str, team_ids: Iterable[str], now: datetime) -> list[Level]:
    """The levels of a decision about a user, the nearest first."""
    subjects = [(USER, user_id), *((TEAM, team_id) for team_id in team_ids), (WORKSPACE, None)]
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
            place.alive,
        )
        for _, place in sorted(places.items())
    ]


def visible(resource: Resource, rights: Rights, now: datetime) -> TextClause:
    """SQL: whether the user may view the row; a condition for `where`. For pages of long lists see `visible_ids`."""
    return _bound(resource.sql.visible, resource, rights, now)


def visible_ids(
    resource: Resource, rights: Rights, now: datetime, last_id: str | None, limit: int
) -> TextClause:
    """SQL: whether the row is one of the next `limit` that the user may view, in the order of falling ids.

    `last_id` is the last one of the page before. The cost is that of the rows on the page and of the grants which say
    otherwise than the place. For a row is visible because of its place (then it is met on the way through the table),
    or because of a grant to the user, to one of its teams or to the workspace (then it is met on the way through the
    grants of that subject); the nearest of each way are enough.
    """
    return _bound(
        resource.sql.visible_ids(limit),
        resource,
        rights,
        now,
        last_id=last_id or _LAST_ID,
        subject_types=[USER, *(TEAM for _ in rights.team_ids)],
        subject_ids=[rights.user_id, *sorted(rights.team_ids)],
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
    rows = await session.execute(_bound(resource.sql.exceptions, resource, rights, now))
    exceptions: dict[bool, set[str]] = {True: set(), False: set()}
    for resource_id, allowed in rows:
        exceptions[allowed].add(str(resource_id))
    parents: frozenset[str] = frozenset()
    if resource.place is not None:
        places = await session.scalars(_bound(resource.sql.allowing_places, resource, rights, now))
        parents = frozenset(map(str, places))
    return Reach(
        parents,
        frozenset(exceptions[True]),
        frozenset(exceptions[False]),
        resource.view in rights.permissions,
    )


@dataclass(frozen=True, slots=True)
class _Statement:
    """A text, and the names of its parameters without the prefix."""

    clause: TextClause
    names: tuple[str, ...]


class _Sql:
    """The statements about one type of resource. Each parameter is named after the type, so that two can be joined."""

    def __init__(self, resource: Resource) -> None:
        self._resource = resource
        self._id = resource.resource_id.key
        self._table = resource.table
        self._p = f":{resource.type}_"
        self.found_by = lru_cache(self._found_by)
        self.visible_ids = lru_cache(maxsize=32)(self._visible_ids)  # most ask for a page of the same size

    @cached_property
    def found(self) -> Any:
        """What exists of :resource_ids, what it lies in, and the grants to :subject_ids and to everyone."""
        return text(self.found_by(*(f":{name}" for name in _ASKED))).bindparams(*_typed(*_ASKED))

    def _found_by(self, workspace_ids: str, resource_ids: str, subject_ids: str) -> str:
        """The same as text, with these words for what is bound."""
        resource, place = self._resource, self._resource.place
        parent_id, above = "NULL::uuid", ""
        if place is not None:
            parent_id = resource.parent_id.key
            above = f"""
              UNION ALL
                SELECT levels.workspace_id, asked_id, depth + 1, '{place.type}', place.{place.resource_id.key},
                    place.{place.parent_id.key}, true
                FROM levels JOIN {place.table} AS place
                    ON place.workspace_id = levels.workspace_id AND place.{place.resource_id.key} = parent_id
            """  # noqa: S608 - names of tables and columns, from the code; here and below
        return f"""
            WITH RECURSIVE levels AS (
                SELECT workspace_id, {self._id} AS asked_id, 0 AS depth, '{resource.type}'::text AS resource_type,
                    {self._id} AS resource_id, {parent_id} AS parent_id, {resource.is_alive(self._table)} AS alive
                FROM {self._table}
                WHERE workspace_id = ANY ({workspace_ids}) AND {self._id} = ANY ({resource_ids})
                {above}
            )
            SELECT levels.workspace_id::text, asked_id::text, depth, levels.resource_type, levels.resource_id::text,
                alive, subject_type, subject_id::text, role, effect, grant_id::text, expire_time
            FROM levels LEFT JOIN grants
                ON grants.workspace_id = levels.workspace_id AND grants.resource_type = levels.resource_type
                AND grants.resource_id = levels.resource_id
                AND (subject_id IS NULL OR subject_id = ANY ({subject_ids}))
        """  # noqa: S608

    @cached_property
    def visible(self) -> _Statement:
        """Whether a row of the table is visible."""
        said = self._said_of(f"{self._table}.{self._id}")
        allowed = f"coalesce({said}, {self._place_allows(self._table, inline=True)})"
        return self._text(f"({self._resource.is_alive(self._table)} AND {allowed})")

    def _visible_ids(self, limit: int) -> _Statement:
        """Whether a row of the table is one of the next visible ones."""
        # The limit is no parameter: a plan for any limit is one for many rows.
        ways = " UNION ALL ".join(self._ways_by_place(limit) + self._ways_by_grant(limit))
        return self._text(f"""
            {self._table}.{self._id} IN (
                {self._with_verdicts}
                SELECT id FROM ({ways}) AS candidates GROUP BY id ORDER BY id DESC LIMIT {limit:d}
            )
        """)  # noqa: S608

    def _ways_by_place(self, limit: int) -> list[str]:
        """The next rows that are visible because of where they lie.

        Where few places are visible, the way is through these places; else through the table, in which then many rows
        are visible. Conditions on :by_role and the number of places are judged once, before any row is read.
        """

        def way(condition: str) -> str:
            return f"""(
                SELECT one.{self._id} AS id FROM {self._table} AS one
                WHERE one.workspace_id = {self._p}workspace_id AND one.{self._id} < {self._p}last_id
                    AND {self._resource.is_alive("one")} AND {condition}
                ORDER BY id DESC LIMIT {limit:d}
            )"""  # noqa: S608

        not_denied = f"coalesce({self._said_of(f'one.{self._id}')}, true)"
        resource = self._resource
        if resource.place is None:
            return [way(f"{self._p}by_role AND {not_denied}")]
        parent_id = f"one.{resource.parent_id.key}"
        count = "(SELECT count(*) FROM verdicts WHERE allowed)"
        # In a CASE, so that grants are looked up only in places that are visible.
        in_place = f"CASE WHEN {parent_id} IN ({_ALLOWING}) THEN {not_denied} ELSE false END"
        return [
            way(f"{self._p}by_role AND {parent_id} IS NULL AND {not_denied}"),
            way(f"{count} > {_FEW_PLACES} AND {in_place}"),
            f"""(
                SELECT by_place.id FROM (SELECT place_id FROM verdicts WHERE allowed) AS places,
                    LATERAL {way(f"{parent_id} = places.place_id AND {not_denied}")} AS by_place
                WHERE {count} <= {_FEW_PLACES}
            )""",  # noqa: S608
        ]

    def _ways_by_grant(self, limit: int) -> list[str]:
        """The next rows that are visible because of a grant on them."""
        granted = f"""(
            SELECT resource_id AS id FROM grants AS mine
            WHERE workspace_id = {self._p}workspace_id AND {{subject}}
                AND resource_type = '{self._resource.type}' AND resource_id < {self._p}last_id
                AND effect = '{ALLOW}' AND role = ANY ({self._p}allowing)
                AND EXISTS (
                    SELECT FROM {self._table} AS one
                    WHERE one.workspace_id = mine.workspace_id AND one.{self._id} = mine.resource_id
                        AND {self._resource.is_alive("one")}
                )
                AND {self._said_of("mine.resource_id")}
            ORDER BY resource_id DESC LIMIT {limit:d}
        )"""  # noqa: S608
        to_subject = granted.format(subject="subject_type = subjects.type AND subject_id = subjects.id")
        to_all = granted.format(subject=f"subject_type = '{WORKSPACE}' AND subject_id IS NULL")
        return [
            f"""(
                SELECT to_subject.id
                FROM unnest({self._p}subject_types, {self._p}subject_ids) AS subjects (type, id),
                    LATERAL {to_subject} AS to_subject
            )""",  # noqa: S608
            to_all,
        ]

    @cached_property
    def allowing_places(self) -> _Statement:
        """The places in which a row is visible that no grant is on."""
        return self._text(f"{self._with_verdicts} {_ALLOWING}")

    @cached_property
    def exceptions(self) -> _Statement:
        """The rows that the grants on them make visible or not, otherwise than their places do."""
        resource = self._resource
        ctes = self._with_verdicts or "WITH"
        return self._text(f"""
            {ctes}{"," if self._with_verdicts else ""} said AS ({self._said(resource.type)})
            SELECT one.{self._id}, said.allowed
            FROM said JOIN {self._table} AS one
                ON one.workspace_id = {self._p}workspace_id AND one.{self._id} = said.resource_id
            WHERE said.allowed <> {self._place_allows("one")} AND {self._resource.is_alive("one")}
        """)  # noqa: S608

    @cached_property
    def _with_verdicts(self) -> str:
        """For each place of the workspace, whether the grants on it and above, or the role, allow it; or nothing."""
        place = self._resource.place
        if place is None:
            return ""
        place_id, parent_id = place.resource_id.key, place.parent_id.key
        return f"""
            WITH RECURSIVE said_of_places AS ({self._said(place.type)}),
            verdicts AS (
                SELECT {place_id} AS place_id, coalesce(allowed, {self._p}by_role) AS allowed
                FROM {place.table} LEFT JOIN said_of_places ON resource_id = {place_id}
                WHERE workspace_id = {self._p}workspace_id AND {parent_id} IS NULL
              UNION ALL
                SELECT {place_id}, coalesce(said_of_places.allowed, verdicts.allowed)
                FROM verdicts JOIN {place.table} AS place
                    ON workspace_id = {self._p}workspace_id AND {parent_id} = verdicts.place_id
                    LEFT JOIN said_of_places ON resource_id = {place_id}
            )
        """  # noqa: S608

    def _place_allows(self, row: str, *, inline: bool = False) -> str:
        """What holds for a row that no grant is on."""
        if self._resource.place is None:
            return f"{self._p}by_role"
        parent_id = f"{row}.{self._resource.parent_id.key}"
        verdicts = self._with_verdicts if inline else ""
        return (
            f"CASE WHEN {parent_id} IS NULL THEN {self._p}by_role"
            f" ELSE {parent_id} IN ({verdicts} {_ALLOWING}) END"
        )

    def _said_of(self, resource_id: str) -> str:
        """What the grants on one row say; null: nothing."""
        return f"""(
            SELECT {_VERDICT} FROM grants
            WHERE resource_id = {resource_id} AND {self._applies(self._resource.type)}
        )"""  # noqa: S608

    def _said(self, resource_type: str) -> str:
        """What the grants say, by the resources that they are on."""
        return f"""
            SELECT resource_id, {_VERDICT} AS allowed FROM grants
            WHERE {self._applies(resource_type)} GROUP BY resource_id
        """  # noqa: S608

    def _applies(self, resource_type: str) -> str:
        """That a grant is for the user, has not expired, and says something about the permission to view a row."""
        p = self._p
        return f"""
            grants.workspace_id = {p}workspace_id AND grants.resource_type = '{resource_type}'
            AND (grants.expire_time IS NULL OR grants.expire_time > {p}now)
            AND (grants.subject_type = '{USER}' AND grants.subject_id = {p}user_id
                OR grants.subject_type = '{TEAM}' AND grants.subject_id = ANY ({p}team_ids)
                OR grants.subject_type = '{WORKSPACE}' AND grants.subject_id IS NULL)
            AND (grants.effect = '{ALLOW}' AND grants.role = ANY ({p}allowing)
                OR grants.effect = '{DENY}' AND (grants.role = ANY ({p}denying) OR grants.role <> ALL ({p}known)))
        """

    def _text(self, sql: str) -> _Statement:
        names = [name for name in _TYPES if f"{self._p}{name}" in sql]
        return _Statement(text(sql).bindparams(*_typed(*names, prefix=self._p[1:])), tuple(names))


_VERDICT = f"""coalesce(
    bool_and(grants.effect = '{ALLOW}') FILTER (WHERE grants.subject_type = '{USER}'),
    bool_and(grants.effect = '{ALLOW}') FILTER (WHERE grants.subject_type = '{TEAM}'),
    bool_and(grants.effect = '{ALLOW}') FILTER (WHERE grants.subject_type = '{WORKSPACE}')
)"""
# Up to so many visible places, each is gone through by itself.
_FEW_PLACES = 16
_ALLOWING = "SELECT place_id FROM verdicts WHERE allowed"


def _typed(*names: str, prefix: str = "") -> list[Any]:
    return [bindparam(prefix + name, type_=_TYPES[name], required=True) for name in names]


def _bound(
    statement: _Statement, resource: Resource, rights: Rights, now: datetime, **more: Any
) -> TextClause:
    """The statement with the values of a user."""
    known = [*ROLES, *sorted(rights.roles)]

    def saying(effect: str) -> list[str]:
        return [role for role in known if says(Grant(USER, role, effect), resource.view, rights.roles)]

    values = {
        "workspace_id": rights.workspace_id,
        "user_id": rights.user_id,
        "team_ids": sorted(rights.team_ids),
        "now": now,
        "by_role": resource.view in rights.permissions,
        "allowing": saying(ALLOW),
        "denying": saying(DENY),
        "known": known,
        **more,
    }
    prefix = f"{resource.type}_"
    return statement.clause.bindparams(**{prefix + name: values[name] for name in statement.names})
