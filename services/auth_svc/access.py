"""Who may do what, for who asks from outside: the rule of the chassis, on what the owners of rights and grants say."""

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc.aio
from meshboard.auth.v1 import access_service_pb2 as pb
from meshboard.auth.v1.access_service_pb2_grpc import AccessServiceServicer
from meshboard.user.v1 import internal_grant_service_pb2 as grants_pb2
from meshboard.user.v1.grant_pb2 import Grant as GrantPb
from meshboard.user.v1.internal_grant_service_pb2_grpc import InternalGrantServiceStub
from meshboard.user.v1.internal_user_service_pb2 import GetTeamsOfUserRequest
from meshboard.user.v1.internal_user_service_pb2_grpc import InternalUserServiceStub

from services.auth_svc import explanations
from services.chassis import auth, errors
from services.chassis.paging import Pages
from services.chassis.permissions import require_known
from services.chassis.rights import (
    PERMISSIONS,
    Decision,
    Grant,
    Level,
    Rights,
    RightsCache,
    decide,
    explain,
    view_of,
)

Context = grpc.aio.ServicerContext[Any, Any]

# To ask about others.
PERMISSION = "access.explain"
# The service that owns the resources of a type.
OWNERS = {"dashboard": "dashboard", "folder": "dashboard", "source": "analytics"}
# The permissions that can be had on a resource of a type. Grants on a folder hold for the dashboards in it.
_NOUNS = {"dashboard": {"dashboards"}, "folder": {"folders", "dashboards"}, "source": {"sources"}}
_ON = {
    resource_type: frozenset(
        permission
        for permission in PERMISSIONS
        for noun, _, verb in [permission.partition(".")]
        if noun in nouns and verb not in ({"list"} if resource_type == "folder" else {"list", "create"})
    )
    for resource_type, nouns in _NOUNS.items()
}
# As many as an owner tells of at once.
MAX_PAGE = 100

_Key = tuple[str, str]


class Asked(Protocol):
    """What the requests about a user have in common."""

    @property
    def user_id(self) -> str: ...
    @property
    def rights_version(self) -> int: ...


class Question(Protocol):
    """What is asked about a user."""

    @property
    def permission(self) -> str: ...
    @property
    def resource(self) -> pb.AccessResource: ...


