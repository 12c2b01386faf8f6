"""Roles that a workspace defines: making, changing and deleting them."""

import asyncio
from collections.abc import Awaitable, Iterable
from typing import Any

import grpc.aio
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from grpc import StatusCode
from meshboard.user.v1.events_pb2 import RightsChanged, RoleCreated, RoleDeleted, RoleUpdated
from meshboard.user.v1.invitation_service_pb2 import RevokeInvitationRequest
from meshboard.user.v1.role_pb2 import Role
from meshboard.user.v1.role_service_pb2 import (
    CreateRoleRequest,
    DeleteRoleRequest,
    GetRoleRequest,
    ListRolesRequest,
    UpdateRoleRequest,
)
from meshboard.user.v1.workspace_pb2 import Workspace
from meshboard.user.v1.workspace_service_pb2 import UpdateWorkspaceRequest
from sqlalchemy import select

from services.chassis.db import OutboxRow
from services.chassis.rights import ROLES
from services.user_svc.roles import MAX_ROLES
from tests.harness import reason_of, refused
from tests.statements import statements_on
from tests.user_svc.conftest import LONG, Person, UserSvc
from tests.user_svc.roles import VIEW, allow, create, give, member_with, rights_of

ANALYST = ("dashboards.list", "dashboards.view", "sources.view", "sources.query")


def deleting(person: Person, name: str) -> DeleteRoleRequest:
    return DeleteRoleRequest(workspace_id=person.workspace_id, name=name)


async def names(svc: UserSvc, person: Person, **page: Any) -> list[str]:
    request = ListRolesRequest(workspace_id=person.workspace_id, **page)
    return [role.name for role in (await svc.roles.ListRoles(request, metadata=person.metadata)).roles]


async def told(svc: UserSvc, person: Person, *kinds: type[Message]) -> list[Message]:
    by_subject = {kind.DESCRIPTOR.full_name: kind for kind in kinds}
    async with svc.sessions() as session:
        rows = await session.scalars(
            select(OutboxRow).where(OutboxRow.subject.in_(by_subject)).order_by(OutboxRow.id)
        )
        return [
            by_subject[row.subject].FromString(row.payload)
            for row in rows
            if row.headers.get("Workspace-Id") == person.workspace_id
        ]


async def test_a_role_is_made_and_found(svc: UserSvc, owner: Person):
    made = await create(svc, owner, "analyst", ANALYST, title="Analyst", description="Asks questions")
    assert (made.name, made.title, made.description) == ("analyst", "Analyst", "Asks questions")
    assert list(made.permissions) == sorted({VIEW, *ANALYST})
    assert made.etag
    assert not made.builtin
    request = GetRoleRequest(workspace_id=owner.workspace_id, name="analyst")
    assert (await svc.roles.GetRole(request, metadata=owner.metadata)).role == made
    assert await told(svc, owner, RoleCreated) == [RoleCreated(role=made)]


async def test_a_repeat_returns_the_first_role(svc: UserSvc, owner: Person):
    first = await create(svc, owner, "analyst", ANALYST, request_id="once")
    version = (await rights_of(svc, owner)).version
    assert await create(svc, owner, "other", request_id="once") == first
    assert (await rights_of(svc, owner)).version == version
    assert await names(svc, owner) == [*ROLES, "analyst"]


@pytest.mark.parametrize("name", ["analyst", "viewer", "owner"])
async def test_a_name_is_taken_once(svc: UserSvc, owner: Person, name: str):
    await create(svc, owner, "analyst")
    outcome = await refused(create(svc, owner, name, request_id="another"))
    assert outcome == (StatusCode.ALREADY_EXISTS, "ROLE_EXISTS")


