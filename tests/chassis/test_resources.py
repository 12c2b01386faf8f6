"""The rule in SQL, for single resources and for lists, against a third writing of it that knows neither of the two."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from services.chassis import db, resources
from services.chassis.db import GrantRow, Id
from services.chassis.resources import Reach, Resource
from services.chassis.rights import ROLES, Rights, decide, explain
from tests.harness import new_id
from tests.parts import Parts

NOW = datetime(2026, 1, 1, tzinfo=UTC)
Sessions = async_sessionmaker[AsyncSession]


class Base(DeclarativeBase):
    pass


class BoxRow(Base):
    __tablename__ = "boxes"
    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    box_id: Mapped[Id] = mapped_column(primary_key=True)
    outer_id: Mapped[Id | None]


class ThingRow(Base):
    __tablename__ = "things"
    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    thing_id: Mapped[Id] = mapped_column(primary_key=True)
    box_id: Mapped[Id | None]
    in_bin: Mapped[bool]


# Named as what there is, since the built-in roles know no others.
BOX = Resource("folder", BoxRow.workspace_id, BoxRow.box_id, parent_id=BoxRow.outer_id, holds=("dashboard",))
THING = Resource(
    "dashboard",
    ThingRow.workspace_id,
    ThingRow.thing_id,
    parent_id=ThingRow.box_id,
    parent=BOX,
    alive="NOT {row}.in_bin",
)
IN_BIN = replace(THING, alive="{row}.in_bin")
ALONE = Resource("source", ThingRow.workspace_id, ThingRow.thing_id, alive="NOT {row}.in_bin")


@pytest.fixture(scope="module")
async def sessions(parts: Parts) -> AsyncIterator[Sessions]:
    sessions = db.connect(await parts.fresh_database("dashboard"))
    async with sessions.begin() as session:
        connection = await session.connection()
        for base in (db.ChassisBase, Base):
            await connection.run_sync(base.metadata.create_all)
    yield sessions
    await db.engine(sessions).dispose()


# A world: a tree of boxes with things, a tree of teams, and grants.

LADDER = ["viewer", "editor", "admin", "owner"]
RUNG = {
    "dashboards.view": 0,
    "folders.view": 0,
    "sources.view": 0,
    "dashboards.edit": 1,
    "folders.create": 1,
    "sources.edit": 1,
    "dashboards.grant": 2,
    "sources.delete": 2,
}
CUSTOM = {
    "guest": frozenset({"dashboards.view", "sources.view"}),
    "author": frozenset({"dashboards.edit", "folders.create"}),
    "janitor": frozenset({"folders.view", "dashboards.grant", "sources.delete"}),
}


@dataclass
class World:
    """`trees` say of each box which earlier one it lies in, `things` of each thing in which box; -1: in none."""

    trees: list[int]
    things: list[int]
    team_trees: list[int]
    my_teams: set[int]
    my_role: str
    # ("box" or "thing", its number), who ("me", "other", "workspace" or a team's number), role, effect, days left
    grants: list[tuple[tuple[str, int], str | int, str, str, int | None]]
    binned: set[int]  # things by their numbers
    ids: dict[object, str] = field(default_factory=dict)

    def id_of(self, what: object) -> str:
        return self.ids.setdefault(what, new_id())

    def permissions(self) -> frozenset[str]:
        if self.my_role in CUSTOM:
            return CUSTOM[self.my_role]
        return frozenset(p for p, rung in RUNG.items() if rung <= LADDER.index(self.my_role))

    def all_my_teams(self) -> set[int]:
        found = set()
        for mine in self.my_teams:
            team = mine
            while team >= 0:
                found.add(team)
                team = self.team_trees[team]
        return found

    def rights(self) -> Rights:
        teams = frozenset(self.id_of(("team", team)) for team in self.all_my_teams())
        mine = ROLES[self.my_role] if self.my_role in ROLES else CUSTOM[self.my_role]
        return Rights(self.id_of("me"), self.id_of("workspace"), self.my_role, mine, teams, 1, roles=CUSTOM)

    def way_out(self, kind: str, number: int) -> Iterator[tuple[str, int]]:
        yield kind, number
        box = self.things[number] if kind == "thing" else self.trees[number]
        while box >= 0:
            yield "box", box
            box = self.trees[box]

    def may(self, kind: str, number: int, permission: str) -> bool:
        """The rule, as plainly as can be."""
        view = permission.split(".", maxsplit=1)[0] + ".view"
        return all(self._verdict(kind, number, each) for each in {view, permission})

    def _verdict(self, kind: str, number: int, permission: str) -> bool:
        for place in self.way_out(kind, number):
            for who in ("user", "team", "workspace"):
                voices = [
                    effect == "ALLOW"
                    for where, subject, role, effect, days in self.grants
                    if where == place
                    and (days is None or days > 0)
                    and self._is_me(subject, who)
                    and speaks(role, effect, permission)
                ]
                if voices:
                    return all(voices)
        return permission in self.permissions()

    def _is_me(self, subject: str | int, who: str) -> bool:
        match who:
            case "user":
                return subject == "me"
            case "team":
                return subject in self.all_my_teams() and not isinstance(subject, str)
        return subject == "workspace"


def speaks(role: str, effect: str, permission: str) -> bool:
    if role in LADDER:
        rung, its = RUNG[permission], LADDER.index(role)
        return rung <= its if effect == "ALLOW" else rung >= its
    if role not in CUSTOM:
        return effect == "DENY"
    view = permission.split(".", maxsplit=1)[0] + ".view"
    return permission in CUSTOM[role] or (effect == "DENY" and view in CUSTOM[role])


def trees(size: int) -> st.SearchStrategy[list[int]]:
    """Each of some nodes with the number of an earlier one that it lies in, or -1."""
    return (
        st.integers(1, size)
        .flatmap(lambda n: st.tuples(*(st.integers(-1, i - 1) for i in range(n))))
        .map(list)
    )


@st.composite
def worlds(draw: st.DrawFn) -> World:
    boxes, teams = draw(trees(6)), draw(trees(4))
    things = draw(st.lists(st.integers(-1, len(boxes) - 1), min_size=1, max_size=8))
    wheres = [("box", i) for i in range(len(boxes))] + [("thing", i) for i in range(len(things))]
    whos: list[str | int] = ["me", "me", "other", "workspace", *range(len(teams))]
    grants = draw(
        st.lists(
            st.tuples(
                st.sampled_from(wheres),
                st.sampled_from(whos),
                st.sampled_from([*LADDER, *CUSTOM, "deleted"]),
                st.sampled_from(["ALLOW", "DENY"]),
                st.sampled_from([None, None, None, 1, 0, -1]),
            ),
            max_size=16,
            unique_by=lambda grant: grant[:3],
        )
    )
    return World(
        boxes,
        things,
        teams,
        draw(st.sets(st.integers(0, len(teams) - 1))),
        draw(st.sampled_from([*LADDER, *CUSTOM])),
        grants,
        draw(st.sets(st.integers(0, len(things) - 1))),
    )


async def write(
    session: AsyncSession, world: World, *, types: tuple[str, str] = ("dashboard", "folder")
) -> None:
    """The world's rows; and the same grants turned round in another workspace, which must not matter."""
    workspace_id = world.id_of("workspace")
    for number, outer in enumerate(world.trees):
        session.add(
            BoxRow(
                workspace_id=workspace_id,
                box_id=world.id_of(("box", number)),
                outer_id=world.id_of(("box", outer)) if outer >= 0 else None,
            )
        )
    for number, box in enumerate(world.things):
        session.add(
            ThingRow(
                workspace_id=workspace_id,
                thing_id=world.id_of(("thing", number)),
                box_id=world.id_of(("box", box)) if box >= 0 else None,
                in_bin=number in world.binned,
            )
        )
    elsewhere = new_id()
    rows = []
    for where, who, role, effect, days in world.grants:
        kind = {"me": "user", "other": "user", "workspace": "workspace"}.get(str(who), "team")
        subject = None if who == "workspace" else world.id_of(who if kind == "user" else ("team", who))
        for workspace, its_effect in (
            (workspace_id, effect),
            (elsewhere, "DENY" if effect == "ALLOW" else "ALLOW"),
        ):
            rows.append(
                {
                    "workspace_id": workspace,
                    "grant_id": new_id(),
                    "resource_type": types[0] if where[0] == "thing" else types[1],
                    "resource_id": world.id_of(where),
                    "subject_type": kind,
                    "subject_id": subject,
                    "role": role,
                    "effect": its_effect,
                    "expire_time": None if days is None else NOW + timedelta(days=days),
                    "creator_id": world.id_of("other"),
                    "create_time": NOW,
                }
            )
    if rows:
        await session.execute(insert(GrantRow), rows)


