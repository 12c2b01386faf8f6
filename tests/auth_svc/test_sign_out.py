import grpc
import grpc.aio
from meshboard.auth.v1.auth_service_pb2 import RefreshRequest, SignOutRequest
from meshboard.auth.v1.internal_auth_service_pb2 import CheckSessionRequest, ListRevocationsRequest
from meshboard.user.v1.user_service_pb2 import GetMeRequest

from tests.auth_svc.conftest import Services, bearer, claims_of
from tests.conditions import eventually
from tests.harness import new_id, refused, service_metadata


async def test_ends_the_session_everywhere(services: Services):
    signed_up = await services.sign_up()
    other = await services.sign_in(signed_up.user.email)
    session_id = claims_of(signed_up.access_token)["sid"]
    metadata = service_metadata(services.keys, "user", "auth")
    alive = await services.internal_auth.CheckSession(
        CheckSessionRequest(session_id=session_id), metadata=metadata
    )
    assert alive.alive

    await services.auth.SignOut(SignOutRequest(), metadata=bearer(signed_up.access_token))
    alive = await services.internal_auth.CheckSession(
        CheckSessionRequest(session_id=session_id), metadata=metadata
    )
    assert not alive.alive
    listed = await services.internal_auth.ListRevocations(ListRevocationsRequest(), metadata=metadata)
    assert session_id in [revocation.session_id for revocation in listed.revocations]
    outcome = await refused(
        services.auth.Refresh(
            RefreshRequest(refresh_token=signed_up.refresh_token, refresh_key=signed_up.refresh_key)
        )
    )
    assert outcome == (grpc.StatusCode.UNAUTHENTICATED, "REFRESH_TOKEN_INVALID")

    async def ended(address: str) -> bool:
        try:
            if address == "user":
                await services.users.GetMe(GetMeRequest(), metadata=bearer(signed_up.access_token))
            else:
                await services.auth.SignOut(SignOutRequest(), metadata=bearer(signed_up.access_token))
        except grpc.aio.AioRpcError as failure:
            return failure.code() is grpc.StatusCode.UNAUTHENTICATED
        return False

    await eventually(lambda: ended("user"), seconds=2)
    await eventually(lambda: ended("auth"), seconds=2)
    await services.users.GetMe(GetMeRequest(), metadata=bearer(other.access_token))


async def test_needs_a_token(services: Services):
    outcome = await refused(services.auth.SignOut(SignOutRequest()))
    assert outcome == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING")


async def test_an_unknown_session_is_not_alive(services: Services):
    answer = await services.internal_auth.CheckSession(
        CheckSessionRequest(session_id=new_id()),
        metadata=service_metadata(services.keys, "dashboard", "auth"),
    )
    assert not answer.alive


async def test_what_is_internal_is_refused_to_people(services: Services):
    signed_up = await services.sign_up()
    metadata = bearer(signed_up.access_token)
    for call in (
        services.internal_auth.CheckSession(CheckSessionRequest(session_id=new_id()), metadata=metadata),
        services.internal_auth.ListRevocations(ListRevocationsRequest(), metadata=metadata),
    ):
        outcome = await refused(call)
        assert outcome == (grpc.StatusCode.PERMISSION_DENIED, "CALLER_NOT_ALLOWED")
