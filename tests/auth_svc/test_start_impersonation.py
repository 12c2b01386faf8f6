import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from meshboard.auth.v1.auth_service_pb2 import RefreshRequest, SignOutRequest
from meshboard.auth.v1.events_pb2 import SessionRevoked, SignedIn
from meshboard.auth.v1.impersonation_service_pb2 import StartImpersonationRequest, StartImpersonationResponse
from meshboard.auth.v1.internal_auth_service_pb2 import CheckSessionRequest, SetAccountDisabledRequest
from meshboard.user.v1.events_pb2 import MemberRemoved, MemberUpdated, TeamCreated
from meshboard.user.v1.role_pb2 import Role
from meshboard.user.v1.role_service_pb2 import CreateRoleRequest, UpdateRoleRequest
from meshboard.user.v1.team_service_pb2 import CreateTeamRequest
from meshboard.user.v1.team_service_pb2_grpc import TeamServiceStub
from meshboard.user.v1.user_service_pb2 import GetMeRequest
from meshboard.user.v1.workspace_service_pb2 import (
    CreateWorkspaceRequest,
    RemoveMemberRequest,
    UpdateMemberRequest,
)
from sqlalchemy import select, text, update

from services.auth_svc.models import Account, Session
from services.chassis.db import InboxRow, OutboxRow
from tests.auth_svc.conftest import Services, bearer, claims_of
from tests.auth_svc.machines import (
    Person,
    audited,
    create,
    exchange,
    join,
    machine,
    outcome_in_workspace,
    owner_of,
)
from tests.conditions import eventually
from tests.harness import new_id, refused, service_metadata

NO_MEMBER = (grpc.StatusCode.NOT_FOUND, "MEMBER_NOT_FOUND")
POINTLESS = (grpc.StatusCode.INVALID_ARGUMENT, "IMPERSONATION_POINTLESS")
TOO_HIGH = (grpc.StatusCode.PERMISSION_DENIED, "ROLE_TOO_HIGH")
INVALID = (grpc.StatusCode.UNAUTHENTICATED, "REFRESH_TOKEN_INVALID")


async def start(
    services: Services, admin: Person, user_id: str, seconds: int = 0
) -> StartImpersonationResponse:
    request = StartImpersonationRequest(
        workspace_id=admin.workspace_id, user_id=user_id, reason="ticket 17", duration_seconds=seconds
    )
    return await services.impersonations.StartImpersonation(request, metadata=admin.metadata)


@dataclass(frozen=True)
class Cast:
    """An owner, an admin and an editor of one workspace, and the session of the admin as the editor."""

    owner: Person
    admin: Person
    editor: Person
    session: StartImpersonationResponse


async def cast(services: Services) -> Cast:
    owner = await owner_of(services)
    admin, editor = await join(services, owner, "admin"), await join(services, owner, "editor")
    session = await start(services, admin, editor.user_id)
    workspace_id = owner.workspace_id
    assert await outcome_in_workspace(services, session.access_token, workspace_id) == "OK"
    played = Cast(owner, admin, editor, session)
    assert await is_alive(services, played)
    return played


async def is_alive(services: Services, cast: Cast) -> bool:
    """What services are told that ask because announcements do not reach them."""
    answer = await services.internal_auth.CheckSession(
        CheckSessionRequest(session_id=cast.session.session_id),
        metadata=service_metadata(services.keys, "user", "auth"),
    )
    return answer.alive


async def ended(services: Services, cast: Cast) -> None:
    """Fails unless the session ends within 2 s, for calls and for refreshing, and those of the people go on."""

    async def is_ended() -> bool:
        token = cast.session.access_token
        return await outcome_in_workspace(services, token, cast.owner.workspace_id) == "SESSION_REVOKED"

    await eventually(is_ended, seconds=2)
    refreshing = services.auth.Refresh(RefreshRequest(refresh_token=cast.session.refresh_token))
    assert await refused(refreshing) == INVALID

    async def is_dead() -> bool:
        return not await is_alive(services, cast)

    await eventually(is_dead, seconds=2)


