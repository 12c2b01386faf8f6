"""Disabling an account: nothing that it has works any more, until it is enabled."""

import grpc
import grpc.aio
from meshboard.auth.v1.auth_service_pb2 import RefreshRequest, SignInResponse, SignUpResponse
from meshboard.auth.v1.events_pb2 import SessionRevoked
from meshboard.auth.v1.internal_auth_service_pb2 import (
    CheckSessionRequest,
    ListRevocationsRequest,
    SetAccountDisabledRequest,
)
from meshboard.user.v1.user_service_pb2 import GetMeRequest
from sqlalchemy import select

from services.auth_svc.models import AuditEntryRow
from services.chassis.db import OutboxRow
from tests.auth_svc.conftest import Services, bearer, claims_of
from tests.conditions import eventually
from tests.harness import new_id, refused, service_metadata


async def set_disabled(services: Services, user_id: str, disabled: bool, service: str = "user") -> None:
    await services.internal_auth.SetAccountDisabled(
        SetAccountDisabledRequest(user_id=user_id, disabled=disabled),
        metadata=service_metadata(services.keys, service, "auth"),
    )


def refresh_of(tokens: SignUpResponse | SignInResponse) -> RefreshRequest:
    return RefreshRequest(refresh_token=tokens.refresh_token, refresh_key=tokens.refresh_key)


async def entries_of(services: Services, user_id: str) -> list[AuditEntryRow]:
    async with services.sessions() as session:
        return list(
            await session.scalars(
                select(AuditEntryRow)
                .where(AuditEntryRow.subject_id == user_id, AuditEntryRow.kind.endswith("abled"))
                .order_by(AuditEntryRow.audit_entry_id)
            )
        )


async def test_all_sessions_end_everywhere(services: Services):
    first = await services.sign_up()
    second = await services.sign_in(first.user.email)
    other = await services.sign_up()
    await services.users.GetMe(GetMeRequest(), metadata=bearer(second.access_token))
    await set_disabled(services, first.user.user_id, True)
    metadata = service_metadata(services.keys, "dashboard", "auth")
    listed = await services.internal_auth.ListRevocations(ListRevocationsRequest(), metadata=metadata)
    revoked = {revocation.session_id for revocation in listed.revocations}
    for tokens in (first, second):
        session_id = claims_of(tokens.access_token)["sid"]
        alive = await services.internal_auth.CheckSession(
            CheckSessionRequest(session_id=session_id), metadata=metadata
        )
        assert not alive.alive
        assert session_id in revoked

        async def ended(token: str = tokens.access_token) -> bool:
            try:
                await services.users.GetMe(GetMeRequest(), metadata=bearer(token))
            except grpc.aio.AioRpcError as failure:
                return failure.code() is grpc.StatusCode.UNAUTHENTICATED
            return False

        await eventually(ended, seconds=2)
        outcome = await refused(services.auth.Refresh(refresh_of(tokens)))
        assert outcome == (grpc.StatusCode.UNAUTHENTICATED, "REFRESH_TOKEN_INVALID")
        async with services.sessions() as session:
            rows = await session.scalars(
                select(OutboxRow).where(OutboxRow.subject == SessionRevoked.DESCRIPTOR.full_name)
            )
            events = [SessionRevoked.FromString(row.payload) for row in rows]
        (event,) = [event for event in events if event.session_id == session_id]
        assert event.reason == SessionRevoked.DISABLED
    await services.users.GetMe(GetMeRequest(), metadata=bearer(other.access_token))


async def test_only_the_right_password_learns_of_it(services: Services):
    signed_up = await services.sign_up()
    await set_disabled(services, signed_up.user.user_id, True)
    outcome = await refused(services.sign_in(signed_up.user.email))
    assert outcome == (grpc.StatusCode.PERMISSION_DENIED, "ACCOUNT_DISABLED")
    outcome = await refused(services.sign_in(signed_up.user.email, "something else entirely"))
    assert outcome == (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_WRONG")


async def test_an_enabled_account_signs_in_again_and_old_sessions_stay_ended(services: Services):
    signed_up = await services.sign_up()
    await set_disabled(services, signed_up.user.user_id, True)
    await set_disabled(services, signed_up.user.user_id, False)
    signed_in = await services.sign_in(signed_up.user.email)
    await services.auth.Refresh(refresh_of(signed_in))
    await services.users.GetMe(GetMeRequest(), metadata=bearer(signed_in.access_token))
    outcome = await refused(services.auth.Refresh(refresh_of(signed_up)))
    assert outcome == (grpc.StatusCode.UNAUTHENTICATED, "REFRESH_TOKEN_INVALID")


async def test_a_repeat_changes_nothing(services: Services):
    user_id = (await services.sign_up()).user.user_id
    for disabled in (False, True, True, False, False):
        await set_disabled(services, user_id, disabled)
    entries = await entries_of(services, user_id)
    assert [entry.kind for entry in entries] == ["account.disabled", "account.enabled"]
    assert [entry.actor_id for entry in entries] == ["service:user"] * 2


async def test_refuses_who_is_not_user_svc_and_what_is_no_account(services: Services):
    user_id = (await services.sign_up()).user.user_id
    outcome = await refused(set_disabled(services, user_id, True, service="analytics"))
    assert outcome == (grpc.StatusCode.PERMISSION_DENIED, "CALLER_NOT_ALLOWED")
    outcome = await refused(set_disabled(services, new_id(), True))
    assert outcome == (grpc.StatusCode.NOT_FOUND, "RESOURCE_NOT_FOUND")
