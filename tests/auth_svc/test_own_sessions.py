from datetime import timedelta

import grpc
from meshboard.auth.v1.auth_service_pb2 import RefreshRequest, SignInRequest, SignInResponse
from meshboard.auth.v1.session_service_pb2 import (
    ListSessionsRequest,
    RevokeOtherSessionsRequest,
    RevokeSessionRequest,
    Session,
)
from meshboard.user.v1.user_service_pb2 import GetMeRequest
from sqlalchemy import select, update

from services.auth_svc.models import AuditEntryRow
from services.auth_svc.models import Session as SessionRow
from services.auth_svc.own_sessions import device_of
from tests.auth_svc.conftest import PASSWORD, Services, bearer, claims_of, new_email
from tests.conditions import eventually
from tests.harness import new_id, outcome, refused

ABSENT = (grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")
ENDED = (grpc.StatusCode.UNAUTHENTICATED, "SESSION_REVOKED")
FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:143.0) Gecko/20100101 Firefox/143.0"


async def sign_in(services: Services, email: str, address: str = "192.0.2.7") -> SignInResponse:
    return await services.auth.SignIn(
        SignInRequest(email=email, password=PASSWORD), metadata=(("x-meshboard-address", address),)
    )


async def sessions_of(services: Services, token: str) -> list[Session]:
    listed = await services.own_sessions.ListSessions(ListSessionsRequest(), metadata=bearer(token))
    return list(listed.sessions)


async def test_lists_the_newest_first_with_device_and_address(services: Services):
    email = new_email()
    first = await services.sign_up(email)
    second = await sign_in(services, email)
    listed = await sessions_of(services, second.access_token)
    assert [s.session_id for s in listed] == [claims_of(t.access_token)["sid"] for t in (second, first)]
    assert [s.current for s in listed] == [True, False]
    assert [s.address for s in listed] == ["192.0.2.7", "127.0.0.1"]
    assert listed[0].device.startswith("grpc-python")
    assert list(listed[0].authentication_methods) == ["pwd"]
    assert listed[0].create_time.seconds <= listed[0].last_use_time.seconds < listed[0].expire_time.seconds


def test_tells_devices_by_their_names():
    assert device_of(FIREFOX) == "Firefox 143 on Linux"
    assert device_of("curl/8.5.0") == "curl 8"
    assert device_of("something/1 else") == "something/1"
    assert device_of("") == ""


async def test_pages_hold_all(services: Services):
    email = new_email()
    token = (await services.sign_up(email)).access_token
    for _ in range(4):
        await sign_in(services, email)
    request = ListSessionsRequest(page_size=2)
    found: list[str] = []
    while True:
        page = await services.own_sessions.ListSessions(request, metadata=bearer(token))
        found += [s.session_id for s in page.sessions]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert len(found) == 5
    assert found == sorted(found, reverse=True)


async def test_revokes_one_and_no_other(services: Services):
    email = new_email()
    first, second = await services.sign_up(email), await sign_in(services, email)
    session_id = claims_of(second.access_token)["sid"]
    request = RevokeSessionRequest(session_id=session_id.upper())
    await services.own_sessions.RevokeSession(request, metadata=bearer(first.access_token))

    async def out() -> bool:
        call = services.users.GetMe(GetMeRequest(), metadata=bearer(second.access_token))
        return await outcome(call) == ENDED

    await eventually(out, seconds=2)
    assert (await refused(services.auth.Refresh(RefreshRequest(refresh_token=second.refresh_token))))[1] == (
        "REFRESH_TOKEN_INVALID"
    )
    await services.users.GetMe(GetMeRequest(), metadata=bearer(first.access_token))
    again = services.own_sessions.RevokeSession(request, metadata=bearer(first.access_token))
    assert await refused(again) == ABSENT
    async with services.sessions() as session:
        entry = await session.scalar(
            select(AuditEntryRow).where(
                AuditEntryRow.subject_id == first.user.user_id, AuditEntryRow.kind == "session.ended"
            )
        )
    assert entry is not None
    assert entry.details == {"ended_session_id": session_id}


async def test_those_of_others_are_like_absent_ones(services: Services):
    ann, bob = await services.sign_up(), await services.sign_up()
    for session_id in (claims_of(bob.access_token)["sid"], new_id()):
        request = RevokeSessionRequest(session_id=session_id)
        call = services.own_sessions.RevokeSession(request, metadata=bearer(ann.access_token))
        assert await refused(call) == ABSENT
    await services.users.GetMe(GetMeRequest(), metadata=bearer(bob.access_token))


async def test_revokes_all_others(services: Services):
    email = new_email()
    others = [
        (await services.sign_up(email)).refresh_token,
        (await sign_in(services, email)).refresh_token,
    ]
    mine = await sign_in(services, email)
    answer = await services.own_sessions.RevokeOtherSessions(
        RevokeOtherSessionsRequest(), metadata=bearer(mine.access_token)
    )
    assert answer.revoked_count == 2
    assert [s.current for s in await sessions_of(services, mine.access_token)] == [True]
    for other in others:
        refresh = services.auth.Refresh(RefreshRequest(refresh_token=other))
        assert await refused(refresh) == (grpc.StatusCode.UNAUTHENTICATED, "REFRESH_TOKEN_INVALID")


async def test_a_session_ends_in_any_case_at_its_end(services: Services):
    signed_up = await services.sign_up()
    session_id = claims_of(signed_up.access_token)["sid"]
    async with services.sessions.begin() as session:
        row = await session.get_one(SessionRow, session_id)
        assert row.end_time - row.create_time == timedelta(days=90)
        assert row.expire_time - row.create_time == timedelta(days=30)
        end_time = row.create_time + timedelta(seconds=5)
        await session.execute(
            update(SessionRow).where(SessionRow.session_id == session_id).values(end_time=end_time)
        )
    refreshed = await services.auth.Refresh(RefreshRequest(refresh_token=signed_up.refresh_token))
    assert refreshed.access_token
    async with services.sessions() as session:
        assert (await session.get_one(SessionRow, session_id)).expire_time == end_time
