"""A session that has ended is refused on every way within two seconds, and never said to have ended when it has not."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from meshboard.auth.v1.auth_service_pb2 import RefreshRequest, SignOutRequest
from meshboard.user.v1.user_service_pb2 import GetMeRequest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from services.auth_svc.models import AuditEntryRow, Session
from services.user_svc.__main__ import serve as serve_user
from tests.auth_svc.conftest import (
    Services,
    bearer,
    claims_of,
    connected,
    make_both,
    running,
    running_auth,
)
from tests.conditions import eventually
from tests.harness import make_keys, refused
from tests.mesh.people import Person
from tests.parts import Mesh, Parts
from tests.parts import running as running_parts
from tests.security.ways import assert_ended, ways_into


@pytest.mark.xdist_group("mesh")
async def test_an_ended_session_is_refused_on_every_way(mesh: Mesh, ann: Person):
    async with ways_into(mesh) as ways:
        await assert_ended(ways, ann)


@pytest.fixture
async def own_parts(tmp_path: Path) -> AsyncIterator[Parts]:
    async with running_parts(tmp_path / "parts") as servers:
        yield servers


@pytest.fixture
async def own(own_parts: Parts, tmp_path: Path) -> AsyncIterator[Services]:
    keys = make_keys(tmp_path / "keys")
    auth, user = await make_both(own_parts, keys)
    async with running(serve_user, user), running_auth(auth), connected(auth, user, keys) as both:
        yield both


async def test_a_database_that_dies_in_the_middle_is_no_success(own: Services, own_parts: Parts):
    signed_up = await own.sign_up()
    metadata = bearer(signed_up.access_token)
    session_id = claims_of(signed_up.access_token)["sid"]
    locked = own.sessions()
    await locked.execute(select(Session).where(Session.session_id == session_id).with_for_update())
    call = asyncio.ensure_future(refused(own.auth.SignOut(SignOutRequest(), metadata=metadata)))

    async def waits() -> bool:
        async with own.sessions() as session:
            waiting = await session.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted"))
            return bool(waiting)

    await eventually(waits)
    supervisor = own_parts.supervisor
    restarts = supervisor.children["postgres"].restarts
    supervisor.kill("postgres", signal.SIGQUIT)  # an immediate shutdown: every connection is cut
    code, reason = await call
    assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "DEPENDENCY_UNAVAILABLE")
    with pytest.raises(DBAPIError):
        await locked.execute(text("SELECT 1"))
    await locked.invalidate()
    await supervisor.until_ready("postgres", restarts=restarts + 1)

    # Nothing of it has happened: the session is alive, and can be ended.
    async def alive() -> bool:
        outcomes = await asyncio.gather(
            own.users.GetMe(GetMeRequest(), metadata=metadata), return_exceptions=True
        )
        return not isinstance(outcomes[0], BaseException)

    await eventually(alive)

    async def ended_at_last() -> bool:
        call = own.auth.SignOut(SignOutRequest(), metadata=metadata)
        (outcome,) = await asyncio.gather(call, return_exceptions=True)
        return not isinstance(outcome, BaseException)

    await eventually(ended_at_last)
    began = time.monotonic()

    async def out() -> bool:
        outcomes = await asyncio.gather(
            own.users.GetMe(GetMeRequest(), metadata=metadata), return_exceptions=True
        )
        failure = outcomes[0]
        return isinstance(failure, grpc.aio.AioRpcError) and failure.code() is grpc.StatusCode.UNAUTHENTICATED

    await eventually(out, seconds=2 + (time.monotonic() - began))
    request = RefreshRequest(refresh_token=signed_up.refresh_token, refresh_key=signed_up.refresh_key)
    assert (await refused(own.auth.Refresh(request)))[1] == "REFRESH_TOKEN_INVALID"
    async with own.sessions() as session:
        entries = select(AuditEntryRow).where(
            AuditEntryRow.kind == "session.ended", AuditEntryRow.session_id == session_id
        )
        assert len((await session.scalars(entries)).all()) == 1
