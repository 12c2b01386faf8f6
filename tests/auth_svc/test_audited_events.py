"""Entries for what happens in other services."""

from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from google.protobuf.message import Message
from meshboard.analytics.v1 import events_pb2 as analytics_events
from meshboard.analytics.v1.events_pb2 import (
    FailedEventsDiscarded,
    FailedEventUpdated,
    SourceGrantCreated,
    WriteKeyRotated,
)
from meshboard.auth.v1 import events_pb2 as auth_events
from meshboard.dashboard.v1 import events_pb2 as dashboard_events
from meshboard.dashboard.v1.events_pb2 import (
    DashboardGrantCreated,
    DashboardGrantDeleted,
    FolderGrantCreated,
    FolderMoved,
)
from meshboard.dashboard.v1.folder_pb2 import Folder
from meshboard.user.v1 import events_pb2 as user_events
from meshboard.user.v1.events_pb2 import (
    MemberRemoved,
    MemberUpdated,
    RoleUpdated,
    UserUpdated,
    WorkspaceUpdated,
)
from meshboard.user.v1.grant_pb2 import Grant, Subject
from meshboard.user.v1.role_pb2 import Role
from meshboard.user.v1.user_pb2 import User
from meshboard.user.v1.workspace_pb2 import Member, Workspace
from meshboard.user.v1.workspace_service_pb2 import (
    CreateWorkspaceRequest,
    RemoveMemberRequest,
    UpdateMemberRequest,
)
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from services.auth_svc.audited_events import AUDITED, audited, record_event
from services.auth_svc.models import AuditEntryRow
from services.chassis import inbox
from services.chassis.inbox import Event
from tests.auth_svc.conftest import Services, bearer
from tests.conditions import eventually
from tests.harness import new_id

# Events that leave no entry of their own, and why.
NOT_AUDITED = {
    "analytics.v1.CatalogueEventUpdated": "descriptions are no matter of security",
    "analytics.v1.CataloguePropertyUpdated": "descriptions are no matter of security",
    "analytics.v1.CohortCreated": "cohorts are saved questions: they give nobody anything to see",
    "analytics.v1.CohortUpdated": "as above",
    "analytics.v1.CohortDeleted": "as above",
    "analytics.v1.FailedEventsRetried": "stores what was accepted, unchanged",
    "analytics.v1.Tick": "tells of data, and is not stored",
    "auth.v1.AccountCreated": "auth_svc writes the entry where it happens",
    "auth.v1.AccountDiscarded": "nobody has ever used the account",
    "auth.v1.SignedIn": "auth_svc writes the entry where it happens",
    "auth.v1.SessionRevoked": "auth_svc writes the entry where it happens",
    "auth.v1.EmailVerified": "auth_svc writes the entry where it happens",
    "auth.v1.EmailChanged": "auth_svc writes the entry where it happens",
    "auth.v1.SigningKeyRetired": "auth_svc writes the entry where it happens",
    "auth.v1.AuditEntrySealed": "is the entry",
    "auth.v1.AuditHeadPublished": "is about the entries",
    "dashboard.v1.DashboardUpdated": "what a dashboard shows is no matter of security",
    "dashboard.v1.DraftStarted": "nobody sees more or less by it",
    "dashboard.v1.DraftDiscarded": "nobody sees more or less by it",
    "dashboard.v1.DashboardFavourited": "marks are the user's own, and give no right",
    "dashboard.v1.DashboardUnfavourited": "marks are the user's own, and give no right",
    "dashboard.v1.AnnotationCreated": "what a dashboard shows is no matter of security",
    "dashboard.v1.AnnotationUpdated": "what a dashboard shows is no matter of security",
    "dashboard.v1.AnnotationDeleted": "what a dashboard shows is no matter of security",
    "dashboard.v1.LibraryWidgetCreated": "what a dashboard shows is no matter of security",
    "dashboard.v1.LibraryWidgetUpdated": "what a dashboard shows is no matter of security",
    "dashboard.v1.LibraryWidgetDeleted": "what a dashboard shows is no matter of security",
    "dashboard.v1.WidgetCreated": "what a dashboard shows is no matter of security",
    "dashboard.v1.WidgetUpdated": "what a dashboard shows is no matter of security",
    "dashboard.v1.WidgetDeleted": "what a dashboard shows is no matter of security",
    "user.v1.UserCreated": "auth_svc writes the entry of the sign-up or of the service account",
    "user.v1.UserUpdated": "names are no matter of security; what can be done with them is",
    "user.v1.ProfileUpdated": "preferences are no matter of security",
    "user.v1.UserErased": "UserErasureCompleted has the entry",
    "user.v1.RightsChanged": "follows from a change that has an entry",
}

