"""The demo: an account, a source filled with a real access log through the gateway, and a dashboard of it."""

from __future__ import annotations

import asyncio
import gzip
import json
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

from cli.delivery import Gateway as Delivery
from cli.delivery import Outcome, SendStopped, send_file
from cli.records import Columns, Records

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / "examples" / "apache_logs.gz"
EMAIL = "demo@meshboard.example"
RETRY_SECONDS = 60.0


class DemoFailedError(Exception):
    """The gateway answered otherwise than expected; the message says what."""


class Gateway:
    """JSON calls through the gateway, repeated while it says that a retry helps."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self.http = http
        self.url = url
        self.headers: dict[str, str] = {}

    async def call(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        """The answer's JSON. Raises DemoFailedError with the gateway's message."""
        deadline = time.monotonic() + RETRY_SECONDS
        while True:
            request = self.http.request(
                method, self.url + path, json=body, headers={**self.headers, **headers}
            )
            async with request as response:
                answer = await response.json(content_type=None)
                if response.status < 400:
                    return answer
                if response.status not in {429, 503} or time.monotonic() > deadline:
                    raise DemoFailedError(f"{method} {path}: {response.status} {answer}")
                await asyncio.sleep(float(response.headers.get("Retry-After", 1)))


def read_log(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a gzipped log with their numbers, from 1."""
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as lines:
        yield from enumerate((line.rstrip("\n") for line in lines), 1)


async def send_log(gateway: Gateway, path: Path, write_key: str) -> Outcome:
    """Sends a log, and gives what became of it; sent again, each line still counts once. Raises DemoFailedError."""
    outcome = Outcome()
    delivery = Delivery(gateway.http, gateway.url, write_key, patience=RETRY_SECONDS)
    with tempfile.TemporaryDirectory() as state:
        try:
            await send_file(lambda: Records(path, "combined", Columns()), delivery, Path(state), outcome)
        except SendStopped as error:
            raise DemoFailedError(f"{path.name}: {error}") from None
    return outcome


def widgets(source_id: str) -> list[dict[str, Any]]:
    """What the dashboard shows."""

    def query(**more: Any) -> dict[str, Any]:
        return {"sourceIds": [source_id], **more}

    def by(name: str, limit: int = 20) -> dict[str, Any]:
        return query(
            breakdowns=[{"property": name}],
            measures=[{"aggregation": "COUNT", "alias": "requests"}],
            limit=limit,
        )

    def layout(x: int, y: int, width: int = 8, height: int = 8) -> dict[str, int]:
        return {"x": x, "y": y, "width": width, "height": height}

    requests = {"aggregation": "COUNT", "alias": "requests"}
    visitors = {"aggregation": "UNIQUE", "property": "distinct_id", "alias": "visitors"}
    sent = {"aggregation": "SUM", "property": "properties.bytes", "alias": "bytes"}
    hourly = {"granularity": "HOUR"}
    return [
        {
            "title": "Requests",
            "kind": "NUMBER",
            "query": query(measures=[requests]),
            "layout": layout(0, 0, 8, 4),
        },
        {
            "title": "Visitors",
            "kind": "NUMBER",
            "query": query(measures=[visitors]),
            "layout": layout(8, 0, 8, 4),
        },
        {
            "title": "Bytes sent",
            "kind": "NUMBER",
            "query": query(measures=[sent]),
            "layout": layout(16, 0, 8, 4),
        },
        {
            "title": "Requests per hour",
            "kind": "TIMESERIES",
            "query": query(measures=[requests], **hourly),
            "layout": layout(0, 4, 12),
        },
        {
            "title": "Visitors per hour",
            "kind": "TIMESERIES",
            "query": query(measures=[visitors], **hourly),
            "layout": layout(12, 4, 12),
        },
        {"title": "Top paths", "kind": "TABLE", "query": by("path"), "layout": layout(0, 12)},
        {"title": "Status codes", "kind": "BAR", "query": by("properties.status"), "layout": layout(8, 12)},
        {"title": "Browsers", "kind": "BAR", "query": by("browser"), "layout": layout(16, 12)},
        {"title": "Robots and people", "kind": "PIE", "query": by("is_robot"), "layout": layout(0, 20)},
        {
            "title": "Bytes sent per hour",
            "kind": "TIMESERIES",
            "query": query(measures=[sent], **hourly),
            "layout": layout(8, 20, 16),
        },
    ]


async def run(gateway_url: str, data_dir: Path) -> None:
    """Makes the demo, or finds the one made earlier on this data folder, and prints how to look at it."""
    file = data_dir / "secrets" / "demo.json"
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as http:
        gateway = Gateway(http, gateway_url)
        if file.exists():
            made = json.loads(file.read_text())
            _say("The demo was made earlier on this data folder.")
        else:
            made = await _make(gateway, file)
    print(_block(gateway_url, data_dir, made))