@dataclass(frozen=True)
class AccessServicer(AccessServiceServicer):
    """`rights` remembers rights as the access stage does; `owners` are the services that have grants, by name."""

    rights: RightsCache
    users: InternalUserServiceStub
    owners: Mapping[str, InternalGrantServiceStub]
    pages: Pages

    async def Check(self, request: pb.CheckRequest, context: Context) -> pb.CheckResponse:
        _require_askable(request, "")
        rights = await self._rights_or_none(request)
        (answer,) = await self._answers(rights, [request])
        return pb.CheckResponse(
            allowed=answer.allowed, basis=answer.basis, rights_version=rights.version if rights else 0
        )

    async def BatchCheck(self, request: pb.BatchCheckRequest, context: Context) -> pb.BatchCheckResponse:
        for index, question in enumerate(request.questions):
            _require_askable(question, f"questions[{index}].")
        rights = await self._rights_or_none(request)
        return pb.BatchCheckResponse(
            answers=await self._answers(rights, request.questions),
            rights_version=rights.version if rights else 0,
        )

    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:
        _require_askable(request, "")
        rights = await self._rights(request)
        levels = await self._levels_on(rights, request)
        decision = _decide(rights, levels.levels, request.permission)
        teams = await self._teams_of(rights, levels)
        return pb.ExplainResponse(
            allowed=decision.allowed,
            role=rights.role,
            steps=[explanations.step_to_pb(step, rights, levels.grants, teams) for step in decision.steps],
            rights_version=rights.version,
        )

    async def GetEffectivePermissions(
        self, request: pb.GetEffectivePermissionsRequest, context: Context
    ) -> pb.GetEffectivePermissionsResponse:
        rights = await self._rights(request)
        permissions = rights.permissions
        if request.HasField("resource"):
            on = _permissions_on(request.resource, "")
            levels = (await self._levels_on(rights, request)).levels
            permissions = frozenset(
                permission for permission in on if _decide(rights, levels, permission).allowed
            )
        return pb.GetEffectivePermissionsResponse(
            permissions=sorted(permissions),
            role=rights.role,
            team_ids=sorted(rights.team_ids),
            rights_version=rights.version,
        )

    async def ListSubjectGrants(
        self, request: pb.ListSubjectGrantsRequest, context: Context
    ) -> pb.ListSubjectGrantsResponse:
        rights = _caller_rights()
        page = self.pages.open(request, rights.workspace_id)
        owner, token = page.start or (0, "")
        stubs = list(self.owners.values())
        while True:
            answer = await stubs[int(owner)].ListSubjectGrants(
                grants_pb2.ListSubjectGrantsRequest(
                    workspace_id=rights.workspace_id,
                    subject=request.subject,
                    page_size=min(page.size, MAX_PAGE),
                    page_token=token,
                )
            )
            on = [pb.AccessResource(type=each.resource_type, id=each.resource_id) for each in answer.grants]
            seen = await self._seen(rights, on)
            found = [each for each in answer.grants if (each.resource_type, each.resource_id.lower()) in seen]
            token = answer.next_page_token
            owner = owner if token else int(owner) + 1
            more = owner < len(stubs)
            if found or not more:
                return pb.ListSubjectGrantsResponse(
                    grants=found, next_page_token=page.token((owner, token)) if more else ""
                )

    async def _rights(self, request: Asked) -> Rights:
        """The rights of the user whom a request is about, at least as new as it says."""
        rights = await self._rights_or_none(request)
        if rights is None:
            raise errors.not_found(
                "MEMBER_NOT_FOUND", "The workspace has no such member.", user_id=request.user_id
            )
        return rights

    async def _rights_or_none(self, request: Asked) -> Rights | None:
        """None for who is not a member. Members ask about themselves, and about others who may."""
        own = _caller_rights()
        user_id = request.user_id.lower() or own.user_id
        if user_id == own.user_id and own.version >= request.rights_version:
            return own
        if user_id != own.user_id:
            _require_explain(own)
        try:
            return await self.rights.get(user_id, own.workspace_id, request.rights_version)
        except errors.Error as error:
            if error.code is not grpc.StatusCode.NOT_FOUND:
                raise
            return None

    async def _answers(
        self, rights: Rights | None, questions: Sequence[Question]
    ) -> list[pb.BatchCheckResponse.Answer]:
        if rights is None:
            basis = pb.CheckResponse.NOT_A_MEMBER
            return [pb.BatchCheckResponse.Answer(basis=basis) for _ in questions]
        seen = await self._seen(rights, [each.resource for each in questions if each.resource.id])
        return [_answer(rights, seen, question) for question in questions]

    async def _levels_on(
        self, rights: Rights, request: pb.ExplainRequest | pb.GetEffectivePermissionsRequest
    ) -> "_Seen":
        """What decides about the resource of a request; of the workspace itself nothing does but the role."""
        if not request.HasField("resource"):
            return _Seen([], {})
        seen = await self._seen(rights, [request.resource])
        try:
            return seen[_key(request.resource)]
        except KeyError:
            raise errors.not_found("RESOURCE_NOT_FOUND", "There is no such resource.") from None

    async def _seen(self, rights: Rights, on: Iterable[pb.AccessResource]) -> dict[_Key, "_Seen"]:
        """Those of the resources that the caller may see, with what decides about the user."""
        on, own = list(on), _caller_rights()
        if rights.user_id == own.user_id:
            theirs = mine = await self._fetch(rights, on)
            own = rights
        else:
            theirs, mine = await asyncio.gather(self._fetch(rights, on), self._fetch(own, on))
        return {
            key: seen
            for key, seen in theirs.items()
            if key in mine and decide(own, mine[key].levels, _view(key[0]))
        }

    async def _fetch(self, rights: Rights, on: Iterable[pb.AccessResource]) -> dict[_Key, "_Seen"]:
        """Those of the resources that exist, with what decides about the user; one call for each type."""
        ids: dict[str, set[str]] = defaultdict(set)
        for resource in on:
            ids[resource.type].add(resource.id.lower())
        requests = [
            grants_pb2.GetResourceGrantsRequest(
                workspace_id=rights.workspace_id,
                resource_type=resource_type,
                resource_ids=sorted(resource_ids),
                user_id=rights.user_id,
                team_ids=sorted(rights.team_ids),
            )
            for resource_type, resource_ids in ids.items()
        ]
        answers = await asyncio.gather(
            *(self.owners[OWNERS[each.resource_type]].GetResourceGrants(each) for each in requests)
        )
        return {
            (request.resource_type, resource.resource_id): _Seen(
                [_level_from_pb(level) for level in resource.levels],
                {grant.grant_id: grant for level in resource.levels for grant in level.grants},
            )
            for request, answer in zip(requests, answers, strict=True)
            for resource in answer.resources
        }

    async def _teams_of(self, rights: Rights, seen: "_Seen") -> explanations.Teams:
        """The teams of a user, if a grant names one."""
        if not any(grant.subject.team_id for grant in seen.grants.values()):
            return explanations.Teams()
        answer = await self.users.GetTeamsOfUser(
            GetTeamsOfUserRequest(user_id=rights.user_id, workspace_id=rights.workspace_id)
        )
        return explanations.Teams({team.team_id: team for team in answer.teams}, set(answer.direct_team_ids))


