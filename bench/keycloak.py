"""A peer to compare with: Keycloak, where Maven has brought its distribution and there is a Java to run it.

    mvn dependency:get -Dartifact=org.keycloak:keycloak-quarkus-dist:26.7.3:zip -Dtransitive=false

It runs as its own development mode does, on loopback, in a temporary folder, and ends with the measuring.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.load import Load, LoadFailedError

ARCHIVE = Path(
    "~/.m2/repository/org/keycloak/keycloak-quarkus-dist/26.7.3/keycloak-quarkus-dist-26.7.3.zip"
).expanduser()
START_SECONDS = 300.0  # twenty on a quiet machine
CONCURRENCY = 8
FORM = (("content-type", "application/x-www-form-urlencoded"),)


@dataclass(frozen=True)
class Keycloak:
    """A running Keycloak with one client, which has a secret, and one person, who has a password."""

    port: int
    pid: int
    client_secret: str
    password: str

    def client_tokens(self, count: int) -> Load:
        """So many tokens by client credentials, the counterpart of an exchanged API key."""
        return self._tokens(count, grant_type="client_credentials")

    def sign_ins(self, count: int) -> Load:
        """So many sign-ins with a password."""
        return self._tokens(count, grant_type="password", username="bench", password=self.password)

    def _tokens(self, count: int, **form: str) -> Load:
        form |= {"client_id": "bench", "client_secret": self.client_secret}
        return Load(
            protocol="json",
            address=f"127.0.0.1:{self.port}",
            path="/realms/master/protocol/openid-connect/token",
            headers=FORM,
            bodies=partial(_repeat, urllib.parse.urlencode(form).encode(), count),
            concurrency=CONCURRENCY,
        )


def is_present() -> bool:
    """Whether Keycloak can be started here."""
    return ARCHIVE.exists() and shutil.which("java") is not None


@contextmanager
def running(folder: Path) -> Iterator[Keycloak]:
    """Runs Keycloak out of an empty folder. Raises LoadFailedError when it does not start."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(folder)
    home = next(folder.iterdir())
    port, admin_password = _free_port(), secrets.token_urlsafe(16)
    log = folder / "keycloak.log"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("KC_")},
        "KC_BOOTSTRAP_ADMIN_USERNAME": "admin",
        "KC_BOOTSTRAP_ADMIN_PASSWORD": admin_password,
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["sh", str(home / "bin" / "kc.sh"), "start-dev", "--http-host=127.0.0.1", f"--http-port={port}"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_ready(port, process, log)
        client_secret, password = secrets.token_urlsafe(16), secrets.token_urlsafe(16)
        _set_up(port, admin_password, client_secret, password)
        yield Keycloak(port, process.pid, client_secret, password)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_ready(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            _call(port, "GET", "/realms/master")
            return
        except (OSError, urllib.error.URLError):
            if process.poll() is not None or time.monotonic() > deadline:
                raise LoadFailedError(f"Keycloak did not start:\n{log.read_text()[-2000:]}") from None
            time.sleep(0.2)


def _set_up(port: int, admin_password: str, client_secret: str, password: str) -> None:
    form = {
        "grant_type": "password",
        "client_id": "admin-cli",
        "username": "admin",
        "password": admin_password,
    }
    answer = _call(
        port,
        "POST",
        "/realms/master/protocol/openid-connect/token",
        urllib.parse.urlencode(form).encode(),
        "application/x-www-form-urlencoded",
    )
    token = json.loads(answer)["access_token"]
    client = {
        "clientId": "bench",
        "secret": client_secret,
        "serviceAccountsEnabled": True,
        "directAccessGrantsEnabled": True,
        "publicClient": False,
    }
    user = {
        "username": "bench",
        "enabled": True,
        "email": "bench@example.org",
        "emailVerified": True,
        "firstName": "Bench",
        "lastName": "Bench",
        "credentials": [{"type": "password", "value": password, "temporary": False}],
    }
    for what, body in (("clients", client), ("users", user)):
        _call(port, "POST", f"/admin/realms/master/{what}", json.dumps(body).encode(), token=token)


def _call(
    port: int,
    method: str,
    path: str,
    body: bytes | None = None,
    content_type: str = "application/json",
    *,
    token: str = "",
) -> bytes:
    headers = {"Content-Type": content_type, **({"Authorization": f"Bearer {token}"} if token else {})}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, headers, method=method)
    with urllib.request.urlopen(request, timeout=30) as response:
        answer: Any = response.read()
    return bytes(answer)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def _repeat(body: bytes, count: int) -> list[bytes]:
    return [body] * max(1, count)
