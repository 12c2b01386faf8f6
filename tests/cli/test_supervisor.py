"""The supervisor, with small children that stand for the parts."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cli.parts import Part
from cli.processes import is_running, memory_bytes, start_time
from cli.supervisor import AlreadyRuns, PortInUse, StartFailed, Supervisor, sweep
from tests.parts import free_port

CHILD = """
import pathlib, signal, sys, time
order, name, flag = pathlib.Path(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
def stop(*_):
    with order.open("a") as file: file.write(name + "\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
flag.touch()
while True: time.sleep(60)
"""
STUBBORN = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).touch()
time.sleep(600)
"""


def child(folder: Path, name: str, *after: str, listens: tuple[tuple[str, int], ...] = ()) -> Part:
    flag = folder / f"{name}.ready"

    async def ready() -> bool:
        return await asyncio.to_thread(flag.exists)

    argv = (sys.executable, "-c", CHILD, str(folder / "order"), name, str(flag))
    return Part(name=name, argv=argv, ready=ready, after=after, listens=listens)


def stubborn_part(folder: Path) -> Part:
    flag = folder / "stubborn.ready"

    async def ready() -> bool:
        return await asyncio.to_thread(flag.exists)

    return Part(name="stubborn", argv=(sys.executable, "-c", STUBBORN, str(flag)), ready=ready)


async def eventually(condition: Callable[[], bool], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in other processes
            await asyncio.sleep(0.02)


async def test_starts_in_order_and_stops_in_reverse(tmp_path: Path) -> None:
    said: list[str] = []
    mesh = [
        child(tmp_path, "server"),
        child(tmp_path, "service", "server"),
        child(tmp_path, "edge", "service"),
    ]
    async with Supervisor(mesh, tmp_path, say=said.append) as supervisor:
        assert [line.split()[:2] for line in said] == [["✓", "server"], ["✓", "service"], ["✓", "edge"]]
        pids = [supervisor.pid(name) for name in ("server", "service", "edge")]
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert (tmp_path / "order").read_text().split() == ["edge", "service", "server"]
    assert [start_time(pid) for pid in pids] == ["", "", ""]
    assert not (tmp_path / "run" / "state.json").exists()


async def test_restarts_a_crashed_child_and_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    async with Supervisor([child(tmp_path, "service")], tmp_path, say=said.append) as supervisor:
        first = supervisor.pid("service")
        supervisor.kill("service")
        await supervisor.until_ready("service", restarts=1)
        assert supervisor.pid("service") != first
        await eventually(lambda: said[-1].startswith("✓ service runs again"))
        assert "✗ service ended with signal SIGKILL; restarting it in 0.5 s" in said
        state = json.loads((tmp_path / "run" / "state.json").read_text())
        assert state["parts"]["service"]["restarts"] == 1
        assert state["parts"]["service"]["pid"] == supervisor.pid("service")


async def test_waits_longer_before_each_restart(tmp_path: Path) -> None:
    said: list[str] = []
    async with Supervisor([child(tmp_path, "service")], tmp_path, say=said.append) as supervisor:
        for restarts in (1, 2):
            supervisor.kill("service")
            await supervisor.until_ready("service", restarts=restarts)
    assert [line.split()[-2] for line in said if "restarting" in line] == ["0.5", "1.0"]


async def test_a_stopped_part_stays_stopped_until_started(tmp_path: Path) -> None:
    async with Supervisor([child(tmp_path, "service")], tmp_path) as supervisor:
        await supervisor.stop("service")
        with pytest.raises(LookupError):
            supervisor.pid("service")
        await supervisor.start("service")
        assert supervisor.pid("service")


async def test_kills_what_does_not_stop(tmp_path: Path) -> None:
    said: list[str] = []
    async with Supervisor(
        [replace(stubborn_part(tmp_path), stop_seconds=1.0)], tmp_path, say=said.append
    ) as supervisor:
        pid = supervisor.pid("stubborn")
        began = time.monotonic()
    assert 1 <= time.monotonic() - began < 3
    assert start_time(pid) == ""
    assert said[-1] == "✗ stubborn did not stop in time and was killed"


async def test_a_failed_start_shows_the_log_and_stops_the_rest(tmp_path: Path) -> None:
    async def ready() -> bool:
        return False

    broken = Part(
        name="broken",
        argv=(sys.executable, "-c", "raise SystemExit('no such table')"),
        ready=ready,
        after=("server",),
    )
    with pytest.raises(StartFailed, match=r"(?s)broken ended with exit code 1.*no such table"):
        async with Supervisor([child(tmp_path, "server"), broken], tmp_path):
            pass
    assert (tmp_path / "order").read_text().split() == ["server"]


async def test_a_part_that_is_never_ready_fails_the_start(tmp_path: Path) -> None:
    async def ready() -> bool:
        return False

    idle = Part(name="idle", argv=(sys.executable, "-c", "import time; time.sleep(60)"), ready=ready)
    with pytest.raises(StartFailed, match="idle was not ready after 1 s"):
        async with Supervisor([idle], tmp_path, ready_seconds=1):
            pass


async def test_names_the_port_in_use(tmp_path: Path) -> None:
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(PortInUse, match=f"Port {port}, which service would listen on, is in use"):
        async with Supervisor([child(tmp_path, "service", listens=(("127.0.0.1", port),))], tmp_path):
            pass
    server.close()
    await server.wait_closed()
    async with Supervisor([child(tmp_path, "service", listens=(("127.0.0.1", port),))], tmp_path):
        pass


async def test_one_mesh_a_data_folder(tmp_path: Path) -> None:
    part = child(tmp_path, "service", listens=(("127.0.0.1", free_port()),))
    async with Supervisor([part], tmp_path) as supervisor:
        with pytest.raises(AlreadyRuns):
            async with Supervisor([part], tmp_path):
                pass
        assert supervisor.pid("service")
        assert (tmp_path / "run" / "state.json").exists()


async def test_keeps_one_older_log_when_it_grew(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "service.log").write_bytes(b"x" * (10 * 1024 * 1024 + 1))
    async with Supervisor([child(tmp_path, "service")], tmp_path):
        assert (logs / "service.log").stat().st_size == 0
        assert (logs / "service.log.1").stat().st_size > 10 * 1024 * 1024


ORPHANS = """
import asyncio, os, pathlib, signal, sys
from cli.supervisor import Supervisor
from tests.cli.test_supervisor import child, stubborn_part
async def main():
    folder = pathlib.Path(sys.argv[1])
    async with Supervisor([child(folder, "service"), stubborn_part(folder)], folder):
        os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""


async def test_nothing_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    program = [sys.executable, "-c", ORPHANS, str(tmp_path)]
    killed = await asyncio.create_subprocess_exec(*program, cwd=Path(__file__).parents[2])
    assert await killed.wait() == -signal.SIGKILL
    state = tmp_path / "run" / "state.json"
    left = json.loads(state.read_text())["parts"]
    service, stubborn = (left[name] for name in ("service", "stubborn"))
    if sys.platform == "linux":  # told by the kernel
        await eventually(lambda: not is_running(service["pid"], service["start_time"]))
        assert (tmp_path / "order").read_text().split() == ["service"]
    assert is_running(stubborn["pid"], stubborn["start_time"])
    sweep(state)
    assert not is_running(stubborn["pid"], stubborn["start_time"])
    assert not state.exists()


def test_sweeping_leaves_strangers_alone(tmp_path: Path) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    state = tmp_path / "state.json"
    state.write_text(json.dumps({"parts": {"service": {"pid": stranger.pid, "start_time": "1"}}}))
    sweep(state)
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_memory_counts_the_whole_family() -> None:
    assert memory_bytes(os.getpid()) > 10 * 2**20
