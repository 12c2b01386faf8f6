"""Asking who may do what, from outside: the answers are what the services themselves decide."""

from collections.abc import AsyncIterator, Awaitable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import grpc.aio
import pytest
from grpc import StatusCode
from meshboard.auth.v1 import access_service_pb2 as pb
from meshboard.auth.v1.access_service_pb2 import AccessResource, CheckResponse
from meshboard.auth.v1.access_service_pb2_grpc import AccessServiceStub
from meshboard.dashboard.v1.dashboard_pb2 import Dashboard
from meshboard.dashboard.v1.dashboard_service_pb2 import (
    CreateDashboardGrantRequest,
    CreateDashboardRequest,
    GetDashboardRequest,
    UpdateDashboardRequest,
)
from meshboard.dashboard.v1.dashboard_service_pb2_grpc import DashboardServiceStub
from meshboard.dashboard.v1.folder_service_pb2 import CreateFolderGrantRequest, CreateFolderRequest
from meshboard.dashboard.v1.folder_service_pb2_grpc import FolderServiceStub
from meshboard.user.v1.grant_pb2 import Grant, Subject
from meshboard.user.v1.role_pb2 import Role
from meshboard.user.v1.role_service_pb2 import CreateRoleRequest, UpdateRoleRequest
from meshboard.user.v1.team_service_pb2 import AddTeamMemberRequest, CreateTeamRequest
from meshboard.user.v1.team_service_pb2_grpc import TeamServiceStub
from meshboard.user.v1.workspace_service_pb2 import AddMemberRequest

from services.chassis.rights import ROLES
from services.dashboard_svc.__main__ import serve as serve_dashboard
from services.dashboard_svc.settings import Settings as DashboardSettings
from services.user_svc.__main__ import serve as serve_user
from tests.auth_svc.conftest import Services, bearer, connected, make_both, running, running_auth
from tests.auth_svc.machines import Person, exchange, machine
from tests.auth_svc.machines import join as join_workspace
from tests.auth_svc.machines import owner_of as new_owner
from tests.conditions import eventually
from tests.harness import make_keys, make_settings, new_id, refused
from tests.mailbox import Mailbox
from tests.parts import Parts, free_port
from tests.statements import statements_on

ROLE, GRANT = CheckResponse.ROLE, CheckResponse.GRANT
NOT_FOUND, NOT_A_MEMBER = CheckResponse.RESOURCE_NOT_FOUND, CheckResponse.NOT_A_MEMBER


@dataclass(frozen=True)
class House:
    """auth_svc, user_svc and dashboard_svc; analytics_svc is away."""

    services: Services
    dashboard_url: str
    access: AccessServiceStub
    teams: TeamServiceStub
    dashboards: DashboardServiceStub
    folders: FolderServiceStub

    async def dashboard(self, person: Person, folder_id: str = "") -> str:
        """A dashboard of somebody."""
        request = CreateDashboardRequest(title="Sales", folder_id=folder_id)
        answer = await self.dashboards.CreateDashboard(request, metadata=in_workspace(person))
        return str(answer.dashboard.dashboard_id)

    async def folder(self, person: Person, parent_folder_id: str = "") -> str:
        """A folder of somebody."""
        request = CreateFolderRequest(title="Shop", parent_folder_id=parent_folder_id)
        return str((await self.folders.CreateFolder(request, metadata=in_workspace(person))).folder.folder_id)

    async def grant(self, person: Person, dashboard_id: str, role: str, **subject: Any) -> Grant:
        """A grant on a dashboard; `-editor` withholds."""
        request = CreateDashboardGrantRequest(
            dashboard_id=dashboard_id,
            subject=Subject(**subject),
            role=role.removeprefix("-"),
            effect=Grant.DENY if role.startswith("-") else Grant.ALLOW,
        )
        answer = await self.dashboards.CreateDashboardGrant(request, metadata=in_workspace(person))
        return answer.grant

    async def grant_on_folder(self, person: Person, folder_id: str, role: str, **subject: Any) -> Grant:
        """A grant on a folder."""
        request = CreateFolderGrantRequest(
            folder_id=folder_id,
            subject=Subject(**subject),
            role=role.removeprefix("-"),
            effect=Grant.DENY if role.startswith("-") else Grant.ALLOW,
        )
        return (await self.folders.CreateFolderGrant(request, metadata=in_workspace(person))).grant

    async def team(self, owner: Person, title: str, members: Iterable[Person] = (), above: str = "") -> str:
        """A team with members."""
        request = CreateTeamRequest(workspace_id=owner.workspace_id, title=title, parent_team_id=above)
        team_id = str((await self.teams.CreateTeam(request, metadata=owner.metadata)).team.team_id)
        for member in members:
            adding = AddTeamMemberRequest(
                workspace_id=owner.workspace_id, team_id=team_id, user_id=member.user_id
            )
            await self.teams.AddTeamMember(adding, metadata=owner.metadata)
        return team_id

    async def check(
        self, person: Person, permission: str, on: AccessResource | None = None, **fields: Any
    ) -> tuple[bool, int]:
        """Whether, and by what."""
        request = pb.CheckRequest(
            workspace_id=person.workspace_id, permission=permission, resource=on, **fields
        )
        answer = await self.access.Check(request, metadata=person.metadata)
        return answer.allowed, answer.basis


