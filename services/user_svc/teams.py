"""Teams of a workspace, and who is in them."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import grpc.aio
from meshboard.user.v1 import events_pb2
from meshboard.user.v1.team_service_pb2 import (
    AddTeamMemberRequest,
    AddTeamMemberResponse,
    CreateTeamRequest,
    CreateTeamResponse,
    DeleteTeamRequest,
    DeleteTeamResponse,
    GetTeamRequest,
    GetTeamResponse,
    ListTeamMembersRequest,
    ListTeamMembersResponse,
    ListTeamsRequest,
    ListTeamsResponse,
    ListUserTeamsRequest,
    ListUserTeamsResponse,
    MoveTeamRequest,
    MoveTeamResponse,
    RemoveTeamMemberRequest,
    RemoveTeamMemberResponse,
    UpdateTeamRequest,
    UpdateTeamResponse,
)
from meshboard.user.v1.team_service_pb2_grpc import TeamServiceServicer
from meshboard.user.v1.workspace_pb2 import TeamMember as TeamMemberPb
from sqlalchemy import ColumnElement, Select, and_, delete, exists, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import auth, errors, outbox
from services.chassis.masks import changed_fields
from services.chassis.paging import Pages
from services.chassis.texts import clean_name
from services.chassis.times import time_of, timestamp_of
from services.user_svc.convert import team_member_to_pb, team_to_pb
from services.user_svc.models import MAINTAINER, MAX_TEAM_DEPTH, Member, Team, TeamMember, User
from services.user_svc.rights import announce_rights, lock_rights

Context = grpc.aio.ServicerContext[Any, Any]

_EDIT = "teams.edit"


@dataclass(frozen=True)
class TeamServicer(TeamServiceServicer):
    """`new_id` gives UUIDv7s, whose order is that of creation."""

    db: async_sessionmaker[AsyncSession]
    pages: Pages
    now: Callable[[], datetime]
    new_id: Callable[[], str]

    async def CreateTeam(self, request: CreateTeamRequest, context: Context) -> CreateTeamResponse:
        caller = auth.caller()
        now, title = self.now(), clean_name(request.title, "title")
        async with self.db.begin() as session:
            await lock_rights(session, caller.workspace_id)
            depth = 1
            if request.parent_team_id:
                parent = await _find_team(session, caller.workspace_id, request.parent_team_id)
                depth = parent.depth + 1
            _require_depth(depth)
            team = await session.scalar(
                insert(Team)
                .values(
                    workspace_id=caller.workspace_id,
                    team_id=self.new_id(),
                    title=title,
                    description=request.description,
                    parent_team_id=request.parent_team_id or None,
                    depth=depth,
                    creator_id=caller.user_id,
                    request_id=request.request_id or None,
                    create_time=now,
                    update_time=now,
                )
                .on_conflict_do_nothing()
                .returning(Team)
            )
            if team is None:
                return CreateTeamResponse(team=team_to_pb(await self._repeated(session, request)))
            outbox.add(
                session, events_pb2.TeamCreated(team=team_to_pb(team)), workspace_id=caller.workspace_id
            )
        return CreateTeamResponse(team=team_to_pb(team))

    async def _repeated(self, session: AsyncSession, request: CreateTeamRequest) -> Team:
        caller = auth.caller()
        team = (
            await session.scalar(
                select(Team).where(
                    Team.workspace_id == caller.workspace_id,
                    Team.creator_id == caller.user_id,
                    Team.request_id == (request.request_id or None),
                )
            )
            if request.request_id
            else None
        )
        if team is None:
            raise _title_taken(request.title)
        return team

    async def ListTeams(self, request: ListTeamsRequest, context: Context) -> ListTeamsResponse:
        workspace_id = auth.caller().workspace_id
        page = self.pages.open(request, workspace_id)
        async with self.db() as session:
            rows = await session.scalars(
                select(Team)
                .where(Team.workspace_id == workspace_id, page.after(Team.team_id))
                .order_by(Team.team_id)
                .limit(page.limit)
            )
        teams, next_page_token = page.close(rows.all(), lambda team: (team.team_id,))
        return ListTeamsResponse(teams=map(team_to_pb, teams), next_page_token=next_page_token)

    async def GetTeam(self, request: GetTeamRequest, context: Context) -> GetTeamResponse:
        async with self.db() as session:
            team = await _find_team(session, auth.caller().workspace_id, request.team_id)
        return GetTeamResponse(team=team_to_pb(team))

    async def UpdateTeam(self, request: UpdateTeamRequest, context: Context) -> UpdateTeamResponse:
        workspace_id, wanted = auth.caller().workspace_id, request.team
        fields = changed_fields(wanted, request.update_mask, {"title", "description"})
        changes = {field: getattr(wanted, field) for field in fields}
        if "title" in changes:
            changes["title"] = clean_name(wanted.title, "team.title")
        try:
            async with self.db.begin() as session:
                await lock_rights(session, workspace_id)
                team = await _find_team(session, workspace_id, wanted.team_id, wanted.etag)
                await self._change(session, team, changes)
        except IntegrityError:  # the constraint on titles
            raise _title_taken(wanted.title) from None
        return UpdateTeamResponse(team=team_to_pb(team))

    async def MoveTeam(self, request: MoveTeamRequest, context: Context) -> MoveTeamResponse:
        workspace_id = auth.caller().workspace_id
        async with self.db.begin() as session:
            await lock_rights(session, workspace_id)
            team = await _find_team(session, workspace_id, request.team_id, request.etag)
            parent = None
            if request.parent_team_id:
                parent = await _find_team(session, workspace_id, request.parent_team_id)
            if team.parent_team_id != (parent.team_id if parent else None):
                await _shift(session, team, parent)
                await self._change(session, team, {"parent_team_id": parent.team_id if parent else None})
                await announce_rights(session, workspace_id)
        return MoveTeamResponse(team=team_to_pb(team))

    async def _change(self, session: AsyncSession, team: Team, changes: dict[str, Any]) -> None:
        for field, value in changes.items():
            setattr(team, field, value)
        team.version += 1
        team.update_time = self.now()
        await session.flush()
        event = events_pb2.TeamUpdated(team=team_to_pb(team))
        outbox.add(session, event, workspace_id=team.workspace_id)

    async def DeleteTeam(self, request: DeleteTeamRequest, context: Context) -> DeleteTeamResponse:
        workspace_id = auth.caller().workspace_id
        async with self.db.begin() as session:
            await lock_rights(session, workspace_id)
            team = await _find_team(session, workspace_id, request.team_id, request.etag)
            below = exists().where(Team.workspace_id == workspace_id, Team.parent_team_id == team.team_id)
            if await session.scalar(select(below)):
                raise errors.failed_precondition(
                    "TEAM_NOT_EMPTY", "There are teams below the team: move or delete them first."
                )
            for table in (TeamMember, Team):
                await session.execute(
                    delete(table).where(table.workspace_id == workspace_id, table.team_id == team.team_id)
                )
            event = events_pb2.TeamDeleted(workspace_id=workspace_id, team_id=team.team_id)
            outbox.add(session, event, workspace_id=workspace_id)
            await announce_rights(session, workspace_id)
        return DeleteTeamResponse()

    async def AddTeamMember(self, request: AddTeamMemberRequest, context: Context) -> AddTeamMemberResponse:
        workspace_id, now = auth.caller().workspace_id, self.now()
        role = TeamMemberPb.Role.Name(request.role or TeamMemberPb.MEMBER)
        expire_time = time_of(request.expire_time, "expire_time") if request.HasField("expire_time") else None
        if expire_time and expire_time <= now:
            raise errors.invalid_fields([("expire_time", "is not in the future")])
        async with self.db.begin() as session:
            await lock_rights(session, workspace_id)
            team = await _find_team(session, workspace_id, request.team_id)
            user = await _find_user(session, workspace_id, request.user_id)
            row = await session.get(TeamMember, (workspace_id, team.team_id, user.user_id))
            if row is not None and row.expire_time and row.expire_time <= now:
                await session.delete(row)
                await session.flush()
                row = None
            await _require_say(session, team, user.user_id, {role, row.role if row else role})
            if row is None or (row.role, row.expire_time) != (role, expire_time):
                row = await self._put(session, team, user, row, role=role, expire_time=expire_time)
                await announce_rights(session, workspace_id)
        return AddTeamMemberResponse(team_member=team_member_to_pb(row, user))

    async def _put(
        self,
        session: AsyncSession,
        team: Team,
        user: User,
        row: TeamMember | None,
        *,
        role: str,
        expire_time: datetime | None,
    ) -> TeamMember:
        event: Any = events_pb2.TeamMemberUpdated
        if row is None:
            event = events_pb2.TeamMemberAdded
            row = TeamMember(
                workspace_id=team.workspace_id,
                team_id=team.team_id,
                user_id=user.user_id,
                create_time=self.now(),
            )
            session.add(row)
        row.role, row.expire_time = role, expire_time
        told = event(
            workspace_id=team.workspace_id,
            team_id=team.team_id,
            user_id=user.user_id,
            role=role,
            expire_time=timestamp_of(expire_time) if expire_time else None,
        )
        outbox.add(session, told, workspace_id=team.workspace_id)
        return row

    async def RemoveTeamMember(
        self, request: RemoveTeamMemberRequest, context: Context
    ) -> RemoveTeamMemberResponse:
        workspace_id = auth.caller().workspace_id
        async with self.db.begin() as session:
            await lock_rights(session, workspace_id)
            team = await _find_team(session, workspace_id, request.team_id)
            row = await session.get(TeamMember, (workspace_id, team.team_id, request.user_id))
            leaving = row is not None and row.user_id == auth.caller().user_id
            await _require_say(
                session, team, request.user_id.lower(), {row.role} if row else set(), leaving=leaving
            )
            if row is not None:
                await session.delete(row)
                event = events_pb2.TeamMemberRemoved(
                    workspace_id=workspace_id, team_id=team.team_id, user_id=row.user_id
                )
                outbox.add(session, event, workspace_id=workspace_id)
                await announce_rights(session, workspace_id)
        return RemoveTeamMemberResponse()

    async def ListTeamMembers(
        self, request: ListTeamMembersRequest, context: Context
    ) -> ListTeamMembersResponse:
        workspace_id = auth.caller().workspace_id
        page = self.pages.open(request, workspace_id)
        async with self.db() as session:
            team = await _find_team(session, workspace_id, request.team_id)
            teams = _below(team) if request.include_inherited else select(Team.team_id).where(_is(team))
            direct = TeamMember.team_id == team.team_id
            counting = (
                select(TeamMember.user_id, func.array_agg(TeamMember.team_id).filter(~direct).label("via"))
                .where(
                    TeamMember.workspace_id == workspace_id,
                    TeamMember.team_id.in_(teams),
                    _counts(),
                    page.after(TeamMember.user_id),
                )
                .group_by(TeamMember.user_id)
                .order_by(TeamMember.user_id)
                .limit(page.limit)
                .subquery()
            )
            of_team = and_(
                TeamMember.workspace_id == workspace_id,
                direct,
                TeamMember.user_id == counting.c.user_id,
                _counts(),
            )
            rows = await session.execute(
                select(User, TeamMember, counting.c.via)
                .join(counting, counting.c.user_id == User.user_id)
                .outerjoin(TeamMember, of_team)
                .order_by(User.user_id)
            )
        members, next_page_token = page.close(rows.all(), lambda row: (row[0].user_id,))
        return ListTeamMembersResponse(
            team_members=[team_member_to_pb(row, user, via or ()) for user, row, via in members],
            next_page_token=next_page_token,
        )

    async def ListUserTeams(self, request: ListUserTeamsRequest, context: Context) -> ListUserTeamsResponse:
        workspace_id = auth.caller().workspace_id
        page = self.pages.open(request, workspace_id)
        async with self.db() as session:
            user = await _find_user(session, workspace_id, request.user_id)
            of_user = and_(
                TeamMember.workspace_id == Team.workspace_id,
                TeamMember.team_id == Team.team_id,
                TeamMember.user_id == user.user_id,
                _counts(),
            )
            rows = await session.execute(
                select(Team, TeamMember)
                .outerjoin(TeamMember, of_user)
                .where(
                    Team.workspace_id == workspace_id,
                    Team.team_id.in_(_above(workspace_id, of_user)),
                    page.after(Team.team_id),
                )
                .order_by(Team.team_id)
                .limit(page.limit)
            )
        teams, next_page_token = page.close(rows.all(), lambda row: (row[0].team_id,))
        response = ListUserTeamsResponse(next_page_token=next_page_token)
        for team, row in teams:
            member = team_member_to_pb(row, user)
            response.teams.add(
                team=team_to_pb(team),
                direct=member.direct,
                role=member.role,
                expire_time=member.expire_time if member.HasField("expire_time") else None,
            )
        return response


def _is(team: Team) -> ColumnElement[bool]:
    return and_(Team.workspace_id == team.workspace_id, Team.team_id == team.team_id)


def _counts() -> ColumnElement[bool]:
    """SQL: the membership has not expired."""
    return or_(TeamMember.expire_time.is_(None), TeamMember.expire_time > func.now())


def _below(team: Team) -> Select[tuple[str]]:
    """The ids of a team and of all teams below it."""
    below = select(Team.team_id).where(_is(team)).cte(recursive=True)
    children = select(Team.team_id).where(
        Team.workspace_id == team.workspace_id, Team.parent_team_id == below.c.team_id
    )
    return select(below.union_all(children).c.team_id)


def _above(workspace_id: str, of_user: ColumnElement[bool]) -> Select[tuple[str]]:
    """The ids of the teams of a user, and of all teams above them."""
    above = (
        select(Team.team_id, Team.parent_team_id)
        .join(TeamMember, of_user)
        .where(Team.workspace_id == workspace_id)
        .cte(recursive=True)
    )
    parents = select(Team.team_id, Team.parent_team_id).where(
        Team.workspace_id == workspace_id, Team.team_id == above.c.parent_team_id
    )
    return select(above.union(parents).c.team_id)


async def _shift(session: AsyncSession, team: Team, parent: Team | None) -> None:
    """Gives a team and those below it the depth that they have below another parent.

    Raises FAILED_PRECONDITION: TEAM_CYCLE or TEAM_TOO_DEEP.
    """
    found = await session.execute(
        select(Team.team_id, Team.depth).where(
            Team.workspace_id == team.workspace_id, Team.team_id.in_(_below(team))
        )
    )
    depths = {row.team_id: row.depth for row in found}
    if parent is not None and parent.team_id in depths:
        raise errors.failed_precondition("TEAM_CYCLE", "The team would be below itself.")
    shift = (parent.depth if parent else 0) + 1 - team.depth
    _require_depth(max(depths.values()) + shift)
    await session.execute(
        update(Team)
        .where(Team.workspace_id == team.workspace_id, Team.team_id.in_(depths))
        .values(depth=Team.depth + shift)
    )


def _require_depth(depth: int) -> None:
    if depth > MAX_TEAM_DEPTH:
        raise errors.failed_precondition(
            "TEAM_TOO_DEEP", f"Teams nest at most {MAX_TEAM_DEPTH} deep.", max_depth=MAX_TEAM_DEPTH
        )


async def _require_say(
    session: AsyncSession, team: Team, user_id: str, roles: set[str], *, leaving: bool = False
) -> None:
    """Raises PERMISSION_DENIED for who may not give or take these roles of the user in the team.

    Maintainers change neither maintainers nor themselves, so that nobody stays beyond what they were given.
    """
    caller = auth.caller()
    assert caller.claims is not None
    assert caller.rights is not None
    if not caller.claims.scopes & {auth.FULL_SCOPE, _EDIT}:
        raise errors.permission_denied(
            "SCOPE_MISSING", f"The token's scope lacks the permission {_EDIT}.", permission=_EDIT
        )
    if leaving or _EDIT in caller.rights.permissions:
        return
    if user_id == caller.user_id or MAINTAINER in roles or not await _maintains(session, team):
        raise errors.permission_denied(
            "PERMISSION_MISSING", f"The call needs the permission {_EDIT}.", permission=_EDIT
        )


async def _maintains(session: AsyncSession, team: Team) -> bool:
    """Whether the caller is a maintainer of the team or of one above it."""
    above = select(Team.team_id, Team.parent_team_id).where(_is(team)).cte(recursive=True)
    parents = select(Team.team_id, Team.parent_team_id).where(
        Team.workspace_id == team.workspace_id, Team.team_id == above.c.parent_team_id
    )
    maintaining = exists().where(
        TeamMember.workspace_id == team.workspace_id,
        TeamMember.team_id.in_(select(above.union_all(parents).c.team_id)),
        TeamMember.user_id == auth.caller().user_id,
        TeamMember.role == MAINTAINER,
        _counts(),
    )
    return bool(await session.scalar(select(maintaining)))


async def _find_team(session: AsyncSession, workspace_id: str, team_id: str, etag: str = "") -> Team:
    team = await session.get(Team, (workspace_id, team_id))
    if team is None:
        raise errors.not_found("TEAM_NOT_FOUND", "The workspace has no such team.", team_id=team_id)
    if etag and etag != str(team.version):
        raise errors.etag_mismatch()
    return team


async def _find_user(session: AsyncSession, workspace_id: str, user_id: str) -> User:
    """The user, who is a member. Raises NOT_FOUND (MEMBER_NOT_FOUND)."""
    user: User | None = await session.scalar(
        select(User)
        .join(Member, Member.user_id == User.user_id)
        .where(Member.workspace_id == workspace_id, Member.user_id == user_id)
    )
    if user is None:
        raise errors.not_found("MEMBER_NOT_FOUND", "The workspace has no such member.", user_id=user_id)
    return user


def _title_taken(title: str) -> errors.Error:
    return errors.already_exists("TEAM_TITLE_TAKEN", "Another team has this title.", title=title)