async def test_sees_what_the_member_sees_and_names_the_admin(services: Services):
    played = await cast(services)
    claims = claims_of(played.session.access_token)
    assert claims["sub"] == played.editor.user_id
    assert claims["act"] == {"sub": played.admin.user_id}
    assert claims["wid"] == played.owner.workspace_id
    assert claims["sid"] == played.session.session_id
    assert claims["amr"] == ["pwd"]
    me = await services.users.GetMe(GetMeRequest(), metadata=bearer(played.session.access_token))
    assert me.user.user_id == played.editor.user_id
    entry = (await audited(services, played.editor.user_id))[-1]
    assert (entry.kind, entry.outcome, entry.actor_id) == (
        "impersonation.begun",
        "DONE",
        played.admin.user_id,
    )
    assert entry.workspace_id == played.owner.workspace_id
    assert entry.details == {
        "why": "ticket 17",
        "seconds": 3600,
        "impersonation_session_id": played.session.session_id,
    }
    async with services.sessions() as session:
        row = await session.get_one(Session, played.session.session_id)
        signed_in = await session.scalars(
            select(OutboxRow.payload).where(OutboxRow.subject == SignedIn.DESCRIPTOR.full_name)
        )
    assert (row.user_id, row.impersonator_id) == (played.editor.user_id, played.admin.user_id)
    assert row.session_id not in [SignedIn.FromString(payload).session_id for payload in signed_in]


async def test_stays_in_the_workspace_and_away_from_what_is_sensitive(services: Services):
    played = await cast(services)
    token = played.session.access_token
    own = played.editor.account.workspace.workspace_id
    assert await outcome_in_workspace(services, token, own) == "WORKSPACE_NOT_FOUND"
    creating = services.workspaces.CreateWorkspace(CreateWorkspaceRequest(title="T"), metadata=bearer(token))
    assert await refused(creating) == (grpc.StatusCode.PERMISSION_DENIED, "PERSON_REQUIRED")


async def test_nobody_impersonates_while_impersonating(services: Services):
    owner = await owner_of(services)
    admin, editor = await join(services, owner, "admin"), await join(services, owner, "editor")
    session = await start(services, owner, admin.user_id)
    as_admin = Person(admin.user_id, owner.workspace_id, admin.account, bearer(session.access_token))
    outcome = await refused(start(services, as_admin, editor.user_id))
    assert outcome == (grpc.StatusCode.PERMISSION_DENIED, "PERSON_REQUIRED")


async def test_events_carry_both(services: Services):
    owner = await owner_of(services)
    admin = await join(services, owner, "admin")
    session = await start(services, owner, admin.user_id)
    async with grpc.aio.insecure_channel(services.user_settings.listen) as channel:
        await TeamServiceStub(channel).CreateTeam(
            CreateTeamRequest(workspace_id=owner.workspace_id, title="T"),
            metadata=bearer(session.access_token),
        )
    async with services.user_sessions() as db:
        rows = await db.scalars(
            select(OutboxRow).where(OutboxRow.subject == TeamCreated.DESCRIPTOR.full_name)
        )
        actors = [
            row.headers["Actor"]
            for row in rows
            if TeamCreated.FromString(row.payload).team.workspace_id == owner.workspace_id
        ]
    assert actors == [f"{admin.user_id},{owner.user_id}"]