def in_workspace(person: Person) -> tuple[tuple[str, str], ...]:
    return (*person.metadata, ("x-workspace-id", person.workspace_id))


def board(dashboard_id: str) -> AccessResource:
    return AccessResource(type="dashboard", id=dashboard_id)


@pytest.fixture(scope="module")
async def house(
    parts: Parts, tmp_path_factory: pytest.TempPathFactory, mailbox: Mailbox
) -> AsyncIterator[House]:
    keys = make_keys(tmp_path_factory.mktemp("access-keys"))
    address, away = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    auth, user = await make_both(
        parts, keys, smtp_url=mailbox.url, dashboard_address=address, analytics_address=away
    )
    dashboard = make_settings(
        DashboardSettings,
        parts,
        keys,
        await parts.fresh_database("dashboard"),
        auth_address=auth.auth_address,
        user_address=auth.user_address,
        analytics_address=away,
        listen=address,
        private_listen=f"127.0.0.1:{free_port()}",
    )
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(running(serve_user, user))
        await stack.enter_async_context(running_auth(auth))
        await stack.enter_async_context(running(serve_dashboard, dashboard))
        services = await stack.enter_async_context(connected(auth, user, keys))
        auth_channel, user_channel, channel = [
            await stack.enter_async_context(grpc.aio.insecure_channel(each.listen))
            for each in (auth, user, dashboard)
        ]
        yield House(
            services,
            dashboard.postgres_url,
            AccessServiceStub(auth_channel),
            TeamServiceStub(user_channel),
            DashboardServiceStub(channel),
            FolderServiceStub(channel),
        )


@pytest.fixture
async def owner(house: House) -> Person:
    return await new_owner(house.services)


async def join(house: House, owner: Person, role: str) -> Person:
    return await join_workspace(house.services, owner, role)


async def test_the_role_settles_what_is_of_the_workspace(house: House, owner: Person):
    viewer = await join(house, owner, "viewer")
    assert await house.check(viewer, "dashboards.view") == (True, ROLE)
    assert await house.check(viewer, "members.edit") == (False, ROLE)
    assert await house.check(owner, "members.edit") == (True, ROLE)
    assert await house.check(owner, "members.edit", user_id=viewer.user_id) == (False, ROLE)


async def test_grants_settle_what_is_on_resources(house: House, owner: Person):
    viewer, editor = await join(house, owner, "viewer"), await join(house, owner, "editor")
    dashboard_id = await house.dashboard(owner)
    await house.grant(owner, dashboard_id, "editor", user_id=viewer.user_id)
    await house.grant(owner, dashboard_id, "-editor", user_id=editor.user_id)
    on = board(dashboard_id)
    assert await house.check(viewer, "dashboards.edit", on) == (True, GRANT)
    assert await house.check(viewer, "dashboards.delete", on) == (False, ROLE)
    assert await house.check(editor, "dashboards.view", on) == (True, ROLE)
    assert await house.check(editor, "dashboards.edit", on) == (False, GRANT)
    assert await house.check(owner, "dashboards.edit", on, user_id=viewer.user_id) == (True, GRANT)


async def test_a_folder_settles_what_lies_in_it(house: House, owner: Person):
    viewer = await join(house, owner, "viewer")
    folder_id = await house.folder(owner)
    inner_id = await house.folder(owner, folder_id)
    dashboard_id = await house.dashboard(owner, inner_id)
    await house.grant_on_folder(owner, folder_id, "editor", user_id=viewer.user_id)
    folder = AccessResource(type="folder", id=inner_id)
    assert await house.check(viewer, "dashboards.edit", board(dashboard_id)) == (True, GRANT)
    assert await house.check(viewer, "dashboards.create", folder) == (True, GRANT)
    assert await house.check(viewer, "folders.edit", folder) == (True, GRANT)
    await house.grant_on_folder(owner, inner_id, "-viewer", user_id=viewer.user_id)
    assert await house.check(owner, "dashboards.create", folder, user_id=viewer.user_id) == (False, GRANT)


