"""What the access stage refuses beside what roles and grants say: scopes, impersonators, sessions without a factor."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import grpc
import pytest
from meshboard.auth.v1 import account_service_pb2
from meshboard.auth.v1.account_service_pb2 import GetAccountRequest
from meshboard.dashboard.v1 import dashboard_service_pb2
from meshboard.user.v1.workspace_service_pb2 import ListMembersRequest

from services.chassis import errors
from services.chassis.access import Access, MissingAccessError, Need, Rule, rule_of
from tests.harness import Identity, Member, new_id

SENSITIVE = Rule("m", "authenticated", "", frozenset(), (), sensitive=True)
RECENT = Rule("m", "authenticated", "", frozenset(), (), sensitive=True, recent=True)
MEMBERS = Rule("m", "permission", "members.view", frozenset(), ("workspace_id",))


@pytest.fixture(scope="session")
def access(identity: Identity) -> Access:
    return identity.access("user")


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def token_of(member: Member, **claims: Any) -> str:
    return member.identity.token(sub=member.user_id, wid=member.workspace_id, **claims)


async def outcome(access: Access, rule: Rule, token: str, workspace_id: str = "") -> str:
    """OK, or the reason of the refusal."""
    request: Any = GetAccountRequest() if rule.kind == "authenticated" else ListMembersRequest()
    if workspace_id:
        request.workspace_id = workspace_id
    try:
        caller = await access.authenticate(rule, bearer(token))
        await access.authorize(rule, request, bearer(token), caller)
    except errors.Error as error:
        return error.reason
    return "OK"


async def test_sensitive_methods_are_for_the_person_itself(access: Access, identity: Identity):
    person = identity.member()
    admin = {"act": {"sub": new_id()}}
    for rule in (SENSITIVE, RECENT):
        assert await outcome(access, rule, token_of(person)) == "OK"
        assert await outcome(access, rule, token_of(person, **admin)) == "PERSON_REQUIRED"
        assert await outcome(access, rule, token_of(person, amr=None)) == "PERSON_REQUIRED"
        assert await outcome(access, rule, token_of(person, amr=[])) == "PERSON_REQUIRED"


async def test_recent_methods_want_a_proof_of_the_last_minutes(access: Access, identity: Identity):
    person, now = identity.member(), int(time.time())
    assert await outcome(access, RECENT, token_of(person, auth_time=now - 890)) == "OK"
    old = token_of(person, auth_time=now - 901)
    assert await outcome(access, RECENT, old) == "REAUTHENTICATION_REQUIRED"
    assert await outcome(access, SENSITIVE, old) == "OK"


async def test_an_impersonator_stays_in_the_workspace(access: Access, identity: Identity):
    member = identity.member()
    elsewhere = new_id()
    identity.rights[member.user_id, elsewhere] = replace(
        identity.rights[member.user_id, member.workspace_id], workspace_id=elsewhere
    )
    token = token_of(member, act={"sub": new_id()})
    assert await outcome(access, MEMBERS, token, member.workspace_id) == "OK"
    assert await outcome(access, MEMBERS, token, elsewhere) == "WORKSPACE_NOT_FOUND"
    assert await outcome(access, MEMBERS, token_of(member), elsewhere) == "OK"


async def test_a_scope_limits_what_the_rights_allow(access: Access, identity: Identity):
    member = identity.member("admin")
    for scope, expected in {
        "members.view": "OK",
        "dashboards.view members.view": "OK",
        "meshboard": "OK",
        "dashboards.view": "SCOPE_MISSING",
        "members": "SCOPE_MISSING",
        "": "SCOPE_MISSING",
        None: "SCOPE_MISSING",
    }.items():
        assert await outcome(access, MEMBERS, token_of(member, scope=scope, amr=None)) == expected, scope


async def test_a_scope_gives_nothing_that_the_role_has_not(access: Access, identity: Identity):
    viewer = identity.member("viewer")
    edit = replace(MEMBERS, permission="members.edit")
    assert await outcome(access, edit, token_of(viewer, scope="members.edit")) == "PERMISSION_MISSING"


async def test_a_workspace_can_require_a_second_factor(access: Access, identity: Identity):
    member = identity.member()
    key = (member.user_id, member.workspace_id)
    identity.rights[key] = replace(identity.rights[key], second_factor_required=True)
    assert await outcome(access, MEMBERS, token_of(member)) == "SECOND_FACTOR_REQUIRED"
    assert await outcome(access, MEMBERS, token_of(member, amr=["pwd", "otp", "mfa"])) == "OK"
    # A service account has no factors; who impersonates carries those of their own sign-in.
    assert await outcome(access, MEMBERS, token_of(member, amr=None)) == "OK"
    assert await outcome(access, SENSITIVE, token_of(member)) == "OK"


@pytest.mark.parametrize(
    "claims",
    [
        {"amr": "pwd"},
        {"amr": [1]},
        {"scope": ["meshboard"]},
        {"act": "someone"},
        {"act": {}, "scope": 7},
        {"act": {"sub": 7}},
        {"act": {"iss": "x"}},
    ],
    ids=str,
)
async def test_claims_of_another_type_are_refused(access: Access, identity: Identity, claims: dict[str, Any]):
    token = token_of(identity.member(), **claims)
    with pytest.raises(errors.Error) as failure:
        await access.authenticate(SENSITIVE, bearer(token))
    assert (failure.value.code, failure.value.reason) == (
        grpc.StatusCode.UNAUTHENTICATED,
        "TOKEN_INVALID",
    )


def test_the_contract_says_what_is_recent():
    methods = account_service_pb2.DESCRIPTOR.services_by_name["AccountService"].methods_by_name
    said = {name: rule_of(methods[name]) for name in ("ChangeEmail", "GetAccount", "VerifyEmail")}
    assert {name: (rule.sensitive, rule.recent) for name, rule in said.items()} == {
        "ChangeEmail": (True, True),
        "GetAccount": (True, False),
        "VerifyEmail": (False, False),
    }


async def test_a_scope_must_hold_all_that_a_call_needs(access: Access, identity: Identity):
    member = identity.member("admin")
    both = replace(MEMBERS, also=(Need("teams.view"),))
    assert await outcome(access, both, token_of(member, scope="members.view teams.view")) == "OK"
    assert await outcome(access, both, token_of(member, scope="members.view")) == "SCOPE_MISSING"
    viewer = identity.member("viewer")
    beyond = replace(MEMBERS, also=(Need("teams.edit"),))
    assert await outcome(access, beyond, token_of(viewer)) == "PERMISSION_MISSING"
    assert await outcome(access, beyond, token_of(member)) == "OK"


def test_the_contract_says_what_is_needed_besides():
    methods = dashboard_service_pb2.DESCRIPTOR.services_by_name["DashboardService"].methods_by_name
    assert rule_of(methods["MoveDashboard"]).needs == (
        Need("dashboards.grant", ("dashboard_id",)),
        Need("dashboards.edit", ("dashboard_id",)),
        Need("dashboards.create", ("folder_id",), or_workspace=True),
    )
    assert Need("folders.create", ("parent_folder_id",)).type == "folder"
    assert Need("sources.query", ("query", "source_ids")).type == "source"


def test_a_service_refuses_a_rule_about_what_it_does_not_own(access: Access):
    foreign = replace(MEMBERS, also=(Need("folders.create", ("folder_id",)),))
    with pytest.raises(MissingAccessError, match="folder"):
        access.check_rule(foreign)
