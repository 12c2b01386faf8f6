"""Rows as messages of the contract."""

from collections.abc import Iterable
from datetime import datetime

from meshboard.user.v1 import (
    erasure_service_pb2,
    invitation_pb2,
    profile_pb2,
    role_pb2,
    user_pb2,
    workspace_pb2,
)

from services.chassis.rights import ROLES, Rights
from services.chassis.times import timestamp_of
from services.user_svc.models import (
    PENDING,
    ErasureRow,
    Invitation,
    Member,
    ProfileRow,
    Role,
    ServiceErasureRow,
    Team,
    TeamMember,
    User,
    Workspace,
)

_BUILTIN_ROLES = {
    "viewer": "Sees everything, and asks questions of it.",
    "editor": "Makes and changes sources, cohorts, dashboards and folders too.",
    "admin": "Manages members, teams, roles and grants too, and deletes what others have made.",
    "owner": "May do everything, also delete the workspace and hand it over.",
}


def user_to_pb(row: User, seen_from: str | None = None) -> user_pb2.User:
    """The user; `seen_from` a workspace whose members need not know which other one manages the account."""
    managing_workspace_id = row.managing_workspace_id or ""
    if seen_from is not None and seen_from != managing_workspace_id:
        managing_workspace_id = ""
    version = row.avatar_version
    return user_pb2.User(
        user_id=row.user_id,
        display_name=row.display_name,
        email=row.email,
        create_time=timestamp_of(row.create_time),
        update_time=timestamp_of(row.update_time),
        etag=str(row.version),
        kind=user_pb2.User.Kind.Value(row.kind),
        state=user_pb2.User.State.Value(row.state),
        managing_workspace_id=managing_workspace_id,
        avatar_url="" if version is None else f"/v1/users/{row.user_id}/avatar?version={version}",
    )


def profile_to_pb(row: ProfileRow | None) -> profile_pb2.Profile:
    """The profile; without a row as it is in the beginning."""
    if row is None:
        return profile_pb2.Profile(
            theme=profile_pb2.Profile.SYSTEM,
            notifications=profile_pb2.Profile.Notifications(reports=True, alerts=True),
            etag="0",
        )
    return profile_pb2.Profile(
        locale=row.locale,
        time_zone=row.time_zone,
        theme=profile_pb2.Profile.Theme.Value(row.theme),
        notifications=profile_pb2.Profile.Notifications(
            product_news=row.notify_product_news, reports=row.notify_reports, alerts=row.notify_alerts
        ),
        update_time=timestamp_of(row.update_time),
        etag=str(row.version),
    )


def erasure_to_pb(row: ErasureRow, services: Iterable[ServiceErasureRow] = ()) -> erasure_service_pb2.Erasure:
    """The erasure, with what the services have done for it."""
    message = erasure_service_pb2.Erasure
    return message(
        erasure_id=row.erasure_id,
        user_id=row.user_id,
        state=message.DONE if row.complete_time else message.RUNNING,
        create_time=timestamp_of(row.create_time),
        complete_time=timestamp_of(row.complete_time) if row.complete_time else None,
        services=[
            erasure_service_pb2.ServiceErasure(
                service=each.service,
                complete_time=timestamp_of(each.complete_time),
                erased=each.erased,
                kept=each.kept,
            )
            for each in services
        ],
        receipt=row.receipt or "",
    )


def workspace_to_pb(row: Workspace) -> workspace_pb2.Workspace:
    """The workspace."""
    return workspace_pb2.Workspace(
        workspace_id=row.workspace_id,
        title=row.title,
        create_time=timestamp_of(row.create_time),
        update_time=timestamp_of(row.update_time),
        etag=str(row.version),
        require_second_factor=row.require_second_factor,
        default_role=row.default_role,
        allowed_email_domains=row.allowed_email_domains,
    )


def member_to_pb(row: Member, user: User) -> workspace_pb2.Member:
    """The member with its user."""
    return workspace_pb2.Member(
        workspace_id=row.workspace_id,
        user=user_to_pb(user, seen_from=row.workspace_id),
        role=row.role,
        create_time=timestamp_of(row.create_time),
    )


def team_to_pb(row: Team) -> workspace_pb2.Team:
    """The team."""
    return workspace_pb2.Team(
        team_id=row.team_id,
        workspace_id=row.workspace_id,
        title=row.title,
        parent_team_id=row.parent_team_id or "",
        create_time=timestamp_of(row.create_time),
        update_time=timestamp_of(row.update_time),
        etag=str(row.version),
        description=row.description,
        depth=row.depth,
    )


def team_member_to_pb(
    row: TeamMember | None, user: User, via_team_ids: Iterable[str] = ()
) -> workspace_pb2.TeamMember:
    """The membership; without a row the user is in the team by way of others alone."""
    member = workspace_pb2.TeamMember(user=user_to_pb(user), via_team_ids=sorted(via_team_ids))
    if row is not None:
        member.direct = True
        member.role = workspace_pb2.TeamMember.Role.Value(row.role)
        member.create_time.CopyFrom(timestamp_of(row.create_time))
        if row.expire_time:
            member.expire_time.CopyFrom(timestamp_of(row.expire_time))
    return member


def invitation_to_pb(row: Invitation, now: datetime) -> invitation_pb2.Invitation:
    """The invitation as it is now."""
    expired = row.state == PENDING and row.expire_time <= now
    return invitation_pb2.Invitation(
        invitation_id=row.invitation_id,
        workspace_id=row.workspace_id,
        email=row.email,
        role=row.role,
        team_ids=row.team_ids,
        state=invitation_pb2.Invitation.State.Value("EXPIRED" if expired else row.state),
        inviter_id=row.inviter_id,
        acceptor_id=row.acceptor_id or "",
        create_time=timestamp_of(row.create_time),
        send_time=timestamp_of(row.send_time),
        expire_time=timestamp_of(row.expire_time),
    )


def role_to_pb(row: Role) -> role_pb2.Role:
    """The custom role."""
    return role_pb2.Role(
        workspace_id=row.workspace_id,
        name=row.name,
        title=row.title,
        description=row.description,
        permissions=row.permissions,
        create_time=timestamp_of(row.create_time),
        update_time=timestamp_of(row.update_time),
        etag=str(row.version),
    )


def builtin_role_to_pb(workspace_id: str, name: str) -> role_pb2.Role:
    """A role that every workspace has."""
    return role_pb2.Role(
        workspace_id=workspace_id,
        name=name,
        title=name.capitalize(),
        description=_BUILTIN_ROLES[name],
        permissions=sorted(ROLES[name]),
        builtin=True,
    )


def rights_to_pb(rights: Rights) -> workspace_pb2.Rights:
    """The rights, with sorted lists."""
    return workspace_pb2.Rights(
        user_id=rights.user_id,
        workspace_id=rights.workspace_id,
        role=rights.role,
        permissions=sorted(rights.permissions),
        team_ids=sorted(rights.team_ids),
        version=rights.version,
        second_factor_required=rights.second_factor_required,
        custom_roles=[
            workspace_pb2.Rights.CustomRole(name=name, permissions=sorted(permissions))
            for name, permissions in sorted(rights.roles.items())
        ],
        expire_time=timestamp_of(rights.expire_time) if rights.expire_time else None,
    )
