"""Invitations: sending them, and what becomes of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, cast

import grpc.aio
from meshboard.auth.v1.internal_auth_service_pb2 import GetVerifiedEmailRequest
from meshboard.auth.v1.internal_auth_service_pb2_grpc import InternalAuthServiceStub
from meshboard.user.v1 import events_pb2
from meshboard.user.v1.invitation_pb2 import Invitation as InvitationPb
from meshboard.user.v1.invitation_service_pb2 import (
    AcceptInvitationRequest,
    AcceptInvitationResponse,
    CreateInvitationRequest,
    CreateInvitationResponse,
    DeclineInvitationRequest,
    DeclineInvitationResponse,
    GetInvitationRequest,
    GetInvitationResponse,
    ListInvitationsRequest,
    ListInvitationsResponse,
    PreviewInvitationRequest,
    PreviewInvitationResponse,
    ResendInvitationRequest,
    ResendInvitationResponse,
    RevokeInvitationRequest,
    RevokeInvitationResponse,
)
from meshboard.user.v1.invitation_service_pb2_grpc import InvitationServiceServicer
from meshboard.user.v1.workspace_pb2 import TeamMember as TeamMemberPb
from sqlalchemy import ColumnElement, CursorResult, and_, delete, exists, func, or_, select, true, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import auth, errors, outbox
from services.chassis.emails import email_key
from services.chassis.erasures import Erased
from services.chassis.paging import Pages
from services.chassis.rights import ROLES, Rights
from services.chassis.times import time_of, timestamp_of
from services.user_svc.convert import invitation_to_pb, member_to_pb, workspace_to_pb
from services.user_svc.invitation_tokens import invitation_id_of, is_genuine, token_of
from services.user_svc.models import (
    ACCEPTED,
    DECLINED,
    PENDING,
    REVOKED,
    Invitation,
    Member,
    Team,
    TeamMember,
    User,
    Workspace,
)
from services.user_svc.rights import announce_rights, lock_rights, read_rights
from services.user_svc.roles import OWNER, owner_role_reserved
from services.user_svc.workspaces import add_member, require_allowed_email

Context = grpc.aio.ServicerContext[Any, Any]

_LIFETIME = timedelta(days=7)
_LONGEST_LIFETIME = timedelta(days=30)
_BETWEEN_MAILS = timedelta(seconds=60)
_MAX_A_DAY = 500
_INVITE, _EDIT_TEAMS = "invitations.edit", "teams.edit"


@dataclass(frozen=True)
class Invitations:
    """Reads the links of invitations. `keys` sign their tokens: the first one new ones, the others are earlier ones."""

    keys: Sequence[bytes]
    now: Callable[[], datetime]

    def token(self, invitation: Invitation) -> str:
        """The token of a pending invitation. Raises NOT_FOUND (INVITATION_INVALID) when it is not pending any more."""
        self._require_pending(invitation)
        return token_of(self.keys[0], invitation)

    async def find(self, session: AsyncSession, token: str, *, lock: bool = False) -> Invitation:
        """The invitation of a genuine token, whatever its state. Raises NOT_FOUND (INVITATION_INVALID)."""
        statement = select(Invitation).where(Invitation.invitation_id == invitation_id_of(token))
        if lock:
            statement = statement.with_for_update().execution_options(populate_existing=True)
        invitation: Invitation | None = await session.scalar(statement)
        if invitation is None or not is_genuine(self.keys, invitation, token):
            raise invalid()
        return invitation

    async def preview(self, session: AsyncSession, token: str, *, accepted_too: bool = False) -> Invitation:
        """The invitation that a token can be used for, or was used for by whoever repeats that.

        Raises NOT_FOUND (INVITATION_INVALID), FAILED_PRECONDITION (INVITATION_ROLE_GONE).
        """
        invitation = await self.find(session, token)
        if not (accepted_too and invitation.state == ACCEPTED):
            self._require_pending(invitation)
            await _require_authority(session, invitation)
        return invitation

    async def accept(
        self, session: AsyncSession, token: str, user: User, email: str
    ) -> tuple[Workspace, Member]:
        """Makes a user, whose verified address this is, a member; once more gives the same.

        Raises as `InvitationService.AcceptInvitation` says.
        """
        found = await self.find(session, token)
        await lock_rights(session, found.workspace_id)
        invitation = await self.find(session, token, lock=True)
        workspace = await session.get_one(Workspace, invitation.workspace_id, populate_existing=True)
        if invitation.state == ACCEPTED and invitation.acceptor_id == user.user_id:
            member = await session.get(Member, (workspace.workspace_id, user.user_id))
            if member is None:
                raise invalid()
            return workspace, member
        self._require_pending(invitation)
        if email_key(email) != invitation.email_key:
            raise for_another()
        await _require_authority(session, invitation)
        now = self.now()
        member = await add_member(session, workspace, user, invitation.role, now)
        await _join_teams(session, invitation, user, now)
        invitation.state, invitation.acceptor_id, invitation.end_time = ACCEPTED, user.user_id, now
        event = events_pb2.InvitationAccepted(
            workspace_id=workspace.workspace_id,
            invitation_id=invitation.invitation_id,
            user_id=user.user_id,
        )
        outbox.add(session, event, workspace_id=workspace.workspace_id)
        await announce_rights(session, workspace.workspace_id)
        return workspace, member

    def _require_pending(self, invitation: Invitation) -> None:
        if invitation.state != PENDING or invitation.expire_time <= self.now():
            raise invalid()


@dataclass(frozen=True)
class InvitationServicer(InvitationServiceServicer):
    """`accounts` says which address of an account is verified; `new_id` gives UUIDv7s."""

    db: async_sessionmaker[AsyncSession]
    invitations: Invitations
    accounts: InternalAuthServiceStub
    pages: Pages
    now: Callable[[], datetime]
    new_id: Callable[[], str]

    async def CreateInvitation(
        self, request: CreateInvitationRequest, context: Context
    ) -> CreateInvitationResponse:
        caller, now = auth.caller(), self.now()
        expire_time = now + _LIFETIME
        if request.HasField("expire_time"):
            expire_time = time_of(request.expire_time, "expire_time")
        if not now < expire_time <= now + _LONGEST_LIFETIME:
            raise errors.invalid_fields([("expire_time", "is not within the next 30 days")])
        async with self.db.begin() as session:
            await lock_rights(session, caller.workspace_id)
            workspace = await session.get_one(Workspace, caller.workspace_id)
            role = request.role or workspace.default_role
            team_ids = sorted({team_id.lower() for team_id in request.team_ids})
            await self._require_sendable(session, workspace, request.email, role, team_ids)
            await _require_teams(session, caller.workspace_id, team_ids)
            await _require_no_member(session, caller.workspace_id, request.email)
            await self._expire(session, caller.workspace_id, request.email)
            invitation = await session.scalar(
                insert(Invitation)
                .values(
                    workspace_id=caller.workspace_id,
                    invitation_id=self.new_id(),
                    email=request.email,
                    email_key=email_key(request.email),
                    role=role,
                    team_ids=team_ids,
                    inviter_id=caller.user_id,
                    creator_id=caller.user_id,
                    request_id=request.request_id or None,
                    create_time=now,
                    send_time=now,
                    expire_time=expire_time,
                )
                .on_conflict_do_nothing()
                .returning(Invitation)
            )
            if invitation is None:
                first = await self._repeated(session, request.request_id)
                return CreateInvitationResponse(invitation=invitation_to_pb(first, now))
            event = events_pb2.InvitationCreated(invitation=invitation_to_pb(invitation, now))
            outbox.add(session, event, workspace_id=caller.workspace_id)
        return CreateInvitationResponse(invitation=event.invitation)

    async def GetInvitation(self, request: GetInvitationRequest, context: Context) -> GetInvitationResponse:
        async with self.db() as session:
            invitation = await _find(session, request.invitation_id)
        return GetInvitationResponse(invitation=invitation_to_pb(invitation, self.now()))

    async def ListInvitations(
        self, request: ListInvitationsRequest, context: Context
    ) -> ListInvitationsResponse:
        workspace_id, now = auth.caller().workspace_id, self.now()
        page = self.pages.open(request, workspace_id)
        async with self.db() as session:
            rows = await session.scalars(
                select(Invitation)
                .where(
                    Invitation.workspace_id == workspace_id,
                    _in_state(request.state, now),
                    page.after(Invitation.invitation_id, descending=True),
                )
                .order_by(Invitation.invitation_id.desc())
                .limit(page.limit)
            )
        invitations, next_page_token = page.close(rows.all(), lambda row: (row.invitation_id,))
        return ListInvitationsResponse(
            invitations=[invitation_to_pb(row, now) for row in invitations], next_page_token=next_page_token
        )

    async def ResendInvitation(
        self, request: ResendInvitationRequest, context: Context
    ) -> ResendInvitationResponse:
        caller, now = auth.caller(), self.now()
        async with self.db.begin() as session:
            await lock_rights(session, caller.workspace_id)
            invitation = await _find(session, request.invitation_id, lock=True)
            if invitation.state != PENDING:
                raise _closed()
            if (wait := invitation.send_time + _BETWEEN_MAILS - now) > timedelta(0):
                raise errors.resource_exhausted(
                    "INVITATION_DELAYED",
                    "The invitation was mailed a moment ago: look into the mailbox, or wait a minute.",
                    retry_seconds=wait.total_seconds(),
                )
            workspace = await session.get_one(Workspace, caller.workspace_id)
            await self._require_sendable(
                session, workspace, invitation.email, invitation.role, invitation.team_ids
            )
            invitation.generation += 1
            invitation.inviter_id, invitation.send_time = caller.user_id, now
            invitation.expire_time = max(invitation.expire_time, now + _LIFETIME)
            event = events_pb2.InvitationResent(
                workspace_id=caller.workspace_id, invitation_id=invitation.invitation_id
            )
            outbox.add(session, event, workspace_id=caller.workspace_id)
        return ResendInvitationResponse(invitation=invitation_to_pb(invitation, now))

    async def RevokeInvitation(
        self, request: RevokeInvitationRequest, context: Context
    ) -> RevokeInvitationResponse:
        async with self.db.begin() as session:
            invitation = await _find(session, request.invitation_id, lock=True)
            if invitation.state not in {PENDING, REVOKED}:
                raise _closed()
            if invitation.state == PENDING:
                self._end(session, invitation, REVOKED, events_pb2.InvitationRevoked)
        return RevokeInvitationResponse()

    async def PreviewInvitation(
        self, request: PreviewInvitationRequest, context: Context
    ) -> PreviewInvitationResponse:
        async with self.db() as session:
            invitation = await self.invitations.preview(session, request.token)
            workspace = await session.get_one(Workspace, invitation.workspace_id)
            inviter = await session.get_one(User, invitation.inviter_id)
        return PreviewInvitationResponse(
            email=invitation.email,
            workspace_title=workspace.title,
            inviter_name=inviter.display_name,
            role=invitation.role,
            expire_time=timestamp_of(invitation.expire_time),
        )

    async def AcceptInvitation(
        self, request: AcceptInvitationRequest, context: Context
    ) -> AcceptInvitationResponse:
        user_id = auth.caller().user_id
        async with self.db() as session:
            invitation = await self.invitations.preview(session, request.token, accepted_too=True)
            user = await session.get_one(User, user_id)
        if email_key(user.email) != invitation.email_key:
            raise for_another()
        verified = await self.accounts.GetVerifiedEmail(GetVerifiedEmailRequest(user_id=user_id))
        if not verified.email:
            raise errors.failed_precondition(
                "EMAIL_UNVERIFIED", "Verify the address of your account first: a link was mailed to it."
            )
        async with self.db.begin() as session:
            # Held, so that the user is there when they become a member.
            held = {"read": True, "key_share": True}
            user = await session.get_one(User, user_id, with_for_update=held)
            workspace, member = await self.invitations.accept(session, request.token, user, verified.email)
        return AcceptInvitationResponse(
            workspace=workspace_to_pb(workspace), member=member_to_pb(member, user)
        )

    async def DeclineInvitation(
        self, request: DeclineInvitationRequest, context: Context
    ) -> DeclineInvitationResponse:
        async with self.db.begin() as session:
            invitation = await self.invitations.find(session, request.token, lock=True)
            if invitation.state not in {PENDING, DECLINED}:
                raise invalid()
            if invitation.state == PENDING:
                self._end(session, invitation, DECLINED, events_pb2.InvitationDeclined)
        return DeclineInvitationResponse()

    def _end(self, session: AsyncSession, invitation: Invitation, state: str, event: Any) -> None:
        invitation.state, invitation.end_time = state, self.now()
        told = event(workspace_id=invitation.workspace_id, invitation_id=invitation.invitation_id)
        outbox.add(session, told, workspace_id=invitation.workspace_id)

    async def _require_sendable(
        self, session: AsyncSession, workspace: Workspace, email: str, role: str, team_ids: Sequence[str]
    ) -> None:
        """Raises unless the caller may have such an invitation mailed, as the tables say now."""
        inviter_id = auth.caller().user_id
        require_allowed_email(workspace, email)
        _require_within(await read_rights(session, inviter_id, workspace.workspace_id), role, team_ids)
        # People do not send mails to the world.
        sent = await session.scalar(
            select(func.count())
            .select_from(Invitation)
            .where(Invitation.inviter_id == inviter_id, Invitation.send_time > self.now() - timedelta(days=1))
        )
        if (sent or 0) >= _MAX_A_DAY:
            raise errors.resource_exhausted(
                "INVITATION_LIMIT",
                f"One person sends at most {_MAX_A_DAY} invitations in a day.",
                retry_seconds=3600,
            )

    async def _expire(self, session: AsyncSession, workspace_id: str, email: str) -> None:
        """Makes room for another invitation where one has expired."""
        now = self.now()
        await session.execute(
            update(Invitation)
            .where(
                Invitation.workspace_id == workspace_id,
                Invitation.email_key == email_key(email),
                Invitation.state == PENDING,
                Invitation.expire_time <= now,
            )
            .values(state="EXPIRED", end_time=now)
        )

    async def _repeated(self, session: AsyncSession, request_id: str) -> Invitation:
        """The invitation that an earlier call with this `request_id` made; "" is that of none."""
        caller = auth.caller()
        row: Invitation | None = await session.scalar(
            select(Invitation).where(
                Invitation.workspace_id == caller.workspace_id,
                Invitation.creator_id == caller.user_id,
                Invitation.request_id == request_id,
            )
        )
        if row is None:
            raise errors.already_exists(
                "INVITATION_EXISTS", "The address is invited already: resend or revoke that invitation."
            )
        return row


async def _find(session: AsyncSession, invitation_id: str, *, lock: bool = False) -> Invitation:
    identity = (auth.caller().workspace_id, invitation_id)
    invitation = await session.get(Invitation, identity, with_for_update=lock or None)
    if invitation is None:
        raise errors.not_found(
            "INVITATION_NOT_FOUND", "The workspace has no such invitation.", invitation_id=invitation_id
        )
    return invitation


def _in_state(state: InvitationPb.State.ValueType, now: datetime) -> ColumnElement[bool]:
    expired = and_(Invitation.state == PENDING, Invitation.expire_time <= now)
    match state:
        case InvitationPb.STATE_UNSPECIFIED:
            return true()
        case InvitationPb.PENDING:
            return and_(Invitation.state == PENDING, Invitation.expire_time > now)
        case InvitationPb.EXPIRED:
            return or_(Invitation.state == "EXPIRED", expired)
        case _:
            return Invitation.state == InvitationPb.State.Name(state)


def _require_within(rights: Rights, role: str, team_ids: Sequence[str]) -> None:
    """Raises unless who has these rights may invite to this role and these teams: nobody gives more than they have."""
    permissions = ROLES.get(role) or rights.roles.get(role)
    if permissions is None:
        known = ", ".join([*ROLES, *sorted(rights.roles)])
        raise errors.invalid_argument(
            "ROLE_UNKNOWN", f"There is no such role; these are: {known}.", field="role", role=role
        )
    if role == OWNER and rights.role != OWNER:
        raise owner_role_reserved()
    if not permissions <= rights.permissions:
        raise errors.permission_denied(
            "ROLE_TOO_HIGH", "The role has permissions that the caller has not.", role=role
        )
    for permission in (_INVITE, *((_EDIT_TEAMS,) if team_ids else ())):
        if permission not in rights.permissions:
            raise errors.permission_denied(
                "PERMISSION_MISSING", f"The call needs the permission {permission}.", permission=permission
            )


async def _require_authority(session: AsyncSession, invitation: Invitation) -> None:
    """Raises unless who has sent the invitation could do so still.

    So an admin who is removed leaves no door behind: NOT_FOUND (INVITATION_INVALID), or FAILED_PRECONDITION
    (INVITATION_ROLE_GONE).
    """
    try:
        rights = await read_rights(session, invitation.inviter_id, invitation.workspace_id)
        _require_within(rights, invitation.role, invitation.team_ids)
    except errors.Error as error:
        if error.reason == "ROLE_UNKNOWN":
            raise errors.failed_precondition(
                "INVITATION_ROLE_GONE", "The role of the invitation is gone: ask for another one."
            ) from error
        raise invalid() from error


async def _require_teams(session: AsyncSession, workspace_id: str, team_ids: Sequence[str]) -> None:
    known = await session.scalars(
        select(Team.team_id).where(Team.workspace_id == workspace_id, Team.team_id.in_(team_ids))
    )
    if missing := sorted(set(team_ids) - set(known)):
        raise errors.not_found("TEAM_NOT_FOUND", "The workspace has no such team.", team_id=missing[0])


async def _require_no_member(session: AsyncSession, workspace_id: str, email: str) -> None:
    """Saves a pointless mail; whether the person is a member is decided when they accept."""
    member = exists().where(
        Member.workspace_id == workspace_id,
        Member.user_id == User.user_id,
        func.lower(User.email) == func.lower(email),
    )
    if await session.scalar(select(member)):
        raise errors.already_exists("MEMBER_EXISTS", "Somebody with this address is a member already.")


async def _join_teams(session: AsyncSession, invitation: Invitation, user: User, now: datetime) -> None:
    """Puts the user into those teams of the invitation that are still there."""
    team_ids = await session.scalars(
        select(Team.team_id)
        .where(Team.workspace_id == invitation.workspace_id, Team.team_id.in_(invitation.team_ids))
        .order_by(Team.team_id)
    )
    for team_id in team_ids.all():
        session.add(
            TeamMember(
                workspace_id=invitation.workspace_id,
                team_id=team_id,
                user_id=user.user_id,
                create_time=now,
            )
        )
        event = events_pb2.TeamMemberAdded(
            workspace_id=invitation.workspace_id,
            team_id=team_id,
            user_id=user.user_id,
            role=TeamMemberPb.MEMBER,
        )
        outbox.add(session, event, workspace_id=invitation.workspace_id)


async def erase_invitations(session: AsyncSession, user_id: str) -> Erased:
    """Deletes what a person has accepted, and what was sent to the address: who has it next inherits nothing."""
    email = await session.scalar(select(User.email).where(User.user_id == user_id))
    done = await session.execute(
        delete(Invitation).where(
            or_(Invitation.acceptor_id == user_id, Invitation.email_key == email_key(email or ""))
        )
    )
    return Erased({"invitations": cast("CursorResult[Any]", done).rowcount})


def for_another() -> errors.Error:
    """What is said to who has another address than the invited one."""
    return errors.permission_denied(
        "INVITATION_FOR_ANOTHER", "The invitation is for another address than that of your account."
    )


def invalid() -> errors.Error:
    """What is said to a link that does not work, whatever the cause."""
    return errors.not_found(
        "INVITATION_INVALID", "The invitation does not hold, or not any more: ask for another one."
    )


def _closed() -> errors.Error:
    return errors.failed_precondition(
        "INVITATION_CLOSED", "The invitation is accepted, declined or revoked already."
    )