@pytest.mark.parametrize("name", ["", "a", "Analyst", "1st", "an_alyst", "a" * 41, "a b", "rôle"])
async def test_a_name_is_a_slug(svc: UserSvc, owner: Person, name: str):
    outcome = await refused(create(svc, owner, name))
    assert outcome == (StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")


@pytest.mark.parametrize(
    ("permissions", "reason"),
    [
        ((VIEW, "dashboards.edti"), "PERMISSION_UNKNOWN"),
        ((VIEW, "workspaces.delete"), "PERMISSION_RESERVED"),
        ((VIEW, "workspaces.transfer"), "PERMISSION_RESERVED"),
        ((VIEW, "dashboards.edit"), "PERMISSION_INCOMPLETE"),
        ((VIEW, "members.impersonate"), "PERMISSION_INCOMPLETE"),
        (("dashboards.view",), "PERMISSION_INCOMPLETE"),
        ((), "PERMISSION_INCOMPLETE"),
    ],
)
async def test_permissions_must_make_sense(
    svc: UserSvc, owner: Person, permissions: Iterable[str], reason: str
):
    await create(svc, owner, "sound")
    calls: list[Awaitable[object]] = [
        svc.roles.CreateRole(
            CreateRoleRequest(workspace_id=owner.workspace_id, name="odd", permissions=permissions),
            metadata=owner.metadata,
        ),
        svc.roles.UpdateRole(
            UpdateRoleRequest(
                role=Role(workspace_id=owner.workspace_id, name="sound", permissions=permissions),
                update_mask=FieldMask(paths=["permissions"]),
            ),
            metadata=owner.metadata,
        ),
    ]
    for call in calls:
        assert await refused(call) == (StatusCode.INVALID_ARGUMENT, reason)


async def test_the_nearest_permissions_are_named(svc: UserSvc, owner: Person):
    with pytest.raises(grpc.aio.AioRpcError, match=r"Did you mean dashboards\.edit"):
        await create(svc, owner, "odd", ["dashboards.edti"])


async def test_a_title_deceives_nobody(svc: UserSvc, owner: Person):
    outcome = await refused(create(svc, owner, "odd", title="Ad\u202emin"))
    assert outcome == (StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")
    assert (await create(svc, owner, "odd", title=" Cafe\u0301 ")).title == "Caf\u00e9"


async def test_what_one_makes_oneself_needs_no_sight_of_the_rest(svc: UserSvc, owner: Person):
    made = await create(svc, owner, "guest", ["dashboards.create", "dashboards.list"])
    assert "dashboards.view" not in made.permissions


async def test_lists_the_built_in_roles_first(svc: UserSvc, owner: Person):
    for name in ("zoo", "ant"):
        await create(svc, owner, name)
    with statements_on(svc.url) as statements:
        assert await names(svc, owner) == ["viewer", "editor", "admin", "owner", "ant", "zoo"]
    assert len(statements) == 2, "one for the rights of the caller, one for the roles"
    found, page_token = list[str](), ""
    while True:
        request = ListRolesRequest(workspace_id=owner.workspace_id, page_size=1, page_token=page_token)
        page = await svc.roles.ListRoles(request, metadata=owner.metadata)
        found += [role.name for role in page.roles]
        page_token = page.next_page_token
        if not page_token:
            break
    assert found == await names(svc, owner)


async def test_built_in_roles_stay_as_they_are(svc: UserSvc, owner: Person):
    request = GetRoleRequest(workspace_id=owner.workspace_id, name="editor")
    editor = (await svc.roles.GetRole(request, metadata=owner.metadata)).role
    assert editor.builtin
    assert set(editor.permissions) == ROLES["editor"]
    for call in (
        allow(svc, owner, "viewer", ANALYST),
        svc.roles.DeleteRole(deleting(owner, "editor"), metadata=owner.metadata),
    ):
        assert await refused(call) == (StatusCode.FAILED_PRECONDITION, "ROLE_BUILTIN")


async def test_changes_what_the_mask_names(svc: UserSvc, owner: Person):
    made = await create(svc, owner, "analyst", ANALYST, description="old")
    version = (await rights_of(svc, owner)).version
    wanted = Role(workspace_id=owner.workspace_id, name="analyst", title="Analyst", description="new")
    request = UpdateRoleRequest(role=wanted, update_mask=FieldMask(paths=["title"]))
    changed = (await svc.roles.UpdateRole(request, metadata=owner.metadata)).role
    assert (changed.title, changed.description, changed.permissions) == ("Analyst", "old", made.permissions)
    assert changed.etag != made.etag
    assert (await rights_of(svc, owner)).version == version, "nobody's rights have changed"
    request.role.etag = made.etag
    outcome = await refused(svc.roles.UpdateRole(request, metadata=owner.metadata))
    assert outcome == (StatusCode.ABORTED, "ETAG_MISMATCH")
    request = UpdateRoleRequest(
        role=Role(workspace_id=owner.workspace_id, name="analyst"), update_mask=FieldMask(paths=["name"])
    )
    outcome = await refused(svc.roles.UpdateRole(request, metadata=owner.metadata))
    assert outcome == (StatusCode.INVALID_ARGUMENT, "UPDATE_MASK_INVALID")


async def test_a_changed_role_is_in_force_at_once(svc: UserSvc, owner: Person):
    analyst = await member_with(svc, owner, "analyst", ANALYST)
    before = await rights_of(svc, analyst)
    assert (before.role, set(before.permissions)) == ("analyst", {VIEW, *ANALYST})
    await allow(svc, owner, "analyst", ["members.view", "sources.view"])
    after = await rights_of(svc, analyst)
    assert set(after.permissions) == {VIEW, "members.view", "sources.view"}
    assert after.version == before.version + 1
    assert [(role.name, set(role.permissions)) for role in after.custom_roles] == [
        ("analyst", set(after.permissions))
    ]
    assert await told(svc, owner, RoleUpdated) == [
        RoleUpdated(
            role=Role.FromString((await role_of(svc, owner, "analyst")).SerializeToString()),
            added_permissions=["members.view"],
            removed_permissions=["dashboards.list", "dashboards.view", "sources.query"],
        )
    ]
    versions = [event.version for event in await told(svc, owner, RightsChanged)]  # type: ignore[attr-defined]
    assert versions[-1] == after.version


async def role_of(svc: UserSvc, person: Person, name: str) -> Role:
    request = GetRoleRequest(workspace_id=person.workspace_id, name=name)
    return (await svc.roles.GetRole(request, metadata=person.metadata)).role


async def test_rights_are_read_in_one_statement(svc: UserSvc, owner: Person):
    analyst = await member_with(svc, owner, "analyst", ANALYST)
    for n in range(5):
        await create(svc, owner, f"other-{n}", ANALYST)
    with statements_on(svc.url) as statements:
        rights = await rights_of(svc, analyst)
    assert len(statements) == 1
    assert len(rights.custom_roles) == 6


async def test_roles_belong_to_one_workspace(svc: UserSvc, owner: Person):
    await create(svc, owner, "analyst", ANALYST)
    stranger = await svc.person()
    assert await names(svc, stranger) == list(ROLES)
    outcome = await refused(role_of(svc, stranger, "analyst"))
    assert outcome == (StatusCode.NOT_FOUND, "ROLE_NOT_FOUND")
    outcome = await refused(svc.join(stranger, "analyst"))
    assert outcome == (StatusCode.INVALID_ARGUMENT, "ROLE_UNKNOWN")
    request = ListRolesRequest(workspace_id=owner.workspace_id)
    outcome = await refused(svc.roles.ListRoles(request, metadata=stranger.metadata))
    assert outcome == (StatusCode.NOT_FOUND, "WORKSPACE_NOT_FOUND")
    await create(svc, stranger, "analyst")  # the name is taken there only


async def test_members_see_roles_and_admins_define_them(svc: UserSvc, owner: Person):
    viewer, admin = await svc.join(owner, "viewer"), await svc.join(owner, "admin")
    await create(svc, admin, "analyst", ANALYST)
    assert "analyst" in await names(svc, viewer)
    for call in (
        create(svc, viewer, "mine"),
        allow(svc, viewer, "analyst", ()),
        svc.roles.DeleteRole(deleting(viewer, "analyst"), metadata=viewer.metadata),
    ):
        assert await refused(call) == (StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")


async def test_nobody_defines_more_than_they_can(svc: UserSvc, owner: Person):
    keeper = await member_with(svc, owner, "keeper", ["roles.view", "roles.edit"])
    await create(svc, owner, "analyst", ANALYST)
    for call in (
        create(svc, keeper, "mine", ["audit.view"]),
        allow(svc, keeper, "keeper", ["roles.view", "roles.edit", "audit.view"]),
        # Neither what a role becomes nor what it was may be beyond who changes it.
        allow(svc, keeper, "analyst", ()),
        svc.roles.UpdateRole(
            UpdateRoleRequest(role=Role(workspace_id=owner.workspace_id, name="analyst", title="Mine")),
            metadata=keeper.metadata,
        ),
        svc.roles.DeleteRole(deleting(keeper, "analyst"), metadata=keeper.metadata),
    ):
        assert await refused(call) == (StatusCode.PERMISSION_DENIED, "ROLE_TOO_HIGH")
    await create(svc, keeper, "mine", ["roles.view"])


async def test_there_is_a_limit(svc: UserSvc, owner: Person):
    for n in range(MAX_ROLES - 3):
        await create(svc, owner, f"role-{n}")
    calls = [create(svc, owner, f"late-{n}") for n in range(6)]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    failures = [reason_of(failure) for failure in outcomes if isinstance(failure, grpc.aio.AioRpcError)]
    assert failures == ["ROLE_LIMIT"] * 3
    assert len(await names(svc, owner, page_size=1000)) == MAX_ROLES + len(ROLES)


async def default(svc: UserSvc, owner: Person, role: str) -> None:
    workspace = Workspace(workspace_id=owner.workspace_id, default_role=role)
    await svc.workspaces.UpdateWorkspace(
        UpdateWorkspaceRequest(workspace=workspace, update_mask=FieldMask(paths=["default_role"])),
        metadata=owner.metadata,
    )


async def test_a_role_is_kept_while_somebody_is_to_get_it(svc: UserSvc, owner: Person):
    await create(svc, owner, "analyst")
    invitation = await svc.invite(owner, "new@example.org", role="analyst")
    outcome = await refused(svc.roles.DeleteRole(deleting(owner, "analyst"), metadata=owner.metadata))
    assert outcome == (StatusCode.FAILED_PRECONDITION, "ROLE_IN_USE")
    await svc.invitations.RevokeInvitation(
        RevokeInvitationRequest(workspace_id=owner.workspace_id, invitation_id=invitation.invitation_id),
        metadata=owner.metadata,
    )
    await default(svc, owner, "analyst")
    outcome = await refused(svc.roles.DeleteRole(deleting(owner, "analyst"), metadata=owner.metadata))
    assert outcome == (StatusCode.FAILED_PRECONDITION, "ROLE_IN_USE")
    await default(svc, owner, "viewer")
    await svc.roles.DeleteRole(deleting(owner, "analyst"), metadata=owner.metadata)


async def test_a_role_is_deleted_when_nobody_has_it(svc: UserSvc, owner: Person):
    analyst = await member_with(svc, owner, "analyst", ANALYST)
    outcome = await refused(svc.roles.DeleteRole(deleting(owner, "analyst"), metadata=owner.metadata))
    assert outcome == (StatusCode.FAILED_PRECONDITION, "ROLE_IN_USE")
    await give(svc, owner, analyst, "viewer")
    await svc.roles.DeleteRole(deleting(owner, "analyst"), metadata=owner.metadata)
    assert await names(svc, owner) == list(ROLES)
    assert not (await rights_of(svc, owner)).custom_roles
    assert await told(svc, owner, RoleDeleted) == [
        RoleDeleted(workspace_id=owner.workspace_id, name="analyst")
    ]
    outcome = await refused(svc.roles.DeleteRole(deleting(owner, "analyst"), metadata=owner.metadata))
    assert outcome == (StatusCode.NOT_FOUND, "ROLE_NOT_FOUND")
    outcome = await refused(allow(svc, owner, "analyst", ()))
    assert outcome == (StatusCode.NOT_FOUND, "ROLE_NOT_FOUND")


ROUNDS = pytest.mark.parametrize("rounds", [20, LONG])


async def outcome_of(call: Any) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as failure:
        return reason_of(failure)
    return "OK"


@ROUNDS
@pytest.mark.timeout(900)
async def test_nobody_keeps_a_role_that_is_gone(svc: UserSvc, owner: Person, rounds: int):
    member, lost = await svc.join(owner, "viewer"), set[tuple[str, str]]()
    for n in range(rounds):
        name = f"role-{n}"
        await create(svc, owner, name)
        outcomes = await asyncio.gather(
            *(
                outcome_of(call)
                for call in (
                    svc.roles.DeleteRole(deleting(owner, name), metadata=owner.metadata),
                    give(svc, owner, member, name),
                )[:: 1 if n % 2 else -1]
            )
        )
        deleted, given = outcomes[:: 1 if n % 2 else -1]
        lost.add((deleted, given))
        assert (await rights_of(svc, member)).role == (name if given == "OK" else "viewer")
        if given == "OK":
            await give(svc, owner, member, "viewer")
            await svc.roles.DeleteRole(deleting(owner, name), metadata=owner.metadata)
    assert lost <= {("OK", "ROLE_UNKNOWN"), ("ROLE_IN_USE", "OK")}
