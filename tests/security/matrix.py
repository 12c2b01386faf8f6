"""The permission matrix: what each kind of caller may do with each RPC, by hand and not read from the contracts.

Members are, in this order: a guest (a custom role that may see the workspace and nothing in it), a viewer, an editor,
an admin and an owner. For each stands a sign: `+` the call gets past the access rules, `-` the caller lacks the
permission, `0` the answer is that of something absent.

Requests are as JSON; `{dashboard}` and the like stand for an id of the target: the own thing, the sibling team's (which
the whole workspace is denied), another workspace's, a deleted one, one that never was.
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
TILE = {"title": "t", "kind": "NUMBER", "layout": {"width": 4, "height": 4}, **QUERY}
EVENT = {"events": [{"event": "e", "distinct_id": "d"}]}
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
    RPCs that name none. `elsewhere` is what is said of a workspace that the caller is not in.
    """

    request: Body
    members: str
    passes: tuple[str, ...] = (OK,)
    absent: str = ""
    key: str = "SCOPE_MISSING"
    elsewhere: str = "WORKSPACE_NOT_FOUND"


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


Row = On | In | SignedIn | Anyone | Services

_ALL = frozenset({"auth", "user", "dashboard", "analytics"})
_AUTH = frozenset({"auth"})
_W = {"workspace_id": "{workspace}"}
_BOARD = {"dashboard_id": "{dashboard}"}
_SOURCE = {"source_id": "{source}"}
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
    "auth.v1.InternalAuthService.SetAccountDisabled": Services(
        {"user_id": "{absent}", "disabled": True}, frozenset({"user"}), ("RESOURCE_NOT_FOUND",)
    ),
    # user_svc
    "user.v1.UserService.GetMe": SignedIn(key=OK),
    "user.v1.UserService.GetUser": In(
        {"user_id": "{member}"}, "-++++", absent="USER_NOT_FOUND", elsewhere="WORKSPACE_NOT_FOUND"
    ),
    "user.v1.UserService.UpdateUser": SignedIn(
        {"user": {"user_id": "{absent}", "display_name": "n"}, "update_mask": "displayName"},
        ("USER_NOT_FOUND",),
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
    "user.v1.TeamService.CreateTeam": In(
        {**_W, "title": "t", "parent_team_id": "{absent}"}, "---++", ("TEAM_NOT_FOUND",)
    ),
    "user.v1.TeamService.ListTeams": In(_W, "-++++", key=OK),
    "user.v1.TeamService.AddTeamMember": In(
        {**_W, "team_id": "{team}", "user_id": "{member}"}, "---++", absent="TEAM_NOT_FOUND"
    ),
    "user.v1.TeamService.RemoveTeamMember": In(
        {**_W, "team_id": "{team}", "user_id": "{absent}"}, "---++", absent="TEAM_NOT_FOUND"
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
    # dashboard_svc
    "dashboard.v1.DashboardService.CreateDashboard": In({"title": "t"}, "--+++"),
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
    "dashboard.v1.WidgetService.DeleteWidget": On(
        {**_BOARD, "widget_id": "{absent}"}, "0-+++", "DASHBOARD_NOT_FOUND", ("WIDGET_NOT_FOUND",)
    ),
    # analytics_svc
    "analytics.v1.IngestService.Ingest": Anyone({"write_key": "none", **EVENT}, ("WRITE_KEY_INVALID",)),
    "analytics.v1.QueryService.RunQuery": On(QUERY, "0++++", "SOURCE_NOT_FOUND"),
    "analytics.v1.QueryService.ValidateQuery": On(QUERY, "0++++", "SOURCE_NOT_FOUND"),
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
    "analytics.v1.InternalQueryService.RunWidgetQuery": Services(
        {**_W, **QUERY}, frozenset({"dashboard"}), (OK,)
    ),
}
