"""`up`, `down`, `status` and `logs` as a person types them, on whole meshes."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cli.envoy_config import REPOSITORY
from cli.processes import start_time
from tests.parts import free_gateway_port

pytestmark = [pytest.mark.xdist_group("mesh"), pytest.mark.timeout(300)]

NAMES = [
    "postgres",
    "nats",
    "valkey",
    "mails",
    "store",
    "auth_svc",
    "user_svc",
    "analytics_svc",
    "pipeline",
    "dashboard_svc",
    "envoy",
]


def meshboard(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "cli.main", *map(str, arguments)]
    return subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)


def status(data: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(meshboard("status", "-o", "json", "--data", data).stdout)
    return report


def parts_of(data: Path) -> dict[str, dict[str, Any]]:
    return {part["name"]: part for part in status(data)["parts"]}


class Up:
    """`up` in the foreground of a terminal."""

    def __init__(self, data: Path, port: int) -> None:
        self.data = data
        self.port = port
        words = [sys.executable, "-m", "cli.main", "up", "--port", str(port), "--data", str(data)]
        self.process = subprocess.Popen(
            words, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.said: list[str] = []
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.put(line.rstrip())

    def until(self, pattern: str, seconds: float = 90) -> str:
        """Returns the next line that matches."""
        deadline = time.monotonic() + seconds
        while True:
            self.said.append(self._lines.get(timeout=deadline - time.monotonic()))
            if re.search(pattern, self.said[-1]):
                return self.said[-1]

    def end(self, number: signal.Signals) -> tuple[int, float]:
        """Sends the signal twice, as the impatient do; returns the exit code and the seconds it took."""
        began = time.monotonic()
        self.process.send_signal(number)
        self.process.send_signal(number)
        code = self.process.wait(timeout=30)
        seconds = time.monotonic() - began
        self._reader.join()
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()
        return code, seconds


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    running = Up(tmp_path_factory.mktemp("up") / "data", free_gateway_port())
    try:
        running.until("^All ready")
        yield running
    finally:
        running.end(signal.SIGTERM)


def test_tells_of_each_part_in_order(mesh: Up) -> None:
    marks = [line for line in mesh.said if line.startswith("✓")]
    assert [line.split()[1] for line in marks] == NAMES
    assert all(re.fullmatch(r"✓ \w+ \(\d+\.\d s\)", line) for line in marks)


def test_status_tells_of_each_part_as_json(mesh: Up) -> None:
    report = status(mesh.data)
    assert report["ready"] is True
    assert report["gateway_url"] == f"http://127.0.0.1:{mesh.port}"
    assert [part["name"] for part in report["parts"]] == NAMES
    for part in report["parts"]:
        assert part["ready"]
        assert start_time(part["pid"])
        assert part["memory_bytes"] > 2**20
        assert Path(part["log"]).is_file()


def test_logs_shows_the_last_lines(mesh: Up) -> None:
    assert len(meshboard("logs", "postgres", "-n", 2, "--data", mesh.data).stdout.splitlines()) == 2
    unknown = meshboard("logs", "mysql", "--data", mesh.data)
    assert unknown.returncode == 1
    assert "No log of mysql" in unknown.stderr


def test_secrets_are_in_no_command_line(mesh: Up) -> None:
    files = [path for path in (mesh.data / "secrets").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    secrets = list(json.loads((mesh.data / "secrets" / "passwords.json").read_text()).values())
    secrets.append((mesh.data / "secrets" / "master.key").read_text().strip())
    lines = " ".join(
        word for process in psutil.process_iter(["cmdline"]) for word in process.info["cmdline"] or ()
    )
    assert str(mesh.data) in lines
    assert not [secret for secret in secrets if secret in lines]


def test_all_listen_on_this_machine_only(mesh: Up) -> None:
    listening = [
        address
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
        and (address := connection.laddr)
        and mesh.port <= address.port < mesh.port + 14
    ]
    assert len(listening) >= 13
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


def test_restarts_a_crashed_service_and_says_so(mesh: Up) -> None:
    pid = parts_of(mesh.data)["user_svc"]["pid"]
    os.kill(pid, signal.SIGKILL)
    assert "restarting it in 0.5 s" in mesh.until("✗ user_svc ended with signal SIGKILL")
    mesh.until("✓ user_svc runs again")
    again = parts_of(mesh.data)["user_svc"]
    assert again["ready"]
    assert again["restarts"] == 1
    assert again["pid"] != pid


def test_a_second_one_on_the_same_data_is_refused(mesh: Up) -> None:
    refused = meshboard("up", "--data", mesh.data, "--port", free_gateway_port())
    assert refused.returncode == 1
    assert "already runs" in refused.stderr
    assert f"down --data {mesh.data}" in refused.stderr
    assert status(mesh.data)["ready"]


def test_names_the_port_in_use_and_the_remedy(tmp_path: Path) -> None:
    port = free_gateway_port()
    with socket.create_server(("127.0.0.1", port + 13)):
        for detach in ([], ["--detach"]):
            refused = meshboard("up", *detach, "--data", tmp_path / "data", "--port", port)
            assert refused.returncode == 1
            assert f"Port {port + 13}, which nats would listen on, is in use." in refused.stderr
            assert "choose other ports: --port" in refused.stderr


def test_refuses_data_of_another_version(tmp_path: Path) -> None:
    (tmp_path / "VERSION").write_text("0\n")
    refused = meshboard("up", "--data", tmp_path, "--port", free_gateway_port())
    assert refused.returncode == 1
    assert "holds data of format 0" in refused.stderr
    assert "--data" in refused.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["VERSION"]


def test_a_second_mesh_beside_it_keeps_its_data(mesh: Up, tmp_path: Path) -> None:
    data, port = tmp_path / "data", free_gateway_port()
    up = ("up", "--detach", "--data", data, "--port", port)
    started = meshboard(*up)
    try:
        assert started.returncode == 0, started.stderr
        assert started.stdout == f"http://127.0.0.1:{port}\n"
        assert status(data)["ready"]
        assert status(mesh.data)["ready"]
        keys = read(f"http://127.0.0.1:{port}/.well-known/jwks.json")
        assert keys != read(f"http://127.0.0.1:{mesh.port}/.well-known/jwks.json")
        pids = [part["pid"] for part in status(data)["parts"]]

        began = time.monotonic()
        assert meshboard("down", "--data", data).returncode == 0
        assert time.monotonic() - began < 10
        assert [start_time(pid) for pid in pids] == [""] * len(pids)
        assert status(data)["ready"] is False
        assert meshboard("status", "--data", data).returncode == 1

        assert meshboard(*up).returncode == 0
        assert read(f"http://127.0.0.1:{port}/.well-known/jwks.json") == keys
    finally:
        assert meshboard("down", "--data", data).returncode == 0
    assert status(mesh.data)["ready"]


def read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        content: bytes = answer.read()
    return content


def test_ctrl_c_is_clean(tmp_path: Path) -> None:
    running = Up(tmp_path / "data", free_gateway_port())
    running.until("^All ready")
    pids = [part["pid"] for part in status(running.data)["parts"]]
    code, seconds = running.end(signal.SIGINT)
    assert code == 0
    assert seconds < 10
    assert [start_time(pid) for pid in pids] == [""] * len(pids)
    running.until("^Stopped. The data stays in")
    assert not [line for line in running.said if "killed" in line or "Traceback" in line]


def test_down_with_nothing_running_says_so(tmp_path: Path) -> None:
    stopped = meshboard("down", "--data", tmp_path)
    assert stopped.returncode == 0
    assert "Nothing runs" in stopped.stderr


@pytest.mark.parametrize("command", ["up", "down", "status", "logs", "doctor"])
def test_each_command_has_help_with_an_example(command: str) -> None:
    assert "Example: ./dev" in meshboard(command, "--help").stdout
