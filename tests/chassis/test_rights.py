"""The rule for single resources, and the cache of rights. `test_resources` has the rule in SQL."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import grpc
import pytest

from services.chassis import errors
from services.chassis.rights import (
    ALLOW,
    DENY,
    PERMISSIONS,
    ROLES,
    TEAM,
    USER,
    WORKSPACE,
    Grant,
    Level,
    Rights,
    RightsCache,
    Step,
    decide,
    explain,
)
from tests.conditions import eventually
from tests.harness import new_id


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
    assert decide(rights(role), [Level(grants)], permission) is allowed


ROLES_OF_A_WORKSPACE = {
    "author": frozenset({"dashboards.edit", "dashboards.create"}),
    "guest": frozenset({"dashboards.view"}),
}


@pytest.mark.parametrize(
    ("grant", "allowed"),
    [
        (Grant(USER, "author", ALLOW), "dashboards.view dashboards.edit"),
        (Grant(USER, "author", DENY), "dashboards.view dashboards.grant"),
        # Without the sight there is nothing.
        (Grant(USER, "guest", DENY), ""),
        (Grant(USER, "guest", ALLOW), "dashboards.view dashboards.edit dashboards.grant"),
        (Grant(USER, "deleted", ALLOW), "dashboards.view dashboards.edit dashboards.grant"),
        (Grant(USER, "deleted", DENY), ""),
    ],
    ids=str,
)
def test_custom_roles(grant: Grant, allowed: str):
    role = "viewer" if grant == Grant(USER, "author", ALLOW) else "admin"
    me = replace(rights(role), roles=ROLES_OF_A_WORKSPACE)
    asked = ["dashboards.view", "dashboards.edit", "dashboards.grant"]
    assert [p for p in asked if decide(me, [Level([grant])], p)] == allowed.split()


def test_the_nearest_level_decides_and_says_so():
    levels = [
        Level([Grant(WORKSPACE, "editor", ALLOW, "near")], "dashboard", "d"),
        Level([Grant(USER, "editor", DENY, "far"), Grant(TEAM, "viewer", ALLOW, "mine")], "folder", "f"),
        Level([Grant(USER, "owner", ALLOW, "farthest")], "folder", "g"),
    ]
    me = rights("viewer")
    seen = Step("dashboards.view", True, "dashboard", "d", WORKSPACE, ("near",))
    assert explain(me, levels, "dashboards.edit").steps == (
        seen,
        Step("dashboards.edit", True, "dashboard", "d", WORKSPACE, ("near",)),
    )
    assert explain(me, levels, "dashboards.grant").steps == (
        seen,
        Step("dashboards.grant", False, "folder", "f", USER, ("far",)),
    )
    assert explain(me, levels[2:], "dashboards.grant").allowed
    assert explain(me, [], "members.edit").steps == (Step("members.edit", False),)
    assert explain(me, [], "access.explain").steps == (Step("access.explain", False),)
    assert explain(rights("admin"), [], "access.explain").allowed


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


class SlowOwner:
    """Answers when it is told to."""

    def __init__(self, answer: Rights) -> None:
        self.answer = answer
        self.asked: list[asyncio.Future[Rights]] = []

    @property
    def key(self) -> tuple[str, str]:
        return self.answer.user_id, self.answer.workspace_id

    async def fetch(self, user_id: str, workspace_id: str) -> Rights:
        self.asked.append(asyncio.get_running_loop().create_future())
        return await self.asked[-1]

    def of_version(self, version: int) -> Rights:
        return replace(self.answer, version=version)


async def settle() -> None:
    """Lets all tasks come to where they wait."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_announcements_may_come_in_any_order():
    owner = SlowOwner(rights(version=5))
    cache = RightsCache(owner.fetch, lambda: True)
    first = asyncio.create_task(cache.get(*owner.key))
    await settle()
    owner.asked[0].set_result(owner.of_version(5))
    await first
    for version in (5, 3, 4):  # what is old says nothing about what is known
        cache.changed(owner.answer.workspace_id, version)
        assert (await cache.get(*owner.key)).version == 5
    cache.changed(owner.answer.workspace_id, 7)
    cache.changed(owner.answer.workspace_id, 6)
    second = asyncio.create_task(cache.get(*owner.key))
    await settle()
    owner.asked[1].set_result(owner.of_version(6))  # read before the change that was announced first
    assert (await second).version == 6
    third = asyncio.create_task(cache.get(*owner.key))
    await settle()
    owner.asked[2].set_result(owner.of_version(7))
    assert (await third).version == 7
    assert (await cache.get(*owner.key)).version == 7
    assert len(owner.asked) == 3


