"""The mesh to measure: one of its own in a temporary folder, or one that runs."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli.envoy_config import REPOSITORY
from cli.parts import launch, surroundings
from cli.stack import Stack, read_state, stack_of

START_SECONDS = 120.0
STOP_SECONDS = 30.0
CALL_SECONDS = 30.0


class MeshFailedError(Exception):
    """The mesh did not start, or answered otherwise than with success."""


@dataclass(frozen=True)
class Mesh:
    """A mesh that serves, without limits of rates.

    Attributes:
        pids: the process of each part by its name.
        ready_seconds: what the supervisor says each part took to be ready.
    """

    stack: Stack
    pids: Mapping[str, int]
    ready_seconds: Mapping[str, float]

    @property
    def gateway(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self.stack.port}"

    def address(self, service: str) -> str:
        """Host and port of a service's gRPC, past the gateway."""
        return f"127.0.0.1:{self.stack.port_of(service)}"

    def environment(self, part: str) -> Mapping[str, str]:
        """The settings that a part was started with."""
        return next(each for each in self.stack.parts() if each.name == part).env

    def calls_answered(self, service: str, method: str) -> int:
        """How many calls of a method (`meshboard.user.v1.UserService.GetMe`) the service answered with OK."""
        address = f"127.0.0.1:{self.stack.port_of(f'{service}_private')}"
        for line in request(address, "GET", "/metrics").decode().splitlines():
            if line.startswith("meshboard_rpc_calls_total{") and f'"{method}"' in line and '"OK"' in line:
                return int(float(line.rpartition(" ")[2]))
        return 0


def attached(data_dir: Path) -> Mesh:
    """The mesh that runs on a data folder. Raises MeshFailedError."""
    state = read_state(data_dir)
    if state is None or not state["ready"]:
        raise MeshFailedError(f"No mesh is ready on {data_dir}.")
    if state["limits"]:
        raise MeshFailedError(
            f"The mesh on {data_dir} limits rates. Start it with --no-limits to measure it."
        )
    parts = state["parts"]
    return Mesh(
        stack_of(data_dir, state),
        {name: part["pid"] for name, part in parts.items()},
        {name: part["ready_seconds"] for name, part in parts.items()},
    )


@contextmanager
def running(data_dir: Path, port: int) -> Iterator[Mesh]:
    """Runs `up --no-limits` with its data in `data_dir`, and stops it. Raises MeshFailedError.

    It ends also when this process is killed.
    """
    arguments = ["up", "--no-limits", "--data", str(data_dir), "--port", str(port)]
    log = data_dir.with_suffix(".log")
    with log.open("ab") as output:
        process = subprocess.Popen(
            launch([sys.executable, "-m", "cli.main", *arguments], signal.SIGTERM, ""),
            cwd=REPOSITORY,
            env=surroundings(),  # settings of the caller would make it another mesh
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not ((state := read_state(data_dir)) and state["ready"]):
            if process.poll() is not None or time.monotonic() > deadline:
                raise MeshFailedError(f"The mesh did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.02)
        yield attached(data_dir)
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Account:
    """Someone who signed up at the mesh, with sources to send events to."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._connection = http.client.HTTPConnection(mesh.gateway, timeout=CALL_SECONDS)
        self._credentials = {
            "email": f"bench-{secrets.token_hex(6)}@meshboard.example",
            "password": secrets.token_urlsafe(15),
        }
        answer = self._call("/v1/auth:signUp", {**self._credentials, "displayName": "Bench"}, token="")
        self.user_id = str(answer["user"]["userId"])
        self.workspace_id = str(answer["workspace"]["workspaceId"])
        self.token = str(answer["accessToken"])
        self._expiry = time.monotonic() + answer["expiresInSeconds"] / 2

    @property
    def email(self) -> str:
        """The address of the account."""
        return self._credentials["email"]

    @property
    def password(self) -> str:
        """The password of the account."""
        return self._credentials["password"]

    def create_api_key(self) -> str:
        """An API key of a new service account."""
        path = f"/v1/workspaces/{self.workspace_id}/serviceAccounts"
        made = self.post(path, {"title": "Load", "role": "viewer"})
        keys = f"{path}/{made['serviceAccount']['serviceAccountId']}/apiKeys"
        return str(self.post(keys, {"title": "Load"})["secret"])

    def post(self, path: str, body: object) -> Any:
        """Makes a call, and returns its answer."""
        self.authorization()
        return self._call(path, body, token=self.token)

    def sign_in(self) -> str:
        """The refresh token of another session."""
        return str(self._call("/v1/auth:signIn", self._credentials, token="")["refreshToken"])

    def authorization(self) -> tuple[tuple[str, str], ...]:
        """The header of a call, good for minutes."""
        if time.monotonic() > self._expiry:
            answer = self._call("/v1/auth:signIn", self._credentials, token="")
            self.token = answer["accessToken"]
            self._expiry = time.monotonic() + answer["expiresInSeconds"] / 2
        return (("authorization", f"Bearer {self.token}"),)

    def create_source(self) -> tuple[str, str]:
        """The id and the write key of a new source."""
        self.authorization()
        answer = self._call("/v1/sources", {"title": "Load"}, token=self.token)
        return answer["source"]["sourceId"], answer["writeKey"]

    def count(self, source_id: str) -> int:
        """How many events of a source a query counts now."""
        self.authorization()
        answer = self._call("/v1/queries:run", {"query": {"sourceIds": [source_id]}}, token=self.token)
        rows = answer["result"]["rows"]
        return int(rows[0][0]) if rows else 0

    def ingest(self, write_key: str, body: bytes) -> None:
        """Sends a batch, and returns when it is acknowledged."""
        headers = {"X-Write-Key": write_key, "Content-Type": "application/json"}
        _request(self._connection, "POST", "/v1/events:ingest", body, headers)

    def wait_for(self, source_id: str, events: int, *, pause: float, seconds: float = 60.0) -> float:
        """Returns when (time.monotonic()) a query counted so many events. Raises MeshFailedError."""
        deadline = time.monotonic() + seconds
        while (found := self.count(source_id)) != events:
            if found > events or time.monotonic() > deadline:
                raise MeshFailedError(f"A query counts {found} events instead of {events}.")
            time.sleep(pause)
        return time.monotonic()

    def _call(self, path: str, body: object, *, token: str) -> Any:
        headers = {
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {token}"} if token else {}),
        }
        return json.loads(_request(self._connection, "POST", path, json.dumps(body).encode(), headers))


def request(address: str, method: str, path: str) -> bytes:
    """Makes one HTTP request without a body. Raises MeshFailedError."""
    connection = http.client.HTTPConnection(address, timeout=CALL_SECONDS)
    try:
        return _request(connection, method, path, b"", {})
    finally:
        connection.close()


def _request(
    connection: http.client.HTTPConnection, method: str, path: str, body: bytes, headers: dict[str, str]
) -> bytes:
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    answer = response.read()
    if response.status != 200:
        raise MeshFailedError(f"{method} {path}: {response.status} {answer[:500].decode(errors='replace')}")
    return answer