TIME = datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC)
WORKSPACE, ACTOR, ADMIN, USER, THING = (new_id() for _ in range(5))


@pytest.fixture
def consumed() -> Iterator[None]:
    """What the inbox says of the event, of which somebody is cause in the name of somebody else."""
    token = inbox.current.set(Event(new_id(), WORKSPACE, {"Actor": f"{ACTOR},{ADMIN}"}, 1, TIME))
    yield
    inbox.current.reset(token)


async def entry_of(services: Services, event: Message) -> AuditEntryRow:
    async with services.sessions() as session:
        await record_event(session, event)
        entry = next(row for row in session.new if isinstance(row, AuditEntryRow))
        session.expunge_all()
        return entry


@pytest.mark.usefixtures("consumed")
@pytest.mark.parametrize(
    ("event", "kind", "subject_id", "details"),
    [
        (
            MemberUpdated(member=Member(user=User(user_id=USER, display_name="Ada"), role="admin")),
            "member.updated",
            USER,
            {"role": "admin"},
        ),
        (MemberRemoved(workspace_id=WORKSPACE, user_id=USER), "member.removed", USER, {}),
        (
            WorkspaceUpdated(workspace=Workspace(title="Shop", allowed_email_domains=["a.org", "b.org"])),
            "workspace.updated",
            "",
            {"title": "Shop", "require_second_factor": False, "allowed_email_domains": ["a.org", "b.org"]},
        ),
        (
            DashboardGrantCreated(
                dashboard_id=THING,
                grant=Grant(grant_id="g", role="editor", effect=Grant.DENY, subject=Subject(user_id=USER)),
            ),
            "grant.created",
            USER,
            {"dashboard_id": THING, "grant_id": "g", "role": "editor", "effect": "DENY"},
        ),
        (
            SourceGrantCreated(
                source_id=THING,
                grant=Grant(grant_id="g", role="viewer", effect=Grant.ALLOW, subject=Subject(workspace=True)),
            ),
            "grant.created",
            "",
            {"source_id": THING, "grant_id": "g", "role": "viewer", "effect": "ALLOW", "everyone": True},
        ),
        (
            DashboardGrantDeleted(dashboard_id=THING, grant_id="g"),
            "grant.deleted",
            "",
            {"dashboard_id": THING, "grant_id": "g"},
        ),
        (
            RoleUpdated(role=Role(name="analyst", title="Analyst"), added_permissions=["sources.query"]),
            "role.updated",
            "",
            {"role": "analyst", "title": "Analyst", "added_permissions": ["sources.query"]},
        ),
        (
            FolderMoved(folder=Folder(folder_id=THING, parent_folder_id="p"), from_parent_folder_id="q"),
            "folder.moved",
            "",
            {"folder_id": THING, "parent_folder_id": "p", "from_parent_folder_id": "q"},
        ),
        (
            FolderGrantCreated(
                folder_id=THING,
                grant=Grant(grant_id="g", role="guest", effect=Grant.DENY, subject=Subject(team_id="t")),
            ),
            "grant.created",
            "",
            {"folder_id": THING, "grant_id": "g", "role": "guest", "effect": "DENY", "team_id": "t"},
        ),
        (WriteKeyRotated(source_id=THING), "write_key.rotated", "", {"source_id": THING}),
        (
            FailedEventUpdated(source_id=THING, failed_event_id=THING),
            "failed_event.updated",
            "",
            {"source_id": THING, "failed_event_id": THING},
        ),
        (
            FailedEventsDiscarded(source_id=THING, failed_event_ids=[THING]),
            "failed_events.discarded",
            "",
            {"source_id": THING},
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Message) else "",
)
async def test_an_event_becomes_an_entry(
    services: Services, event: Message, kind: str, subject_id: str, details: dict[str, object]
):
    entry = await entry_of(services, event)
    assert (entry.kind, entry.subject_id, entry.details) == (kind, subject_id, details)
    assert (entry.actor_id, entry.impersonator_id) == (ACTOR, ADMIN)
    assert (entry.workspace_id, entry.time, entry.outcome) == (WORKSPACE, TIME, "DONE")


def test_each_event_is_audited_or_has_a_reason_not_to_be():
    events = {
        f"{message.full_name.removeprefix('meshboard.')}"
        for module in (analytics_events, auth_events, dashboard_events, user_events)
        for message in module.DESCRIPTOR.message_types_by_name.values()
    }
    audited = {kind.DESCRIPTOR.full_name.removeprefix("meshboard.") for kind in AUDITED}
    assert not audited & NOT_AUDITED.keys()
    assert audited | NOT_AUDITED.keys() == events


@pytest.mark.usefixtures("consumed")
@pytest.mark.parametrize("kind", AUDITED, ids=lambda kind: kind.DESCRIPTOR.name)
async def test_the_fields_of_each_rule_exist(services: Services, kind: type[Message]):
    assert (await entry_of(services, kind())).kind == AUDITED[kind].kind


@pytest.mark.usefixtures("consumed")
async def test_a_handler_of_the_same_event_works_too(services: Services):
    heard: list[Message] = []

    async def handler(session: AsyncSession, event: Message) -> None:
        heard.append(event)

    handlers = audited({MemberRemoved: handler, UserUpdated: handler})
    assert set(handlers) == {*AUDITED, UserUpdated}
    async with services.sessions() as session:
        await handlers[MemberRemoved](session, MemberRemoved())
        await handlers[UserUpdated](session, UserUpdated())
        await handlers[MemberUpdated](session, MemberUpdated())
        kinds = [row.kind for row in session.new if isinstance(row, AuditEntryRow)]
        session.expunge_all()
    assert heard == [MemberRemoved(), UserUpdated()]
    assert sorted(kinds) == ["member.removed", "member.updated"]


async def test_who_did_what_to_members_is_known(services: Services):
    owner, guest = await services.sign_up(), await services.sign_up()
    metadata = bearer(owner.access_token)
    shared = await services.workspaces.CreateWorkspace(
        CreateWorkspaceRequest(title="Shared"), metadata=metadata
    )
    workspace_id, user_id = shared.workspace.workspace_id, guest.user.user_id
    await services.admit(workspace_id, metadata, user_id, guest.access_token)
    await services.workspaces.UpdateMember(
        UpdateMemberRequest(workspace_id=workspace_id, user_id=user_id, role="editor"), metadata=metadata
    )
    await services.workspaces.RemoveMember(
        RemoveMemberRequest(workspace_id=workspace_id, user_id=user_id), metadata=metadata
    )
    expected = {
        ("workspace.created", "", ""),
        ("member.added", owner.user.user_id, "owner"),
        ("invitation.created", "", "viewer"),
        ("invitation.accepted", user_id, ""),
        ("member.added", user_id, "viewer"),
        ("member.updated", user_id, "editor"),
        ("member.removed", user_id, ""),
    }

    async def arrived() -> bool:
        async with services.sessions() as session:
            rows = list(
                await session.scalars(select(AuditEntryRow).where(AuditEntryRow.workspace_id == workspace_id))
            )
        for row in rows:
            by_guest = row.kind == "invitation.accepted" or (row.kind, row.subject_id) == (
                "member.added",
                user_id,
            )
            assert row.actor_id == (user_id if by_guest else owner.user.user_id), row.kind
        return {(row.kind, row.subject_id, row.details.get("role", "")) for row in rows} == expected

    await eventually(arrived)