async def test_who_asks_at_the_same_time_is_given_one_answer():
    owner = SlowOwner(rights(version=1))
    cache = RightsCache(owner.fetch, lambda: True)
    asking = [asyncio.create_task(cache.get(*owner.key)) for _ in range(50)]
    await settle()
    assert len(owner.asked) == 1
    owner.asked[0].set_result(owner.answer)
    assert await asyncio.gather(*asking) == [owner.answer] * 50
    assert await cache.get(*owner.key) == owner.answer
    assert len(owner.asked) == 1


async def test_an_answer_from_before_a_change_is_for_nobody_who_asks_after_it():
    owner = SlowOwner(rights(version=1))
    cache = RightsCache(owner.fetch, lambda: True)
    before = asyncio.create_task(cache.get(*owner.key))
    await settle()
    cache.changed(owner.answer.workspace_id, 2)
    after = [asyncio.create_task(cache.get(*owner.key)) for _ in range(3)]
    await settle()
    assert len(owner.asked) == 1, "one fetch at a time"
    owner.asked[0].set_result(owner.of_version(1))
    assert (await before).version == 1
    await settle()
    owner.asked[1].set_result(owner.of_version(2))
    assert [each.version for each in await asyncio.gather(*after)] == [2, 2, 2]
    assert (await cache.get(*owner.key)).version == 2
    assert len(owner.asked) == 2


async def test_an_answer_that_was_on_its_way_during_a_gap_is_not_kept():
    owner = SlowOwner(rights(version=1))
    cache = RightsCache(owner.fetch, lambda: True)
    first = asyncio.create_task(cache.get(*owner.key))
    await settle()
    cache.clear()
    owner.asked[0].set_result(owner.of_version(1))
    await first
    second = asyncio.create_task(cache.get(*owner.key))
    await settle()
    owner.asked[1].set_result(owner.of_version(2))
    assert (await second).version == 2


async def test_without_announcements_nobody_is_given_an_answer_that_began_before():
    owner = SlowOwner(rights(version=1))
    cache = RightsCache(owner.fetch, lambda: False)
    first = asyncio.create_task(cache.get(*owner.key))
    await settle()
    later = [asyncio.create_task(cache.get(*owner.key)) for _ in range(3)]
    await settle()
    owner.asked[0].set_result(owner.of_version(1))
    await settle()
    assert (first.done(), [each.done() for each in later]) == (True, [False] * 3)
    owner.asked[1].set_result(owner.of_version(2))
    assert [each.version for each in await asyncio.gather(*later)] == [2, 2, 2]
    assert len(owner.asked) == 2


async def test_a_refusal_from_before_a_change_is_for_nobody_who_asks_after_it():
    owner = SlowOwner(rights(version=2))
    cache = RightsCache(owner.fetch, lambda: True)
    before = asyncio.create_task(cache.get(*owner.key))
    await settle()
    cache.changed(owner.answer.workspace_id, 2)
    after = asyncio.create_task(cache.get(*owner.key))
    await settle()
    owner.asked[0].set_exception(errors.not_found("WORKSPACE_NOT_FOUND", "There is no such workspace."))
    with pytest.raises(errors.Error):
        await before
    await settle()
    owner.asked[1].set_result(owner.answer)
    assert await after == owner.answer


async def test_never_gives_less_than_the_version_that_a_caller_carries():
    owner = Owner(rights(version=1))
    cache = RightsCache(owner.fetch, lambda: True)
    with pytest.raises(errors.Error) as failure:
        await cache.get(owner.answer.user_id, owner.answer.workspace_id, at_least=2)
    assert failure.value.code is grpc.StatusCode.UNAVAILABLE


async def test_one_who_gives_up_takes_nothing_from_the_others():
    owner = SlowOwner(rights(version=1))
    cache = RightsCache(owner.fetch, lambda: True)
    first = asyncio.create_task(cache.get(*owner.key))
    await settle()
    second = asyncio.create_task(cache.get(*owner.key))
    await settle()
    first.cancel()
    await settle()
    owner.asked[0].set_result(owner.answer)
    assert await second == owner.answer


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