async def test_who_does_not_see_a_folder_can_do_nothing_in_it(house: House, owner: Person):
    role = CreateRoleRequest(
        workspace_id=owner.workspace_id,
        name="maker",
        permissions=["workspaces.view", "dashboards.view", "dashboards.create"],
    )
    await house.services.roles.CreateRole(role, metadata=owner.metadata)
    maker = await join(house, owner, "maker")
    folder = AccessResource(type="folder", id=await house.folder(owner))
    assert await house.check(owner, "dashboards.create", folder, user_id=maker.user_id) == (False, ROLE)
    assert await house.check(owner, "dashboards.create", user_id=maker.user_id) == (True, ROLE)


async def test_what_the_caller_does_not_see_is_as_if_it_were_not(house: House, owner: Person):
    viewer, admin = await join(house, owner, "viewer"), await join(house, owner, "admin")
    hidden, foreign = await house.dashboard(owner), await house.dashboard(await new_owner(house.services))
    for person in (viewer, admin):
        await house.grant(owner, hidden, "-viewer", user_id=person.user_id)
    for dashboard_id in (hidden, foreign, new_id()):
        on = board(dashboard_id)
        assert await house.check(viewer, "dashboards.view", on) == (False, NOT_FOUND)
        # Nor may an admin learn about it by asking about those who see it.
        assert await house.check(admin, "dashboards.view", on, user_id=owner.user_id) == (False, NOT_FOUND)
        fields: dict[str, Any] = {
            "workspace_id": owner.workspace_id,
            "user_id": owner.user_id,
            "resource": on,
        }
        calls: list[Awaitable[object]] = [
            house.access.Explain(
                pb.ExplainRequest(permission="dashboards.view", **fields), metadata=admin.metadata
            ),
            house.access.GetEffectivePermissions(
                pb.GetEffectivePermissionsRequest(**fields), metadata=admin.metadata
            ),
        ]
        for call in calls:
            assert await refused(call) == (StatusCode.NOT_FOUND, "RESOURCE_NOT_FOUND")
    assert await house.check(owner, "dashboards.view", board(hidden), user_id=viewer.user_id) == (
        False,
        GRANT,
    )


