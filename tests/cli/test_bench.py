"""What `bench` makes of what it measured; how fast anything is, is not asserted."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from uuid import uuid4

import pytest
from aiohttp import web
from meshboard.analytics.v1.event_log_pb2 import LoggedBatch
from meshboard.analytics.v1.ingest_service_pb2 import IngestRequest

from bench import dashboards, direct, events, ingest, queries, reads, soak, startup, visible
from bench.figures import Figure, document, percentile, table
from bench.load import Generator, Load, LoadFailedError, Sent, h2load_rate

H2LOAD = """
finished in 817.34ms, 3670.46 req/s, 1.01MB/s
requests: 3000 total, 3000 started, 3000 done, {ok} succeeded, {failed} failed, 0 errored, 0 timeout
status codes: {ok} 2xx, 0 3xx, {failed} 4xx, 0 5xx
"""


def test_reads_what_h2load_prints() -> None:
    assert h2load_rate(H2LOAD.format(ok=3000, failed=0), 3000) == 3670.46


def test_refuses_a_load_of_which_a_part_failed() -> None:
    with pytest.raises(LoadFailedError, match="not all of 3000"):
        h2load_rate(H2LOAD.format(ok=2999, failed=1), 3000)


def test_percentile_is_the_nearest_rank() -> None:
    values = [float(number) for number in range(100, 0, -1)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1)) == (50, 99, 100)
    assert percentile([7.0], 0.01) == 7


def test_a_target_is_held_against_the_median() -> None:
    reached = Figure(name="a/one", rounds=(1, 9, 5), unit="s", at_least=5)
    missed = Figure(name="a/two", rounds=(1, 9, 5), unit="s", at_most=4.9)
    free = Figure(name="b/three", rounds=(12_345.6,), unit="events/s", note="as it is")
    assert [figure.met for figure in (reached, missed, free)] == [True, False, None]
    assert [line.split() for line in table([reached, missed, free]).splitlines()] == [
        ["a"],
        ["one", "5.00", "s", "1.00", "…", "9.00", "✓", "≥", "5"],
        ["two", "5.00", "s", "1.00", "…", "9.00", "✗", "≤", "4.9"],
        [],
        ["b"],
        ["three", "12,346", "events/s", "as", "it", "is"],
    ]
    written = json.loads(json.dumps(document([reached, missed, free])))
    assert [(one["name"], one["median"], one["met"]) for one in written] == [
        ("a/one", 5, True),
        ("a/two", 5, False),
        ("b/three", 12_345.6, None),
    ]


def test_reads_are_compared_with_the_echo_of_their_round() -> None:
    found = {
        figure.name: figure
        for figure in reads.figures(
            {"echo": [4000, 1000], "grpc": [2000, 900]},
            {("echo", "echo"): [200, 100], ("grpc", "user_svc"): [400, 400]},
        )
    }
    assert found["reads/grpc rate to echo"].rounds == (0.5, 0.9)
    assert found["reads/grpc requests per CPU second to echo"].rounds == (0.5, 0.25)
    assert not found["reads/grpc requests per CPU second to echo"].met
    assert found["reads/grpc CPU of user_svc"].rounds == (400, 400)


def test_ingest_is_counted_until_acknowledged_and_until_visible() -> None:
    one = ingest.Round(1000, 0.5, 2.0, (0.1, 0.3), {"store": 0.02, "valkey": 0.0})
    found = {
        figure.name: figure for figure in ingest.figures({(1, "json"): [one], (100, "grpc"): [one]}, [5000])
    }
    assert found["ingest/json 1 until acknowledged"].rounds == (2000,)
    assert found["ingest/json 1 acknowledgement p99"].rounds == (300,)
    assert found["ingest/grpc 100 until visible"].at_least is None
    best = ingest.figures({(1000, "grpc"): [one], (1000, "json"): [one]}, [5000])
    wanted = {figure.name: figure.at_least for figure in best if figure.at_least}
    assert wanted == {"ingest/grpc 1000 until visible": 100_000, "ingest/json 1000 until visible": 60_000}
    assert found["ingest/grpc 100 to chDB alone"].rounds == (0.1,)
    assert found["ingest/grpc 100 CPU of store"].rounds == (20,)
    assert "ingest/grpc 100 CPU of valkey" not in found


def test_says_whether_memory_is_flat_under_load() -> None:
    sizes = [100e6, 200e6, 210e6, 220e6]
    flat = soak.figures([1000.0] * 4, [{"store": int(size), "nats": 10_000_000} for size in sizes])
    assert [figure.met for figure in flat if figure.name == "soak/last minute to the middle"] == [True]
    grown = soak.figures([1000.0] * 4, [{"store": int(size**2 / 1e8)} for size in [*sizes[:3], 300e6]])
    assert [figure.met for figure in grown if figure.name == "soak/last minute to the middle"] == [False]
    assert {figure.name for figure in flat} >= {"soak/all processes", "soak/store", "soak/nats"}


def test_start_up_and_delays_have_their_targets() -> None:
    made = startup.figures(
        [3.0, 5.0], [{"nats": 0.1}, {"nats": 0.3}], [{"nats": 4_000_000}, {"nats": 6_000_000}]
    )
    assert [(figure.name, figure.median, figure.at_most) for figure in made] == [
        ("startup/warm, until all is ready", 4, 15),
        ("startup/nats", 0.2, None),
        ("memory/all processes at rest", 5, 1000),
        ("memory/nats", 5, None),
    ]
    delays = visible.figures([0.1] * 99 + [2.0], [0.5], 20_000)
    assert [(figure.median, figure.met) for figure in delays] == [
        (0.1, None),
        (0.1, True),
        (0.5, None),
        (0.5, True),
    ]


def test_dashboards_are_held_to_their_slowest_query() -> None:
    again = [1.0] * 98 + [16.0] * 2
    made = dashboards.figures(
        [13.0, 26.0], [10.0, 20.0], [[4.0, 2.0], [6.0, 2.0]], again, {"dashboard_svc": 3.0}
    )
    found = {figure.name: figure for figure in made}
    assert (
        found["dashboards/cold to slowest query"].median,
        found["dashboards/cold to slowest query"].met,
    ) == (
        1.3,
        True,
    )
    assert (found["dashboards/again p99"].median, found["dashboards/again p99"].met) == (16.0, False)
    assert found["dashboards/again, CPU of dashboard_svc"].median == 3.0
    assert found["dashboards/slowest query, alone"].median == 5.0
    assert found["dashboards/all queries, one by one"].median == 7.0
    assert len({str(widget) for widget in dashboards.WIDGETS}) == 20


def test_queries_are_held_to_the_same_sql_alone() -> None:
    spent = {(name, who): [12.0, 30.0] for name in queries.QUERIES for who in ("", "alone")}
    spent["days", "alone"] = [9.0, 20.0]
    found = {figure.name: figure for figure in queries.figures(spent, [1.0] * 98 + [11.0] * 2)}
    assert found["queries/number to chDB alone"].met
    assert found["queries/days to chDB alone"].median == pytest.approx((12 / 9 + 30 / 20) / 2)
    assert not found["queries/days to chDB alone"].met
    assert (found["queries/remembered p99"].median, found["queries/remembered p99"].met) == (11.0, False)


def test_every_event_that_is_sent_is_another() -> None:
    wanted = {f"run-{number}" for number in range(20_000)}  # twice through the log
    requests = [IngestRequest.FromString(body) for body in events.grpc_batches(20_000, 1000, "run")]
    assert [len(request.events) for request in requests] == [1000] * 20
    assert {event.insert_id for request in requests for event in request.events} == wanted
    bodies = [json.loads(body)["events"] for body in events.json_batches(20_000, 1000, "run")]
    assert {event["insertId"] for body in bodies for event in body} == wanted
    batch = LoggedBatch.FromString(events.logged_batches(10, 10, "run", "workspace", "source")[0])
    assert (batch.workspace_id, batch.source_id, len(batch.events)) == ("workspace", "source", 10)
    assert any(event.browser for event in batch.events)


def test_the_baselines_have_tables_and_events_of_their_own() -> None:
    workspace_id, source_id = str(uuid4()), str(uuid4())
    inserted = direct.insert(partial(events.logged_batches, 2_000, 1_000, "run", workspace_id, source_id))
    assert inserted.requests == 2
    rows = queries.Rows(workspace_id, source_id, 1_000)
    with queries.Alone(rows) as alone:
        assert alone.ask(rows.query(queries.QUERIES["days"], 0)) > 0


def bodies(*texts: str) -> list[bytes]:
    return [text.encode() for text in texts]


async def test_the_generator_sends_each_body_once() -> None:
    seen: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(await request.text())
        return web.Response(status=500 if seen[-1] == "bad" else 200)

    application = web.Application()
    application.router.add_post("/take", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]

    def generate(*texts: str) -> Sent:
        load = Load(
            protocol="json",
            address=f"{host}:{port}",
            path="/take",
            headers=(),
            bodies=partial(bodies, *texts),
            concurrency=2,
        )
        with Generator(load) as generator:
            generator.start()
            return generator.wait()

    try:
        sent = await asyncio.to_thread(generate, "one", "two", "three")
        assert sorted(seen) == ["one", "three", "two"]
        assert (sent.requests, len(sent.latencies)) == (3, 3)
        assert sent.ended > sent.began
        with pytest.raises(LoadFailedError, match="500"):
            await asyncio.to_thread(generate, "bad")
    finally:
        await runner.cleanup()
