"""What Prometheus is told of a flow through the mesh."""

from __future__ import annotations

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conditions import eventually
from tests.mesh.people import Person
from tests.parts import Mesh

pytestmark = pytest.mark.xdist_group("mesh")

PROCESSES = ("auth", "user", "dashboard", "analytics", "pipeline", "store")
RPC = "meshboard.{}.v1.{}"


class Figures:
    """All samples of all processes."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.samples = [
            (process, sample.name, sample.labels, sample.value)
            for process, text in texts.items()
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]

    def of(self, process: str, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels; fails when there is none."""
        found = [
            value
            for of_process, of_name, of_labels, value in self.samples
            if (of_process, of_name) == (process, name) and labels.items() <= of_labels.items()
        ]
        assert found, f"{process} tells no {name} {labels}"
        return sum(found)


async def figures(mesh: Mesh, http: aiohttp.ClientSession) -> Figures:
    texts = {}
    for process in PROCESSES:
        port = mesh.stack.port_of(f"{process}_private")
        async with http.get(f"http://127.0.0.1:{port}/metrics") as answer:
            assert answer.status == 200
            assert answer.content_type == "text/plain"
            texts[process] = await answer.text()
    return Figures(texts)


async def test_a_flow_shows_in_the_figures(mesh: Mesh, http: aiohttp.ClientSession, ann: Person):
    source_id, write_key = await ann.new_source()
    query = {"sourceIds": [source_id], "measures": [{"aggregation": "COUNT"}]}
    dashboard_id = await ann.new_dashboard({"title": "Events", "kind": "NUMBER", "query": query})
    path = f"/v1/dashboards/{dashboard_id}"
    before = await figures(mesh, http)
    event = {"event": "counted", "distinctId": "x", "insertId": "same"}
    refused = {"event": "", "distinctId": "x"}
    assert (await ann.send(write_key, event, event, {**event, "insertId": "other"}, refused))["refused"]

    async def counted() -> bool:
        data = await ann.get(f"{path}:data")
        return bool(data["widgets"][0]["result"]["rows"] == [[2]])

    await eventually(counted)
    for _ in range(3):
        await ann.get(path)
    assert (await ann.call("GET", f"{path[:-4]}0000")).status == 404
    after = await figures(mesh, http)

    def grown(process: str, name: str, **labels: str) -> float:
        now = after.of(process, name, **labels)
        try:
            return now - before.of(process, name, **labels)
        except AssertionError:
            return now

    ingest = RPC.format("analytics", "IngestService.Ingest")
    read = RPC.format("dashboard", "DashboardService.GetDashboard")
    assert grown("analytics", "meshboard_rpc_calls_total", method=ingest, code="OK") == 1
    assert grown("analytics", "meshboard_rpc_seconds_count", method=ingest) == 1
    assert grown("dashboard", "meshboard_rpc_calls_total", method=read, code="OK") == 3
    assert grown("dashboard", "meshboard_rpc_calls_total", method=read, code="NOT_FOUND") == 1
    assert grown("dashboard", "meshboard_rpc_seconds_sum", method=read) > 0
    assert grown("analytics", "meshboard_ingest_events_total", outcome="accepted") == 3
    assert grown("analytics", "meshboard_ingest_events_total", outcome="refused") == 1
    assert grown("pipeline", "meshboard_pipeline_events_total", outcome="inserted") == 2
    assert grown("pipeline", "meshboard_pipeline_events_total", outcome="duplicate") == 1
    assert grown("pipeline", "meshboard_pipeline_insert_seconds_count") >= 1
    assert grown("pipeline", "meshboard_pipeline_position") >= 1
    assert grown("store", "meshboard_store_seconds_count", kind="read") >= 1
    assert grown("store", "meshboard_store_seconds_count", kind="write") >= 1
    assert grown("analytics", "meshboard_query_answers_total", **{"from": "store"}) >= 1
    assert grown("dashboard", "meshboard_cache_reads_total", layer="process") >= 1
    assert grown("dashboard", "meshboard_rpc_under_way") == 0
    for service in ("auth", "user", "dashboard", "analytics"):
        used = after.of(service, "meshboard_postgres_pool_used", database=service)
        opened = after.of(service, "meshboard_postgres_pool_open", database=service)
        size = after.of(service, "meshboard_postgres_pool_size", database=service)
        assert 0 <= used <= opened <= size == 10


async def test_outboxes_and_consumers_tell_how_far_they_are_behind(
    mesh: Mesh, http: aiohttp.ClientSession, ann: Person
):
    await ann.post(f"/v1/workspaces/{ann.workspace_id}/teams", {"title": "Those who wait"})

    async def up_to_date() -> bool:
        now = await figures(mesh, http)
        signed_in = {"stream": "DOMAIN", "subject": "meshboard.auth.v1.SignedIn"}
        return all(
            [
                *(now.of(s, "meshboard_outbox_pending", service=s) == 0 for s in PROCESSES[:4]),
                *(now.of(s, "meshboard_outbox_oldest_seconds", service=s) == 0 for s in PROCESSES[:4]),
                now.of("user", "meshboard_consumer_pending", **signed_in) == 0,
                now.of("user", "meshboard_consumer_unacknowledged", **signed_in) == 0,
                now.of("user", "meshboard_events_consumed_total", outcome="done") > 0,
                now.of("pipeline", "meshboard_consumer_pending", stream="EVENTS") == 0,
            ]
        )

    async def told() -> bool:
        try:
            return await up_to_date()
        except AssertionError:  # it is measured every few seconds
            return False

    await eventually(told, 30)
