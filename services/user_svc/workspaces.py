"""Workspaces and their members."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import grpc.aio
from meshboard.user.v1 import events_pb2
from meshboard.user.v1.workspace_service_pb2 import (
    AddMemberRequest,
    AddMemberResponse,
    CreateWorkspaceRequest,
    CreateWorkspaceResponse,
    DeleteWorkspaceRequest,
    DeleteWorkspaceResponse,
    GetWorkspaceRequest,
    GetWorkspaceResponse,
    LeaveWorkspaceRequest,
    LeaveWorkspaceResponse,
    ListMembersRequest,
    ListMembersResponse,
    ListWorkspacesRequest,
    ListWorkspacesResponse,
    RemoveMemberRequest,
    RemoveMemberResponse,
    TransferOwnershipRequest,
    TransferOwnershipResponse,
    UpdateMemberRequest,
    UpdateMemberResponse,
    UpdateWorkspaceRequest,
    UpdateWorkspaceResponse,
)
from meshboard.user.v1.workspace_service_pb2_grpc import WorkspaceServiceServicer
from sqlalchemy import Integer, Text, cast, delete, exists, func, literal_column, select, true, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import aliased

from services.chassis import auth, errors, outbox
from services.chassis.emails import email_key
from services.chassis.masks import changed_fields
from services.chassis.paging import Pages
from services.chassis.texts import clean_name
from services.user_svc.convert import member_to_pb, workspace_to_pb
from services.user_svc.models import (
    ACTIVE,
    ERASING,
    SERVICE_ACCOUNT,
    Invitation,
    Member,
    Role,
    Team,
    TeamMember,
    User,
    Workspace,
)
from services.user_svc.rights import announce_rights, lock_rights
from services.user_svc.roles import OWNER, owner_role_reserved, require_rank, require_role
from services.user_svc.users import user_not_found

Context = grpc.aio.ServicerContext[Any, Any]

_MUTABLE = ("title", "require_second_factor", "default_role", "allowed_email_domains")
_LABEL = r"[^\W_]([\w-]{0,61}[^\W_])?"
_DOMAIN = re.compile(rf"{_LABEL}(\.{_LABEL})+")


@dataclass(frozen=True)
class WorkspaceServicer(WorkspaceServiceServicer):
    """`new_id` gives UUIDv7s, whose order is that of creation."""

    db: async_sessionmaker[AsyncSession]
    pages: Pages
    now: Callable[[], datetime]
    new_id: Callable[[], str]

    async def CreateWorkspace(
        self, request: CreateWorkspaceRequest, context: Context
    ) -> CreateWorkspaceResponse:
        user_id = auth.caller().user_id
        async with self.db.begin() as session:
            owner = await session.get_one(User, user_id)
            workspace = await add_workspace(
                session,
                owner,
                self.new_id(),
                title=clean_name(request.title, "title"),
                request_id=request.request_id or None,
                now=self.now(),
            )
            if workspace is None:
                workspace = (
                    await session.scalars(
                        select(Workspace).where(
                            Workspace.creator_id == user_id, Workspace.request_id == request.request_id
                        )
                    )
                ).one()
            else:
                await announce_rights(session, workspace.workspace_id)
        return CreateWorkspaceResponse(workspace=workspace_to_pb(workspace))

    async def GetWorkspace(self, request: GetWorkspaceRequest, context: Context) -> GetWorkspaceResponse:
        async with self.db() as session:
            workspace = await session.get_one(Workspace, auth.caller().workspace_id)
        return GetWorkspaceResponse(workspace=workspace_to_pb(workspace))

    async def ListWorkspaces(
        self, request: ListWorkspacesRequest, context: Context
    ) -> ListWorkspacesResponse:
        user_id = auth.caller().user_id
        page = self.pages.open(request, user_id)
        async with self.db() as session:
            rows = await session.scalars(
                select(Workspace)
                .join(Member, Member.workspace_id == Workspace.workspace_id)
                .where(Member.user_id == user_id, page.after(Workspace.workspace_id))
                .order_by(Workspace.workspace_id)
                .limit(page.limit)
            )
        workspaces, next_page_token = page.close(rows.all(), lambda workspace: (workspace.workspace_id,))
        return ListWorkspacesResponse(
            workspaces=map(workspace_to_pb, workspaces), next_page_token=next_page_token
        )

    async def UpdateWorkspace(
        self, request: UpdateWorkspaceRequest, context: Context
    ) -> UpdateWorkspaceResponse:
        workspace_id = auth.caller().workspace_id
        fields = changed_fields(request.workspace, request.update_mask, _MUTABLE)
        changes = {field: getattr(request.workspace, field) for field in fields}
        if "title" in changes:
            changes["title"] = clean_name(changes["title"], "workspace.title")
        if "allowed_email_domains" in changes:
            changes["allowed_email_domains"] = _domains(changes["allowed_email_domains"])
        if changes.get("default_role") == OWNER:
            raise owner_role_reserved()
        claims = auth.caller().claims
        if changes.get("require_second_factor") and claims and not claims.has_second_factor:
            raise errors.permission_denied(
                "SECOND_FACTOR_REQUIRED", "Only who has signed in with a second factor can require one."
            )
        etag = request.workspace.etag
        async with self.db.begin() as session:
            await lock_rights(session, workspace_id)
            if "default_role" in changes:
                await require_role(session, workspace_id, changes["default_role"])
            workspace = await session.scalar(
                update(Workspace)
                .where(
                    Workspace.workspace_id == workspace_id,
                    cast(Workspace.version, Text) == etag if etag else true(),
                )
                .values(**changes, version=Workspace.version + 1, update_time=self.now())
                .returning(Workspace)
            )
            if workspace is None:
                raise errors.etag_mismatch()
            event = events_pb2.WorkspaceUpdated(workspace=workspace_to_pb(workspace))
            outbox.add(session, event, workspace_id=workspace_id)
            if "require_second_factor" in changes:
                await announce_rights(session, workspace_id)
        return UpdateWorkspaceResponse(workspace=workspace_to_pb(workspace))

    async def DeleteWorkspace(
        self, request: DeleteWorkspaceRequest, context: Context
    ) -> DeleteWorkspaceResponse:
        workspace_id = auth.caller().workspace_id
        async with self.db.begin() as session:
            await lock_rights(session, workspace_id)
            workspace = await session.get_one(Workspace, workspace_id)
            if request.etag and request.etag != str(workspace.version):
                raise errors.etag_mismatch()
            await delete_workspace(session, workspace_id)
        return DeleteWorkspaceResponse()

    async def LeaveWorkspace(
        self, request: LeaveWorkspaceRequest, context: Context
    ) -> LeaveWorkspaceResponse:
        caller = auth.caller()
        async with self.db.begin() as session:
            await lock_rights(session, caller.workspace_id)
            member, _ = await _find_member(session, caller.workspace_id, caller.user_id)
            await _require_another_owner(session, member)
            await _remove(session, member)
        return LeaveWorkspaceResponse()

    async def TransferOwnership(
        self, request: TransferOwnershipRequest, context: Context
    ) -> TransferOwnershipResponse:
        caller, role = auth.caller(), request.role or "admin"
        if role == OWNER:
            raise errors.invalid_fields([("role", "is that of an owner")])
        if request.user_id.lower() == caller.user_id:
            raise errors.invalid_fields([("user_id", "is the caller")])
        async with self.db.begin() as session:
            await lock_rights(session, caller.workspace_id)
            await require_rank(session, OWNER)
            await require_role(session, caller.workspace_id, role)
            successor, user = await _find_member(session, caller.workspace_id, request.user_id)
            if user.kind == SERVICE_ACCOUNT:
                raise owner_role_reserved()
            former, former_user = await _find_member(session, caller.workspace_id, caller.user_id)
            successor.role = OWNER
            await _require_another_owner(session, former)  # the successor may be deactivated
            former.role = role
            owners = [member_to_pb(successor, user), member_to_pb(former, former_user)]
            for member in owners:
                event = events_pb2.MemberUpdated(member=member)
                outbox.add(session, event, workspace_id=caller.workspace_id)
            await announce_rights(session, caller.workspace_id)
        return TransferOwnershipResponse(owner=owners[0], former_owner=owners[1])

    async def AddMember(self, request: AddMemberRequest, context: Context) -> AddMemberResponse:
        caller = auth.caller()
        async with self.db.begin() as session:
            await lock_rights(session, caller.workspace_id)
            await require_role(session, caller.workspace_id, request.role)
            await require_rank(session, request.role)
            user = await _find_acquaintance(session, request.user_id)
            workspace = await session.get_one(Workspace, caller.workspace_id)
            member = await add_member(session, workspace, user, request.role, self.now())
            await announce_rights(session, caller.workspace_id)
        return AddMemberResponse(member=member_to_pb(member, user))

    async def ListMembers(self, request: ListMembersRequest, context: Context) -> ListMembersResponse:
        workspace_id = auth.caller().workspace_id
        page = self.pages.open(request, workspace_id)
        async with self.db() as session:
            rows = await session.execute(
                select(Member, User)
                .join(User, User.user_id == Member.user_id)
                .where(
                    Member.workspace_id == workspace_id,
                    Member.role == request.role if request.role else true(),
                    page.after(Member.create_time, Member.user_id),
                )
                .order_by(Member.create_time, Member.user_id)
                # A parameter would leave Postgres to guess, and to join a workspace with thousands as a whole.
                .limit(literal_column(str(page.limit), Integer))
            )
        members, next_page_token = page.close(rows.all(), lambda row: (row[0].create_time, row[0].user_id))
        return ListMembersResponse(
            members=[member_to_pb(member, user) for member, user in members],
            next_page_token=next_page_token,
        )

    async def UpdateMember(self, request: UpdateMemberRequest, context: Context) -> UpdateMemberResponse:
        workspace_id = auth.caller().workspace_id
        async with self.db.begin() as session:
            await lock_rights(session, workspace_id)
            await require_role(session, workspace_id, request.role)
            member, user = await _find_member(session, workspace_id, request.user_id)
            if member.role != request.role:
                if request.role == OWNER and user.kind == SERVICE_ACCOUNT:
                    raise owner_role_reserved()
                await require_rank(session, request.role, member.role)
                await _require_another_owner(session, member)
                member.role = request.role
                event = events_pb2.MemberUpdated(member=member_to_pb(member, user))
                outbox.add(session, event, workspace_id=workspace_id)
                await announce_rights(session, workspace_id)
        return UpdateMemberResponse(member=member_to_pb(member, user))

    async def RemoveMember(self, request: RemoveMemberRequest, context: Context) -> RemoveMemberResponse:
        workspace_id = auth.caller().workspace_id
        async with self.db.begin() as session:
            await lock_rights(session, workspace_id)
            member, _ = await _find_member(session, workspace_id, request.user_id)
            await require_rank(session, member.role)
            await _require_another_owner(session, member)
            await _remove(session, member)
        return RemoveMemberResponse()


async def add_workspace(
    session: AsyncSession,
    owner: User,
    workspace_id: str,
    *,
    title: str,
    request_id: str | None = None,
    now: datetime,
) -> Workspace | None:
    """Adds a workspace with its owner, and the events that tell of both; None when it is there already."""
    workspace: Workspace | None = await session.scalar(
        insert(Workspace)
        .values(
            workspace_id=workspace_id,
            title=title,
            creator_id=owner.user_id,
            request_id=request_id,
            create_time=now,
            update_time=now,
        )
        .on_conflict_do_nothing()
        .returning(Workspace)
    )
    if workspace is None:
        return None
    member = Member(workspace_id=workspace_id, user_id=owner.user_id, role=OWNER, create_time=now)
    session.add(member)
    created = events_pb2.WorkspaceCreated(workspace=workspace_to_pb(workspace))
    outbox.add(session, created, workspace_id=workspace_id)
    added = events_pb2.MemberAdded(member=member_to_pb(member, owner))
    outbox.add(session, added, workspace_id=workspace_id)
    return workspace


async def delete_workspace(session: AsyncSession, workspace_id: str) -> None:
    """Deletes a workspace with its teams and members, and tells of it; other services delete what they have in it."""
    await lock_rights(session, workspace_id)
    # So that nobody uses rights that are remembered.
    await announce_rights(session, workspace_id)
    for table in (Invitation, TeamMember, Team, Member, Role, Workspace):
        await session.execute(delete(table).where(table.workspace_id == workspace_id))
    outbox.add(session, events_pb2.WorkspaceDeleted(workspace_id=workspace_id), workspace_id=workspace_id)


async def add_member(
    session: AsyncSession, workspace: Workspace, user: User, role: str, now: datetime
) -> Member:
    """Adds a member and the event that tells of it; the caller has locked the rights, and announces them.

    Raises ALREADY_EXISTS (MEMBER_EXISTS), FAILED_PRECONDITION (EMAIL_DOMAIN_REFUSED), NOT_FOUND (USER_NOT_FOUND) for
    who is being erased.
    """
    # Held, so that nobody joins who is being erased.
    await session.refresh(user, with_for_update={"read": True, "key_share": True})
    if user.state == ERASING:
        raise user_not_found(user.user_id)
    member: Member | None = await session.scalar(
        insert(Member)
        .values(workspace_id=workspace.workspace_id, user_id=user.user_id, role=role, create_time=now)
        .on_conflict_do_nothing()
        .returning(Member)
    )
    if member is None:
        raise errors.already_exists("MEMBER_EXISTS", "The user is a member already.", user_id=user.user_id)
    require_allowed_email(workspace, user.email)
    event = events_pb2.MemberAdded(member=member_to_pb(member, user))
    outbox.add(session, event, workspace_id=workspace.workspace_id)
    return member


async def _remove(session: AsyncSession, member: Member) -> None:
    await session.delete(member)
    event = events_pb2.MemberRemoved(workspace_id=member.workspace_id, user_id=member.user_id)
    outbox.add(session, event, workspace_id=member.workspace_id)
    await announce_rights(session, member.workspace_id)


def require_allowed_email(workspace: Workspace, email: str) -> None:
    """Raises FAILED_PRECONDITION (EMAIL_DOMAIN_REFUSED) for an address that the workspace does not let in."""
    allowed = workspace.allowed_email_domains
    if allowed and email_key(email).rpartition("@")[2] not in allowed:
        raise errors.failed_precondition(
            "EMAIL_DOMAIN_REFUSED",
            f"The workspace lets in people with an address in: {', '.join(allowed)}.",
            allowed=", ".join(allowed),
        )


def _domains(names: Iterable[str]) -> list[str]:
    """Domains as they are kept. Raises INVALID_ARGUMENT for what is none."""
    domains = [email_key(name) for name in names]
    for index, domain in enumerate(domains):
        if not _DOMAIN.fullmatch(domain):
            raise errors.invalid_fields(
                [(f"workspace.allowed_email_domains[{index}]", "is no domain such as example.org")]
            )
    return sorted(set(domains))


async def _find_member(session: AsyncSession, workspace_id: str, user_id: str) -> tuple[Member, User]:
    found = await session.execute(
        select(Member, User)
        .join(User, User.user_id == Member.user_id)
        .where(Member.workspace_id == workspace_id, Member.user_id == user_id)
    )
    row = found.one_or_none()
    if row is None:
        raise errors.not_found("MEMBER_NOT_FOUND", "The workspace has no such member.", user_id=user_id)
    member, user = row
    return member, user


async def _find_acquaintance(session: AsyncSession, user_id: str) -> User:
    """A user who shares a workspace with the caller; anyone else is nobody here. Raises NOT_FOUND (USER_NOT_FOUND)."""
    theirs = aliased(Member)
    shared = exists().where(
        Member.user_id == auth.caller().user_id,
        theirs.workspace_id == Member.workspace_id,
        theirs.user_id == User.user_id,
    )
    user: User | None = await session.scalar(select(User).where(User.user_id == user_id, shared))
    # A service account belongs to the workspace that it was made in, and elsewhere is nobody.
    if user is None or (
        user.kind == SERVICE_ACCOUNT
        and not await session.get(Member, (auth.caller().workspace_id, user.user_id))
    ):
        raise user_not_found(user_id)
    return user


async def _require_another_owner(session: AsyncSession, member: Member) -> None:
    if member.role != OWNER:
        return
    others = await session.scalar(
        select(func.count())
        .select_from(Member)
        .join(User, User.user_id == Member.user_id)
        .where(
            Member.workspace_id == member.workspace_id,
            Member.role == OWNER,
            Member.user_id != member.user_id,
            User.state == ACTIVE,
        )
    )
    if not others:
        raise errors.failed_precondition(
            "LAST_OWNER", "The workspace would be left without an owner: make someone else an owner first."
        )