@dataclass(frozen=True, slots=True)
class _Seen:
    """What decides about a user on a resource, and the grants in it by their ids."""

    levels: Sequence[Level]
    grants: Mapping[str, GrantPb]


def _caller_rights() -> Rights:
    rights = auth.caller().rights
    assert rights is not None, "the access stage settles the rights"
    return rights


def _require_explain(own: Rights) -> None:
    """Lets ask about others who has the permission, and a token whose scope has it."""
    claims = auth.caller().claims
    assert claims is not None, "the access stage wants a token"
    if PERMISSION not in own.permissions:
        raise errors.permission_denied(
            "PERMISSION_MISSING",
            f"Asking about others needs the permission {PERMISSION}.",
            permission=PERMISSION,
        )
    if not claims.scopes & {auth.FULL_SCOPE, PERMISSION}:
        raise errors.permission_denied(
            "SCOPE_MISSING", f"The token's scope lacks the permission {PERMISSION}.", permission=PERMISSION
        )


def _require_askable(question: Question, path: str) -> None:
    """Raises INVALID_ARGUMENT unless the permission is there, and can be had on such a resource."""
    require_known(question.permission, f"{path}permission")
    if question.resource.id and question.permission not in _permissions_on(question.resource, path):
        raise errors.invalid_fields(
            [(f"{path}resource.type", f"{question.permission} is not had on one of these")]
        )


def _permissions_on(resource: pb.AccessResource, path: str) -> frozenset[str]:
    try:
        return _ON[resource.type]
    except KeyError:
        raise errors.invalid_fields([(f"{path}resource.type", f"is none of {', '.join(_ON)}")]) from None


def _view(resource_type: str) -> str:
    return f"{resource_type}s.view"


def _key(resource: pb.AccessResource) -> _Key:
    return resource.type, resource.id.lower()


def _answer(rights: Rights, seen: Mapping[_Key, _Seen], question: Question) -> pb.BatchCheckResponse.Answer:
    levels: Sequence[Level] = []
    if question.resource.id:
        if _key(question.resource) not in seen:
            return pb.BatchCheckResponse.Answer(basis=pb.CheckResponse.RESOURCE_NOT_FOUND)
        levels = seen[_key(question.resource)].levels
    decision = _decide(rights, levels, question.permission)
    by_grant = bool(decision.steps[-1].grant_ids)
    return pb.BatchCheckResponse.Answer(
        allowed=decision.allowed, basis=pb.CheckResponse.GRANT if by_grant else pb.CheckResponse.ROLE
    )


def _decide(rights: Rights, levels: Sequence[Level], permission: str) -> Decision:
    """As the access stage decides: who may not see a resource may do nothing with it, or in it."""
    decision = explain(rights, levels, permission)
    if not levels or view_of(permission) == (view := _view(levels[0].resource_type)):
        return decision
    sight = explain(rights, levels, view)
    return Decision(decision.allowed, (*sight.steps, *decision.steps)) if sight.allowed else sight


def _level_from_pb(level: grants_pb2.GetResourceGrantsResponse.Level) -> Level:
    return Level(
        [
            Grant(
                str(grant.subject.WhichOneof("subject")).removesuffix("_id"),
                grant.role,
                GrantPb.Effect.Name(grant.effect),
                grant.grant_id,
            )
            for grant in level.grants
        ],
        level.resource_type,
        level.resource_id,
    )
