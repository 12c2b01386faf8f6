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
    ListTeamsRequest,
    ListTeamsResponse,
    RemoveTeamMemberRequest,
    RemoveTeamMemberResponse,
)
from meshboard.user.v1.team_service_pb2_grpc import TeamServiceServicer
from sqlalchemy import delete, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import auth, errors, outbox
from services.chassis.paging import Pages
from services.user_svc.convert import team_to_pb
from services.user_svc.models import MAX_TEAM_DEPTH, Member, Team, TeamMember
from services.user_svc.rights import announce_rights, lock_rights

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True)
class TeamServicer(TeamServiceServicer):
    """`new_id` gives UUIDv7s, whose order is that of creation."""

    db: async_sessionmaker[AsyncSession]
    pages: Pages
    now: Callable[[], datetime]
    new_id: Callable[[], str]

    async def CreateTeam(self, request: CreateTeamRequest, context: Context) -> CreateTeamResponse:
        caller = auth.caller()
        now = self.now()
        async with self.db.begin() as session:
            depth = 1
            if request.parent_team_id:
                parent = await _find_team(session, caller.workspace_id, request.parent_team_id)
                depth = parent.depth + 1
            if depth > MAX_TEAM_DEPTH:
                raise errors.failed_precondition(
                    "TEAM_TOO_DEEP", f"Teams nest at most {MAX_TEAM_DEPTH} deep.", max_depth=MAX_TEAM_DEPTH
                )
            team = await session.scalar(
                insert(Team)
                .values(
                    workspace_id=caller.workspace_id,
                    team_id=self.new_id(),
                    title=request.title,
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
            raise errors.already_exists(
                "TEAM_TITLE_TAKEN", "Another team has this title.", title=request.title
            )
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

    async def AddTeamMember(self, request: AddTeamMemberRequest, context: Context) -> AddTeamMemberResponse:
        workspace_id = auth.caller().workspace_id
        async with self.db.begin() as session:
            await lock_rights(session, workspace_id)
            team = await _find_team(session, workspace_id, request.team_id)
            member = await session.get(Member, (workspace_id, request.user_id))
            if member is None:
                raise errors.not_found(
                    "MEMBER_NOT_FOUND", "The workspace has no such member.", user_id=request.user_id
                )
            added = await session.scalar(
                insert(TeamMember)
                .values(
                    workspace_id=workspace_id,
                    team_id=team.team_id,
                    user_id=member.user_id,
                    create_time=self.now(),
                )
                .on_conflict_do_nothing()
                .returning(TeamMember.user_id)
            )
            if added:
                event = events_pb2.TeamMemberAdded(
                    workspace_id=workspace_id, team_id=team.team_id, user_id=added
                )
                outbox.add(session, event, workspace_id=workspace_id)
                await announce_rights(session, workspace_id)
        return AddTeamMemberResponse()

    async def RemoveTeamMember(
        self, request: RemoveTeamMemberRequest, context: Context
    ) -> RemoveTeamMemberResponse:
        workspace_id = auth.caller().workspace_id
        async with self.db.begin() as session:
            await lock_rights(session, workspace_id)
            team = await _find_team(session, workspace_id, request.team_id)
            removed = await session.scalar(
                delete(TeamMember)
                .where(
                    TeamMember.workspace_id == workspace_id,
                    TeamMember.team_id == team.team_id,
                    TeamMember.user_id == request.user_id,
                )
                .returning(TeamMember.user_id)
            )
            if removed:
                event = events_pb2.TeamMemberRemoved(
                    workspace_id=workspace_id, team_id=team.team_id, user_id=removed
                )
                outbox.add(session, event, workspace_id=workspace_id)
                await announce_rights(session, workspace_id)
        return RemoveTeamMemberResponse()


async def _find_team(session: AsyncSession, workspace_id: str, team_id: str) -> Team:
    team = await session.get(Team, (workspace_id, team_id))
    if team is None:
        raise errors.not_found("TEAM_NOT_FOUND", "The workspace has no such team.", team_id=team_id)
    return team