async def test_whom_nobody_impersonates(services: Services):
    owner, stranger = await owner_of(services), await owner_of(services)
    admin, editor = await join(services, owner, "admin"), await join(services, owner, "editor")
    account = await create(services, owner)
    foreign = await create(services, stranger)
    for caller, user_id, outcome in (
        (admin, owner.user_id, TOO_HIGH),
        (admin, admin.user_id, POINTLESS),
        (admin, admin.user_id.upper(), POINTLESS),
        (admin, account.service_account_id, POINTLESS),
        (admin, foreign.service_account_id, NO_MEMBER),
        (admin, stranger.user_id, NO_MEMBER),
        (admin, new_id(), NO_MEMBER),
        (editor, admin.user_id, (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")),
        (stranger, editor.user_id, NO_MEMBER),
    ):
        assert await refused(start(services, caller, user_id)) == outcome
    refusals = [(e.kind, e.reason, e.actor_id) for e in await audited(services, owner.user_id)]
    assert refusals[-1] == ("impersonation.begun", "ROLE_TOO_HIGH", admin.user_id)
    peers = await asyncio.gather(*(join(services, owner, "admin") for _ in range(1)))
    await start(services, admin, peers[0].user_id)


async def test_a_machine_impersonates_nobody(services: Services):
    owner = await owner_of(services)
    editor = await join(services, owner, "editor")
    made = await machine(services, owner, "admin")
    program = Person(
        made.account.service_account_id,
        owner.workspace_id,
        owner.account,
        bearer(await exchange(services, made.secret)),
    )
    outcome = await refused(start(services, program, editor.user_id))
    assert outcome == (grpc.StatusCode.PERMISSION_DENIED, "PERSON_REQUIRED")


async def test_a_disabled_account_is_not_impersonated(services: Services):
    owner = await owner_of(services)
    editor = await join(services, owner, "editor")
    await disable(services, editor.user_id)
    outcome = await refused(start(services, owner, editor.user_id))
    assert outcome == (grpc.StatusCode.PERMISSION_DENIED, "ACCOUNT_DISABLED")


async def test_is_refreshed_until_its_end_and_not_beyond(services: Services):
    owner = await owner_of(services)
    editor = await join(services, owner, "editor")
    session = await start(services, owner, editor.user_id, seconds=120)
    async with services.sessions() as db:
        row = await db.get_one(Session, session.session_id)
    assert row.end_time - row.create_time == timedelta(seconds=120)

    def check(access_token: str, expires_in_seconds: int) -> None:
        claims = claims_of(access_token)
        assert expires_in_seconds <= 120
        assert row.end_time.timestamp() - 3 < claims["exp"] <= row.end_time.timestamp()
        assert claims["act"] == {"sub": owner.user_id}

    check(session.access_token, session.expires_in_seconds)
    refreshed = await services.auth.Refresh(RefreshRequest(refresh_token=session.refresh_token))
    check(refreshed.access_token, refreshed.expires_in_seconds)
    async with services.sessions.begin() as db:
        await db.execute(
            update(Session)
            .where(Session.session_id == session.session_id)
            .values(end_time=datetime.now(UTC) + timedelta(seconds=1))
        )
    refreshed = await services.auth.Refresh(RefreshRequest(refresh_token=refreshed.refresh_token))
    assert refreshed.expires_in_seconds <= 1

    async def over() -> bool:
        async with services.sessions() as db:
            return (await db.get_one(Session, session.session_id)).expire_time <= datetime.now(UTC)

    await eventually(over, seconds=3)
    refreshing = services.auth.Refresh(RefreshRequest(refresh_token=refreshed.refresh_token))
    assert await refused(refreshing) == INVALID


async def test_does_not_outlive_the_admins_session(services: Services):
    owner = await owner_of(services)
    editor = await join(services, owner, "editor")
    end = datetime.now(UTC) + timedelta(seconds=300)
    async with services.sessions.begin() as db:
        await db.execute(update(Session).where(Session.user_id == owner.user_id).values(expire_time=end))
    session = await start(services, owner, editor.user_id)
    async with services.sessions() as db:
        row = await db.get_one(Session, session.session_id)
    assert row.end_time <= end


async def disable(services: Services, user_id: str) -> None:
    await services.internal_auth.SetAccountDisabled(
        SetAccountDisabledRequest(user_id=user_id, disabled=True),
        metadata=service_metadata(services.keys, "user", "auth"),
    )


async def remove(services: Services, played: Cast, user_id: str) -> None:
    await services.workspaces.RemoveMember(
        RemoveMemberRequest(workspace_id=played.owner.workspace_id, user_id=user_id),
        metadata=played.owner.metadata,
    )


async def change_role(services: Services, played: Cast, user_id: str, role: str) -> None:
    await services.workspaces.UpdateMember(
        UpdateMemberRequest(workspace_id=played.owner.workspace_id, user_id=user_id, role=role),
        metadata=played.owner.metadata,
    )


async def change_a_role(services: Services, played: Cast) -> None:
    role = Role(workspace_id=played.owner.workspace_id, name="helper", permissions=["workspaces.view"])
    await services.roles.CreateRole(
        CreateRoleRequest(workspace_id=role.workspace_id, name=role.name, permissions=role.permissions),
        metadata=played.owner.metadata,
    )
    role.permissions.append("members.view")
    await services.roles.UpdateRole(UpdateRoleRequest(role=role), metadata=played.owner.metadata)


ENDS: dict[str, Callable[[Services, Cast], Awaitable[object]]] = {
    "sign-out": lambda s, c: s.auth.SignOut(SignOutRequest(), metadata=bearer(c.session.access_token)),
    "admin-signs-out": lambda s, c: s.auth.SignOut(SignOutRequest(), metadata=c.admin.metadata),
    "admin-is-disabled": lambda s, c: disable(s, c.admin.user_id),
    "admin-is-removed": lambda s, c: remove(s, c, c.admin.user_id),
    "admin-is-an-editor-now": lambda s, c: change_role(s, c, c.admin.user_id, "editor"),
    "member-is-disabled": lambda s, c: disable(s, c.editor.user_id),
    "member-is-removed": lambda s, c: remove(s, c, c.editor.user_id),
    "a-role-allows-more-now": change_a_role,
    "member-is-an-owner-now": lambda s, c: change_role(s, c, c.editor.user_id, "owner"),
}


@pytest.mark.parametrize("end", ENDS)
async def test_ends(services: Services, end: str):
    played = await cast(services)
    await ENDS[end](services, played)
    await ended(services, played)
    if end == "sign-out":
        refreshing = RefreshRequest(refresh_token=played.admin.account.refresh_token)
        await services.auth.Refresh(refreshing)
    async with services.sessions() as session:
        rows = await session.scalars(
            select(OutboxRow.payload).where(OutboxRow.subject == SessionRevoked.DESCRIPTOR.full_name)
        )
        events = [SessionRevoked.FromString(payload) for payload in rows]
    (event,) = [event for event in events if event.session_id == played.session.session_id]
    reasons = {"sign-out": SessionRevoked.SIGNED_OUT, "member-is-disabled": SessionRevoked.DISABLED}
    assert event.reason == reasons.get(end, SessionRevoked.IMPERSONATION_ENDED)


async def consumed(services: Services, kind: type[Any], workspace_id: str) -> bool:
    """Whether auth_svc has consumed the event of this kind about members of the workspace."""
    async with services.user_sessions() as session:
        rows = (
            await session.scalars(select(OutboxRow).where(OutboxRow.subject == kind.DESCRIPTOR.full_name))
        ).all()
    ids = [row.id for row in rows if row.headers.get("Workspace-Id") == workspace_id]
    async with services.sessions() as session:
        found = await session.scalars(select(InboxRow.event_id).where(InboxRow.event_id.in_(ids)))
        return len(ids) == 1 and len(found.all()) == 1


async def test_members_of_other_workspaces_have_nothing_to_do_with_it(services: Services):
    played = await cast(services)
    other = await cast(services)
    await change_role(services, other, other.admin.user_id, "viewer")
    await ended(services, other)
    assert await consumed(services, MemberUpdated, other.owner.workspace_id)
    token = played.session.access_token
    assert await outcome_in_workspace(services, token, played.owner.workspace_id) == "OK"


async def test_a_removal_while_it_begins_is_not_missed(services: Services):
    owner = await owner_of(services)
    admin, editor = await join(services, owner, "admin"), await join(services, owner, "editor")
    async with services.sessions.begin() as session:
        await session.get_one(Account, editor.user_id, with_for_update=True)
        starting = asyncio.create_task(refused(start(services, admin, editor.user_id)))

        async def waits() -> bool:
            async with services.sessions() as other:
                waiting = await other.scalar(
                    text(
                        "SELECT count(*) FROM pg_stat_activity"
                        " WHERE datname = current_database() AND wait_event_type = 'Lock'"
                    )
                )
            return bool(waiting)

        await eventually(waits)
        await services.workspaces.RemoveMember(
            RemoveMemberRequest(workspace_id=owner.workspace_id, user_id=admin.user_id),
            metadata=owner.metadata,
        )
        await eventually(lambda: consumed(services, MemberRemoved, owner.workspace_id))
    assert await starting == (grpc.StatusCode.NOT_FOUND, "WORKSPACE_NOT_FOUND")
    async with services.sessions() as session:
        rows = await session.scalars(select(Session).where(Session.impersonator_id == admin.user_id))
        assert [row.revoke_time is not None for row in rows] == [True]
