"""People who use the mesh through its gateway."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp


@dataclass
class Answer:
    """What the gateway answered."""

    status: int
    body: Any
    headers: dict[str, str]

    @property
    def reason(self) -> str:
        """The reason of an error; fails when it is not in the one error shape."""
        assert set(self.body) == {"code", "message", "details"}, self.body
        assert self.headers["content-type"].startswith("application/json")
        infos = [d for d in self.body["details"] if d["@type"].endswith("google.rpc.ErrorInfo")]
        assert len(infos) == 1, self.body
        assert infos[0]["domain"] == "meshboard"
        return str(infos[0]["reason"])


class Person:
    """Someone with a browser, signed in or not."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self.http = http
        self.url = url
        self.email = f"{secrets.token_hex(8)}@example.org"
        self.password = secrets.token_urlsafe(12)
        self.account: dict[str, Any] = {}
        self.headers: dict[str, str] = {}

    async def call(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """Makes a JSON call, whatever comes of it."""
        data = json.dumps(body) if isinstance(body, dict | list) else body
        sent = {"content-type": "application/json", **self.headers, **headers}
        async with self.http.request(method, self.url + path, data=data, headers=sent) as response:
            text = await response.text()
            answer_headers = {key.lower(): value for key, value in response.headers.items()}
            return Answer(response.status, json.loads(text) if text else None, answer_headers)

    async def get(self, path: str, **headers: str) -> Any:
        """The body of a call that works."""
        answer = await self.call("GET", path, **headers)
        assert answer.status == 200, answer
        return answer.body

    async def post(self, path: str, body: Any, **headers: str) -> Any:
        """The body of a call that works."""
        answer = await self.call("POST", path, body, **headers)
        assert answer.status == 200, answer
        return answer.body

    async def sign_up(self, **more: str) -> Person:
        """Makes an account, and carries its token from now on."""
        credentials = {"email": self.email, "password": self.password, "displayName": "Someone", **more}
        self.account = await self.post("/v1/auth:signUp", credentials)
        self.headers["authorization"] = f"Bearer {self.account['accessToken']}"
        return self

    @property
    def workspace_id(self) -> str:
        """The personal workspace."""
        return str(self.account["workspace"]["workspaceId"])

    @property
    def user_id(self) -> str:
        """The person's id."""
        return str(self.account["user"]["userId"])

    async def new_source(self) -> tuple[str, str]:
        """A source's id and write key."""
        answer = await self.post("/v1/sources", {"title": secrets.token_hex(4)})
        return answer["source"]["sourceId"], answer["writeKey"]

    async def new_dashboard(self, *widgets: dict[str, Any], title: str = "") -> str:
        """The id of a dashboard with these widgets."""
        dashboard = await self.post("/v1/dashboards", {"title": title or secrets.token_hex(4)})
        dashboard_id = str(dashboard["dashboard"]["dashboardId"])
        for widget in widgets:
            await self.post(f"/v1/dashboards/{dashboard_id}/widgets", widget)
        return dashboard_id

    async def send(self, write_key: str, *events: dict[str, Any]) -> Any:
        """Sends events, and gives the answer."""
        return await self.post("/v1/events:ingest", {"events": list(events)}, **{"x-write-key": write_key})

    async def run_query(self, **query: Any) -> Any:
        """The result of a query."""
        return (await self.post("/v1/queries:run", {"query": query}))["result"]

    @asynccontextmanager
    async def watch(
        self, dashboard_id: str, cursor: str = "", accept: str = "text/event-stream", **choices: str
    ) -> AsyncIterator[Watch]:
        """Follows a dashboard by server-sent events, or by lines of JSON."""
        path = f"/v1/dashboards/{dashboard_id}:watch"
        async with self.watch_at(path, cursor, accept, **choices) as watch:
            yield watch

    @asynccontextmanager
    async def watch_at(
        self, path: str, cursor: str = "", accept: str = "text/event-stream", **choices: str
    ) -> AsyncIterator[Watch]:
        """Follows what streams at a path, in the same forms."""
        parameters = [("cursor", cursor)] if cursor else []
        parameters += [("choices", f"{name}={value}") for name, value in choices.items()]
        headers = {**self.headers, "accept": accept}
        async with self.http.get(self.url + path, params=parameters, headers=headers) as response:
            assert response.status == 200, await response.text()
            assert response.headers["content-type"].startswith(accept)
            yield Watch(response, "data:" if accept == "text/event-stream" else "")


class Watch:
    """An open stream of messages, each a line with a prefix."""

    def __init__(self, response: aiohttp.ClientResponse, prefix: str) -> None:
        self._response = response
        self._prefix = prefix

    async def next(self, seconds: float = 20) -> dict[str, Any]:
        """The next message that is no heartbeat, and does not only doubt the annotations; fails after `seconds`."""
        async with asyncio.timeout(seconds):
            while True:
                line = (await self._response.content.readline()).decode().strip()
                if line and line.startswith(self._prefix):
                    message: dict[str, Any] = json.loads(line.removeprefix(self._prefix))
                    told = message.get("changes") or message.get("removedWidgetIds")
                    doubts = message.get("annotationsChanged") and not told
                    if "heartbeat" not in message and not doubts:
                        return message
                assert line or not self._response.content.at_eof(), "the stream has ended"
