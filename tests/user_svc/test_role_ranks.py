"""Who may give which role: never one that could more than the giver."""

from grpc import StatusCode
from meshboard.user.v1.internal_user_service_pb2 import PutServiceUserRequest
from meshboard.user.v1.workspace_service_pb2 import AddMemberRequest, RemoveMemberRequest

from tests.harness import new_id, refused
from tests.user_svc.conftest import Person, UserSvc
from tests.user_svc.roles import create, give, member_with, rights_of

RECRUITER = ("members.view", "members.edit", "invitations.view", "invitations.edit")
TOO_HIGH = (StatusCode.PERMISSION_DENIED, "ROLE_TOO_HIGH")


async def test_who_manages_members_lifts_nobody_above_themselves(svc: UserSvc, owner: Person):
    recruiter = await member_with(svc, owner, "recruiter", RECRUITER)
    viewer, stranger = await svc.join(owner, "viewer"), await svc.person()
    await create(svc, owner, "guest")
    await create(svc, owner, "auditor", ["audit.view"])
    for role in ("viewer", "editor", "admin", "auditor"):
        assert await refused(give(svc, recruiter, recruiter, role)) == TOO_HIGH
        adding = AddMemberRequest(workspace_id=owner.workspace_id, user_id=stranger.user_id, role=role)
        assert await refused(svc.workspaces.AddMember(adding, metadata=recruiter.metadata)) == TOO_HIGH
    # The role that somebody has must be in reach too.
    assert await refused(give(svc, recruiter, viewer, "guest")) == TOO_HIGH
    removing = RemoveMemberRequest(workspace_id=owner.workspace_id, user_id=viewer.user_id)
    assert await refused(svc.workspaces.RemoveMember(removing, metadata=recruiter.metadata)) == TOO_HIGH
    outcome = await refused(give(svc, recruiter, viewer, "owner"))
    assert outcome == (StatusCode.PERMISSION_DENIED, "OWNER_ROLE_RESERVED")
    guest = await svc.join(recruiter, "guest")
    await give(svc, recruiter, guest, "recruiter")
    removing = RemoveMemberRequest(workspace_id=owner.workspace_id, user_id=guest.user_id)
    await svc.workspaces.RemoveMember(removing, metadata=recruiter.metadata)


async def test_admins_give_all_but_that_of_an_owner(svc: UserSvc, owner: Person):
    admin = await svc.join(owner, "admin")
    await create(svc, owner, "auditor", ["audit.view"])
    member = await svc.join(admin, "auditor")
    for role in ("admin", "editor", "auditor"):
        await give(svc, admin, member, role)
        assert (await rights_of(svc, member)).role == role
    outcome = await refused(give(svc, admin, member, "owner"))
    assert outcome == (StatusCode.PERMISSION_DENIED, "OWNER_ROLE_RESERVED")


async def test_a_role_that_is_not_there(svc: UserSvc, owner: Person):
    member = await svc.join(owner, "viewer")
    outcome = await refused(give(svc, owner, member, "analyst"))
    assert outcome == (StatusCode.INVALID_ARGUMENT, "ROLE_UNKNOWN")
    outcome = await refused(svc.join(owner, "analyst"))
    assert outcome == (StatusCode.INVALID_ARGUMENT, "ROLE_UNKNOWN")


async def test_a_service_account_has_a_custom_role(svc: UserSvc, owner: Person):
    await create(svc, owner, "auditor", ["audit.view"])
    request = PutServiceUserRequest(
        user_id=new_id(), workspace_id=owner.workspace_id, display_name="CI", role="auditor"
    )
    user = (await svc.internal.PutServiceUser(request, metadata=svc.calling_as("auth"))).user
    machine = Person(user.user_id, owner.workspace_id, "", ())
    assert "audit.view" in (await rights_of(svc, machine)).permissions
    request = PutServiceUserRequest(
        user_id=new_id(), workspace_id=owner.workspace_id, display_name="CI", role="gone"
    )
    outcome = await refused(svc.internal.PutServiceUser(request, metadata=svc.calling_as("auth")))
    assert outcome == (StatusCode.INVALID_ARGUMENT, "ROLE_UNKNOWN")
