"""Custom roles of a workspace, and who may give which role."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import grpc.aio
from meshboard.user.v1 import events_pb2, role_pb2
from meshboard.user.v1.role_service_pb2 import (
    CreateRoleRequest,
    CreateRoleResponse,
    DeleteRoleRequest,
    DeleteRoleResponse,
    GetRoleRequest,
    GetRoleResponse,
    ListPermissionsRequest,
    ListPermissionsResponse,
    ListRolesRequest,
    ListRolesResponse,
    UpdateRoleRequest,
    UpdateRoleResponse,
)
from meshboard.user.v1.role_service_pb2_grpc import RoleServiceServicer
from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import auth, errors, outbox
from services.chassis.masks import changed_fields
from services.chassis.paging import Pages
from services.chassis.rights import ROLES
from services.chassis.texts import clean_name
from services.user_svc.convert import builtin_role_to_pb, role_to_pb
from services.user_svc.models import PENDING, Invitation, Member, Role, Workspace
from services.user_svc.permissions import require_complete
from services.user_svc.rights import announce_rights, lock_rights

Context = grpc.aio.ServicerContext[Any, Any]

OWNER = "owner"
MAX_ROLES = 50
MUTABLE = ("title", "description", "permissions")
_BUILTIN = list(ROLES)


@dataclass(frozen=True)
class RoleServicer(RoleServiceServicer):
    """`catalogue` are all permissions, by name."""

    db: async_sessionmaker[AsyncSession]
    pages: Pages
    catalogue: Sequence[role_pb2.Permission]
    now: Callable[[], datetime]

    async def CreateRole(self, request: CreateRoleRequest, context: Context) -> CreateRoleResponse:
        caller, now = auth.caller(), self.now()
        permissions = require_complete(request.permissions, "permissions")
        if request.name in ROLES:
            raise _role_exists(request.name)
        async with self.db.begin() as session:
            await lock_rights(session, caller.workspace_id)
            await _require_own(session, permissions)
            role = await session.scalar(
                insert(Role)
                .values(
                    workspace_id=caller.workspace_id,
                    name=request.name,
                    title=_title(request.title, request.name, "title"),
                    description=request.description,
                    permissions=permissions,
                    creator_id=caller.user_id,
                    request_id=request.request_id or None,
                    create_time=now,
                    update_time=now,
                )
                .on_conflict_do_nothing()
                .returning(Role)
            )
            if role is None:
                return CreateRoleResponse(role=role_to_pb(await _repeated(session, request)))
            await _require_room(session)
            created = role_to_pb(role)
            outbox.add(session, events_pb2.RoleCreated(role=created), workspace_id=caller.workspace_id)
            await announce_rights(session, caller.workspace_id)
        return CreateRoleResponse(role=created)

    async def GetRole(self, request: GetRoleRequest, context: Context) -> GetRoleResponse:
        workspace_id = auth.caller().workspace_id
        if request.name in ROLES:
            return GetRoleResponse(role=builtin_role_to_pb(workspace_id, request.name))
        async with self.db() as session:
            role = await _find(session, request.name)
        return GetRoleResponse(role=role_to_pb(role))

    async def ListRoles(self, request: ListRolesRequest, context: Context) -> ListRolesResponse:
        workspace_id = auth.caller().workspace_id
        page = self.pages.open(request, workspace_id)
        async with self.db() as session:
            rows = await session.scalars(
                select(Role).where(Role.workspace_id == workspace_id).order_by(Role.name)
            )
        every = [*(builtin_role_to_pb(workspace_id, name) for name in ROLES), *map(role_to_pb, rows)]
        roles, next_page_token = page.close(page.rest(every, _position), _position)
        return ListRolesResponse(roles=roles, next_page_token=next_page_token)

    async def UpdateRole(self, request: UpdateRoleRequest, context: Context) -> UpdateRoleResponse:
        workspace_id, wanted = auth.caller().workspace_id, request.role
        fields = changed_fields(wanted, request.update_mask, MUTABLE)
        async with self.db.begin() as session:
            await lock_rights(session, workspace_id)
            role = await _find(session, wanted.name)
            if wanted.etag and wanted.etag != str(role.version):
                raise errors.etag_mismatch()
            before = after = frozenset(role.permissions)
            if "permissions" in fields:
                after = frozenset(require_complete(wanted.permissions, "role.permissions"))
            await _require_own(session, before | after)  # while the caller's own role is as it was
            role.permissions = sorted(after)
            if "title" in fields:
                role.title = _title(wanted.title, role.name, "role.title")
            if "description" in fields:
                role.description = wanted.description
            role.version += 1
            role.update_time = self.now()
            updated = role_to_pb(role)
            event = events_pb2.RoleUpdated(
                role=updated,
                added_permissions=sorted(after - before),
                removed_permissions=sorted(before - after),
            )
            outbox.add(session, event, workspace_id=workspace_id)
            if before != after:
                await announce_rights(session, workspace_id)
        return UpdateRoleResponse(role=updated)

    async def DeleteRole(self, request: DeleteRoleRequest, context: Context) -> DeleteRoleResponse:
        workspace_id = auth.caller().workspace_id
        async with self.db.begin() as session:
            await lock_rights(session, workspace_id)
            role = await _find(session, request.name)
            await _require_own(session, role.permissions)
            await _require_unused(session, role)
            await session.delete(role)
            event = events_pb2.RoleDeleted(workspace_id=workspace_id, name=role.name)
            outbox.add(session, event, workspace_id=workspace_id)
            await announce_rights(session, workspace_id)
        return DeleteRoleResponse()

    async def ListPermissions(
        self, request: ListPermissionsRequest, context: Context
    ) -> ListPermissionsResponse:
        page = self.pages.open(request, auth.caller().workspace_id)
        permissions, next_page_token = page.close(page.rest(self.catalogue, _name), _name)
        return ListPermissionsResponse(permissions=permissions, next_page_token=next_page_token)


async def require_role(session: AsyncSession, workspace_id: str, role: str) -> None:
    """Raises INVALID_ARGUMENT (ROLE_UNKNOWN) for a role that is not there; under `lock_rights` it stays there."""
    if role not in await _permissions_of(session, workspace_id, role):
        raise errors.invalid_argument(
            "ROLE_UNKNOWN",
            f"There is no such role; built-in ones are: {', '.join(ROLES)}.",
            field="role",
            role=role,
        )


async def require_rank(session: AsyncSession, *roles: str) -> None:
    """Lets the caller give or take these roles, if their own one has all that these have; under `lock_rights`.

    Raises PERMISSION_DENIED: OWNER_ROLE_RESERVED for that of an owner, ROLE_TOO_HIGH for another.
    """
    own_role, own = await _own_rights(session)
    if OWNER in roles and own_role != OWNER:
        raise owner_role_reserved()
    for role, permissions in (await _permissions_of(session, auth.caller().workspace_id, *roles)).items():
        if not permissions <= own:
            raise _role_too_high(permissions - own, role=role)


def owner_role_reserved() -> errors.Error:
    """What is said to who may not give or take the role of an owner."""
    return errors.permission_denied(
        "OWNER_ROLE_RESERVED",
        "Only an owner can give or take the role of an owner, and only people can have it.",
    )


async def _require_own(session: AsyncSession, permissions: Iterable[str]) -> None:
    """Lets nobody define a role that could more than they can, as the tables say now."""
    _, own = await _own_rights(session)
    if lacking := set(permissions) - own:
        raise _role_too_high(lacking)


async def _own_rights(session: AsyncSession) -> tuple[str, frozenset[str]]:
    """The caller's role and its permissions, not older than the lock on the rights."""
    caller = auth.caller()
    role = await session.scalar(
        select(Member.role).where(
            Member.workspace_id == caller.workspace_id, Member.user_id == caller.user_id
        )
    )
    permissions = await _permissions_of(session, caller.workspace_id, role or "")
    return role or "", permissions.get(role or "", frozenset())


