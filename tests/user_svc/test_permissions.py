"""The catalogue of permissions."""

from meshboard.user.v1.role_pb2 import Permission
from meshboard.user.v1.role_service_pb2 import ListPermissionsRequest

from services.chassis.rights import PERMISSIONS
from services.chassis.server import contracts
from services.user_svc.permissions import catalogue
from tests.user_svc.conftest import Person, UserSvc

EVERY = {permission.name: permission for permission in catalogue(contracts())}


def test_has_every_permission_once():
    assert list(EVERY) == sorted(PERMISSIONS)


def test_says_what_a_permission_opens_and_who_has_it():
    assert EVERY["sources.query"] == Permission(
        name="sources.query",
        resource_types=["source"],
        methods=[
            "meshboard.analytics.v1.CatalogueService.GetCatalogueEvent",
            "meshboard.analytics.v1.CatalogueService.GetCatalogueProperty",
            "meshboard.analytics.v1.CatalogueService.ListCatalogueEvents",
            "meshboard.analytics.v1.CatalogueService.ListCatalogueProperties",
            "meshboard.analytics.v1.CohortService.PreviewCohort",
            "meshboard.analytics.v1.EventService.ListEvents",
            "meshboard.analytics.v1.EventService.TailEvents",
            "meshboard.analytics.v1.FailedEventService.GetFailedEvent",
            "meshboard.analytics.v1.FailedEventService.ListFailedEvents",
            "meshboard.analytics.v1.InsightService.RunFunnel",
            "meshboard.analytics.v1.InsightService.RunLifecycle",
            "meshboard.analytics.v1.InsightService.RunPaths",
            "meshboard.analytics.v1.InsightService.RunRetention",
            "meshboard.analytics.v1.QueryService.ExplainQuery",
            "meshboard.analytics.v1.QueryService.RunQuery",
            "meshboard.analytics.v1.QueryService.ValidateQuery",
        ],
        builtin_roles=["viewer", "editor", "admin", "owner"],
    )
    assert "meshboard.dashboard.v1.WidgetService.CreateWidget" in EVERY["dashboards.edit"].methods
    assert list(EVERY["dashboards.edit"].builtin_roles) == ["editor", "admin", "owner"]
    assert list(EVERY["members.edit"].resource_types) == ["workspace"]


def test_says_what_only_owners_have():
    reserved = [name for name, permission in EVERY.items() if permission.owner_only]
    assert reserved == ["workspaces.delete", "workspaces.transfer"]
    assert list(EVERY["workspaces.delete"].builtin_roles) == ["owner"]


async def test_is_listed_for_every_member(svc: UserSvc, owner: Person):
    viewer = await svc.join(owner, "viewer")
    found, page_token = list[str](), ""
    while True:
        request = ListPermissionsRequest(page_size=20, page_token=page_token)
        page = await svc.roles.ListPermissions(request, metadata=viewer.metadata)
        found += [permission.name for permission in page.permissions]
        page_token = page.next_page_token
        if not page_token:
            break
    assert found == list(EVERY)
