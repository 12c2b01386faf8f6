"""What holds for every RPC, field and reason, read from the one descriptor set that every surface is made from."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from buf.validate import validate_pb2
from google.api import annotations_pb2, http_pb2
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from meshboard.options.v1 import access_pb2

from services.chassis.access import rule_of
from services.chassis.auth import SERVICES
from services.chassis.rights import PERMISSIONS

ROOT = Path(__file__).parents[2]
OURS = "meshboard/"

_set = descriptor_pb2.FileDescriptorSet.FromString((ROOT / "gen" / "descriptor.binpb").read_bytes())
FILES = [file for file in _set.file if file.name.startswith(OURS)]
for _file in FILES:  # so that the default pool knows them, with their options
    importlib.import_module(_file.name.removesuffix(".proto").replace("/", ".") + "_pb2")
_pool: Any = descriptor_pool.Default()
METHODS: list[MethodDescriptor] = [
    method
    for file in FILES
    for service in file.service
    for method in _pool.FindServiceByName(f"{file.package}.{service.name}").methods
]
PUBLIC = {"public", "write_key", "share_link"}

# Reviewed by hand: what anyone may call, and what every signed-in user may call whatever the role. A new RPC of these
# kinds fails here until someone has thought about it.
OPEN_RPCS = {
    "meshboard.auth.v1.AuthService.SignUp": "public",
    "meshboard.auth.v1.AuthService.SignIn": "public",
    "meshboard.auth.v1.AuthService.BeginPasskeySignIn": "public",
    "meshboard.auth.v1.AuthService.CompleteSignIn": "public",
    "meshboard.auth.v1.AccountService.VerifyEmail": "public",
    "meshboard.auth.v1.AccountService.RequestPasswordReset": "public",
    "meshboard.auth.v1.AccountService.ResetPassword": "public",
    "meshboard.auth.v1.AccountService.ConfirmEmailChange": "public",
    "meshboard.auth.v1.ServiceAccountService.ExchangeApiKey": "public",
    "meshboard.auth.v1.AuthService.Refresh": "public",
    "meshboard.auth.v1.AuthService.GetJwks": "public",
    "meshboard.auth.v1.AuthService.SignOut": "authenticated",
    "meshboard.auth.v1.AccountService.GetAccount": "authenticated",
    "meshboard.auth.v1.AccountService.Reauthenticate": "authenticated",
    "meshboard.auth.v1.AccountService.ChangePassword": "authenticated",
    "meshboard.auth.v1.AccountService.ChangeEmail": "authenticated",
    "meshboard.auth.v1.AccountService.SendVerification": "authenticated",
    "meshboard.auth.v1.AuditService.ListOwnAuditEntries": "authenticated",
    "meshboard.auth.v1.FactorService.ListFactors": "authenticated",
    "meshboard.auth.v1.FactorService.BeginTotp": "authenticated",
    "meshboard.auth.v1.FactorService.ConfirmTotp": "authenticated",
    "meshboard.auth.v1.FactorService.BeginPasskey": "authenticated",
    "meshboard.auth.v1.FactorService.ConfirmPasskey": "authenticated",
    "meshboard.auth.v1.FactorService.DeleteFactor": "authenticated",
    "meshboard.auth.v1.FactorService.ReplaceRecoveryCodes": "authenticated",
    "meshboard.auth.v1.SessionService.ListSessions": "authenticated",
    "meshboard.auth.v1.SessionService.RevokeSession": "authenticated",
    "meshboard.auth.v1.SessionService.RevokeOtherSessions": "authenticated",
    "meshboard.user.v1.UserService.GetMe": "authenticated",
    "meshboard.user.v1.UserService.UpdateUser": "authenticated",
    "meshboard.user.v1.ProfileService.GetProfile": "authenticated",
    "meshboard.user.v1.ProfileService.UpdateProfile": "authenticated",
    "meshboard.user.v1.AvatarService.SetAvatar": "authenticated",
    "meshboard.user.v1.AvatarService.DeleteAvatar": "authenticated",
    "meshboard.user.v1.ErasureService.DeleteUser": "authenticated",
    "meshboard.user.v1.ErasureService.GetErasure": "public",
    "meshboard.user.v1.WorkspaceService.CreateWorkspace": "authenticated",
    "meshboard.user.v1.WorkspaceService.ListWorkspaces": "authenticated",
    "meshboard.user.v1.InvitationService.PreviewInvitation": "public",
    "meshboard.user.v1.InvitationService.AcceptInvitation": "authenticated",
    "meshboard.user.v1.InvitationService.DeclineInvitation": "public",
    "meshboard.dashboard.v1.ShareService.GetSharedPage": "public",
    "meshboard.dashboard.v1.ShareService.GetSharedDashboard": "share_link",
    "meshboard.dashboard.v1.ShareService.GetSharedDashboardData": "share_link",
    "meshboard.dashboard.v1.ShareService.WatchSharedDashboard": "share_link",
    "meshboard.dashboard.v1.ShareService.UnlockSharedDashboard": "share_link",
    "meshboard.dashboard.v1.ShareService.ListSharedVariableValues": "share_link",
    "meshboard.dashboard.v1.ShareService.ListSharedAnnotations": "share_link",
    "meshboard.analytics.v1.IngestService.Ingest": "write_key",
    "meshboard.analytics.v1.IngestService.IngestStream": "write_key",
    "meshboard.analytics.v1.CompatService.SendBatch": "write_key",
    "meshboard.analytics.v1.CompatService.SendTrack": "write_key",
    "meshboard.analytics.v1.CompatService.SendIdentify": "write_key",
    "meshboard.analytics.v1.CompatService.SendPage": "write_key",
    "meshboard.analytics.v1.CompatService.SendScreen": "write_key",
    "meshboard.analytics.v1.CompatService.SendGroup": "write_key",
    "meshboard.analytics.v1.CompatService.SendAlias": "write_key",
}

# What tells nothing that is not known in the workspace, and ends the impersonator's own session.
FOR_IMPERSONATORS = {"meshboard.user.v1.UserService.GetMe", "meshboard.auth.v1.AuthService.SignOut"}


def http(method: MethodDescriptor) -> http_pb2.HttpRule:
    """The HTTP rule of a method; empty when it has none."""
    return method.GetOptions().Extensions[annotations_pb2.http]


def resolve(method: MethodDescriptor, path: str) -> FieldDescriptor:
    message: Descriptor | None = method.input_type
    field: FieldDescriptor | None = None
    for name in path.split("."):
        assert message is not None
        field = message.fields_by_name[name]
        message = field.message_type
    assert field is not None
    return field


def may_be_empty(field: FieldDescriptor) -> bool:
    """Whether a request is valid without this text."""
    rules = field.GetOptions().Extensions[validate_pb2.field]
    return bool(rules.ignore == validate_pb2.IGNORE_IF_ZERO_VALUE)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.full_name)
def test_every_rpc_says_who_may_call(method: MethodDescriptor):
    found = rule_of(method)
    if found.kind == "permission":
        assert method.full_name not in OPEN_RPCS
        for need in found.needs:
            assert need.permission in PERMISSIONS
            assert need.path or not need.or_workspace
            if need.path:
                field = resolve(method, ".".join(need.path))
                assert field.type == FieldDescriptor.TYPE_STRING
                assert field.name.endswith(("_id", "_ids"))
                assert may_be_empty(field) is need.or_workspace
    elif found.kind == "internal":
        assert found.callers
        assert found.callers <= set(SERVICES)
    else:
        assert OPEN_RPCS.get(method.full_name) == found.kind, "review it, then add it to OPEN_RPCS"
    if found.kind == "authenticated":
        # No workspace limits such a call: an admin who impersonates somebody must not get beyond the workspace.
        assert found.sensitive or method.full_name in FOR_IMPERSONATORS


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.full_name)
def test_what_is_not_internal_has_a_route_and_internal_has_none(method: MethodDescriptor):
    has_route = http(method).WhichOneof("pattern") is not None
    internal = rule_of(method).kind == "internal"
    assert has_route is not internal
    assert method.containing_service.name.startswith("Internal") is internal, (
        "the gateway refuses by this name"
    )


@pytest.mark.parametrize(
    "method", [m for m in METHODS if http(m).WhichOneof("pattern")], ids=lambda m: m.full_name
)
def test_routes_follow_the_pattern(method: MethodDescriptor):
    found = http(method)
    verb = str(found.WhichOneof("pattern"))
    path = getattr(found, verb)
    assert re.fullmatch(r"/(v1|\.well-known|shared)(/[\w.{}-]+)+(:[a-z][A-Za-z]+)?", path), path
    expected = {
        "Get": "get",
        "List": "get",
        "Watch": "get",
        "Update": "patch",
        "Delete": "delete",
        "Remove": "delete",
    }
    for prefix, wanted in expected.items():
        if method.name.startswith(prefix):
            assert verb == wanted
    if verb in {"post", "patch"}:
        assert found.body
    if verb == "patch" and found.body != "*":
        assert "update_mask" in method.input_type.fields_by_name
    for variable in re.findall(r"{([\w.]+)}", path):
        assert resolve(method, variable).type == FieldDescriptor.TYPE_STRING


def test_no_two_rpcs_share_a_route():
    routes = [
        (str(http(m).WhichOneof("pattern")), re.sub(r"{[^}]*}", "{}", getattr(http(m), p)))
        for m in METHODS
        if (p := http(m).WhichOneof("pattern"))
    ]
    assert len(routes) == len(set(routes))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.full_name)
def test_messages_are_named_after_the_rpc(method: MethodDescriptor):
    assert method.input_type.name == f"{method.name}Request"
    assert method.output_type.name == f"{method.name}Response"


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.full_name)
def test_lists_have_pages_and_creates_can_be_repeated(method: MethodDescriptor):
    fields = method.input_type.fields_by_name
    if method.name.startswith("List") and rule_of(method).kind != "internal":
        assert {"page_size", "page_token"} <= set(fields)
        assert "next_page_token" in method.output_type.fields_by_name
    if method.name.startswith("Create") and rule_of(method).kind != "internal":
        assert "request_id" in fields


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.full_name)
def test_every_id_and_text_of_a_request_is_bounded(method: MethodDescriptor):
    """A text field of a request has a rule, so that nobody sends a megabyte into a title."""
    for field in method.input_type.fields:
        if field.type == FieldDescriptor.TYPE_STRING and field.name != "workspace_id":
            assert field.GetOptions().HasExtension(validate_pb2.field), f"{field.full_name} has no rule"


def test_secrets_are_marked():
    """Whatever sounds like a secret says that it is sensitive; tokens of pages are none."""
    for file in FILES:
        for message in file.message_type:
            for field in message.field:
                if re.search(r"password|secret|(?<!page_)token$|write_key$|refresh_key$", field.name) and (
                    field.type == FieldDescriptor.TYPE_STRING
                ):
                    found = _pool.FindFieldByName(f"{file.package}.{message.name}.{field.name}")
                    assert found.GetOptions().Extensions[access_pb2.sensitive], found.full_name


def catalogue() -> dict[str, set[str]]:
    """The reasons by package."""
    return {
        file.package.split(".")[1]: {value.name for value in enum.value}
        for file in FILES
        for enum in file.enum_type
        if enum.name == "ErrorReason"
    }


RAISED = re.compile(r"[A-Z][A-Z0-9_]{3,}")
RAISERS = {
    "invalid_argument",
    "not_found",
    "already_exists",
    "permission_denied",
    "unauthenticated",
    "failed_precondition",
    "aborted",
    "resource_exhausted",
}


def raised_in(folder: Path) -> set[str]:
    """The reasons that the code names where it raises an error."""
    reasons = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if (
                name in RAISERS
                and isinstance(node.args[0].value, str)
                and RAISED.fullmatch(node.args[0].value)
            ):
                reasons.add(node.args[0].value)
    return reasons


@pytest.mark.parametrize("service", ["chassis", *SERVICES])
def test_every_reason_is_in_the_catalogue(service: str):
    reasons = catalogue()
    known = reasons["options"] | reasons.get(service, set())
    folder = ROOT / "services" / (service if service == "chassis" else f"{service}_svc")
    assert raised_in(folder) <= known


@pytest.mark.parametrize("service", SERVICES)
def test_every_reason_of_the_catalogue_is_raised(service: str):
    """A reason that nobody raises misleads whoever reads the contract."""
    code = "".join(path.read_text() for path in (ROOT / "services").rglob("*.py"))
    unused = {
        reason
        for reason in catalogue()[service]
        if reason != "ERROR_REASON_UNSPECIFIED" and f'"{reason}"' not in code
    }
    # Reasons made from the name of the resource by the chassis.
    unused -= {"DASHBOARD_NOT_FOUND", "FOLDER_NOT_FOUND", "SOURCE_NOT_FOUND"}
    assert not unused