async def _permissions_of(session: AsyncSession, workspace_id: str, *roles: str) -> dict[str, frozenset[str]]:
    """The permissions of those of the roles that are there."""
    found = {role: ROLES[role] for role in roles if role in ROLES}
    if found.keys() != set(roles):
        rows = await session.execute(
            select(Role.name, Role.permissions).where(Role.workspace_id == workspace_id, Role.name.in_(roles))
        )
        found |= {name: frozenset(permissions) for name, permissions in rows}
    return found


async def _find(session: AsyncSession, name: str) -> Role:
    if name in ROLES:
        raise errors.failed_precondition(
            "ROLE_BUILTIN", "Built-in roles can be neither changed nor deleted.", role=name
        )
    role = await session.get(Role, (auth.caller().workspace_id, name))
    if role is None:
        raise errors.not_found("ROLE_NOT_FOUND", "The workspace has no such role.", role=name)
    return role


async def _repeated(session: AsyncSession, request: CreateRoleRequest) -> Role:
    """The role that an earlier call with this `request_id` made; "" is that of none."""
    caller = auth.caller()
    role: Role | None = await session.scalar(
        select(Role).where(
            Role.workspace_id == caller.workspace_id,
            Role.creator_id == caller.user_id,
            Role.request_id == request.request_id,
        )
    )
    if role is None:
        raise _role_exists(request.name)
    return role