async def check_singles(
    session: AsyncSession, world: World, resource: Resource, kind: str, permissions: list[str]
) -> None:
    """`find`, `levels_for`, `decide` and `explain` say what the world says."""
    me = world.rights()
    count = len(world.things if kind == "thing" else world.trees)
    numbers = {world.id_of((kind, number)): number for number in range(count)}
    found = await resources.find(
        session, resource, [me.workspace_id], [*numbers, new_id()], [me.user_id, *me.team_ids]
    )
    assert {resource_id for _, resource_id in found} == set(numbers)
    for (_, resource_id), places in found.items():
        levels = resources.levels_for(places, me.user_id, me.team_ids, NOW)
        assert levels[0].alive is (kind == "box" or numbers[resource_id] not in world.binned)
        for permission in permissions:
            expected = world.may(kind, numbers[resource_id], permission)
            assert decide(me, levels, permission) is expected
            decision = explain(me, levels, permission)
            assert decision.allowed is decision.steps[-1].allowed is expected
            for step in decision.steps:
                effects = [
                    grant.effect
                    for level in levels
                    for grant in level.grants
                    if level.resource_id == step.resource_id and grant.grant_id in step.grant_ids
                ]
                assert len(effects) == len(step.grant_ids)
                assert set(effects) <= {"ALLOW" if step.allowed else "DENY"}
                assert bool(effects) is bool(step.subject_type) is bool(step.resource_id)


