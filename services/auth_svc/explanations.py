"""The steps of a decision, as data and in words."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

from meshboard.auth.v1 import access_service_pb2 as pb
from meshboard.user.v1.grant_pb2 import Grant
from meshboard.user.v1.workspace_pb2 import Team

from services.chassis.rights import Rights, Step


@dataclass(frozen=True, slots=True)
class Teams:
    """The teams of a user with all above them, by id, and the ids of those that the user is in."""

    by_id: Mapping[str, Team] = field(default_factory=dict)
    direct: Set[str] = frozenset()

    def path_to(self, team_id: str) -> Sequence[Team]:
        """From a team that the user is in up to this one, the shortest way; empty when there is none any more."""
        ways = [way for start in self.direct if (way := self._climb(start, team_id))]
        return min(ways, key=len, default=[])

    def _climb(self, start: str, goal: str) -> list[Team]:
        way: list[Team] = []
        at = self.by_id.get(start)
        while at is not None and at not in way:
            way.append(at)
            if at.team_id == goal:
                return way
            at = self.by_id.get(at.parent_team_id)
        return []


def step_to_pb(
    step: Step, rights: Rights, grants: Mapping[str, Grant], teams: Teams
) -> pb.ExplainResponse.Step:
    """One step; `grants` are those on the resource and above it, by their ids."""
    settling = [grants[grant_id] for grant_id in step.grant_ids]
    paths = [teams.path_to(grant.subject.team_id) for grant in settling if grant.subject.team_id]
    return pb.ExplainResponse.Step(
        permission=step.permission,
        allowed=step.allowed,
        text=" ".join(_sentence(step, grant, teams) for grant in settling) or _of_role(step, rights),
        resource=pb.AccessResource(type=step.resource_type, id=step.resource_id) if settling else None,
        grants=settling,
        team_paths=[
            pb.ExplainResponse.TeamPath(
                teams=[pb.ExplainResponse.Team(team_id=team.team_id, title=team.title) for team in path]
            )
            for path in paths
        ],
    )


def _of_role(step: Step, rights: Rights) -> str:
    verb = "has" if step.allowed else "lacks"
    return f"No grant says anything: the role {rights.role} in the workspace {verb} {step.permission}."


def _sentence(step: Step, grant: Grant, teams: Teams) -> str:
    place = f"the {step.resource_type} {step.resource_id}"
    verb = "gives" if step.allowed else "withholds"
    return f"A grant of {grant.role} on {place} to {_whom(grant, teams)} {verb} {step.permission}."


def _whom(grant: Grant, teams: Teams) -> str:
    match grant.subject.WhichOneof("subject"):
        case "user_id":
            return "the user"
        case "team_id":
            return _by_way_of(teams.path_to(grant.subject.team_id)) or f"the team {grant.subject.team_id}"
        case _:
            return "everyone in the workspace"


def _by_way_of(path: Sequence[Team]) -> str:
    if not path:
        return ""
    *below, goal = [f"“{team.title}”" for team in path]
    return f"the team {goal}" + (
        f", which the user is in by way of {', then '.join(below)}," if below else ""
    )
