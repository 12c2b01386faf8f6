import asyncio
import random

import grpc.aio
import pytest
from grpc import StatusCode
from meshboard.user.v1.team_service_pb2 import ListTeamsRequest, MoveTeamRequest
from meshboard.user.v1.workspace_pb2 import Team

from tests.harness import new_id, reason_of, refused
from tests.user_svc.conftest import LONG, Person, UserSvc
from tests.user_svc.test_create_team import create
from tests.user_svc.test_get_rights import rights_of

ROUNDS = pytest.mark.parametrize("rounds", [20, LONG])


async def move(svc: UserSvc, owner: Person, team: Team, below: Team | None, etag: str = "") -> Team:
    request = MoveTeamRequest(
        workspace_id=owner.workspace_id,
        team_id=team.team_id,
        parent_team_id=below.team_id if below else "",
        etag=etag,
    )
    return (await svc.teams.MoveTeam(request, metadata=owner.metadata)).team


async def teams_of(svc: UserSvc, owner: Person) -> dict[str, Team]:
    request = ListTeamsRequest(workspace_id=owner.workspace_id, page_size=1000)
    found = await svc.teams.ListTeams(request, metadata=owner.metadata)
    return {team.team_id: team for team in found.teams}


def check(teams: dict[str, Team]) -> None:
    """Each team is one deeper than its parent, which no cycle can be."""
    for team in teams.values():
        above = teams[team.parent_team_id].depth if team.parent_team_id else 0
        assert team.depth == above + 1
        assert team.depth <= 8


async def test_takes_all_below_along(svc: UserSvc, owner: Person):
    top, other = await create(svc, owner, "Top"), await create(svc, owner, "Other")
    middle = await create(svc, owner, "Middle", parent_team_id=top.team_id)
    low = await create(svc, owner, "Low", parent_team_id=middle.team_id)
    version = (await rights_of(svc, owner)).version
    moved = await move(svc, owner, middle, other)
    assert (moved.parent_team_id, moved.depth) == (other.team_id, 2)
    assert moved.etag != middle.etag
    at_top = await move(svc, owner, middle, None, moved.etag)
    assert (at_top.parent_team_id, at_top.depth) == ("", 1)
    assert (await teams_of(svc, owner))[low.team_id].depth == 2
    assert (await rights_of(svc, owner)).version == version + 2
    assert await move(svc, owner, middle, None) == at_top, "where it is already, nothing changes"
    assert (await rights_of(svc, owner)).version == version + 2
    check(await teams_of(svc, owner))


async def test_rejects_cycles_and_depth(svc: UserSvc, owner: Person):
    teams = [await create(svc, owner, "0")]
    for n in range(1, 7):
        teams.append(await create(svc, owner, str(n), parent_team_id=teams[-1].team_id))
    for below in (teams[0], teams[1], teams[6]):
        outcome = await refused(move(svc, owner, teams[0], below))
        assert outcome == (StatusCode.FAILED_PRECONDITION, "TEAM_CYCLE")
    two = await create(svc, owner, "two")
    await create(svc, owner, "three", parent_team_id=two.team_id)
    outcome = await refused(move(svc, owner, two, teams[6]))
    assert outcome == (StatusCode.FAILED_PRECONDITION, "TEAM_TOO_DEEP")
    await move(svc, owner, two, teams[5])
    check(await teams_of(svc, owner))


async def test_rejects_what_is_not_there(svc: UserSvc, owner: Person):
    team, foreign = await create(svc, owner, "T"), await create(svc, await svc.person(), "T")
    for moved, below in ((Team(team_id=new_id()), None), (foreign, None), (team, foreign)):
        outcome = await refused(move(svc, owner, moved, below))
        assert outcome == (StatusCode.NOT_FOUND, "TEAM_NOT_FOUND")
    outcome = await refused(move(svc, owner, team, None, "0"))
    assert outcome == (StatusCode.ABORTED, "ETAG_MISMATCH")


@ROUNDS
async def test_two_moves_at_once_make_no_cycle(svc: UserSvc, owner: Person, rounds: int):
    first, second = await create(svc, owner, "First"), await create(svc, owner, "Second")
    for _ in range(rounds):
        outcomes = await asyncio.gather(
            move(svc, owner, first, second), move(svc, owner, second, first), return_exceptions=True
        )
        failures = [reason_of(o) for o in outcomes if isinstance(o, grpc.aio.AioRpcError)]
        assert failures == ["TEAM_CYCLE"]
        check(await teams_of(svc, owner))
        await asyncio.gather(move(svc, owner, first, None), move(svc, owner, second, None))


@ROUNDS
async def test_any_moves_at_once_leave_a_forest(svc: UserSvc, owner: Person, rounds: int):
    chance = random.Random(5)
    teams = [await create(svc, owner, str(n)) for n in range(12)]
    for _ in range(rounds):
        moves = [(chance.choice(teams), chance.choice([*teams, None])) for _ in range(6)]
        outcomes = await asyncio.gather(
            *(move(svc, owner, team, below) for team, below in moves), return_exceptions=True
        )
        failures = {reason_of(o) for o in outcomes if isinstance(o, grpc.aio.AioRpcError)}
        assert failures <= {"TEAM_CYCLE", "TEAM_TOO_DEEP"}
        check(await teams_of(svc, owner))
