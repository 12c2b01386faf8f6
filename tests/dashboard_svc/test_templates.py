"""Dashboards from templates."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from meshboard.analytics.v1.query_pb2 import Query
from meshboard.dashboard.v1.dashboard_pb2 import DashboardContent
from meshboard.dashboard.v1.template_service_pb2 import (
    CreateDashboardFromTemplateRequest,
    ListDashboardTemplatesRequest,
)
from meshboard.dashboard.v1.version_service_pb2 import ListVersionsRequest
from meshboard.dashboard.v1.widget_service_pb2 import ListWidgetsRequest

from services.chassis import errors
from services.dashboard_svc import kinds, layouts
from services.dashboard_svc.contents import FIELDS
from services.dashboard_svc.definitions import clean, sources_of
from services.dashboard_svc.template_contents import TEMPLATES
from services.dashboard_svc.validation import check_variables
from tests.dashboard_svc.conftest import Mesh
from tests.harness import Member, new_id, refused

SOURCE = new_id()


async def create(mesh: Mesh, member: Member, template: str = "product", **more: Any) -> Any:
    request = CreateDashboardFromTemplateRequest(template=template, source_id=SOURCE, **more)
    return (await mesh.templates.CreateDashboardFromTemplate(request, metadata=member.metadata)).dashboard


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_what_a_person_could_make(name: str) -> None:
    content = TEMPLATES[name].content(SOURCE)
    written = DashboardContent()
    written.CopyFrom(content)
    clean(written, FIELDS)
    assert written == content
    assert sources_of(content) == {SOURCE}
    places = {widget.name: widget.layout for widget in content.widgets}
    assert len(places) == len(content.widgets)
    for widget in content.widgets:
        kinds.check(widget)
        check_variables(widget, content.variables)
        layouts.check_free(widget.name, widget.layout, places)


async def test_makes_a_dashboard_of_the_source(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    folder = await mesh.folder(ann)
    made = await create(mesh, ann, title=" Shop ", folder_id=folder.folder_id)
    assert (made.title, made.folder_id, made.name) == ("Shop", folder.folder_id, "")
    assert made.variables
    request = ListWidgetsRequest(dashboard_id=made.dashboard_id)
    widgets = (await mesh.widgets.ListWidgets(request, metadata=ann.metadata)).widgets
    assert len(widgets) == len(TEMPLATES["product"].content(SOURCE).widgets)
    versions = await mesh.versions.ListVersions(
        ListVersionsRequest(dashboard_id=made.dashboard_id), metadata=ann.metadata
    )
    assert len(versions.versions) == 1


async def test_takes_the_right_to_the_source(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    mesh.analytics.refused = errors.not_found("SOURCE_NOT_FOUND", "There is no such source.")
    assert await refused(create(mesh, ann)) == (grpc.StatusCode.NOT_FOUND, "SOURCE_NOT_FOUND")
    (query, _) = mesh.analytics.validated[0]
    assert query == Query(source_ids=[SOURCE])


async def test_refuses_what_is_not_there(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    assert await refused(create(mesh, ann, "none")) == (grpc.StatusCode.NOT_FOUND, "TEMPLATE_NOT_FOUND")
    assert await refused(create(mesh, ann, folder_id=new_id())) == (
        grpc.StatusCode.NOT_FOUND,
        "FOLDER_NOT_FOUND",
    )
    assert await refused(create(mesh, ann, title="\u200b")) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "VALIDATION_FAILED",
    )


async def test_a_repeat_returns_the_first(mesh: Mesh) -> None:
    ann = mesh.identity.member("editor")
    first = await create(mesh, ann, request_id="once")
    assert (await create(mesh, ann, request_id="once")).dashboard_id == first.dashboard_id


async def test_lists_in_pages(mesh: Mesh) -> None:
    ann = mesh.identity.member("viewer")
    found: list[str] = []
    token = ""
    while token or not found:
        request = ListDashboardTemplatesRequest(page_size=2, page_token=token)
        page = await mesh.templates.ListDashboardTemplates(request, metadata=ann.metadata)
        found += [template.template for template in page.templates]
        token = page.next_page_token
    assert found == ["api-traffic", "product", "web-analytics"]
