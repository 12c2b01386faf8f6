"""The rule, and that the SQL for lists says the same as the function for single resources."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, select, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from services.chassis import db
from services.chassis.db import GrantRow, Id
from services.chassis.rights import (
    ALLOW,
    DENY,
    PERMISSIONS,
    ROLES,
    TEAM,
    USER,
    WORKSPACE,
    Grant,
    Rights,
    RightsCache,
    decide,
    visible,
)
from tests.conditions import eventually
from tests.harness import new_id
from tests.parts import Parts

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def rights(role: str = "viewer", team_ids: frozenset[str] = frozenset(), version: int = 1) -> Rights:
    return Rights(new_id(), new_id(), role, ROLES[role], team_ids, version)


def test_each_role_has_all_of_the_one_below():
    below: frozenset[str] = frozenset()
    for permissions in ROLES.values():
        assert below < permissions
        below = permissions
    assert below == PERMISSIONS


@pytest.mark.parametrize(
    ("role", "grants", "permission", "allowed"),
    [
        ("viewer", [], "dashboards.view", True),
        ("viewer", [], "dashboards.edit", False),
        ("viewer", [Grant(USER, "editor", ALLOW)], "dashboards.edit", True),
        ("viewer", [Grant(WORKSPACE, "editor", ALLOW)], "dashboards.edit", True),
        ("editor", [Grant(USER, "editor", DENY)], "dashboards.edit", False),
        ("editor", [Grant(USER, "editor", DENY)], "dashboards.view", True),
        ("owner", [Grant(USER, "viewer", DENY)], "dashboards.view", False),
        ("owner", [Grant(USER, "viewer", DENY)], "dashboards.grant", False),
        # Deny beats allow on one level, the nearer level beats the farther one.
        ("viewer", [Grant(TEAM, "editor", ALLOW), Grant(TEAM, "editor", DENY)], "dashboards.edit", False),
        ("viewer", [Grant(USER, "owner", ALLOW), Grant(WORKSPACE, "viewer", DENY)], "dashboards.edit", True),
        ("viewer", [Grant(USER, "viewer", DENY), Grant(TEAM, "owner", ALLOW)], "dashboards.view", False),
        # What may not be seen may not be changed, whatever else is granted.
        ("editor", [Grant(WORKSPACE, "viewer", DENY), Grant(TEAM, "viewer", DENY)], "dashboards.edit", False),
        ("viewer", [Grant(USER, "unheard-of", ALLOW)], "dashboards.edit", False),
    ],
)
def test_decide(role: str, grants: list[Grant], permission: str, allowed: bool):
    assert decide(rights(role), grants, permission) is allowed


class Base(DeclarativeBase):
    pass


class Thing(Base):
    __tablename__ = "things"
    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    dashboard_id: Mapped[Id] = mapped_column(primary_key=True)


@pytest.fixture(scope="module")
async def sessions(parts: Parts):
    sessions = db.connect(await parts.fresh_database("dashboard"))
    async with sessions.begin() as session:
        connection = await session.connection()
        await connection.run_sync(db.ChassisBase.metadata.create_all)
        await connection.execute(text("CREATE TABLE things (workspace_id uuid, dashboard_id uuid)"))
    yield sessions
    await sessions.kw["bind"].dispose()


TEAMS = [new_id() for _ in range(3)]
OTHER_USER = new_id()
GRANTS = st.lists(
    st.tuples(
        st.sampled_from([(USER, "me"), (USER, "other"), (TEAM, 0), (TEAM, 1), (TEAM, 2), (WORKSPACE, None)]),
        st.sampled_from(list(ROLES)),
        st.sampled_from([ALLOW, DENY]),
        st.sampled_from([None, NOW + timedelta(seconds=1), NOW, NOW - timedelta(days=1)]),
    ),
    max_size=6,
    unique_by=lambda grant: (grant[0], grant[1]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    role=st.sampled_from(list(ROLES)),
    teams=st.sets(st.integers(0, 2)),
    things=st.lists(GRANTS, min_size=1, max_size=4),
)
async def test_lists_show_what_decide_allows(
    sessions: async_sessionmaker[AsyncSession], role: str, teams: set[int], things: list[list[tuple]]
):
    me = rights(role, frozenset(TEAMS[i] for i in teams))
    expected = set()
    async with sessions.begin() as session:
        await session.execute(delete(GrantRow))
        for grants in things:
            thing = new_id()
            session.add(Thing(workspace_id=me.workspace_id, dashboard_id=thing))
            mine = []
            for (subject_type, who), granted, effect, expire_time in grants:
                subject = {"me": me.user_id, "other": OTHER_USER, None: None}.get(who) or (
                    TEAMS[who] if isinstance(who, int) else None
                )
                session.add(
                    GrantRow(
                        workspace_id=me.workspace_id,
                        grant_id=new_id(),
                        resource_type="dashboard",
                        resource_id=thing,
                        subject_type=subject_type,
                        subject_id=subject,
                        role=granted,
                        effect=effect,
                        expire_time=expire_time,
                        creator_id=me.user_id,
                        create_time=NOW,
                    )
                )
                applies = who is None or who == "me" or (isinstance(who, int) and who in teams)
                if applies and (expire_time is None or expire_time > NOW):
                    mine.append(Grant(subject_type, granted, effect))
            if decide(me, mine, "dashboards.view"):
                expected.add(thing)
    async with sessions() as session:
        seen = await session.scalars(
            select(Thing.dashboard_id).where(
                Thing.workspace_id == me.workspace_id,
                visible("dashboard", Thing.dashboard_id, me, NOW),
            )
        )
        assert set(seen) == expected


class Owner:
    """Counts how often rights are fetched."""

    def __init__(self, answer: Rights) -> None:
        self.answer = answer
        self.count = 0

    async def fetch(self, user_id: str, workspace_id: str) -> Rights:
        self.count += 1
        return self.answer


async def test_cache_remembers_until_told_of_a_change():
    owner = Owner(rights(version=1))
    cache = RightsCache(owner.fetch, lambda: True)
    key = (owner.answer.user_id, owner.answer.workspace_id)
    await cache.get(*key)
    await cache.get(*key)
    assert owner.count == 1
    cache.changed(key[1], 2)
    owner.answer = Rights(*key, "owner", ROLES["owner"], frozenset(), 2)
    assert (await cache.get(*key)).role == "owner"
    assert owner.count == 2


async def test_cache_asks_while_no_announcements_arrive():
    owner = Owner(rights())
    cache = RightsCache(owner.fetch, lambda: False)
    for _ in range(3):
        await cache.get(owner.answer.user_id, owner.answer.workspace_id)
    assert owner.count == 3


async def test_cache_asks_when_a_caller_carries_a_newer_version():
    owner = Owner(rights(version=1))
    cache = RightsCache(owner.fetch, lambda: True)
    key = (owner.answer.user_id, owner.answer.workspace_id)
    await cache.get(*key)
    owner.answer = Rights(*key, "editor", ROLES["editor"], frozenset(), 5)
    assert (await cache.get(*key, at_least=5)).version == 5
    assert (await cache.get(*key, at_least=5)).version == 5
    assert owner.count == 2


async def test_cache_does_not_keep_an_answer_older_than_the_change():
    owner = Owner(rights(version=1))
    cache = RightsCache(owner.fetch, lambda: True)
    key = (owner.answer.user_id, owner.answer.workspace_id)
    cache.changed(key[1], 2)
    await cache.get(*key)
    await cache.get(*key)
    assert owner.count == 2, "the answer was on its way while the change happened"


async def test_cache_keeps_nothing_longer_than_a_membership_lasts():
    now = datetime.now(UTC)
    for expire_time, count in ((now - timedelta(seconds=1), 3), (now + timedelta(hours=1), 1)):
        owner = Owner(replace(rights(), expire_time=expire_time))
        cache = RightsCache(owner.fetch, lambda: True)
        for _ in range(3):
            await cache.get(owner.answer.user_id, owner.answer.workspace_id)
        assert owner.count == count
    owner = Owner(replace(rights(), expire_time=datetime.now(UTC) + timedelta(milliseconds=200)))
    cache = RightsCache(owner.fetch, lambda: True)

    async def asked_again() -> bool:
        await cache.get(owner.answer.user_id, owner.answer.workspace_id)
        return owner.count > 1

    assert not await asked_again()
    await eventually(asked_again)
