"""The permission matrix: what each kind of caller may do with each RPC, by hand and not read from the contracts.

Members are, in this order: a guest (a custom role that may see the workspace and nothing in it), a viewer, an editor,
an admin and an owner. For each stands a sign: `+` the call gets past the access rules, `-` the caller lacks the
permission, `~` the caller lacks it too, but is told so only of a thing that is there, `0` the answer is that of
something absent.

Requests are as JSON; `{dashboard}` and the like stand for an id of the target: the own thing, the sibling team's (which
the whole workspace is denied), another workspace's, a deleted one, one that never was. What stands behind a `#` in a
name tells rows of one RPC apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Body = Mapping[str, Any]

OK = "OK"
QUERY = {
    "query": {
        "source_ids": ["{source}"],
        "time_range": {"last_seconds": 60},
        "measures": [{"aggregation": "COUNT"}],
    }
}
TILE = {"title": "t", "kind": "NUMBER", **QUERY}
EVENT = {"events": [{"event": "e", "distinct_id": "d"}]}
MESSAGE = {"write_key": "none", "type": "track", "event": "e", "user_id": "d"}
SUBJECT = {"subject": {"workspace": True}, "role": "viewer", "effect": "ALLOW"}


@dataclass(frozen=True)
class On:
    """An RPC on a resource that grants are made on.

    What a caller may not see is absent. `passes` are the outcomes of a call that gets past the access rules, on the own
    resource; destructive calls are written so that they fail behind them. `absent` is what is said of one that is not
    there.
    """

    request: Body
    members: str
    absent: str
    passes: tuple[str, ...] = (OK,)
    key: str = "SCOPE_MISSING"


@dataclass(frozen=True)
class In:
    """An RPC in a workspace, which the path, the header or the token names.

    `absent` is what is said, to who gets past the access rules, of a thing in the workspace that is not there; "" for
    RPCs that name none. `scope_is_late` says that the method checks the scope of a key itself.
    `ends` says that the call ends the caller's membership.
    """

    request: Body
    members: str
    passes: tuple[str, ...] = (OK,)
    absent: str = ""
    key: str = "SCOPE_MISSING"
    scope_is_late: bool = False
    ends: bool = False


@dataclass(frozen=True)
class SignedIn:
    """An RPC for whoever is signed in, about itself. `ends` says that it ends the session."""

    request: Body = field(default_factory=dict)
    passes: tuple[str, ...] = (OK,)
    key: str = "PERSON_REQUIRED"
    ends: bool = False


@dataclass(frozen=True)
class Anyone:
    """An RPC without a token, for which a secret in the request stands where there is one."""

    request: Body = field(default_factory=dict)
    passes: tuple[str, ...] = (OK,)


@dataclass(frozen=True)
class Services:
    """An RPC for these services alone."""

    request: Body
    callers: frozenset[str]
    passes: tuple[str, ...] = (OK,)
    # Who answers, where that is not the service of the package.
    at: str = ""


Row = On | In | SignedIn | Anyone | Services

_ALL = frozenset({"auth", "user", "dashboard", "analytics"})
_AUTH = frozenset({"auth"})
_W = {"workspace_id": "{workspace}"}
_BOARD = {"dashboard_id": "{dashboard}"}
_FOLDER = {"folder_id": "{folder}"}
_ASKED = {"permission": "dashboards.view", "resource": {"type": "dashboard", "id": "{dashboard}"}}
_SOURCE = {"source_id": "{source}"}
_SOURCES = {"source_ids": ["{source}"]}
_RECENT = {**_SOURCES, "time_range": {"last_seconds": 60}}
_DEFINITION = {"definition": {"conditions": [{"behaviour": {"event": "e"}}]}}
_MACHINE = {**_W, "service_account_id": "{service_account}"}

MATRIX: Mapping[str, Row] = {
    # auth_svc: accounts
    "auth.v1.AccountService.GetAccount": SignedIn(),
    "auth.v1.AccountService.Reauthenticate": SignedIn(
        {"password": "not this one"}, ("CREDENTIALS_WRONG", "SIGN_IN_DELAYED")
    ),
    "auth.v1.AccountService.ChangePassword": SignedIn(
        {"current_password": "not this one", "new_password": "a long new password"},
        ("CREDENTIALS_WRONG", "SIGN_IN_DELAYED"),
    ),
    "auth.v1.AccountService.ChangeEmail": SignedIn({"new_email": "no-address"}, ("VALIDATION_FAILED",)),
    "auth.v1.AccountService.SendVerification": SignedIn({}, (OK, "MAIL_DELAYED")),
    "auth.v1.AccountService.VerifyEmail": Anyone({"token": "none"}, ("LINK_INVALID",)),
    "auth.v1.AccountService.RequestPasswordReset": Anyone({"email": "nobody@example.org"}),
    "auth.v1.AccountService.ResetPassword": Anyone(
        {"token": "none", "new_password": "a long new password"}, ("LINK_INVALID",)
    ),
    "auth.v1.AccountService.ConfirmEmailChange": Anyone({"token": "none"}, ("LINK_INVALID",)),
    "auth.v1.AuditService.ListAuditEntries": In(_W, "---++"),
    "auth.v1.AuditService.ListOwnAuditEntries": SignedIn(),
    "auth.v1.AuditService.ExportAuditEntries": In(_W, "---++"),
    "auth.v1.InternalAccountService.ReserveAccount": Services(
        {"user_id": "{absent}", **_W, "email": "reserved@example.org", "display_name": "R"},
        frozenset({"user"}),
    ),
    # auth_svc: signing in and out
    "auth.v1.AuthService.SignUp": Anyone(
        {"email": "nobody", "password": "a long password", "display_name": "N"}, ("VALIDATION_FAILED",)
    ),
    "auth.v1.AuthService.SignIn": Anyone(
        {"email": "nobody@example.org", "password": "a long password"},
        ("CREDENTIALS_WRONG", "SIGN_IN_DELAYED"),
    ),
    "auth.v1.AuthService.BeginPasskeySignIn": Anyone(),
    "auth.v1.AuthService.CompleteSignIn": Anyone(
        {"mfa_token": "none", "totp_code": "000000"}, ("MFA_TOKEN_INVALID", "SIGN_IN_DELAYED")
    ),
    "auth.v1.AuthService.Refresh": Anyone({"refresh_token": "none"}, ("REFRESH_TOKEN_INVALID",)),
    "auth.v1.AuthService.SignOut": SignedIn(key=OK, ends=True),
    "auth.v1.AuthService.GetJwks": Anyone(),
    "auth.v1.FactorService.ListFactors": SignedIn(),
    "auth.v1.FactorService.BeginTotp": SignedIn(),
    "auth.v1.FactorService.ConfirmTotp": SignedIn(
        {"mfa_token": "none", "code": "000000", "title": "t"},
        ("FACTOR_WRONG", "MFA_TOKEN_INVALID", "SIGN_IN_DELAYED"),
    ),
    "auth.v1.FactorService.BeginPasskey": SignedIn(),
    "auth.v1.FactorService.ConfirmPasskey": SignedIn(
        {"mfa_token": "none", "credential": {}, "title": "t"},
        ("FACTOR_WRONG", "MFA_TOKEN_INVALID", "SIGN_IN_DELAYED"),
    ),
    "auth.v1.FactorService.DeleteFactor": SignedIn({"factor_id": "{absent}"}, ("FACTOR_NOT_FOUND",)),
    "auth.v1.FactorService.ReplaceRecoveryCodes": SignedIn({}, ("FACTOR_MISSING",)),
    "auth.v1.SessionService.ListSessions": SignedIn(),
    "auth.v1.SessionService.RevokeSession": SignedIn({"session_id": "{absent}"}, ("SESSION_NOT_FOUND",)),
    "auth.v1.SessionService.RevokeOtherSessions": SignedIn(),
    # auth_svc: who may do what
    "auth.v1.AccessService.Check": In({**_ASKED}, "+++++"),
    "auth.v1.AccessService.Check#about somebody": In({**_ASKED, "user_id": "{member}"}, "---++"),
    "auth.v1.AccessService.BatchCheck": In({"questions": [_ASKED]}, "+++++"),
    "auth.v1.AccessService.BatchCheck#about somebody": In(
        {"questions": [_ASKED], "user_id": "{member}"}, "---++"
    ),
    "auth.v1.AccessService.Explain": On(_ASKED, "0++++", "RESOURCE_NOT_FOUND"),
    "auth.v1.AccessService.Explain#about somebody": In(
        {"permission": "dashboards.view", "user_id": "{member}"}, "---++", absent="MEMBER_NOT_FOUND"
    ),
    "auth.v1.AccessService.GetEffectivePermissions": On(
        {"resource": {"type": "dashboard", "id": "{dashboard}"}}, "0++++", "RESOURCE_NOT_FOUND"
    ),
    "auth.v1.AccessService.GetEffectivePermissions#about somebody": In(
        {"user_id": "{member}"}, "---++", absent="MEMBER_NOT_FOUND"
    ),
    "auth.v1.AccessService.ListSubjectGrants": In({"subject": {"user_id": "{member}"}}, "---++"),
    # auth_svc: machines
    "auth.v1.ImpersonationService.StartImpersonation": In(
        {**_W, "user_id": "{absent}", "reason": "a test"},
        "---++",
        ("MEMBER_NOT_FOUND",),
        key="PERSON_REQUIRED",
    ),
    "auth.v1.ServiceAccountService.CreateServiceAccount": In(
        {**_W, "title": "t", "role": "no-such-role"}, "---++", ("ROLE_UNKNOWN",), key="PERSON_REQUIRED"
    ),
    "auth.v1.ServiceAccountService.GetServiceAccount": In(
        _MACHINE, "---++", absent="SERVICE_ACCOUNT_NOT_FOUND"
    ),
    "auth.v1.ServiceAccountService.ListServiceAccounts": In(_W, "---++"),
    "auth.v1.ServiceAccountService.UpdateServiceAccount": In(
        {**_W, "service_account": {"service_account_id": "{service_account}", "title": "t", "etag": "no"}},
        "---++",
        ("ETAG_MISMATCH",),
        absent="SERVICE_ACCOUNT_NOT_FOUND",
        key="PERSON_REQUIRED",
    ),
    "auth.v1.ServiceAccountService.DeleteServiceAccount": In(
        {**_W, "service_account_id": "{absent}"},
        "---++",
        ("SERVICE_ACCOUNT_NOT_FOUND",),
        key="PERSON_REQUIRED",
    ),
    "auth.v1.ServiceAccountService.CreateApiKey": In(
        {**_MACHINE, "title": "t", "scopes": ["no.scope"]},
        "---++",
        ("SCOPE_UNKNOWN",),
        key="PERSON_REQUIRED",
    ),
    "auth.v1.ServiceAccountService.ListApiKeys": In(_MACHINE, "---++", absent="SERVICE_ACCOUNT_NOT_FOUND"),
    "auth.v1.ServiceAccountService.DeleteApiKey": In(
        {**_MACHINE, "api_key_id": "{absent}"}, "---++", ("API_KEY_NOT_FOUND",), key="PERSON_REQUIRED"
    ),
    "auth.v1.ServiceAccountService.ExchangeApiKey": Anyone({"api_key": "none"}, ("API_KEY_INVALID",)),
    "auth.v1.InternalAuthService.ListRevocations": Services({}, _ALL),
    "auth.v1.InternalAuthService.CheckSession": Services({"session_id": "{absent}"}, _ALL),
    "auth.v1.InternalAuthService.GetVerifiedEmail": Services({"user_id": "{member}"}, frozenset({"user"})),
    "auth.v1.InternalAuthService.SetAccountDisabled": Services(
        {"user_id": "{absent}", "disabled": True}, frozenset({"user"}), (OK, "RESOURCE_NOT_FOUND")
    ),
    # user_svc
    "user.v1.UserService.GetMe": SignedIn(key=OK),
    "user.v1.UserService.GetUser": In({"user_id": "{member}"}, "-++++", absent="USER_NOT_FOUND"),
    "user.v1.UserService.UpdateUser": SignedIn(
        {"user": {"user_id": "{absent}", "display_name": "n"}, "update_mask": "displayName"},
        ("USER_NOT_FOUND",),
    ),
    "user.v1.UserService.BatchGetUsers": In({"user_ids": ["{member}"]}, "-++++"),
    "user.v1.UserService.ListUsers": In({}, "-++++"),
    "user.v1.UserService.SearchUsers": In({"query": "someone"}, "-++++"),
    "user.v1.ProfileService.GetProfile": SignedIn(),
    "user.v1.ProfileService.UpdateProfile": SignedIn(
        {"profile": {"theme": "DARK", "etag": "no"}, "update_mask": "theme"}, ("ETAG_MISMATCH",)
    ),
    "user.v1.AvatarService.SetAvatar": SignedIn(
        {"image": {"content_type": "image/png", "data": "bm9uZQ=="}}, ("AVATAR_INVALID",)
    ),
    "user.v1.AvatarService.DeleteAvatar": SignedIn(),
    "user.v1.AvatarService.GetAvatar": In(
        {"user_id": "{member}"}, "-++++", ("AVATAR_NOT_FOUND",), absent="AVATAR_NOT_FOUND"
    ),
    "user.v1.ErasureService.DeleteUser": SignedIn({"user_id": "{absent}"}, ("USER_NOT_FOUND",)),
    "user.v1.ErasureService.DeleteManagedUser": In(
        {**_W, "user_id": "{absent}"}, "---++", ("USER_NOT_FOUND",), key="PERSON_REQUIRED"
    ),
    "user.v1.ErasureService.GetErasure": Anyone(
        {"erasure_id": "{absent}", "erasure_token": "none"}, ("ERASURE_NOT_FOUND",)
    ),
    "user.v1.ErasureService.GetManagedErasure": In(
        {**_W, "erasure_id": "{absent}"}, "---++", ("ERASURE_NOT_FOUND",)
    ),
    "user.v1.ManagedUserService.CreateManagedUser": In(
        {**_W, "email": "managed@example.org", "display_name": "M", "role": "no-such-role"},
        "---++",
        ("ROLE_UNKNOWN",),
    ),
    "user.v1.ManagedUserService.UpdateManagedUser": In(
        {
            **_W,
            "user": {"user_id": "{managed}", "display_name": "M", "etag": "no"},
            "update_mask": "displayName",
        },
        "---++",
        ("ETAG_MISMATCH",),
        absent="USER_NOT_FOUND",
    ),
    "user.v1.ManagedUserService.DeactivateUser": In(
        {**_W, "user_id": "{managed}"}, "---++", absent="USER_NOT_FOUND"
    ),
    "user.v1.ManagedUserService.ReactivateUser": In(
        {**_W, "user_id": "{managed}"}, "---++", absent="USER_NOT_FOUND"
    ),
    "user.v1.WorkspaceService.CreateWorkspace": SignedIn({"title": "t", "request_id": "once"}),
    "user.v1.WorkspaceService.GetWorkspace": In(_W, "+++++"),
    "user.v1.WorkspaceService.ListWorkspaces": SignedIn(),
    "user.v1.WorkspaceService.UpdateWorkspace": In(
        {"workspace": {**_W, "title": "t", "etag": "no"}, "update_mask": "title"}, "---++", ("ETAG_MISMATCH",)
    ),
    "user.v1.WorkspaceService.AddMember": In(
        {**_W, "user_id": "{absent}", "role": "viewer"}, "---++", ("USER_NOT_FOUND",)
    ),
    "user.v1.WorkspaceService.ListMembers": In(_W, "-++++"),
    "user.v1.WorkspaceService.UpdateMember": In(
        {**_W, "user_id": "{absent}", "role": "viewer"}, "---++", ("MEMBER_NOT_FOUND",)
    ),
    "user.v1.WorkspaceService.RemoveMember": In(
        {**_W, "user_id": "{absent}"}, "---++", ("MEMBER_NOT_FOUND",)
    ),
    "user.v1.WorkspaceService.DeleteWorkspace": In(
        {**_W, "etag": "no"}, "----+", ("ETAG_MISMATCH",), key="PERSON_REQUIRED"
    ),
    "user.v1.WorkspaceService.LeaveWorkspace": In(_W, "+++++", key="PERSON_REQUIRED", ends=True),
    "user.v1.WorkspaceService.TransferOwnership": In(
        {**_W, "user_id": "{absent}"}, "----+", ("MEMBER_NOT_FOUND",), key="PERSON_REQUIRED"
    ),
    "user.v1.InvitationService.CreateInvitation": In(
        {**_W, "email": "invited@example.org", "role": "no-such-role"}, "---++", ("ROLE_UNKNOWN",)
    ),
    "user.v1.InvitationService.GetInvitation": In(
        {**_W, "invitation_id": "{invitation}"}, "---++", absent="INVITATION_NOT_FOUND"
    ),
    "user.v1.InvitationService.ListInvitations": In(_W, "---++"),
    "user.v1.InvitationService.ResendInvitation": In(
        {**_W, "invitation_id": "{invitation}"},
        "---++",
        (OK, "INVITATION_DELAYED"),
        absent="INVITATION_NOT_FOUND",
    ),
    "user.v1.InvitationService.RevokeInvitation": In(
        {**_W, "invitation_id": "{absent}"}, "---++", ("INVITATION_NOT_FOUND",)
    ),
    "user.v1.InvitationService.PreviewInvitation": Anyone({"token": "none"}, ("INVITATION_INVALID",)),
    "user.v1.InvitationService.AcceptInvitation": SignedIn({"token": "none"}, ("INVITATION_INVALID",)),
    "user.v1.InvitationService.DeclineInvitation": Anyone({"token": "none"}, ("INVITATION_INVALID",)),
    "user.v1.RoleService.CreateRole": In(
        {**_W, "name": "odd", "permissions": ["workspaces.view", "no.permission"]},
        "---++",
        ("PERMISSION_UNKNOWN",),
    ),
    "user.v1.RoleService.GetRole": In({**_W, "name": "{role}"}, "-++++", absent="ROLE_NOT_FOUND"),
    "user.v1.RoleService.ListRoles": In(_W, "-++++"),
    "user.v1.RoleService.UpdateRole": In(
        {"role": {**_W, "name": "{role}", "title": "t", "etag": "no"}, "update_mask": "title"},
        "---++",
        ("ETAG_MISMATCH",),
        absent="ROLE_NOT_FOUND",
    ),
    "user.v1.RoleService.DeleteRole": In({**_W, "name": "never-was"}, "---++", ("ROLE_NOT_FOUND",)),
    "user.v1.RoleService.ListPermissions": In({}, "-++++"),
    "user.v1.TeamService.CreateTeam": In(
        {**_W, "title": "t", "parent_team_id": "{absent}"}, "---++", ("TEAM_NOT_FOUND",)
    ),
    "user.v1.TeamService.ListTeams": In(_W, "-++++", key=OK),
    "user.v1.TeamService.GetTeam": In({**_W, "team_id": "{team}"}, "-++++", absent="TEAM_NOT_FOUND", key=OK),
    "user.v1.TeamService.UpdateTeam": In(
        {"team": {**_W, "team_id": "{team}", "title": "t", "etag": "no"}, "update_mask": "title"},
        "---++",
        ("ETAG_MISMATCH",),
        absent="TEAM_NOT_FOUND",
    ),
    "user.v1.TeamService.MoveTeam": In(
        {**_W, "team_id": "{team}", "etag": "no"}, "---++", ("ETAG_MISMATCH",), absent="TEAM_NOT_FOUND"
    ),
    "user.v1.TeamService.DeleteTeam": In(
        {**_W, "team_id": "{team}", "etag": "no"}, "---++", ("ETAG_MISMATCH",), absent="TEAM_NOT_FOUND"
    ),
    "user.v1.TeamService.AddTeamMember": In(
        {**_W, "team_id": "{team}", "user_id": "{member}"},
        "-~~++",
        absent="TEAM_NOT_FOUND",
        key="SCOPE_MISSING",
        scope_is_late=True,
    ),
    "user.v1.TeamService.RemoveTeamMember": In(
        {**_W, "team_id": "{team}", "user_id": "{absent}"},
        "-~~++",
        absent="TEAM_NOT_FOUND",
        key="SCOPE_MISSING",
        scope_is_late=True,
    ),
    "user.v1.TeamService.ListTeamMembers": In(
        {**_W, "team_id": "{team}"}, "-++++", absent="TEAM_NOT_FOUND", key=OK
    ),
    "user.v1.TeamService.ListUserTeams": In(
        {**_W, "user_id": "{member}"}, "-++++", absent="MEMBER_NOT_FOUND", key=OK
    ),
    "user.v1.InternalUserService.CreateUser": Services(
        {"user_id": "{absent}", "workspace_id": "{workspace}", "email": "x@example.org", "display_name": "X"},
        _AUTH,
        ("USER_ID_TAKEN",),
    ),
    "user.v1.InternalUserService.PutServiceUser": Services(
        {"user_id": "{member}", "workspace_id": "{workspace}", "display_name": "X", "role": "viewer"},
        _AUTH,
        ("USER_ID_TAKEN",),
    ),
    "user.v1.InternalUserService.RemoveServiceUser": Services({"user_id": "{absent}", **_W}, _AUTH),
    "user.v1.InternalUserService.GetSignIn": Services({"user_id": "{member}"}, _AUTH),
    "user.v1.InternalUserService.GetRights": Services({"user_id": "{member}", **_W}, _ALL),
    "user.v1.InternalUserService.CheckSubjects": Services(
        {**_W, "user_ids": ["{member}"]}, frozenset({"dashboard", "analytics"})
    ),
    "user.v1.InternalUserService.GetTeamsOfUser": Services({**_W, "user_id": "{member}"}, _AUTH),
    "user.v1.InternalUserService.SearchMembers": Services(
        {**_W, "query": "someone", "limit": 10}, frozenset({"dashboard"})
    ),
    "user.v1.InternalUserService.GetInvitationMail": Services(
        {**_W, "invitation_id": "{absent}"}, _AUTH, ("INVITATION_INVALID",)
    ),
    "user.v1.InternalUserService.CheckInvitation": Services(
        {"token": "none"}, _AUTH, ("INVITATION_INVALID",)
    ),
    "user.v1.InternalGrantService.GetResourceGrants": Services(
        {**_W, "resource_type": "dashboard", "resource_ids": ["{dashboard}"], "user_id": "{member}"},
        _AUTH,
        at="dashboard",
    ),
    "user.v1.InternalGrantService.GetResourceGrants#of a source": Services(
        {**_W, "resource_type": "source", "resource_ids": ["{source}"], "user_id": "{member}"},
        _AUTH,
        at="analytics",
    ),
    "user.v1.InternalGrantService.ListSubjectGrants": Services(
        {**_W, "subject": {"user_id": "{member}"}}, _AUTH, at="dashboard"
    ),
    "user.v1.InternalGrantService.ListSubjectGrants#of a source": Services(
        {**_W, "subject": {"user_id": "{member}"}}, _AUTH, at="analytics"
    ),
    # dashboard_svc
    "dashboard.v1.DashboardService.CreateDashboard": In({"title": "t"}, "--+++"),
    "dashboard.v1.DashboardService.CreateDashboard#in a folder": On(
        {"title": "t", "folder_id": "{folder}"}, "0-+++", "FOLDER_NOT_FOUND"
    ),
    "dashboard.v1.DashboardService.SearchDashboards": In({"query": "dashboard"}, "-++++"),
    "dashboard.v1.DashboardService.MoveDashboard": On(
        {**_BOARD, "etag": "no"}, "0--++", "DASHBOARD_NOT_FOUND", ("ETAG_MISMATCH",)
    ),
    "dashboard.v1.DashboardService.BatchUpdateDashboardGrants": On(
        {**_BOARD, "delete_grant_ids": ["{absent}"]}, "0--++", "DASHBOARD_NOT_FOUND", ("GRANT_NOT_FOUND",)
    ),
    "dashboard.v1.SearchService.Search": In({"query": "someone"}, "+++++"),
    "dashboard.v1.FolderService.CreateFolder": In({"title": "t"}, "--+++"),
    "dashboard.v1.FolderService.CreateFolder#in a folder": On(
        {"title": "t", "parent_folder_id": "{folder}"}, "0-+++", "FOLDER_NOT_FOUND"
    ),
    "dashboard.v1.FolderService.GetFolder": On(_FOLDER, "0++++", "FOLDER_NOT_FOUND"),
    "dashboard.v1.FolderService.ListFolders": In({}, "-++++"),
    "dashboard.v1.FolderService.UpdateFolder": On(
        {"folder": {**_FOLDER, "title": "t", "etag": "no"}, "update_mask": "title"},
        "0-+++",
        "FOLDER_NOT_FOUND",
        ("ETAG_MISMATCH",),
    ),
    "dashboard.v1.FolderService.MoveFolder": On(
        {**_FOLDER, "etag": "no"}, "0--++", "FOLDER_NOT_FOUND", ("ETAG_MISMATCH",)
    ),
    "dashboard.v1.FolderService.DeleteFolder": On(
        {**_FOLDER, "etag": "no"}, "0--++", "FOLDER_NOT_FOUND", ("ETAG_MISMATCH",)
    ),
    "dashboard.v1.FolderService.CreateFolderGrant": On(
        {**_FOLDER, "subject": {"team_id": "{absent}"}, "role": "viewer", "effect": "ALLOW"},
        "0--++",
        "FOLDER_NOT_FOUND",
        ("SUBJECT_UNKNOWN",),
    ),
    "dashboard.v1.FolderService.ListFolderGrants": On(_FOLDER, "0--++", "FOLDER_NOT_FOUND"),
    "dashboard.v1.FolderService.DeleteFolderGrant": On(
        {**_FOLDER, "grant_id": "{absent}"}, "0--++", "FOLDER_NOT_FOUND", ("GRANT_NOT_FOUND",)
    ),
    "dashboard.v1.FolderService.BatchUpdateFolderGrants": On(
        {**_FOLDER, "delete_grant_ids": ["{absent}"]}, "0--++", "FOLDER_NOT_FOUND", ("GRANT_NOT_FOUND",)
    ),
    "dashboard.v1.DashboardService.GetDashboard": On(_BOARD, "0++++", "DASHBOARD_NOT_FOUND"),
    "dashboard.v1.DashboardService.ListDashboards": In({}, "-++++"),
    "dashboard.v1.DashboardService.UpdateDashboard": On(
        {"dashboard": {**_BOARD, "title": "t", "etag": "no"}, "update_mask": "title"},
        "0-+++",
        "DASHBOARD_NOT_FOUND",
        ("ETAG_MISMATCH",),
    ),
    "dashboard.v1.DashboardService.DeleteDashboard": On(
        {**_BOARD, "etag": "no"}, "0--++", "DASHBOARD_NOT_FOUND", ("ETAG_MISMATCH",)
    ),
    "dashboard.v1.DashboardService.DuplicateDashboard": On(
        {**_BOARD, "request_id": "once"}, "0-+++", "DASHBOARD_NOT_FOUND"
    ),
    "dashboard.v1.DashboardService.DuplicateDashboard#into a folder": On(
        {**_BOARD, "folder_id": "{folder}", "request_id": "twice"}, "0-+++", "DASHBOARD_NOT_FOUND"
    ),
    "dashboard.v1.DashboardService.UndeleteDashboard": On(
        {**_BOARD, "etag": "no"}, "0--++", "DASHBOARD_NOT_FOUND", ("ETAG_MISMATCH",)
    ),
    "dashboard.v1.DashboardService.PurgeDashboard": On(
        {**_BOARD, "etag": "no"}, "0--++", "DASHBOARD_NOT_FOUND", ("ETAG_MISMATCH",)
    ),
    "dashboard.v1.DashboardService.FavouriteDashboard": On(_BOARD, "0++++", "DASHBOARD_NOT_FOUND"),
    "dashboard.v1.DashboardService.UnfavouriteDashboard": On(_BOARD, "0++++", "DASHBOARD_NOT_FOUND"),
    "dashboard.v1.DraftService.StartDraft": On(
        {**_BOARD, "etag": "no"}, "0-+++", "DASHBOARD_NOT_FOUND", ("ETAG_MISMATCH",)
    ),
    "dashboard.v1.DraftService.GetDraft": On(_BOARD, "0-+++", "DASHBOARD_NOT_FOUND", ("DRAFT_NOT_FOUND",)),
    "dashboard.v1.DraftService.GetDraftData": On(
        _BOARD, "0-+++", "DASHBOARD_NOT_FOUND", ("DRAFT_NOT_FOUND",)
    ),
    "dashboard.v1.DraftService.PublishDashboard": On(
        {**_BOARD, "etag": "no"}, "0-+++", "DASHBOARD_NOT_FOUND", ("ETAG_MISMATCH",)
    ),
    "dashboard.v1.DraftService.DiscardDraft": On(
        {**_BOARD, "etag": "no"}, "0-+++", "DASHBOARD_NOT_FOUND", ("ETAG_MISMATCH",)
    ),
    "dashboard.v1.VersionService.ListVersions": On(_BOARD, "0-+++", "DASHBOARD_NOT_FOUND"),
    "dashboard.v1.VersionService.GetVersion": On(
        {**_BOARD, "version_id": "99999"}, "0-+++", "DASHBOARD_NOT_FOUND", ("VERSION_NOT_FOUND",)
    ),
    "dashboard.v1.VersionService.DiffVersions": On(
        {**_BOARD, "to_version_id": "99999"}, "0-+++", "DASHBOARD_NOT_FOUND", ("VERSION_NOT_FOUND",)
    ),
    "dashboard.v1.VersionService.RestoreVersion": On(
        {**_BOARD, "version_id": "99999"}, "0-+++", "DASHBOARD_NOT_FOUND", ("VERSION_NOT_FOUND",)
    ),
    "dashboard.v1.FileService.ExportDashboard": On(_BOARD, "0++++", "DASHBOARD_NOT_FOUND"),
    # Behind the access rules the content is looked at, and this one has no title.
    "dashboard.v1.FileService.ApplyDashboard": In(
        {"file": {"name": "none"}}, "-++++", ("VALIDATION_FAILED",)
    ),
    "dashboard.v1.FileService.ApplyDashboard#a new one": In(
        {"file": {"name": "traffic", "content": {"title": "t"}}, "dry_run": True}, "--+++"
    ),
    "dashboard.v1.TemplateService.ListDashboardTemplates": In({}, "-++++"),
    "dashboard.v1.TemplateService.CreateDashboardFromTemplate": In(
        {"template": "none", "source_id": "{source}"}, "--+++", ("TEMPLATE_NOT_FOUND",)
    ),
    "dashboard.v1.TemplateService.CreateDashboardFromTemplate#in a folder": On(
        {"template": "none", "source_id": "{source}", "folder_id": "{folder}"},
        "0-+++",
        "FOLDER_NOT_FOUND",
        ("TEMPLATE_NOT_FOUND",),
    ),
    "dashboard.v1.DashboardService.GetDashboardData": On(_BOARD, "0++++", "DASHBOARD_NOT_FOUND"),
    "dashboard.v1.DashboardService.WatchDashboard": On(_BOARD, "0++++", "DASHBOARD_NOT_FOUND"),
    "dashboard.v1.DashboardService.CreateDashboardGrant": On(
        {**_BOARD, "subject": {"team_id": "{absent}"}, "role": "viewer", "effect": "ALLOW"},
        "0--++",
        "DASHBOARD_NOT_FOUND",
        ("SUBJECT_UNKNOWN",),
    ),
    "dashboard.v1.DashboardService.ListDashboardGrants": On(_BOARD, "0--++", "DASHBOARD_NOT_FOUND"),
    "dashboard.v1.DashboardService.DeleteDashboardGrant": On(
        {**_BOARD, "grant_id": "{absent}"}, "0--++", "DASHBOARD_NOT_FOUND", ("GRANT_NOT_FOUND",)
    ),
    "dashboard.v1.WidgetService.CreateWidget": On(
        {**_BOARD, **TILE, "request_id": "once"}, "0-+++", "DASHBOARD_NOT_FOUND"
    ),
    "dashboard.v1.WidgetService.GetWidget": On(
        {**_BOARD, "widget_id": "{widget}"}, "0++++", "DASHBOARD_NOT_FOUND"
    ),
    "dashboard.v1.WidgetService.ListWidgets": On(_BOARD, "0++++", "DASHBOARD_NOT_FOUND"),
    "dashboard.v1.WidgetService.UpdateWidget": On(
        {
            "widget": {**_BOARD, "widget_id": "{widget}", "title": "t", "kind": "NUMBER", "etag": "no"},
            "update_mask": "title",
        },
        "0-+++",
        "DASHBOARD_NOT_FOUND",
        ("ETAG_MISMATCH",),
    ),
    "dashboard.v1.WidgetService.ArrangeWidgets": On(
        {**_BOARD, "placements": [{"widget_id": "{absent}", "layout": {"width": 4, "height": 4}}]},
        "0-+++",
        "DASHBOARD_NOT_FOUND",
        ("WIDGET_NOT_FOUND",),
    ),
    "dashboard.v1.WidgetService.DeleteWidget": On(
        {**_BOARD, "widget_id": "{absent}"}, "0-+++", "DASHBOARD_NOT_FOUND", ("WIDGET_NOT_FOUND",)
    ),
    "dashboard.v1.LibraryWidgetService.CreateLibraryWidget": In(
        {"title": "t", "kind": "TEXT", "markdown": "t"}, "--+++"
    ),
    "dashboard.v1.LibraryWidgetService.GetLibraryWidget": In(
        {"library_widget_id": "{absent}"},
        "-++++",
        ("LIBRARY_WIDGET_NOT_FOUND",),
        absent="LIBRARY_WIDGET_NOT_FOUND",
    ),
    "dashboard.v1.LibraryWidgetService.ListLibraryWidgets": In({}, "-++++"),
    "dashboard.v1.LibraryWidgetService.UpdateLibraryWidget": In(
        {"library_widget": {"library_widget_id": "{absent}", "title": "t"}, "update_mask": "title"},
        "--+++",
        ("LIBRARY_WIDGET_NOT_FOUND",),
        absent="LIBRARY_WIDGET_NOT_FOUND",
    ),
    "dashboard.v1.LibraryWidgetService.DeleteLibraryWidget": In(
        {"library_widget_id": "{absent}"},
        "--+++",
        ("LIBRARY_WIDGET_NOT_FOUND",),
        absent="LIBRARY_WIDGET_NOT_FOUND",
    ),
    "dashboard.v1.LibraryWidgetService.ListLibraryWidgetUses": In(
        {"library_widget_id": "{absent}"},
        "-++++",
        ("LIBRARY_WIDGET_NOT_FOUND",),
        absent="LIBRARY_WIDGET_NOT_FOUND",
    ),
    "dashboard.v1.WidgetKindService.CreateWidgetKind": In(
        {"name": "bars", "title": "t", "options_schema": {"type": "string"}, "query_template": {}},
        "---++",
        ("WIDGET_KIND_INVALID",),
    ),
    "dashboard.v1.WidgetKindService.GetWidgetKind": In(
        {"widget_kind_id": "{absent}"},
        "-++++",
        ("WIDGET_KIND_NOT_FOUND",),
        absent="WIDGET_KIND_NOT_FOUND",
    ),
    "dashboard.v1.WidgetKindService.ListWidgetKinds": In({}, "-++++"),
    "dashboard.v1.WidgetKindService.UpdateWidgetKind": In(
        {"widget_kind": {"widget_kind_id": "{absent}", "title": "t"}, "update_mask": "title"},
        "---++",
        ("WIDGET_KIND_NOT_FOUND",),
        absent="WIDGET_KIND_NOT_FOUND",
    ),
    "dashboard.v1.WidgetKindService.DeleteWidgetKind": In(
        {"widget_kind_id": "{absent}"},
        "---++",
        ("WIDGET_KIND_NOT_FOUND",),
        absent="WIDGET_KIND_NOT_FOUND",
    ),
    "dashboard.v1.WidgetKindService.ListWidgetKindVersions": In(
        {"widget_kind_id": "{absent}"},
        "-++++",
        ("WIDGET_KIND_NOT_FOUND",),
        absent="WIDGET_KIND_NOT_FOUND",
    ),
    "dashboard.v1.WidgetKindService.CheckWidgetKindUpgrade": In(
        {"widget_kind_id": "{absent}"},
        "---++",
        ("WIDGET_KIND_NOT_FOUND",),
        absent="WIDGET_KIND_NOT_FOUND",
    ),
    "dashboard.v1.WidgetKindService.UpgradeWidgets": In(
        {"widget_kind_id": "{absent}"},
        "---++",
        ("WIDGET_KIND_NOT_FOUND",),
        absent="WIDGET_KIND_NOT_FOUND",
    ),
    "dashboard.v1.AnnotationService.CreateAnnotation": On(
        {**_BOARD, "text": "t", "request_id": "once"}, "0-+++", "DASHBOARD_NOT_FOUND"
    ),
    "dashboard.v1.AnnotationService.GetAnnotation": On(
        {**_BOARD, "annotation_id": "{absent}"}, "0++++", "DASHBOARD_NOT_FOUND", ("ANNOTATION_NOT_FOUND",)
    ),
    "dashboard.v1.AnnotationService.ListAnnotations": On(_BOARD, "0++++", "DASHBOARD_NOT_FOUND"),
    "dashboard.v1.AnnotationService.UpdateAnnotation": On(
        {"annotation": {**_BOARD, "annotation_id": "{absent}", "text": "t"}},
        "0-+++",
        "DASHBOARD_NOT_FOUND",
        ("ANNOTATION_NOT_FOUND",),
    ),
    "dashboard.v1.AnnotationService.DeleteAnnotation": On(
        {**_BOARD, "annotation_id": "{absent}"}, "0-+++", "DASHBOARD_NOT_FOUND", ("ANNOTATION_NOT_FOUND",)
    ),
    "dashboard.v1.VariableService.ListVariableValues": On(
        {**_BOARD, "name": "never"}, "0++++", "DASHBOARD_NOT_FOUND", ("VARIABLE_NOT_FOUND",)
    ),
    "dashboard.v1.ShareService.CreateShareLink": On(
        {**_BOARD, "request_id": "once"}, "0--++", "DASHBOARD_NOT_FOUND"
    ),
    "dashboard.v1.ShareService.CreateSnapshot": On(
        {**_BOARD, "request_id": "once"}, "0--++", "DASHBOARD_NOT_FOUND"
    ),
    "dashboard.v1.ShareService.GetShareLink": On(
        {**_BOARD, "share_link_id": "{absent}"}, "0--++", "DASHBOARD_NOT_FOUND", ("SHARE_LINK_NOT_FOUND",)
    ),
    "dashboard.v1.ShareService.ListShareLinks": On(_BOARD, "0--++", "DASHBOARD_NOT_FOUND"),
    "dashboard.v1.ShareService.UpdateShareLink": On(
        {"share_link": {**_BOARD, "share_link_id": "{absent}", "title": "t"}, "update_mask": "title"},
        "0--++",
        "DASHBOARD_NOT_FOUND",
        ("SHARE_LINK_NOT_FOUND",),
    ),
    "dashboard.v1.ShareService.DeleteShareLink": On(
        {**_BOARD, "share_link_id": "{absent}"}, "0--++", "DASHBOARD_NOT_FOUND", ("SHARE_LINK_NOT_FOUND",)
    ),
    "dashboard.v1.ShareService.GetSharedPage": Anyone({"token": "none"}),
    "dashboard.v1.ShareService.GetSharedDashboard": Anyone({"token": "none"}, ("SHARE_LINK_NOT_FOUND",)),
    "dashboard.v1.ShareService.GetSharedDashboardData": Anyone({"token": "none"}, ("SHARE_LINK_NOT_FOUND",)),
    "dashboard.v1.ShareService.WatchSharedDashboard": Anyone({"token": "none"}, ("SHARE_LINK_NOT_FOUND",)),
    "dashboard.v1.ShareService.UnlockSharedDashboard": Anyone(
        {"token": "none", "password": "none"}, ("SHARE_LINK_NOT_FOUND",)
    ),
    "dashboard.v1.ShareService.ListSharedVariableValues": Anyone(
        {"token": "none", "name": "v"}, ("SHARE_LINK_NOT_FOUND",)
    ),
    "dashboard.v1.ShareService.ListSharedAnnotations": Anyone({"token": "none"}, ("SHARE_LINK_NOT_FOUND",)),
    # analytics_svc
    "analytics.v1.IngestService.Ingest": Anyone({"write_key": "none", **EVENT}, ("WRITE_KEY_INVALID",)),
    "analytics.v1.IngestService.IngestStream": Anyone({"write_key": "none", **EVENT}, ("WRITE_KEY_INVALID",)),
    "analytics.v1.CompatService.SendBatch": Anyone(
        {"write_key": "none", "batch": [MESSAGE]}, ("WRITE_KEY_INVALID",)
    ),
    "analytics.v1.CompatService.SendTrack": Anyone({"message": MESSAGE}, ("WRITE_KEY_INVALID",)),
    "analytics.v1.CompatService.SendIdentify": Anyone({"message": MESSAGE}, ("WRITE_KEY_INVALID",)),
    "analytics.v1.CompatService.SendPage": Anyone({"message": MESSAGE}, ("WRITE_KEY_INVALID",)),
    "analytics.v1.CompatService.SendScreen": Anyone({"message": MESSAGE}, ("WRITE_KEY_INVALID",)),
    "analytics.v1.CompatService.SendGroup": Anyone({"message": MESSAGE}, ("WRITE_KEY_INVALID",)),
    "analytics.v1.CompatService.SendAlias": Anyone({"message": MESSAGE}, ("WRITE_KEY_INVALID",)),
    "analytics.v1.QueryService.RunQuery": On(QUERY, "0++++", "SOURCE_NOT_FOUND"),
    "analytics.v1.QueryService.ValidateQuery": On(QUERY, "0++++", "SOURCE_NOT_FOUND"),
    "analytics.v1.QueryService.ExplainQuery": On(QUERY, "0++++", "SOURCE_NOT_FOUND"),
    "analytics.v1.EventService.ListEvents": On({"source_ids": ["{source}"]}, "0++++", "SOURCE_NOT_FOUND"),
    "analytics.v1.EventService.TailEvents": On({"source_ids": ["{source}"]}, "0++++", "SOURCE_NOT_FOUND"),
    "analytics.v1.InsightService.RunFunnel": On(
        {"query": {**_SOURCES, "steps": [{"event": "a"}, {"event": "b"}]}}, "0++++", "SOURCE_NOT_FOUND"
    ),
    "analytics.v1.InsightService.RunRetention": On({"query": _RECENT}, "0++++", "SOURCE_NOT_FOUND"),
    "analytics.v1.InsightService.RunPaths": On({"query": _SOURCES}, "0++++", "SOURCE_NOT_FOUND"),
    "analytics.v1.InsightService.RunLifecycle": On({"query": _RECENT}, "0++++", "SOURCE_NOT_FOUND"),
    "analytics.v1.CohortService.CreateCohort": In({"title": "t", **_DEFINITION}, "--+++"),
    "analytics.v1.CohortService.GetCohort": In(
        {"cohort_id": "{absent}"}, "-++++", ("COHORT_NOT_FOUND",), absent="COHORT_NOT_FOUND"
    ),
    "analytics.v1.CohortService.ListCohorts": In({}, "-++++"),
    "analytics.v1.CohortService.UpdateCohort": In(
        {"cohort": {"cohort_id": "{absent}", "title": "t"}, "update_mask": "title"},
        "--+++",
        ("COHORT_NOT_FOUND",),
        absent="COHORT_NOT_FOUND",
    ),
    "analytics.v1.CohortService.DeleteCohort": In(
        {"cohort_id": "{absent}"}, "--+++", ("COHORT_NOT_FOUND",), absent="COHORT_NOT_FOUND"
    ),
    "analytics.v1.CohortService.PreviewCohort": On({**_SOURCES, **_DEFINITION}, "0++++", "SOURCE_NOT_FOUND"),
    "analytics.v1.SourceService.CreateSource": In({"title": "t"}, "--+++"),
    "analytics.v1.SourceService.GetSource": On(_SOURCE, "0++++", "SOURCE_NOT_FOUND"),
    "analytics.v1.SourceService.ListSources": In({}, "-++++"),
    "analytics.v1.SourceService.UpdateSource": On(
        {"source": {**_SOURCE, "title": "t", "etag": "no"}, "update_mask": "title"},
        "0-+++",
        "SOURCE_NOT_FOUND",
        ("ETAG_MISMATCH",),
    ),
    "analytics.v1.SourceService.RotateWriteKey": On(_SOURCE, "0-+++", "SOURCE_NOT_FOUND"),
    "analytics.v1.SourceService.ListSourceUsage": On(_SOURCE, "0++++", "SOURCE_NOT_FOUND"),
    "analytics.v1.WriteKeyService.CreateWriteKey": On(
        {**_SOURCE, "title": "t"}, "0-+++", "SOURCE_NOT_FOUND", (OK, "WRITE_KEY_LIMIT")
    ),
    "analytics.v1.WriteKeyService.ListWriteKeys": On(_SOURCE, "0++++", "SOURCE_NOT_FOUND"),
    "analytics.v1.WriteKeyService.UpdateWriteKey": On(
        {"write_key": {**_SOURCE, "write_key_id": "{absent}", "title": "t"}, "update_mask": "title"},
        "0-+++",
        "SOURCE_NOT_FOUND",
        ("WRITE_KEY_NOT_FOUND",),
    ),
    "analytics.v1.WriteKeyService.DeleteWriteKey": On(
        {**_SOURCE, "write_key_id": "{absent}"}, "0-+++", "SOURCE_NOT_FOUND", ("WRITE_KEY_NOT_FOUND",)
    ),
    "analytics.v1.SourceService.DeleteSource": On(
        {"source_id": "{victim_source}"}, "0--++", "SOURCE_NOT_FOUND", (OK, "SOURCE_NOT_FOUND")
    ),
    "analytics.v1.SourceService.CreateSourceGrant": On(
        {**_SOURCE, "subject": {"team_id": "{absent}"}, "role": "viewer", "effect": "ALLOW"},
        "0--++",
        "SOURCE_NOT_FOUND",
        ("SUBJECT_UNKNOWN",),
    ),
    "analytics.v1.SourceService.ListSourceGrants": On(_SOURCE, "0--++", "SOURCE_NOT_FOUND"),
    "analytics.v1.SourceService.DeleteSourceGrant": On(
        {**_SOURCE, "grant_id": "{absent}"}, "0--++", "SOURCE_NOT_FOUND", ("GRANT_NOT_FOUND",)
    ),
    "analytics.v1.SourceService.BatchUpdateSourceGrants": On(
        {**_SOURCE, "delete_grant_ids": ["{absent}"]}, "0--++", "SOURCE_NOT_FOUND", ("GRANT_NOT_FOUND",)
    ),
    "analytics.v1.CatalogueService.ListCatalogueEvents": On(_SOURCE, "0++++", "SOURCE_NOT_FOUND"),
    "analytics.v1.CatalogueService.GetCatalogueEvent": On(
        {**_SOURCE, "name": "never"}, "0++++", "SOURCE_NOT_FOUND", ("CATALOGUE_NAME_NOT_FOUND",)
    ),
    "analytics.v1.CatalogueService.UpdateCatalogueEvent": On(
        {"event": {**_SOURCE, "name": "never", "etag": "no"}, "update_mask": "hidden"},
        "0-+++",
        "SOURCE_NOT_FOUND",
        ("ETAG_MISMATCH",),
    ),
    "analytics.v1.CatalogueService.ListCatalogueProperties": On(_SOURCE, "0++++", "SOURCE_NOT_FOUND"),
    "analytics.v1.CatalogueService.GetCatalogueProperty": On(
        {**_SOURCE, "name": "properties.never"}, "0++++", "SOURCE_NOT_FOUND", ("CATALOGUE_NAME_NOT_FOUND",)
    ),
    "analytics.v1.CatalogueService.UpdateCatalogueProperty": On(
        {"property": {**_SOURCE, "name": "properties.never", "etag": "no"}, "update_mask": "hidden"},
        "0-+++",
        "SOURCE_NOT_FOUND",
        ("ETAG_MISMATCH",),
    ),
    "analytics.v1.FailedEventService.GetFailedEvent": On(
        {**_SOURCE, "failed_event_id": "{absent}"}, "0++++", "SOURCE_NOT_FOUND", ("FAILED_EVENT_NOT_FOUND",)
    ),
    "analytics.v1.FailedEventService.ListFailedEvents": On(_SOURCE, "0++++", "SOURCE_NOT_FOUND"),
    "analytics.v1.FailedEventService.UpdateFailedEvent": On(
        {**_SOURCE, "failed_event": {"failed_event_id": "{absent}"}},
        "0-+++",
        "SOURCE_NOT_FOUND",
        ("FAILED_EVENT_NOT_FOUND",),
    ),
    "analytics.v1.FailedEventService.RetryFailedEvents": On(
        {**_SOURCE, "failed_event_ids": ["{absent}"]}, "0-+++", "SOURCE_NOT_FOUND"
    ),
    "analytics.v1.FailedEventService.DiscardFailedEvents": On(
        {**_SOURCE, "failed_event_ids": ["{absent}"]}, "0-+++", "SOURCE_NOT_FOUND"
    ),
    "analytics.v1.InternalQueryService.RunWidgetQueries": Services(
        {**_W, "questions": [QUERY]}, frozenset({"dashboard"})
    ),
    "analytics.v1.InternalQueryService.RecallWidgetAnswers": Services(
        {**_W, "questions": [QUERY]}, frozenset({"dashboard"})
    ),
    "analytics.v1.InternalQueryService.CheckWidgetQueries": Services(
        {**_W, "questions": [QUERY]}, frozenset({"dashboard"})
    ),
}