async def _require_room(session: AsyncSession) -> None:
    """Counts the roles, with the new one among them; the lock on the rights has others wait."""
    count = await session.scalar(
        select(func.count()).select_from(Role).where(Role.workspace_id == auth.caller().workspace_id)
    )
    if (count or 0) > MAX_ROLES:
        raise errors.failed_precondition(
            "ROLE_LIMIT", f"The workspace has {MAX_ROLES} custom roles: delete one first.", limit=MAX_ROLES
        )


async def _require_unused(session: AsyncSession, role: Role) -> None:
    """Keeps a role that somebody has or is to get; the lock on the rights has those wait who would give it."""
    given = {
        "members": select(Member.role).where(Member.workspace_id == role.workspace_id),
        "invitations": select(Invitation.role).where(
            Invitation.workspace_id == role.workspace_id,
            Invitation.state == PENDING,
            Invitation.expire_time > func.now(),
        ),
        "newcomers": select(Workspace.default_role).where(Workspace.workspace_id == role.workspace_id),
    }
    counts = [
        select(func.count()).select_from(names).where(names.c[0] == role.name).scalar_subquery()
        for names in (each.subquery() for each in given.values())
    ]
    uses = dict(zip(given, (await session.execute(select(*counts))).one(), strict=True))
    if any(uses.values()):
        raise errors.failed_precondition(
            "ROLE_IN_USE",
            "Members or invitations have the role, or newcomers get it: give them another one first.",
            **uses,
        )


def _title(title: str, name: str, field: str) -> str:
    """How the role is shown. Raises INVALID_ARGUMENT for what deceives the eye."""
    return clean_name(title, field) if title else name


def _position(role: role_pb2.Role) -> tuple[int, str]:
    """Where a role stands in the list."""
    return _BUILTIN.index(role.name) if role.builtin else len(_BUILTIN), role.name


def _name(permission: role_pb2.Permission) -> tuple[str]:
    return (permission.name,)


def _role_exists(name: str) -> errors.Error:
    return errors.already_exists("ROLE_EXISTS", "There is a role with this name already.", role=name)


def _role_too_high(lacking: Iterable[str], **metadata: str) -> errors.Error:
    return errors.permission_denied(
        "ROLE_TOO_HIGH",
        "The role has permissions that the caller has not.",
        lacking=", ".join(sorted(lacking)),
        **metadata,
    )
