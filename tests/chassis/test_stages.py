"""Every stage around a call, on a real server with a service made for the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, cast

import grpc
import grpc.aio
import pytest
import structlog
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from meshboard.analytics.v1 import source_service_pb2 as pb
from meshboard.analytics.v1 import source_service_pb2_grpc as pb_grpc
from meshboard.dashboard.v1 import dashboard_service_pb2 as dashboard_pb
from meshboard.dashboard.v1 import dashboard_service_pb2_grpc as dashboard_pb_grpc
from meshboard.user.v1 import internal_user_service_pb2 as internal_pb
from meshboard.user.v1 import internal_user_service_pb2_grpc as internal_pb_grpc
from meshboard.user.v1 import user_service_pb2, user_service_pb2_grpc
from meshboard.user.v1 import workspace_service_pb2 as workspace_pb
from meshboard.user.v1 import workspace_service_pb2_grpc as workspace_pb_grpc
from sqlalchemy import exc
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from services.chassis import auth, db, errors
from services.chassis.access import MissingAccessError
from services.chassis.clients import Peer
from services.chassis.db import GrantRow, Id
from services.chassis.interceptor import Handover, Write
from services.chassis.resources import Resource
from services.chassis.server import Server
from services.chassis.settings import Settings
from tests.conditions import eventually
from tests.harness import (
    Identity,
    Member,
    make_settings,
    new_id,
    reason_of,
    refused,
    service_metadata,
    serving,
    status_of,
)
from tests.parts import Parts

SECRET = "correct horse battery staple"


class Base(DeclarativeBase):
    pass


class Source(Base):
    __tablename__ = "sources"
    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    source_id: Mapped[Id] = mapped_column(primary_key=True)


class Dashboard(Base):
    __tablename__ = "dashboards"
    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    dashboard_id: Mapped[Id] = mapped_column(primary_key=True)


class Folder(Base):
    __tablename__ = "folders"
    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    folder_id: Mapped[Id] = mapped_column(primary_key=True)
    parent_folder_id: Mapped[Id | None]


class Sources(pb_grpc.SourceServiceServicer):
    """Does what the title of a source says."""

    def __init__(self) -> None:
        self.callers: list[auth.Caller] = []
        self.waiting = 0
        self.cancelled = 0
        self.requests: list[pb.CreateSourceRequest] = []

    async def CreateSource(self, request, context):
        self.requests.append(request)
        self.callers.append(auth.caller())
        match request.title:
            case "raise":
                raise RuntimeError(SECRET)
            case "conflict":
                raise errors.already_exists("GRANT_EXISTS", "It is there.", title=request.title)
            case "wait":
                self.waiting += 1
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    self.cancelled += 1
                    raise
                finally:
                    self.waiting -= 1
            case "database":
                raise exc.OperationalError("SELECT 1", {"password": SECRET}, ConnectionError("gone"))
        return pb.CreateSourceResponse()

    async def GetSource(self, request, context):
        self.callers.append(auth.caller())
        return pb.GetSourceResponse()

    async def UpdateSource(self, request, context):
        self.callers.append(auth.caller())
        return pb.UpdateSourceResponse()


class Workspaces(workspace_pb_grpc.WorkspaceServiceServicer):
    async def GetWorkspace(self, request, context):
        response = workspace_pb.GetWorkspaceResponse()
        response.workspace.workspace_id = auth.caller().workspace_id
        return response


class Internal(internal_pb_grpc.InternalUserServiceServicer):
    async def CreateUser(self, request, context):
        response = internal_pb.CreateUserResponse()
        response.user.display_name = auth.caller().service
        return response


class Dashboards(dashboard_pb_grpc.DashboardServiceServicer):
    """A stream that goes on for as long as its caller may see it, and an answer that is kept as bytes."""

    async def GetDashboard(self, request, context):
        kept = dashboard_pb.GetDashboardResponse()
        kept.dashboard.title = "Kept"
        return kept.SerializeToString()

    def __init__(self) -> None:
        self.handed_over = 0

    async def WatchDashboard(self, request, context):
        if request.cursor:
            yield dashboard_pb.WatchDashboardResponse(cursor="before")
            yield Handover(partial(self._send, request.cursor))
            yield dashboard_pb.WatchDashboardResponse(cursor="behind")
            return
        while True:
            await auth.recheck()
            yield dashboard_pb.WatchDashboardResponse(cursor="x")
            await asyncio.sleep(0.02)

    async def _send(self, what: str, write: Write) -> None:
        self.handed_over += 1
        try:
            await write(dashboard_pb.WatchDashboardResponse(cursor=what))
            if what == "wait":
                await asyncio.Event().wait()
            if what == "fail":
                raise errors.not_found("DASHBOARD_NOT_FOUND", "There is no such dashboard.")
        finally:
            self.handed_over -= 1


class Running:
    """A server under test, and stubs for it."""

    def __init__(
        self, channel: grpc.aio.Channel, server: Server, sessions, sources: Sources, streams: Dashboards
    ) -> None:
        self.channel = channel
        self.server = server
        self.sessions = sessions
        self.servicer = sources
        self.streams = streams
        self.sources = pb_grpc.SourceServiceStub(channel)
        self.workspaces = workspace_pb_grpc.WorkspaceServiceStub(channel)
        self.internal = internal_pb_grpc.InternalUserServiceStub(channel)
        self.dashboards = dashboard_pb_grpc.DashboardServiceStub(channel)

    async def new_source(self, member: Member) -> str:
        source_id = new_id()
        async with self.sessions.begin() as session:
            session.add(Source(workspace_id=member.workspace_id, source_id=source_id))
        return source_id

    async def grant(self, member: Member, kind: str, resource_id: str, role: str, effect: str) -> str:
        grant_id = new_id()
        async with self.sessions.begin() as session:
            session.add(
                GrantRow(
                    workspace_id=member.workspace_id,
                    grant_id=grant_id,
                    resource_type=kind,
                    resource_id=resource_id,
                    subject_type="user",
                    subject_id=member.user_id,
                    role=role,
                    effect=effect,
                    creator_id=member.user_id,
                )
            )
        return grant_id


@pytest.fixture
async def running(parts: Parts, identity: Identity) -> AsyncIterator[Running]:
    url = await parts.fresh_database("analytics")
    sessions = db.connect(url)
    async with sessions.begin() as session:
        connection = await session.connection()
        await connection.run_sync(db.ChassisBase.metadata.create_all)
        await connection.run_sync(Base.metadata.create_all)
    sources, dashboards = Sources(), Dashboards()
    settings = make_settings(Settings, parts, identity.keys, url, max_calls=3, call_seconds=5)
    access = identity.access(
        "user",
        db=sessions,
        resources=[
            Resource("source", Source.workspace_id, Source.source_id),
            Resource("dashboard", Dashboard.workspace_id, Dashboard.dashboard_id),
            Resource("folder", Folder.workspace_id, Folder.folder_id, parent_id=Folder.parent_folder_id),
        ],
    )
    registrations = [
        lambda s: pb_grpc.add_SourceServiceServicer_to_server(sources, s),
        lambda s: workspace_pb_grpc.add_WorkspaceServiceServicer_to_server(Workspaces(), s),
        lambda s: internal_pb_grpc.add_InternalUserServiceServicer_to_server(Internal(), s),
        lambda s: dashboard_pb_grpc.add_DashboardServiceServicer_to_server(dashboards, s),
    ]
    async with serving(settings, registrations, access) as (channel, server):
        yield Running(channel, server, sessions, sources, dashboards)
    await db.engine(sessions).dispose()


async def fails(call, code: grpc.StatusCode, reason: str) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert (caught.value.code(), reason_of(caught.value)) == (code, reason), caught.value
    return caught.value


async def read_to_the_end(stream) -> None:
    async with asyncio.timeout(10):
        while await stream.read() is not grpc.aio.EOF:
            pass


# Authentication


async def test_a_call_without_token_is_refused(running: Running):
    call = running.sources.CreateSource(pb.CreateSourceRequest(title="x"))
    await fails(call, grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING")


async def test_strangers_learn_no_rules(running: Running):
    call = running.sources.CreateSource(pb.CreateSourceRequest())
    await fails(call, grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING")


async def test_two_tokens_are_none(running: Running, identity: Identity):
    member = identity.member("editor")
    call = running.sources.CreateSource(pb.CreateSourceRequest(title="x"), metadata=member.metadata * 2)
    await fails(call, grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING")


async def test_cookies_are_the_gateways_affair(running: Running, identity: Identity):
    member = identity.member("editor")
    metadata = (("cookie", f"mb_session={member.token}"),)
    call = running.sources.CreateSource(pb.CreateSourceRequest(title="x"), metadata=metadata)
    assert await refused(call) == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING")


async def test_an_ended_session_is_refused(running: Running, identity: Identity):
    member = identity.member("editor")
    member.sign_out()
    call = running.sources.CreateSource(pb.CreateSourceRequest(title="x"), metadata=member.metadata)
    await fails(call, grpc.StatusCode.UNAUTHENTICATED, "SESSION_REVOKED")


# Validation


async def test_each_wrong_field_is_named(running: Running, identity: Identity):
    member = identity.member("editor")
    call = running.sources.CreateSource(
        pb.CreateSourceRequest(request_id="x" * 129), metadata=member.metadata
    )
    failure = await fails(call, grpc.StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")
    (packed,) = [d for d in status_of(failure).details if d.Is(error_details_pb2.BadRequest.DESCRIPTOR)]
    violations = error_details_pb2.BadRequest.FromString(packed.value).field_violations
    assert [v.field for v in violations] == ["title", "request_id"]
    assert running.servicer.requests == []


async def test_the_path_of_a_nested_field_is_named(running: Running, identity: Identity):
    member = identity.member("editor")
    request = pb.UpdateSourceRequest()
    request.source.source_id = "not a uuid"
    call = running.sources.UpdateSource(request, metadata=member.metadata)
    failure = await fails(call, grpc.StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")
    assert "source.source_id" in (failure.details() or "")


async def test_the_idempotency_key_fills_the_request_id(running: Running, identity: Identity):
    member = identity.member("editor")
    metadata = (*member.metadata, ("idempotency-key", "once"))
    await running.sources.CreateSource(pb.CreateSourceRequest(title="x"), metadata=metadata)
    assert running.servicer.requests[0].request_id == "once"


# Access


async def test_a_role_without_the_permission_is_denied(running: Running, identity: Identity):
    member = identity.member("viewer")
    call = running.sources.CreateSource(pb.CreateSourceRequest(title="x"), metadata=member.metadata)
    await fails(call, grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")


async def test_the_servicer_knows_who_calls_and_where(running: Running, identity: Identity):
    member = identity.member("editor")
    await running.sources.CreateSource(pb.CreateSourceRequest(title="x"), metadata=member.metadata)
    (caller,) = running.servicer.callers
    assert (caller.user_id, caller.workspace_id) == (member.user_id, member.workspace_id)


async def test_absent_foreign_and_hidden_are_alike(running: Running, identity: Identity):
    owner, stranger = identity.member("owner"), identity.member("owner")
    source_id = await running.new_source(owner)
    hidden_id = await running.new_source(stranger)
    await running.grant(stranger, "source", hidden_id, "viewer", "DENY")
    answers = set()
    for wanted in (new_id(), source_id, hidden_id):
        call = running.sources.GetSource(pb.GetSourceRequest(source_id=wanted), metadata=stranger.metadata)
        failure = await fails(call, grpc.StatusCode.NOT_FOUND, "SOURCE_NOT_FOUND")
        answers.add((failure.details(), status_of(failure).SerializeToString()))
    assert len(answers) == 1
    await running.sources.GetSource(pb.GetSourceRequest(source_id=source_id), metadata=owner.metadata)


async def test_seen_but_not_editable_is_denied(running: Running, identity: Identity):
    member = identity.member("viewer")
    request = pb.UpdateSourceRequest()
    request.source.source_id = await running.new_source(member)
    call = running.sources.UpdateSource(request, metadata=member.metadata)
    await fails(call, grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")
    await running.grant(member, "source", request.source.source_id, "editor", "ALLOW")
    await running.sources.UpdateSource(request, metadata=member.metadata)


async def test_the_header_chooses_the_workspace(running: Running, identity: Identity):
    member = identity.member("viewer")
    other = identity.member("owner")
    elsewhere = Member(identity, member.user_id, other.workspace_id)
    elsewhere.become("editor")
    metadata = (*member.metadata, ("x-workspace-id", other.workspace_id))
    await running.sources.CreateSource(pb.CreateSourceRequest(title="x"), metadata=metadata)
    assert running.servicer.callers[0].workspace_id == other.workspace_id


async def test_path_and_header_that_differ_are_refused(running: Running, identity: Identity):
    member = identity.member("owner")
    metadata = (*member.metadata, ("x-workspace-id", new_id()))
    call = running.workspaces.GetWorkspace(
        workspace_pb.GetWorkspaceRequest(workspace_id=member.workspace_id), metadata=metadata
    )
    await fails(call, grpc.StatusCode.INVALID_ARGUMENT, "WORKSPACE_AMBIGUOUS")


@pytest.mark.parametrize("workspace_id", ["01980000-0000-7000-8000-000000000000", "nonsense"])
async def test_a_workspace_of_others_is_not_found(running: Running, identity: Identity, workspace_id: str):
    member = identity.member("owner")
    metadata = (*member.metadata, ("x-workspace-id", workspace_id))
    call = running.sources.CreateSource(pb.CreateSourceRequest(title="x"), metadata=metadata)
    await fails(call, grpc.StatusCode.NOT_FOUND, "WORKSPACE_NOT_FOUND")


async def test_internal_methods_are_for_the_named_services(running: Running, identity: Identity):
    request = internal_pb.CreateUserRequest(
        user_id=new_id(), workspace_id=new_id(), email="a@example.org", display_name="A"
    )
    metadata = service_metadata(identity.keys, "auth", "user")
    assert (await running.internal.CreateUser(request, metadata=metadata)).user.display_name == "auth"
    for wrong in (
        (),
        identity.member("owner").metadata,
        service_metadata(identity.keys, "dashboard", "user"),
    ):
        call = running.internal.CreateUser(request, metadata=wrong)
        await fails(call, grpc.StatusCode.PERMISSION_DENIED, "CALLER_NOT_ALLOWED")
    call = running.internal.CreateUser(request, metadata=service_metadata(identity.keys, "auth", "analytics"))
    await fails(call, grpc.StatusCode.UNAUTHENTICATED, "TOKEN_INVALID")


def test_a_service_with_an_unguarded_method_does_not_start(parts: Parts, identity: Identity):
    settings = make_settings(Settings, parts, identity.keys, "")

    def register(server):
        pb_grpc.add_SourceServiceServicer_to_server(Sources(), server)

    with pytest.raises(MissingAccessError, match="source"):
        Server(settings, [register], identity.access("analytics"))


# Streams


async def test_a_stream_ends_when_the_session_does(running: Running, identity: Identity):
    member = identity.member("viewer")
    dashboard_id = new_id()
    async with running.sessions.begin() as session:
        session.add(Dashboard(workspace_id=member.workspace_id, dashboard_id=dashboard_id))
    request = dashboard_pb.WatchDashboardRequest(dashboard_id=dashboard_id)
    stream = running.dashboards.WatchDashboard(request, metadata=member.metadata)
    await stream.read()
    member.sign_out()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_to_the_end(stream)
    assert reason_of(caught.value) == "SESSION_REVOKED"


async def test_a_stream_ends_when_the_right_does(running: Running, identity: Identity):
    member = identity.member("viewer")
    dashboard_id = new_id()
    async with running.sessions.begin() as session:
        session.add(Dashboard(workspace_id=member.workspace_id, dashboard_id=dashboard_id))
    request = dashboard_pb.WatchDashboardRequest(dashboard_id=dashboard_id)
    stream = running.dashboards.WatchDashboard(request, metadata=member.metadata)
    await stream.read()
    await running.grant(member, "dashboard", dashboard_id, "viewer", "DENY")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_to_the_end(stream)
    assert reason_of(caught.value) == "DASHBOARD_NOT_FOUND"


async def test_a_method_hands_its_stream_over(running: Running, identity: Identity):
    member = identity.member("viewer")
    dashboard_id = new_id()
    async with running.sessions.begin() as session:
        session.add(Dashboard(workspace_id=member.workspace_id, dashboard_id=dashboard_id))

    def watch(cursor: str):
        request = dashboard_pb.WatchDashboardRequest(dashboard_id=dashboard_id, cursor=cursor)
        return running.dashboards.WatchDashboard(request, metadata=member.metadata)

    assert [response.cursor async for response in watch("within")] == ["before", "within", "behind"]
    stream = watch("fail")
    assert [(await stream.read()).cursor for _ in range(2)] == ["before", "fail"]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.read()
    assert (caught.value.code(), reason_of(caught.value)) == (
        grpc.StatusCode.NOT_FOUND,
        "DASHBOARD_NOT_FOUND",
    )
    stream = watch("wait")
    assert [(await stream.read()).cursor for _ in range(2)] == ["before", "wait"]
    assert running.streams.handed_over == 1
    stream.cancel()
    await eventually(lambda: running.streams.handed_over == 0)


# Errors, deadlines, load


async def test_an_error_keeps_its_code_reason_and_values(running: Running, identity: Identity):
    member = identity.member("editor")
    call = running.sources.CreateSource(pb.CreateSourceRequest(title="conflict"), metadata=member.metadata)
    failure = await fails(call, grpc.StatusCode.ALREADY_EXISTS, "GRANT_EXISTS")
    assert errors.from_status(status_of(failure)).metadata == {"title": "conflict"}


@pytest.mark.parametrize("data", [b"\xff", b"\x0a\x02\xff\xfe"], ids=["no message", "no UTF-8"])
async def test_a_request_that_cannot_be_read(running: Running, identity: Identity, data: bytes):
    call: Any = running.channel.unary_unary("/meshboard.analytics.v1.SourceService/CreateSource")
    await fails(call(data), grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING")
    metadata = identity.member("editor").metadata
    with structlog.testing.capture_logs() as logs:
        await fails(call(data, metadata=metadata), grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_MALFORMED")
    assert not [line for line in logs if line["log_level"] == "error"]


async def test_a_call_without_a_message_is_refused_at_once(running: Running, identity: Identity):
    """As the gateway sends one when the JSON in a packed body ends too early."""
    method: Any = running.channel.stream_unary("/meshboard.analytics.v1.SourceService/CreateSource")
    call = method(iter([]), metadata=identity.member("editor").metadata, timeout=10)
    await fails(call, grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_MALFORMED")


async def test_a_fault_says_nothing_of_itself(running: Running, identity: Identity):
    member = identity.member("editor")
    with structlog.testing.capture_logs() as logs:
        call = running.sources.CreateSource(pb.CreateSourceRequest(title="raise"), metadata=member.metadata)
        failure = await fails(call, grpc.StatusCode.INTERNAL, "INTERNAL_FAULT")
    assert SECRET not in str(failure)
    assert [line for line in logs if line["event"] == "fault"], "the fault is in the error log"


async def test_a_lost_database_is_unavailable(running: Running, identity: Identity):
    member = identity.member("editor")
    call = running.sources.CreateSource(pb.CreateSourceRequest(title="database"), metadata=member.metadata)
    failure = await fails(call, grpc.StatusCode.UNAVAILABLE, "DEPENDENCY_UNAVAILABLE")
    assert SECRET not in str(failure)


async def test_the_callers_deadline_cancels_the_method(running: Running, identity: Identity):
    member = identity.member("editor")
    call = running.sources.CreateSource(
        pb.CreateSourceRequest(title="wait"), metadata=member.metadata, timeout=1
    )
    # With a reason: the method gives up before gRPC does.
    await fails(call, grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_PASSED")
    await eventually(lambda: running.servicer.cancelled == 1)


async def test_a_caller_that_goes_away_cancels_the_method(running: Running, identity: Identity):
    member = identity.member("editor")
    call = running.sources.CreateSource(pb.CreateSourceRequest(title="wait"), metadata=member.metadata)
    await eventually(lambda: running.servicer.waiting == 1)
    call.cancel()
    await eventually(lambda: running.servicer.cancelled == 1)


async def test_calls_beyond_the_limit_are_refused_at_the_door(running: Running, identity: Identity):
    member = identity.member("editor")
    waiting = [
        running.sources.CreateSource(pb.CreateSourceRequest(title="wait"), metadata=member.metadata)
        for _ in range(3)
    ]
    await eventually(lambda: running.servicer.waiting == 3)
    call = running.sources.CreateSource(pb.CreateSourceRequest(title="x"), metadata=member.metadata)
    failure = await fails(call, grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    assert errors.from_status(status_of(failure)).retry_seconds == 1
    for call in waiting:
        call.cancel()
    await eventually(lambda: running.servicer.waiting == 0)
    await running.sources.CreateSource(pb.CreateSourceRequest(title="x"), metadata=member.metadata)


async def test_an_answer_that_is_kept_as_bytes_goes_out_as_it_is(running: Running, identity: Identity):
    member = identity.member("viewer")
    dashboard_id = new_id()
    async with running.sessions.begin() as session:
        session.add(Dashboard(workspace_id=member.workspace_id, dashboard_id=dashboard_id))
    request = dashboard_pb.GetDashboardRequest(dashboard_id=dashboard_id)
    answer = await running.dashboards.GetDashboard(request, metadata=member.metadata)
    assert answer.dashboard.title == "Kept"


# Clients


async def test_a_peers_answer_reaches_the_caller_and_its_faults_do_not(running: Running, identity: Identity):
    tokens = auth.ServiceTokens("dashboard", identity.keys)
    peer = Peer("user", f"127.0.0.1:{running.server.port}", tokens)
    member = identity.member("editor")
    auth.set_caller(auth.Caller(token=member.token))
    stub = peer.stub(pb_grpc.SourceServiceStub)
    for title, code in (("conflict", "ALREADY_EXISTS"), ("raise", "UNAVAILABLE")):
        with pytest.raises(errors.Error) as caught:
            await stub.CreateSource(pb.CreateSourceRequest(title=title))
        assert caught.value.code.name == code
    with pytest.raises(errors.Error) as caught:
        await stub.CreateSource(pb.CreateSourceRequest(title="wait"), timeout=0.2)
    assert caught.value.code.name == "DEADLINE_EXCEEDED"
    await peer.close()


async def test_a_peers_stream_is_for_who_calls(running: Running, identity: Identity):
    peer = Peer("user", f"127.0.0.1:{running.server.port}", auth.ServiceTokens("dashboard", identity.keys))
    member = identity.member("viewer")
    dashboard_id = new_id()
    async with running.sessions.begin() as session:
        session.add(Dashboard(workspace_id=member.workspace_id, dashboard_id=dashboard_id))
    auth.set_caller(auth.Caller(token=member.token))
    stub = peer.stub(dashboard_pb_grpc.DashboardServiceStub)

    async def read(dashboard_id: str) -> None:
        request = dashboard_pb.WatchDashboardRequest(dashboard_id=dashboard_id)
        async for response in stub.WatchDashboard(request, timeout=1):
            assert response.cursor == "x"

    for asked, reason in ((dashboard_id, "DEADLINE_PASSED"), (new_id(), "DASHBOARD_NOT_FOUND")):
        with pytest.raises(errors.Error) as caught:
            await read(asked)
        assert caught.value.reason == reason
    await peer.close()


async def test_a_peer_that_is_down_is_unavailable(identity: Identity):
    peer = Peer("user", "127.0.0.1:1", auth.ServiceTokens("dashboard", identity.keys))
    with pytest.raises(errors.Error) as caught:
        await peer.stub(user_service_pb2_grpc.UserServiceStub).GetMe(user_service_pb2.GetMeRequest())
    assert caught.value.reason == "DEPENDENCY_UNAVAILABLE"
    await peer.close()


# The server


async def test_health_and_reflection_need_no_token(running: Running):
    health: Any = health_pb2_grpc.HealthStub(running.channel)
    answer = await health.Check(health_pb2.HealthCheckRequest(service="meshboard.analytics.v1.SourceService"))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    reflection: Any = reflection_pb2_grpc.ServerReflectionStub(cast(Any, running.channel))
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    stream = reflection.ServerReflectionInfo(iter([request]))
    listed = {service.name for service in (await stream.read()).list_services_response.service}
    assert {"meshboard.auth.v1.AuthService", "meshboard.analytics.v1.QueryService"} <= listed
    stream.cancel()


async def test_a_draining_server_finishes_what_it_has_begun(parts: Parts, identity: Identity):
    finish = asyncio.Event()

    class Users(user_service_pb2_grpc.UserServiceServicer):
        begun = False

        async def GetMe(self, request, context):
            self.begun = True
            await finish.wait()
            return user_service_pb2.GetMeResponse()

    users = Users()
    settings = make_settings(Settings, parts, identity.keys, "")
    server = Server(
        settings,
        [lambda s: user_service_pb2_grpc.add_UserServiceServicer_to_server(users, s)],
        identity.access("user"),
    )
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = user_service_pb2_grpc.UserServiceStub(channel)
        metadata = identity.member().metadata
        call = stub.GetMe(user_service_pb2.GetMeRequest(), metadata=metadata)
        await eventually(lambda: users.begun)
        stopping = asyncio.create_task(server.stop())
        await eventually(server.draining.is_set)
        finish.set()
        await call
        await stopping
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.GetMe(user_service_pb2.GetMeRequest(), metadata=metadata)
