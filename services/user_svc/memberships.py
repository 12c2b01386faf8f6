"""What stands and falls with a user in all their workspaces at once."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import and_, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from services.chassis import auth, errors
from services.user_svc.models import ACTIVE, PERSON, Member, User, Workspace
from services.user_svc.roles import OWNER, require_rank


@dataclass(frozen=True, slots=True)
class Membership:
    """A workspace of a user. `is_last_owner`: other people would be left without an active owner."""

    workspace_id: str
    role: str
    is_alone: bool
    is_last_owner: bool


async def lock_user(session: AsyncSession, user_id: str) -> tuple[User | None, list[Membership]]:
    """The user and their workspaces, whose rights nobody else changes until the transaction ends."""
    await _lock_workspaces(session, user_id)
    # Nobody becomes a member from here on: the new row would refer to this one.
    user = await session.get(User, user_id, with_for_update=True)
    await _lock_workspaces(session, user_id)  # one that the user has joined meanwhile
    other, person = aliased(Member), aliased(User)
    found = await session.execute(
        select(
            Member.workspace_id,
            Member.role,
            func.count(person.user_id),
            func.count(person.user_id).filter(other.role == OWNER, person.state == ACTIVE),
        )
        .select_from(Member)
        .outerjoin(other, and_(other.workspace_id == Member.workspace_id, other.user_id != Member.user_id))
        .outerjoin(person, and_(person.user_id == other.user_id, person.kind == PERSON))
        .where(Member.user_id == user_id)
        .group_by(Member.workspace_id, Member.role)
        .order_by(Member.workspace_id)
    )
    return user, [
        Membership(workspace_id, role, people == 0, role == OWNER and people > 0 and owners == 0)
        for workspace_id, role, people, owners in found
    ]


async def _lock_workspaces(session: AsyncSession, user_id: str) -> None:
    # In the order of the ids, so that no two callers wait for each other.
    joined = select(Member.workspace_id).where(Member.user_id == user_id)
    await session.execute(
        select(Workspace.workspace_id)
        .where(Workspace.workspace_id.in_(joined))
        .order_by(Workspace.workspace_id)
        .with_for_update(key_share=True)
    )


def require_owners(memberships: Sequence[Membership], named_in: str | None = None) -> None:
    """Raises FAILED_PRECONDITION (LAST_OWNER) naming the workspaces, or `named_in` alone, which the caller knows of."""
    left = [each.workspace_id for each in memberships if each.is_last_owner]
    if left:
        named = [workspace_id for workspace_id in left if named_in in {None, workspace_id}]
        raise errors.failed_precondition(
            "LAST_OWNER",
            "A workspace would be left without an active owner: make someone else an owner first.",
            workspace_ids=",".join(named),
        )


async def require_seniority(session: AsyncSession, user_id: str) -> None:
    """Lets nobody act upon a member of the caller's workspace whose role has more than theirs: PERMISSION_DENIED."""
    role = await session.scalar(
        select(Member.role).where(
            Member.workspace_id == auth.caller().workspace_id, Member.user_id == user_id
        )
    )
    if role is not None:
        await require_rank(session, role)
