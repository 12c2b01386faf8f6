"""One trace follows a request, and an event, from the gateway to the event store; and it tells no secrets."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import grpc.aio
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.conditions import eventually
from tests.mesh.people import Person
from tests.parts import Mesh, running_mesh

pytestmark = [pytest.mark.xdist_group("mesh"), pytest.mark.timeout(300)]

SERVICES = {
    "gateway",
    "meshboard-auth",
    "meshboard-user",
    "meshboard-dashboard",
    "meshboard-analytics",
    "meshboard-pipeline",
    "meshboard-store",
}


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Stands in for a collector: keeps what is exported to it."""

    def __init__(self) -> None:
        self.spans: dict[bytes, tuple[str, Span]] = {}

    async def Export(self, request: Any, context: object) -> Any:
        for of_resource in request.resource_spans:
            names = {a.key: a.value.string_value for a in of_resource.resource.attributes}
            for of_scope in of_resource.scope_spans:
                for span in of_scope.spans:
                    self.spans[span.span_id] = (names["service.name"], span)
        return trace_service_pb2.ExportTraceServiceResponse()

    def trace(self, trace: Trace) -> list[tuple[str, Span]]:
        """The service and span of each span of a trace."""
        return [(service, span) for service, span in self.spans.values() if span.trace_id == trace.trace_id]

    def services_of(self, trace: Trace) -> set[str]:
        """The services with a span in the trace, or with one that is linked to it: an insert has many traces."""
        return {
            service
            for service, span in self.spans.values()
            if trace.trace_id in {span.trace_id, *(link.trace_id for link in span.links)}
        }

    def telling(self, text: str) -> list[str]:
        """The spans that have the text somewhere."""
        return [f"{service}: {span}" for service, span in self.spans.values() if text in str(span)]

    def way_to(self, service: str, trace: Trace) -> list[str]:
        """The services on the way from the caller to a span of `service`, the longest there is."""
        ways = []
        for name, span in self.trace(trace):
            way, at = [name], span
            while at.parent_span_id in self.spans:
                above, at = self.spans[at.parent_span_id]
                if above != way[0]:
                    way.insert(0, above)
            if name == service and at.parent_span_id == trace.span_id:
                ways.append(way)
        return max(ways, key=len, default=[])


class Trace:
    """What a caller calls a trace."""

    def __init__(self) -> None:
        self.trace_id = secrets.token_bytes(16)
        self.span_id = secrets.token_bytes(8)

    @property
    def headers(self) -> dict[str, str]:
        """W3C Trace Context."""
        return {"traceparent": f"00-{self.trace_id.hex()}-{self.span_id.hex()}-01"}


@asynccontextmanager
async def receiving() -> AsyncIterator[tuple[Receiver, str]]:
    """A receiver and its address."""
    receiver = Receiver()
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield receiver, f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@pytest.fixture(scope="module")
async def traced(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Mesh, Receiver]]:
    async with receiving() as (receiver, address):
        settings = {"MESHBOARD_OTLP_ENDPOINT": address}
        async with running_mesh(tmp_path_factory.mktemp("traced"), settings=settings) as mesh:
            yield mesh, receiver


@pytest.fixture
def receiver(traced: tuple[Mesh, Receiver]) -> Receiver:
    return traced[1]


@pytest.fixture
async def ann(traced: tuple[Mesh, Receiver], http: aiohttp.ClientSession) -> Person:
    return await Person(http, traced[0].gateway_url).sign_up()


async def send(person: Person, write_key: str, trace: Trace, **properties: object) -> None:
    event = {"event": "traced", "distinctId": "someone", "properties": properties}
    await person.post("/v1/events:ingest", {"events": [event]}, **{"x-write-key": write_key}, **trace.headers)


async def test_one_trace_leads_an_event_from_the_gateway_to_the_store(ann: Person, receiver: Receiver):
    _, write_key = await ann.new_source()
    trace = Trace()
    await send(ann, write_key, trace)
    expected = ["gateway", "meshboard-analytics", "meshboard-pipeline", "meshboard-store"]

    async def arrived() -> bool:
        return receiver.way_to("meshboard-store", trace) == expected

    await eventually(arrived)
    kinds = {(service, span.kind) for service, span in receiver.trace(trace)}
    assert ("meshboard-analytics", Span.SPAN_KIND_PRODUCER) in kinds
    assert ("meshboard-pipeline", Span.SPAN_KIND_CONSUMER) in kinds