async def check_lists(session: AsyncSession, world: World, resource: Resource, kind: str) -> None:
    """Lists and pages hold exactly what the world lets be seen; `reach` tells the same."""
    me = world.rights()
    count = len(world.things if kind == "thing" else world.trees)
    numbers = {world.id_of((kind, number)): number for number in range(count)}
    if kind == "thing":
        listed = world.binned if resource is IN_BIN else set(numbers.values()) - world.binned
        numbers = {i: number for i, number in numbers.items() if number in listed}
    expected = [i for i in sorted(numbers, reverse=True) if world.may(kind, numbers[i], resource.view)]
    mine = select(resource.resource_id).where(resource.workspace_id == me.workspace_id)
    newest_first = mine.order_by(resource.resource_id.desc())
    assert [*await session.scalars(newest_first.where(resources.visible(resource, me, NOW)))] == expected
    paged: list[str] = []
    while True:
        last_id = paged[-1] if paged else None
        page = [
            *await session.scalars(
                newest_first.where(resources.visible_ids(resource, me, NOW, last_id, 3)).limit(3)
            )
        ]
        paged += page
        if len(page) < 3:
            break
    assert paged == expected
    told = await resources.reach(session, resource, me, NOW)
    assert {i for i in numbers if reached(world, told, i, kind, numbers[i], resource)} == set(expected)


def reached(world: World, told: Reach, resource_id: str, kind: str, number: int, resource: Resource) -> bool:
    if resource_id in told.allowed | told.denied:
        assert not told.allowed & told.denied
        return resource_id in told.allowed
    box = world.things[number] if kind == "thing" else world.trees[number]
    return told.top if box < 0 or resource.place is None else world.id_of(("box", box)) in told.parents


LAW = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


@LAW
@given(world=worlds())
async def test_what_lies_in_places(sessions: Sessions, world: World):
    async with sessions() as session:
        await write(session, world)
        await check_singles(
            session, world, THING, "thing", ["dashboards.view", "dashboards.edit", "dashboards.grant"]
        )
        await check_singles(session, world, BOX, "box", ["folders.view", "folders.create", "dashboards.edit"])
        await check_lists(session, world, THING, "thing")
        await check_lists(session, world, IN_BIN, "thing")
        await check_lists(session, world, BOX, "box")


@LAW
@given(world=worlds())
async def test_what_lies_in_nothing(sessions: Sessions, world: World):
    world.things = [-1 for _ in world.things]
    async with sessions() as session:
        await write(session, world, types=("source", "folder"))
        await check_singles(
            session, world, ALONE, "thing", ["sources.view", "sources.edit", "sources.delete"]
        )
        await check_lists(session, world, ALONE, "thing")
