"""Who may call a method: the `access` option of the contract, enforced in one place.

Here it is also settled which workspace a call is about: the one in the path, else the `X-Workspace-Id` header, else the
one of the token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextvars import Context
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from google.api import annotations_pb2
from google.protobuf import message
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from meshboard.options.v1 import access_pb2
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import auth, errors, resources
from services.chassis.db import driver_connection
from services.chassis.resources import Resource
from services.chassis.rights import Level, Rights, RightsCache, decide

WORKSPACE_FIELD = "workspace_id"
WORKSPACE_HEADER = "x-workspace-id"
RIGHTS_VERSION_KEY = "x-meshboard-rights-version"

Metadata = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Need:
    """A permission that a call takes. `path` is that of the resource field; without one, the workspace is meant.

    With `or_workspace` the field may be empty, and then the workspace is meant too.
    """

    permission: str
    path: tuple[str, ...] = ()
    or_workspace: bool = False

    @property
    def on_workspace(self) -> bool:
        """Whether the field, if there is one, names the workspace."""
        return not self.path or self.path[-1] == WORKSPACE_FIELD

    @property
    def type(self) -> str:
        """The type of the resource."""
        return self.path[-1].removeprefix("parent_").removesuffix("s").removesuffix("_id")


@dataclass(frozen=True, slots=True)
class Rule:
    """The access of one method. `kind` is the name of the oneof's field, `path` the resource field's path.

    `also` are needed beside `permission`. `has_body` says that the message may be the body of an HTTP request.
    """

    method: str
    kind: str
    permission: str
    callers: frozenset[str]
    path: tuple[str, ...]
    sensitive: bool = False
    recent: bool = False
    or_workspace: bool = False
    also: tuple[Need, ...] = ()
    has_body: bool = False

    @property
    def needs(self) -> tuple[Need, ...]:
        """All permissions that a call takes."""
        return (Need(self.permission, self.path, self.or_workspace), *self.also)


class MissingAccessError(Exception):
    """A method has no `access` option."""


def rule_of(method: MethodDescriptor) -> Rule:
    """Reads the option of a method. Raises MissingAccessError."""
    option = method.GetOptions().Extensions[access_pb2.access]
    http = method.GetOptions().Extensions[annotations_pb2.http]
    kind = option.WhichOneof("rule")
    if kind is None:
        raise MissingAccessError(f"{method.full_name} has no access option")
    return Rule(
        method.full_name,
        kind,
        option.permission,
        frozenset(option.internal.callers),
        _path(option.resource),
        sensitive=option.sensitive or option.recent,
        recent=option.recent,
        or_workspace=option.or_workspace,
        also=tuple(Need(need.permission, _path(need.resource), need.or_workspace) for need in option.also),
        has_body=any(binding.body for binding in (http, *http.additional_bindings)),
    )


def _path(resource: str) -> tuple[str, ...]:
    return tuple(resource.split(".")) if resource else ()


def rules_of(services: Iterable[ServiceDescriptor]) -> dict[str, Rule]:
    """The rules by gRPC path, such as `/meshboard.user.v1.UserService/GetMe`. Raises MissingAccessError."""
    return {f"/{s.full_name}/{m.name}": rule_of(m) for s in services for m in s.methods}


Credential = Callable[[message.Message, Metadata], Awaitable[None]]


class Access:
    """Authenticates a call and decides whether it may go on.

    `resources` are those of this service; `credentials` check what `write_key` and `share_link` methods carry;
    `recent_seconds` is how long ago the caller of a `recent` method may have been authenticated.
    """

    def __init__(
        self,
        tokens: auth.TokenVerifier,
        service_tokens: auth.ServiceTokens,
        revocations: auth.Revocations,
        rights: RightsCache,
        *,
        db: async_sessionmaker[AsyncSession] | None = None,
        resources: Iterable[Resource] = (),
        credentials: Mapping[str, Credential] | None = None,
        recent_seconds: float = 900,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._tokens = tokens
        self._service_tokens = service_tokens
        self._revocations = revocations
        self._rights = rights
        self._resources = {r.type: r for r in resources}
        if self._resources:
            assert db is not None, "a service with resources has a database"
            self._readers = {r.type: _GrantReader(r, db) for r in self._resources.values()}
        self._credentials = credentials or {}
        self._recent_seconds = recent_seconds
        self._now = now

    def check_rule(self, rule: Rule) -> None:
        """Raises MissingAccessError when this service cannot enforce the rule."""
        if rule.kind in {"write_key", "share_link"} and rule.kind not in self._credentials:
            raise MissingAccessError(f"{rule.method}: nothing checks a {rule.kind}")
        for need in rule.needs:
            if not need.on_workspace and need.type not in self._resources:
                raise MissingAccessError(f"{rule.method}: no resource of this service is a {need.type}")

    async def authenticate(self, rule: Rule, metadata: Metadata) -> auth.Caller:
        """Says who calls. Raises UNAUTHENTICATED, or PERMISSION_DENIED for what only services may call."""
        service = ""
        if service_token := metadata.get(auth.SERVICE_TOKEN_KEY):
            service = self._service_tokens.verify(service_token)
        if rule.kind == "internal":
            if service not in rule.callers:
                raise errors.permission_denied(
                    "CALLER_NOT_ALLOWED", "The method is for services of the mesh only."
                )
            return auth.Caller(service=service)
        if rule.kind not in {"authenticated", "permission"}:
            return auth.ANYONE
        scheme, _, token = metadata.get("authorization", "").partition(" ")
        if not token or scheme.lower() != "bearer":
            raise errors.unauthenticated("TOKEN_MISSING", "The call needs an access token.")
        claims = await self._tokens.verify(token)
        await self._revocations.check(claims.session_id)
        if rule.sensitive:
            self._check_person(rule, claims)
        return auth.Caller(claims=claims, service=service, token=token)

    async def authorize(
        self, rule: Rule, request: message.Message, metadata: Metadata, caller: auth.Caller
    ) -> auth.Caller:
        """Says in which workspace, with which rights. Raises NOT_FOUND, PERMISSION_DENIED or INVALID_ARGUMENT."""
        if rule.kind in self._credentials:
            await self._credentials[rule.kind](request, metadata)
        if rule.kind != "permission" or caller.claims is None:
            return caller
        claims = caller.claims
        workspace_id = _workspace_of(rule, request, metadata) or claims.workspace_id
        if not workspace_id:
            raise errors.not_found("WORKSPACE_NOT_FOUND", "The call names no workspace.")
        if claims.impersonator_id and workspace_id != claims.workspace_id:
            raise errors.not_found("WORKSPACE_NOT_FOUND", "There is no such workspace.")
        at_least = int(metadata.get(RIGHTS_VERSION_KEY, 0)) if caller.service else 0
        rights = await self._rights.get(claims.user_id, workspace_id, at_least)
        if rights.second_factor_required and claims.methods and not claims.has_second_factor:
            raise errors.permission_denied(
                "SECOND_FACTOR_REQUIRED", "The workspace requires a sign-in with a second factor."
            )
        for need in rule.needs:
            _check_scope(need, claims)
        for need in rule.needs:
            await self._check_need(need, [] if need.on_workspace else _values(request, need.path), rights)
        return caller.in_workspace(rights)

    async def require(self, caller: auth.Caller, permission: str, field: str, resource_id: str) -> None:
        """Decides about a resource that the request does not name by its id, once it has been found.

        `field` is what a request would name it by, such as `dashboard_id`; without a `resource_id` the workspace is
        meant. Raises NOT_FOUND or PERMISSION_DENIED, as the `access` option does.
        """
        assert caller.claims is not None
        assert caller.rights is not None, "the access stage settles the rights"
        need = Need(permission, (field,), or_workspace=True)
        _check_scope(need, caller.claims)
        await self._check_need(need, [resource_id], caller.rights)

    def _check_person(self, rule: Rule, claims: auth.Claims) -> None:
        if not claims.is_person:
            raise errors.permission_denied("PERSON_REQUIRED", "Only the person itself may do this.")
        if rule.recent and claims.auth_time < self._now().timestamp() - self._recent_seconds:
            raise errors.permission_denied(
                "REAUTHENTICATION_REQUIRED", "Prove once more who you are, then repeat the call."
            )

    async def _check_need(self, need: Need, named: list[str], rights: Rights) -> None:
        if need.on_workspace or (need.or_workspace and named == [""]):
            if need.permission not in rights.permissions:
                raise _missing(need)
            return
        resource = self._resources[need.type]
        wanted = {str(UUID(resource_id)) for resource_id in named}
        if not wanted:
            raise resource.absent()
        levels = await self._readers[resource.type].read(wanted, rights, self._now())
        if levels.keys() != wanted or not all(decide(rights, levels[r], resource.view) for r in wanted):
            raise resource.absent()
        if not all(decide(rights, levels[r], need.permission) for r in wanted):
            raise _missing(need) if all(levels[r][0].alive for r in wanted) else resource.absent()


class _GrantReader:
    """Reads the grants on resources of one type, in one statement for all calls that ask at the same time.

    What a call is given was read after it had asked. So a thousand streams that check their access at once cost as much
    as one.
    """

    def __init__(self, resource: Resource, db: async_sessionmaker[AsyncSession]) -> None:
        self._resource = resource
        self._db = db
        self._next: _Batch | None = None

    async def read(self, resource_ids: set[str], rights: Rights, now: datetime) -> dict[str, list[Level]]:
        """The resources among these that exist, each with the levels that decide about the user."""
        if self._next is None:
            self._next = _Batch()
            # In an empty context: it runs for several calls, and has none's deadline.
            self._next.found = asyncio.create_task(self._run(self._next), context=Context())
        batch = self._next
        batch.workspace_ids.add(rights.workspace_id)
        batch.resource_ids |= resource_ids
        batch.subject_ids |= {rights.user_id, *rights.team_ids}
        assert batch.found is not None
        found = await asyncio.shield(batch.found)
        return {
            resource_id: resources.levels_for(found[key], rights.user_id, rights.team_ids, now)
            for resource_id in resource_ids
            if (key := (rights.workspace_id, resource_id)) in found
        }

    async def _run(self, batch: _Batch) -> resources.Found:
        try:
            async with driver_connection(self._db) as connection:
                self._next = None  # who asks from here on is in the next statement
                return await resources.find_at_once(
                    connection, self._resource, batch.workspace_ids, batch.resource_ids, batch.subject_ids
                )
        finally:
            if self._next is batch:
                self._next = None


@dataclass(slots=True, eq=False)
class _Batch:
    """What the next statement asks for, and what it finds."""

    workspace_ids: set[str] = field(default_factory=set)
    resource_ids: set[str] = field(default_factory=set)
    subject_ids: set[str] = field(default_factory=set)
    found: asyncio.Task[resources.Found] | None = None


def _check_scope(need: Need, claims: auth.Claims) -> None:
    if auth.FULL_SCOPE not in claims.scopes and need.permission not in claims.scopes:
        raise errors.permission_denied(
            "SCOPE_MISSING",
            f"The token's scope lacks the permission {need.permission}.",
            permission=need.permission,
        )


def _missing(need: Need) -> errors.Error:
    return errors.permission_denied(
        "PERMISSION_MISSING", f"The call needs the permission {need.permission}.", permission=need.permission
    )


def _values(request: message.Message, path: tuple[str, ...]) -> list[str]:
    """The value, or values, of a field by its path."""
    value: Any = request
    for name in path:
        value = getattr(value, name)
    return [value] if isinstance(value, str) else list(value)


def _workspace_of(rule: Rule, request: message.Message, metadata: Metadata) -> str:
    """The workspace of the path or the header; empty when there is neither."""
    named = ""
    first = rule.needs[0]
    if first.path and first.on_workspace:
        (named,) = _values(request, first.path)
    elif WORKSPACE_FIELD in request.DESCRIPTOR.fields_by_name:
        named = getattr(request, WORKSPACE_FIELD)
    header = metadata.get(WORKSPACE_HEADER, "")
    if not header:
        return named.lower()
    try:
        header = str(UUID(header))
    except ValueError:
        raise errors.not_found("WORKSPACE_NOT_FOUND", "There is no such workspace.") from None
    if named and named.lower() != header:
        raise errors.invalid_argument(
            "WORKSPACE_AMBIGUOUS", "The path and the X-Workspace-Id header name different workspaces."
        )
    return header
