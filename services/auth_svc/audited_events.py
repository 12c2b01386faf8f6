"""What happens in other services and matters to security, as entries of the audit log."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import Message
from meshboard.analytics.v1.events_pb2 import (
    FailedEventsDiscarded,
    FailedEventUpdated,
    SourceCreated,
    SourceDeleted,
    SourceGrantCreated,
    SourceGrantDeleted,
    SourceUpdated,
    WriteKeyCreated,
    WriteKeyDeleted,
    WriteKeyRotated,
    WriteKeyUpdated,
)
from meshboard.dashboard.v1.events_pb2 import (
    DashboardCreated,
    DashboardDeleted,
    DashboardGrantCreated,
    DashboardGrantDeleted,
    DashboardMoved,
    DashboardPublished,
    DashboardPurged,
    DashboardUndeleted,
    FolderCreated,
    FolderDeleted,
    FolderGrantCreated,
    FolderGrantDeleted,
    FolderMoved,
    FolderUpdated,
    ShareLinkCreated,
    ShareLinkDeleted,
    ShareLinkUpdated,
    VersionRestored,
    WidgetKindCreated,
    WidgetKindDeleted,
    WidgetKindUpdated,
)
from meshboard.user.v1.events_pb2 import (
    InvitationAccepted,
    InvitationCreated,
    InvitationDeclined,
    InvitationResent,
    InvitationRevoked,
    MemberAdded,
    MemberRemoved,
    MemberUpdated,
    RoleCreated,
    RoleDeleted,
    RoleUpdated,
    TeamCreated,
    TeamDeleted,
    TeamMemberAdded,
    TeamMemberRemoved,
    TeamMemberUpdated,
    TeamUpdated,
    UserErasureCompleted,
    UserErasureRequested,
    UserStateChanged,
    WorkspaceCreated,
    WorkspaceDeleted,
    WorkspaceUpdated,
)
from sqlalchemy.ext.asyncio import AsyncSession

from services.auth_svc import audit
from services.auth_svc.origins import Origin
from services.chassis import inbox, outbox
from services.chassis.inbox import Handler


@dataclass(frozen=True, slots=True)
class Rule:
    """The kind of the entry, the field that names the account acted upon, and its details by field."""

    kind: str
    subject: str = ""
    details: Mapping[str, str] = field(default_factory=dict)


_GRANT = {
    "grant_id": "grant.grant_id",
    "role": "grant.role",
    "effect": "grant.effect",
    "team_id": "grant.subject.team_id",
    "everyone": "grant.subject.workspace",
}
_SHARE_LINK = {
    "dashboard_id": "share_link.dashboard_id",
    "share_link_id": "share_link.share_link_id",
    "title": "share_link.title",
    "has_password": "share_link.has_password",
    "paused": "share_link.paused",
}
_WIDGET_KIND = {
    "widget_kind_id": "widget_kind.widget_kind_id",
    "name": "widget_kind.name",
    "version": "widget_kind.version",
}
_WRITE_KEY = {"source_id": "write_key.source_id", "write_key_id": "write_key.write_key_id"}

AUDITED: Mapping[type[Message], Rule] = {
    WorkspaceCreated: Rule("workspace.created", "", {"title": "workspace.title"}),
    WorkspaceUpdated: Rule(
        "workspace.updated",
        "",
        {
            "title": "workspace.title",
            "require_second_factor": "workspace.require_second_factor",
            "default_role": "workspace.default_role",
            "allowed_email_domains": "workspace.allowed_email_domains",
        },
    ),
    WorkspaceDeleted: Rule("workspace.deleted"),
    UserStateChanged: Rule("user.state_changed", "user_id", {"state": "state"}),
    UserErasureRequested: Rule("user.erasure_requested", "user_id", {"erasure_id": "erasure_id"}),
    UserErasureCompleted: Rule("user.erased", "user_id", {"erasure_id": "erasure_id"}),
    MemberAdded: Rule("member.added", "member.user.user_id", {"role": "member.role"}),
    MemberUpdated: Rule("member.updated", "member.user.user_id", {"role": "member.role"}),
    MemberRemoved: Rule("member.removed", "user_id"),
    TeamCreated: Rule("team.created", "", {"team_id": "team.team_id", "title": "team.title"}),
    TeamUpdated: Rule(
        "team.updated",
        "",
        {"team_id": "team.team_id", "title": "team.title", "parent_team_id": "team.parent_team_id"},
    ),
    TeamDeleted: Rule("team.deleted", "", {"team_id": "team_id"}),
    TeamMemberAdded: Rule("team_member.added", "user_id", {"team_id": "team_id", "role": "role"}),
    TeamMemberUpdated: Rule("team_member.updated", "user_id", {"team_id": "team_id", "role": "role"}),
    TeamMemberRemoved: Rule("team_member.removed", "user_id", {"team_id": "team_id"}),
    RoleCreated: Rule("role.created", "", {"role": "role.name", "permissions": "role.permissions"}),
    RoleUpdated: Rule(
        "role.updated",
        "",
        {
            "role": "role.name",
            "title": "role.title",
            "added_permissions": "added_permissions",
            "removed_permissions": "removed_permissions",
        },
    ),
    RoleDeleted: Rule("role.deleted", "", {"role": "name"}),
    InvitationCreated: Rule(
        "invitation.created",
        "",
        {"invitation_id": "invitation.invitation_id", "role": "invitation.role"},
    ),
    InvitationResent: Rule("invitation.resent", "", {"invitation_id": "invitation_id"}),
    InvitationRevoked: Rule("invitation.revoked", "", {"invitation_id": "invitation_id"}),
    InvitationAccepted: Rule("invitation.accepted", "user_id", {"invitation_id": "invitation_id"}),
    InvitationDeclined: Rule("invitation.declined", "", {"invitation_id": "invitation_id"}),
    DashboardCreated: Rule("dashboard.created", "", {"dashboard_id": "dashboard.dashboard_id"}),
    DashboardMoved: Rule(
        "dashboard.moved",
        "",
        {
            "dashboard_id": "dashboard.dashboard_id",
            "folder_id": "dashboard.folder_id",
            "from_folder_id": "from_folder_id",
        },
    ),
    DashboardDeleted: Rule("dashboard.deleted", "", {"dashboard_id": "dashboard_id"}),
    DashboardUndeleted: Rule("dashboard.undeleted", "", {"dashboard_id": "dashboard.dashboard_id"}),
    DashboardPurged: Rule("dashboard.purged", "", {"dashboard_id": "dashboard_id"}),
    DashboardPublished: Rule("dashboard.published", "", {"dashboard_id": "dashboard.dashboard_id"}),
    VersionRestored: Rule(
        "dashboard.restored", "", {"dashboard_id": "dashboard_id", "version_id": "version_id"}
    ),
    WidgetKindCreated: Rule("widget_kind.created", "", _WIDGET_KIND),
    WidgetKindUpdated: Rule("widget_kind.updated", "", _WIDGET_KIND),
    WidgetKindDeleted: Rule("widget_kind.deleted", "", {"widget_kind_id": "widget_kind_id", "name": "name"}),
    ShareLinkCreated: Rule("share_link.created", "", _SHARE_LINK),
    ShareLinkUpdated: Rule("share_link.updated", "", {**_SHARE_LINK, "fields": "fields"}),
    ShareLinkDeleted: Rule(
        "share_link.deleted", "", {"dashboard_id": "dashboard_id", "share_link_id": "share_link_id"}
    ),
    DashboardGrantCreated: Rule(
        "grant.created", "grant.subject.user_id", {"dashboard_id": "dashboard_id", **_GRANT}
    ),
    DashboardGrantDeleted: Rule(
        "grant.deleted", "", {"dashboard_id": "dashboard_id", "grant_id": "grant_id"}
    ),
    FolderCreated: Rule(
        "folder.created",
        "",
        {
            "folder_id": "folder.folder_id",
            "parent_folder_id": "folder.parent_folder_id",
            "title": "folder.title",
        },
    ),
    FolderUpdated: Rule("folder.updated", "", {"folder_id": "folder.folder_id", "title": "folder.title"}),
    FolderMoved: Rule(
        "folder.moved",
        "",
        {
            "folder_id": "folder.folder_id",
            "parent_folder_id": "folder.parent_folder_id",
            "from_parent_folder_id": "from_parent_folder_id",
        },
    ),
    FolderDeleted: Rule("folder.deleted", "", {"folder_id": "folder_id"}),
    FolderGrantCreated: Rule("grant.created", "grant.subject.user_id", {"folder_id": "folder_id", **_GRANT}),
    FolderGrantDeleted: Rule("grant.deleted", "", {"folder_id": "folder_id", "grant_id": "grant_id"}),
    SourceCreated: Rule("source.created", "", {"source_id": "source.source_id"}),
    SourceDeleted: Rule("source.deleted", "", {"source_id": "source_id"}),
    SourceUpdated: Rule(
        "source.updated",
        "",
        {
            "source_id": "source.source_id",
            "allowed_origins": "source.allowed_origins",
            "redacted_properties": "source.redacted_properties",
            "retention_days": "source.retention_days",
        },
    ),
    WriteKeyCreated: Rule("write_key.created", "", {**_WRITE_KEY, "title": "write_key.title"}),
    WriteKeyUpdated: Rule("write_key.updated", "", {**_WRITE_KEY, "title": "write_key.title"}),
    WriteKeyRotated: Rule("write_key.rotated", "", {"source_id": "source_id"}),
    WriteKeyDeleted: Rule(
        "write_key.deleted", "", {"source_id": "source_id", "write_key_id": "write_key_id"}
    ),
    FailedEventUpdated: Rule(
        "failed_event.updated", "", {"source_id": "source_id", "failed_event_id": "failed_event_id"}
    ),
    FailedEventsDiscarded: Rule("failed_events.discarded", "", {"source_id": "source_id"}),
    SourceGrantCreated: Rule("grant.created", "grant.subject.user_id", {"source_id": "source_id", **_GRANT}),
    SourceGrantDeleted: Rule("grant.deleted", "", {"source_id": "source_id", "grant_id": "grant_id"}),
}


def audited(handlers: Mapping[type[Message], Handler]) -> dict[type[Message], Handler]:
    """These handlers, and an entry for each event of AUDITED, in one transaction where an event has both."""
    every: dict[type[Message], Handler] = {**dict.fromkeys(AUDITED, record_event), **handlers}
    return {
        message_type: _both(handler) if message_type in AUDITED and message_type in handlers else handler
        for message_type, handler in every.items()
    }


def _both(handler: Handler) -> Handler:
    async def handle(session: AsyncSession, event: Message) -> None:
        await record_event(session, event)
        await handler(session, event)

    return handle


async def record_event(session: AsyncSession, event: Message) -> None:
    """Adds the entry of an event that is being consumed; who caused it stands in the event's headers."""
    rule, about = AUDITED[type(event)], inbox.current.get()
    actor_id, _, impersonator_id = about.headers.get(outbox.ACTOR, "").partition(",")
    details = {name: _value(event, path) for name, path in rule.details.items()}
    audit.record(
        session,
        rule.kind,
        Origin(),
        about.store_time,
        actor_id=actor_id,
        impersonator_id=impersonator_id,
        subject_id=_value(event, rule.subject) if rule.subject else "",
        workspace_id=about.workspace_id,
        **{name: value for name, value in details.items() if value or name == "require_second_factor"},
    )


def _value(message: Any, path: str) -> Any:
    """The value of a field by its path; of an enum its name, of a repeated field a list."""
    *parents, name = path.split(".")
    for parent in parents:
        message = getattr(message, parent)
    value, field = getattr(message, name), message.DESCRIPTOR.fields_by_name[name]
    if field.is_repeated:
        return list(value)
    enum = field.enum_type
    return enum.values_by_number[value].name if enum else value