async def sign_in(gateway_url: str, data_dir: Path) -> str:
    """A fresh access token of the demo account. Raises DemoFailedError."""
    file = data_dir / "secrets" / "demo.json"
    if not file.exists():
        raise DemoFailedError(f"{data_dir} has no demo account: make one with `./dev up --demo`")
    made = json.loads(file.read_text())
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as http:
        credentials = {"email": made["email"], "password": made["password"]}
        answer = await Gateway(http, gateway_url).call("POST", "/v1/auth:signIn", credentials)
    return str(answer["accessToken"])


async def _make(gateway: Gateway, file: Path) -> dict[str, str]:
    password = secrets.token_urlsafe(15)
    account = {"email": EMAIL, "password": password, "displayName": "Demo"}
    answer = await gateway.call("POST", "/v1/auth:signUp", account)
    gateway.headers["Authorization"] = f"Bearer {answer['accessToken']}"
    source = await gateway.call("POST", "/v1/sources", {"title": "A web server's access log"})
    _say(f"Sending {LOG.name} through the gateway …")
    start = time.monotonic()
    sent = await send_log(gateway, LOG, source["writeKey"])
    _say(f"✓ {sent.accepted:,} lines accepted in {time.monotonic() - start:.1f} s, {sent.refused} refused")
    for line, why in sent.refusals:
        _say(f"  line {line}: {why}")
    await _until_visible(gateway, source["source"]["sourceId"], sent.accepted)
    dashboard = (await gateway.call("POST", "/v1/dashboards", {"title": "Web traffic"}))["dashboard"]
    for widget in widgets(source["source"]["sourceId"]):
        await gateway.call("POST", f"/v1/dashboards/{dashboard['dashboardId']}/widgets", widget)
    _say(f"✓ dashboard with {len(widgets(''))} widgets")
    made = {
        "email": EMAIL,
        "password": password,
        "dashboardId": dashboard["dashboardId"],
        "sourceId": source["source"]["sourceId"],
        "writeKey": source["writeKey"],
    }
    file.touch(mode=0o600)
    file.write_text(json.dumps(made, indent=2) + "\n")
    return made


async def _until_visible(gateway: Gateway, source_id: str, count: int) -> None:
    """Waits until a query counts what was accepted, so that the dashboard's first numbers are whole."""
    deadline = time.monotonic() + RETRY_SECONDS
    query = {"query": {"sourceIds": [source_id]}}
    while (rows := (await gateway.call("POST", "/v1/queries:run", query))["result"]["rows"]) != [[count]]:
        if time.monotonic() > deadline:
            raise DemoFailedError(
                f"{count} events were accepted, but a query shows {rows}: see `./dev logs pipeline`"
            )
        await asyncio.sleep(0.1)


def _block(gateway_url: str, data_dir: Path, made: dict[str, str]) -> str:
    """What a person does next; each line works when pasted into a shell in this folder."""
    host = gateway_url.removeprefix("http://")
    data = "" if data_dir == ROOT / ".data" else f" --data {data_dir}"
    token = f"$(./dev token{data})"
    dashboard_id = made["dashboardId"]
    method = "meshboard.dashboard.v1.DashboardService/GetDashboardData"
    request = f'{{"dashboard_id": "{dashboard_id}"}}'
    event = '{"events":[{"event":"request","distinctId":"me"}]}'
    bearer = f'-H "Authorization: Bearer {token}"'
    dashboard = f"{gateway_url}/v1/dashboards/{dashboard_id}"
    return f"""
Gateway     {gateway_url}
Account     {made["email"]}
Password    {made["password"]}   (kept in {data_dir / "secrets" / "demo.json"})
Dashboard   {dashboard_id}
Source      {made["sourceId"]}
Write key   {made["writeKey"]}

Its data as JSON:
  curl -s {bearer} {dashboard}:data
Live, as server-sent events:
  curl -sN {bearer} -H "Accept: text/event-stream" {dashboard}:watch
One more event:
  curl -s -H "X-Write-Key: {made["writeKey"]}" {gateway_url}/v1/events:ingest -d '{event}'
With grpcurl:
  grpcurl -plaintext {bearer} -d '{request}' {host} {method}
With buf:
  .venv/bin/buf curl --protocol grpc --http2-prior-knowledge {bearer} -d '{request}' {gateway_url}/{method}
"""


def _say(line: str) -> None:
    print(line, file=sys.stderr)