async def test_requests_that_share_a_publish_or_an_insert_are_linked_to_it(ann: Person, receiver: Receiver):
    _, write_key = await ann.new_source()
    traces = [Trace() for _ in range(20)]
    await asyncio.gather(*(send(ann, write_key, trace) for trace in traces))

    def joined() -> bool:
        leading = {s.trace_id for name, s in receiver.spans.values() if name == "meshboard-pipeline"}
        linked = {link.trace_id for _, s in receiver.spans.values() for link in s.links}
        return all(trace.trace_id in leading | linked for trace in traces)

    await eventually(joined)


async def test_one_trace_leads_a_query_from_the_gateway_to_the_store(ann: Person, receiver: Receiver):
    source_id, _ = await ann.new_source()
    query = {"sourceIds": [source_id], "measures": [{"aggregation": "COUNT"}]}
    dashboard_id = await ann.new_dashboard({"title": "Events", "kind": "NUMBER", "query": query})
    trace = Trace()
    await ann.get(f"/v1/dashboards/{dashboard_id}:data", **trace.headers)
    expected = ["gateway", "meshboard-dashboard", "meshboard-analytics", "meshboard-store"]

    async def arrived() -> bool:
        return receiver.way_to("meshboard-store", trace) == expected

    await eventually(arrived)
    statements = [a.value.string_value for _, s in receiver.trace(trace) for a in s.attributes]
    statements = [text for text in statements if text.startswith("SELECT") and "dashboards" in text]
    assert statements
    assert all("$1" in text and dashboard_id not in text for text in statements)


async def test_one_trace_leads_a_sign_up_to_the_service_that_keeps_users(ann: Person, receiver: Receiver):
    trace = Trace()
    friend = Person(ann.http, ann.url)
    friend.headers.update(trace.headers)
    await friend.sign_up()

    async def arrived() -> bool:
        return receiver.way_to("meshboard-user", trace) == ["gateway", "meshboard-auth", "meshboard-user"]

    await eventually(arrived)


async def test_no_secret_and_nothing_personal_is_in_a_span(
    ann: Person, receiver: Receiver, traced: tuple[Mesh, Receiver]
):
    canary = f"canary{secrets.token_hex(8)}"
    person = Person(ann.http, ann.url)
    person.email, person.password = f"{canary}@example.org", f"P{canary}"
    credentials = {"email": person.email, "password": person.password}
    await person.sign_up()
    again = {**credentials, "password": "another one", "displayName": canary}
    assert (await person.call("POST", "/v1/auth:signUp", again)).status == 409
    assert (await person.call("POST", "/v1/auth:signIn", {**credentials, "password": canary})).status == 401
    tokens = await person.post("/v1/auth:signIn", credentials)
    refreshed = await person.post(
        "/v1/auth:refresh", {"refreshToken": tokens["refreshToken"], "refreshKey": tokens["refreshKey"]}
    )
    await person.post(f"/v1/workspaces/{person.workspace_id}/teams", {"title": canary})
    assert (await person.call("GET", f"/v1/dashboards?pageToken={canary}")).status == 400
    source_id, write_key = await person.new_source()
    query: dict[str, Any] = {
        "sourceIds": [source_id],
        "filters": [{"property": "distinct_id", "operator": "EQUAL", "values": [canary]}],
    }
    await person.new_dashboard({"title": canary, "kind": "NUMBER", "query": query})
    await person.run_query(**query)
    bad = {**query, "measures": [{"aggregation": "COUNT", "alias": canary, "property": "nonsense"}]}
    assert (await person.call("POST", "/v1/queries:run", {"query": bad})).status == 400
    event = {"event": "e", "distinctId": canary, "url": f"https://{canary}/", "properties": {"p": canary}}
    await person.send(write_key, event)
    assert (
        await person.call("POST", "/v1/events:ingest", {"events": [event]}, **{"x-write-key": canary})
    ).status == 401

    last = Trace()
    dashboard_id = await person.new_dashboard({"title": "Last", "kind": "NUMBER", "query": query})
    await person.get(f"/v1/dashboards/{dashboard_id}:data", **last.headers)
    await send(person, write_key, last)
    other = Person(person.http, person.url)
    other.headers.update(last.headers)
    await other.sign_up()

    async def all_arrived() -> bool:
        return receiver.services_of(last) == SERVICES

    await eventually(all_arrived)
    secret_file = traced[0].stack.data_dir / "secrets" / "passwords.json"
    hidden = [
        canary,
        "eyJ",  # every JWT begins so: access and service tokens
        write_key,
        tokens["refreshToken"],
        tokens["refreshKey"],
        refreshed["refreshToken"],
        *json.loads(secret_file.read_text()).values(),
    ]
    assert [(secret, receiver.telling(secret)) for secret in hidden if receiver.telling(secret)] == []