async def test_members_ask_about_themselves_only(house: House, owner: Person):
    viewer = await join(house, owner, "viewer")
    asked: dict[str, Any] = {"workspace_id": owner.workspace_id, "user_id": owner.user_id}
    itself: dict[str, Any] = {"workspace_id": owner.workspace_id, "user_id": viewer.user_id.upper()}
    question = pb.BatchCheckRequest.Question(permission="dashboards.view")

    def calls(fields: dict[str, Any], metadata: Any) -> list[Awaitable[object]]:
        return [
            house.access.Check(pb.CheckRequest(permission="dashboards.view", **fields), metadata=metadata),
            house.access.BatchCheck(pb.BatchCheckRequest(questions=[question], **fields), metadata=metadata),
            house.access.Explain(
                pb.ExplainRequest(permission="dashboards.view", **fields), metadata=metadata
            ),
            house.access.GetEffectivePermissions(
                pb.GetEffectivePermissionsRequest(**fields), metadata=metadata
            ),
        ]

    for call in calls(asked, viewer.metadata):
        assert await refused(call) == (StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")
    for call in calls(itself, viewer.metadata):
        await call
    listing = pb.ListSubjectGrantsRequest(
        workspace_id=owner.workspace_id, subject=Subject(user_id=viewer.user_id)
    )
    outcome = await refused(house.access.ListSubjectGrants(listing, metadata=viewer.metadata))
    assert outcome == (StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")
    # A key asks about others only if its scope says so.
    for scopes, outcomes in (
        (("workspaces.view",), {(StatusCode.PERMISSION_DENIED, "SCOPE_MISSING")}),
        (("workspaces.view", "access.explain"), set()),
    ):
        made = await machine(house.services, owner, "admin", scopes)
        metadata = bearer(await exchange(house.services, made.secret))
        found = set()
        for call in calls(asked, metadata):
            if outcomes:
                found.add(await refused(call))
            else:
                await call
        assert found == outcomes


async def test_strangers_are_told_apart_by_nobody(house: House, owner: Person):
    stranger = await new_owner(house.services)
    for user_id in (stranger.user_id, new_id()):
        assert await house.check(owner, "dashboards.view", user_id=user_id) == (False, NOT_A_MEMBER)
        request = pb.ExplainRequest(
            workspace_id=owner.workspace_id, permission="dashboards.view", user_id=user_id
        )
        outcome = await refused(house.access.Explain(request, metadata=owner.metadata))
        assert outcome == (StatusCode.NOT_FOUND, "MEMBER_NOT_FOUND")
    request = pb.ExplainRequest(workspace_id=owner.workspace_id, permission="dashboards.view")
    outcome = await refused(house.access.Explain(request, metadata=stranger.metadata))
    assert outcome == (StatusCode.NOT_FOUND, "WORKSPACE_NOT_FOUND")


@pytest.mark.parametrize(
    ("permission", "on", "reason"),
    [
        ("dashboards.edti", None, "PERMISSION_UNKNOWN"),
        ("sources.edit", AccessResource(type="dashboard", id=new_id()), "VALIDATION_FAILED"),
        ("folders.edit", AccessResource(type="dashboard", id=new_id()), "VALIDATION_FAILED"),
        ("dashboards.create", AccessResource(type="dashboard", id=new_id()), "VALIDATION_FAILED"),
        ("dashboards.list", AccessResource(type="folder", id=new_id()), "VALIDATION_FAILED"),
        ("members.edit", AccessResource(type="member", id=new_id()), "VALIDATION_FAILED"),
        ("dashboards.edit", AccessResource(type="dashboard", id="x"), "VALIDATION_FAILED"),
    ],
)
async def test_refuses_what_nobody_can_have(
    house: House, owner: Person, permission: str, on: AccessResource | None, reason: str
):
    asked: dict[str, Any] = {"workspace_id": owner.workspace_id}
    question = pb.BatchCheckRequest.Question(permission=permission, resource=on)
    calls: list[Awaitable[object]] = [
        house.check(owner, permission, on),
        house.access.BatchCheck(pb.BatchCheckRequest(questions=[question], **asked), metadata=owner.metadata),
        house.access.Explain(
            pb.ExplainRequest(permission=permission, resource=on, **asked), metadata=owner.metadata
        ),
    ]
    for call in calls:
        assert await refused(call) == (StatusCode.INVALID_ARGUMENT, reason)


async def test_a_batch_costs_as_much_as_one(house: House, owner: Person):
    viewer = await join(house, owner, "viewer")
    boards = [await house.dashboard(owner) for _ in range(20)]
    for dashboard_id in boards[::2]:
        await house.grant(owner, dashboard_id, "editor", user_id=viewer.user_id)
    asked = [board(dashboard_id) for dashboard_id in [*boards, new_id()]]
    request = pb.BatchCheckRequest(
        workspace_id=viewer.workspace_id,
        questions=[
            pb.BatchCheckRequest.Question(permission=permission, resource=on)
            for on in asked
            for permission in ("dashboards.view", "dashboards.edit")
        ],
    )
    with statements_on(house.dashboard_url) as of_one:
        await house.check(viewer, "dashboards.edit", asked[0])
    with statements_on(house.dashboard_url) as of_many:
        answer = await house.access.BatchCheck(request, metadata=viewer.metadata)
    about_grants = [len([text for text in each if "grants" in text]) for each in (of_one, of_many)]
    assert 0 < about_grants[1] == about_grants[0] <= 2
    found = [each.allowed for each in answer.answers]
    assert found == [*[True, True, True, False] * 10, False, False]
    assert [each.basis for each in answer.answers[-2:]] == [NOT_FOUND] * 2
    for dashboard_id, edits in zip(boards, found[1::2], strict=False):
        looking = GetDashboardRequest(dashboard_id=dashboard_id)
        await house.dashboards.GetDashboard(looking, metadata=in_workspace(viewer))
        changing = house.dashboards.UpdateDashboard(
            UpdateDashboardRequest(dashboard=Dashboard(dashboard_id=dashboard_id, title="Mine")),
            metadata=in_workspace(viewer),
        )
        if edits:
            await changing
        else:
            assert await refused(changing) == (StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")


async def test_a_check_reads_nothing_when_rights_are_remembered(house: House, owner: Person):
    viewer = await join(house, owner, "viewer")
    services = house.services

    async def reads_nothing() -> bool:
        with (
            statements_on(services.auth_settings.postgres_url) as in_auth,
            statements_on(services.user_settings.postgres_url) as in_user,
        ):
            for user_id in ("", viewer.user_id):
                assert await house.check(owner, "dashboards.view", user_id=user_id) == (True, ROLE)
        # The relay, the sealer and consumers read theirs beside all calls.
        return not [text for text in (*in_auth, *in_user) if "members" in text or "accounts" in text]

    await eventually(reads_nothing)  # once the announcement of the newcomer is heard


async def test_answers_are_as_new_as_asked_for(house: House, owner: Person):
    viewer = await join(house, owner, "viewer")
    request = pb.CheckRequest(
        workspace_id=owner.workspace_id, permission="members.edit", user_id=viewer.user_id
    )
    before = await house.access.Check(request, metadata=owner.metadata)
    assert not before.allowed
    role = Role(workspace_id=owner.workspace_id, name="recruiter", permissions=["workspaces.view"])
    await house.services.roles.CreateRole(
        CreateRoleRequest(workspace_id=owner.workspace_id, name=role.name, permissions=role.permissions),
        metadata=owner.metadata,
    )
    recruiter = await join(house, owner, "recruiter")
    role.permissions.extend(["members.view", "members.edit"])
    await house.services.roles.UpdateRole(UpdateRoleRequest(role=role), metadata=owner.metadata)
    request.user_id, request.rights_version = recruiter.user_id, before.rights_version + 3
    after = await house.access.Check(request, metadata=owner.metadata)
    assert after.allowed
    assert after.rights_version >= request.rights_version
    request.rights_version = after.rights_version + 1
    for user_id in (recruiter.user_id, ""):
        request.user_id = user_id
        outcome = await refused(house.access.Check(request, metadata=owner.metadata))
        assert outcome == (StatusCode.UNAVAILABLE, "DEPENDENCY_UNAVAILABLE")


async def test_an_owner_that_is_away_is_no_answer(house: House, owner: Person):
    on = AccessResource(type="source", id=new_id())
    outcome = await refused(house.check(owner, "sources.view", on))
    assert outcome == (StatusCode.UNAVAILABLE, "DEPENDENCY_UNAVAILABLE")
    assert await house.check(owner, "sources.view") == (True, ROLE)


async def explained(
    house: House, asker: Person, user: Person, permission: str, on: AccessResource | None = None
) -> pb.ExplainResponse:
    request = pb.ExplainRequest(
        workspace_id=asker.workspace_id, user_id=user.user_id, permission=permission, resource=on
    )
    return await house.access.Explain(request, metadata=asker.metadata)


async def test_says_why_by_a_role(house: House, owner: Person):
    viewer = await join(house, owner, "viewer")
    dashboard_id = await house.dashboard(owner)
    answer = await explained(house, owner, viewer, "dashboards.edit", board(dashboard_id))
    assert (answer.allowed, answer.role) == (False, "viewer")
    assert [step.text for step in answer.steps] == [
        "No grant says anything: the role viewer in the workspace has dashboards.view.",
        "No grant says anything: the role viewer in the workspace lacks dashboards.edit.",
    ]
    assert not any(step.HasField("resource") for step in answer.steps)
    (step,) = (await explained(house, owner, viewer, "members.view")).steps
    assert (step.allowed, step.permission) == (True, "members.view")


async def test_says_why_by_team_folder_and_grant(house: House, owner: Person):
    viewer = await join(house, owner, "viewer")
    shop = await house.team(owner, "Shop")
    online = await house.team(owner, "Online", above=shop)
    web = await house.team(owner, "Web", [viewer], above=online)
    folder_id = await house.folder(owner)
    dashboard_id = await house.dashboard(owner, await house.folder(owner, folder_id))
    grant = await house.grant_on_folder(owner, folder_id, "editor", team_id=shop)
    answer = await explained(house, owner, viewer, "dashboards.edit", board(dashboard_id))
    assert answer.allowed
    sight, edit = answer.steps
    assert (sight.permission, edit.permission) == ("dashboards.view", "dashboards.edit")
    assert edit.resource == AccessResource(type="folder", id=folder_id)
    assert list(edit.grants) == [grant]
    (path,) = edit.team_paths
    assert [(team.team_id, team.title) for team in path.teams] == [
        (web, "Web"),
        (online, "Online"),
        (shop, "Shop"),
    ]
    assert edit.text == (
        f"A grant of editor on the folder {folder_id} to the team “Shop”, which the user is in by way of “Web”, then"
        " “Online”, gives dashboards.edit."
    )
    denied = await house.grant(owner, dashboard_id, "-viewer", workspace=True)
    answer = await explained(house, owner, viewer, "dashboards.edit", board(dashboard_id))
    (step,) = answer.steps
    assert (answer.allowed, step.permission, list(step.grants)) == (False, "dashboards.view", [denied])
    assert step.text == (
        f"A grant of viewer on the dashboard {dashboard_id} to everyone in the workspace withholds dashboards.view."
    )


async def effective(
    house: House, asker: Person, user: Person, on: AccessResource | None = None
) -> pb.GetEffectivePermissionsResponse:
    request = pb.GetEffectivePermissionsRequest(
        workspace_id=asker.workspace_id, user_id=user.user_id, resource=on
    )
    return await house.access.GetEffectivePermissions(request, metadata=asker.metadata)


async def test_lists_all_that_a_user_may_do(house: House, owner: Person):
    viewer = await join(house, owner, "viewer")
    team_id = await house.team(owner, "Shop", [viewer])
    answer = await effective(house, viewer, viewer)
    assert set(answer.permissions) == ROLES["viewer"]
    assert (answer.role, list(answer.team_ids)) == ("viewer", [team_id])
    dashboard_id = await house.dashboard(owner)
    await house.grant(owner, dashboard_id, "editor", team_id=team_id)
    answer = await effective(house, owner, viewer, board(dashboard_id))
    assert list(answer.permissions) == ["dashboards.edit", "dashboards.view"]
    await house.grant(owner, dashboard_id, "-viewer", user_id=viewer.user_id)
    assert not (await effective(house, owner, viewer, board(dashboard_id))).permissions


async def test_lists_the_grants_of_a_subject(house: House, owner: Person):
    viewer, admin = await join(house, owner, "viewer"), await join(house, owner, "admin")
    boards = [await house.dashboard(owner) for _ in range(4)]
    grants = [await house.grant(owner, each, "editor", user_id=viewer.user_id) for each in boards]
    await house.grant(owner, boards[0], "-viewer", user_id=admin.user_id)
    await house.grant(owner, boards[1], "editor", workspace=True)

    async def page(asker: Person, page_token: str = "") -> pb.ListSubjectGrantsResponse:
        request = pb.ListSubjectGrantsRequest(
            workspace_id=owner.workspace_id,
            subject=Subject(user_id=viewer.user_id),
            page_size=2,
            page_token=page_token,
        )
        return await house.access.ListSubjectGrants(request, metadata=asker.metadata)

    first = await page(owner)
    assert [(each.resource_type, each.resource_id, each.grant) for each in first.grants] == [
        ("dashboard", dashboard_id, grant) for dashboard_id, grant in zip(boards, grants, strict=True)
    ][:2]
    second = await page(owner, first.next_page_token)
    assert [each.resource_id for each in second.grants] == boards[2:]
    # The last page is that of the service which is away.
    outcome = await refused(page(owner, second.next_page_token))
    assert outcome == (StatusCode.UNAVAILABLE, "DEPENDENCY_UNAVAILABLE")
    assert [each.resource_id for each in (await page(admin)).grants] == [boards[1]], (
        "one is hidden from the admin"
    )
    outcome = await refused(page(owner, f"{first.next_page_token[:-2]}AA"))
    assert outcome == (StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID")


async def test_a_machine_with_a_custom_role(house: House, owner: Person):
    await house.services.roles.CreateRole(
        CreateRoleRequest(
            workspace_id=owner.workspace_id, name="checker", permissions=["workspaces.view", "access.explain"]
        ),
        metadata=owner.metadata,
    )
    made = await machine(house.services, owner, "checker")
    metadata = bearer(await exchange(house.services, made.secret))
    request = pb.CheckRequest(
        workspace_id=owner.workspace_id, user_id=owner.user_id, permission="members.edit"
    )
    answer = await house.access.Check(request, metadata=metadata)
    assert answer.allowed
    # It has neither more than its role, nor what it is asked about.
    adding = AddMemberRequest(workspace_id=owner.workspace_id, user_id=new_id(), role="viewer")
    outcome = await refused(house.services.workspaces.AddMember(adding, metadata=metadata))
    assert outcome == (StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")
