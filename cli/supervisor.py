"""Starts the parts of a mesh, keeps them running, and stops them in reverse order."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from cli.parts import Part, launch, private_directory, surroundings
from cli.processes import is_running, kill_group, start_time

LOG_BYTES = 10 * 1024 * 1024
READY_SECONDS = 60.0
SWEEP_SECONDS = 3.0
FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 30.0
HEALTHY_SECONDS = 30.0  # a part that lived this long starts again at the first backoff


class AlreadyRuns(Exception):
    """Another supervisor runs on the same data."""


class PortInUse(Exception):
    """A part cannot listen on its port."""

    def __init__(self, name: str, port: int) -> None:
        super().__init__(f"Port {port}, which {name} would listen on, is in use.")


class StartFailed(Exception):
    """A part did not become ready. The message ends with the last lines of its log."""


@dataclass
class Child:
    """What is known about the process of one part."""

    part: Part
    process: asyncio.subprocess.Process | None = None
    start_time: str = ""
    restarts: int = 0
    ready_seconds: float = 0.0

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.returncode is None


class Supervisor:
    """Runs `parts` as children of this process: `async with Supervisor(parts, data_dir) as mesh`.

    Entering returns when every part is ready. It raises AlreadyRuns when another supervisor uses `data_dir`,
    PortInUse when a part could not listen, and StartFailed, with everything stopped again, when a part is not
    ready within `ready_seconds`. Output goes to `data_dir`/logs/NAME.log. `say` gets one line for each thing
    worth telling. `data_dir`/run/state.json holds `about` and the processes while there are any.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        data_dir: Path,
        *,
        say: Callable[[str], None] = lambda line: None,
        about: Mapping[str, object] | None = None,
        ready_seconds: float = READY_SECONDS,
    ) -> None:
        self.children = {part.name: Child(part) for part in parts}
        self.logs = data_dir / "logs"
        self.state_file = data_dir / "run" / "state.json"
        self._say = say
        self._about = about or {}
        self._all_ready = False
        self._lock = -1
        self._ready_seconds = ready_seconds
        self._ready = {part.name: asyncio.Event() for part in parts}
        self._gone = {part.name: asyncio.Event() for part in parts}
        self._news = asyncio.Condition()  # notified when a part has become ready
        self._keepers: dict[str, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Supervisor:
        private_directory(self.logs)
        private_directory(self.state_file.parent, mode=0o711)
        self._lock = os.open(self.state_file.with_name("lock"), os.O_RDWR | os.O_CREAT, 0o600)
        self._take_lock()
        try:
            sweep(self.state_file)
            self._check_ports()
            await self._start_all()
        except BaseException:
            await self.stop_all()
            raise
        self._all_ready = True
        self._note()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop_all()

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise AlreadyRuns(f"A mesh already runs on {self.state_file.parents[1]}.") from None

    def _check_ports(self) -> None:
        parts = [child.part for child in self.children.values()]
        wanted = [(port, host, part.name) for part in parts for host, port in part.listens]
        for port, host, name in sorted(wanted):  # the gateway's port, which the caller chose, comes first
            if not is_free(host, port):
                raise PortInUse(name, port)

    def pid(self, name: str) -> int:
        """Returns the process id of the part; raises LookupError while it does not run."""
        child = self.children[name]
        if child.process is None or not child.running:
            raise LookupError(f"{name} does not run")
        return child.process.pid

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to the part, as a crash or an operator would; the supervisor then restarts it."""
        os.kill(self.pid(name), number)

    async def until_ready(self, name: str, *, restarts: int = 0) -> None:
        """Waits until the part was restarted `restarts` times or more and is ready; raises TimeoutError."""
        child = self.children[name]
        async with asyncio.timeout(self._ready_seconds), self._news:
            await self._news.wait_for(lambda: child.restarts >= restarts and self._ready[name].is_set())

    async def stop(self, name: str, *, began: float | None = None) -> None:
        """Stops one part and leaves it stopped until `start`. `began` is when the whole mesh began to stop."""
        keeper = self._keepers.pop(name, None)
        if keeper is not None:
            keeper.cancel()
            with suppress(asyncio.CancelledError):
                await keeper
        await self._end(self.children[name], began)
        self._ready[name].clear()
        self._gone[name].set()
        self._note()

    async def start(self, name: str) -> None:
        """Starts a part that `stop` stopped, and waits until it is ready."""
        await self._start(self.children[name])

    async def stop_all(self) -> None:
        """Stops each part once those that need it have stopped; kills what takes too long."""
        began = time.monotonic()

        async def stop(name: str) -> None:
            needing = [child.part.name for child in self.children.values() if name in child.part.after]
            await asyncio.gather(*(self._gone[other].wait() for other in needing))
            await self.stop(name, began=began)

        await asyncio.gather(*(stop(name) for name in reversed(self.children)))
        self.state_file.unlink(missing_ok=True)
        os.close(self._lock)

    # --- starting -----------------------------------------------------------------------------------------

    async def _start_all(self) -> None:
        starts = {name: asyncio.create_task(self._start(child)) for name, child in self.children.items()}
        try:
            for name, start in starts.items():
                # Told in the order of the parts; the first failure ends it, whichever part it is in.
                while not start.done():
                    await asyncio.wait(starts.values(), return_when=asyncio.FIRST_EXCEPTION, timeout=0.05)
                    if failed := [task for task in starts.values() if task.done() and task.exception()]:
                        await failed[0]
                await start
                self._say(f"✓ {name} ({self.children[name].ready_seconds:.1f} s)")
        finally:
            for start in starts.values():
                start.cancel()
            await asyncio.gather(*starts.values(), return_exceptions=True)

    async def _start(self, child: Child) -> None:
        part = child.part
        await asyncio.gather(*(self._ready[name].wait() for name in part.after))
        began = time.monotonic()
        if part.prepare is not None:
            await part.prepare()
        await self._spawn(child)
        await self._until_serving(child)
        if part.prime is not None:
            await part.prime()
        child.ready_seconds = time.monotonic() - began
        await self._tell_ready(child)
        self._keepers[part.name] = asyncio.create_task(self._keep(child))

    async def _spawn(self, child: Child) -> None:
        part = child.part
        log = self.logs / f"{part.name}.log"
        if log.exists() and log.stat().st_size > LOG_BYTES:
            log.replace(log.with_suffix(".log.1"))
        with log.open("ab") as output:
            child.process = await asyncio.create_subprocess_exec(
                *launch(part.argv, part.stop_signal, part.account),
                cwd=part.cwd,
                env={**surroundings(), **part.env},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C reaches the supervisor only, which keeps the order
            )
        child.start_time = start_time(child.process.pid)
        self._gone[part.name].clear()
        self._note()

    async def _until_serving(self, child: Child) -> None:
        deadline = time.monotonic() + self._ready_seconds
        while not await child.part.ready():
            if child.process is None or child.process.returncode is not None:
                code = None if child.process is None else child.process.returncode
                raise StartFailed(
                    f"{child.part.name} ended with {_ending(code)} before it was ready.{self._tail(child)}"
                )
            if time.monotonic() > deadline:
                waited = f"{self._ready_seconds:.0f} s"
                raise StartFailed(f"{child.part.name} was not ready after {waited}.{self._tail(child)}")
            await asyncio.sleep(0.05)

    async def _tell_ready(self, child: Child) -> None:
        async with self._news:
            self._ready[child.part.name].set()
            self._news.notify_all()

    def _tail(self, child: Child) -> str:
        log = self.logs / f"{child.part.name}.log"
        lines = log.read_text(errors="replace").splitlines()[-12:]
        return "".join(f"\n  {line}" for line in [f"The end of {log}:", *lines])

    # --- keeping ------------------------------------------------------------------------------------------

    async def _keep(self, child: Child) -> None:
        """Restarts the part whenever its process ends."""
        backoff = FIRST_BACKOFF_SECONDS
        name = child.part.name
        began = time.monotonic()
        while child.process is not None:
            await child.process.wait()
            self._ready[name].clear()
            kill_group(child.process.pid)  # workers that outlived it would hold its port
            if time.monotonic() - began > HEALTHY_SECONDS:
                backoff = FIRST_BACKOFF_SECONDS
            self._say(
                f"✗ {name} ended with {_ending(child.process.returncode)}; restarting it in {backoff:.1f} s"
            )
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, LONGEST_BACKOFF_SECONDS)
            began = time.monotonic()
            child.restarts += 1
            await self._spawn(child)
            try:
                await self._until_serving(child)
            except StartFailed as failure:
                self._say(f"✗ {failure}")
                await self._end(child)
            else:
                await self._tell_ready(child)
                self._say(f"✓ {name} runs again ({time.monotonic() - began:.1f} s)")

    # --- stopping -----------------------------------------------------------------------------------------

    async def _end(self, child: Child, began: float | None = None) -> None:
        process = child.process
        if process is None:
            return
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.send_signal(child.part.stop_signal)
            try:
                spent = 0.0 if began is None else time.monotonic() - began
                async with asyncio.timeout(max(0.5, child.part.stop_seconds - spent)):
                    await process.wait()
            except TimeoutError:
                self._say(f"✗ {child.part.name} did not stop in time and was killed")
        kill_group(process.pid)
        await process.wait()

    def _note(self) -> None:
        """Writes state.json, which `down`, `status` and the next start read."""
        processes = {
            child.part.name: {
                "pid": child.process.pid if child.process and child.running else None,
                "start_time": child.start_time,
                "restarts": child.restarts,
                "ready_seconds": round(child.ready_seconds, 3),
            }
            for child in self.children.values()
        }
        supervisor = {"pid": os.getpid(), "start_time": start_time(os.getpid())}
        state = {**self._about, "ready": self._all_ready, "supervisor": supervisor, "parts": processes}
        fresh = self.state_file.with_suffix(".new")
        fresh.write_text(json.dumps(state, indent=2))
        fresh.replace(self.state_file)


def sweep(state_file: Path) -> None:
    """Ends the processes that an earlier supervisor, killed itself, left in `state_file`, and no others."""
    if not state_file.exists():
        return
    entries = json.loads(state_file.read_text())["parts"].values()
    left = [(entry["pid"], entry["start_time"]) for entry in entries if entry["pid"]]
    deadline = time.monotonic() + SWEEP_SECONDS
    while any(is_running(*one) for one in left) and time.monotonic() < deadline:
        time.sleep(0.05)  # on Linux they were told to stop when their supervisor ended
    for pid, began in left:
        if is_running(pid, began):
            kill_group(pid)
    while any(is_running(*one) for one in left):
        time.sleep(0.02)
    state_file.unlink()


def is_free(host: str, port: int) -> bool:
    """Says whether a server could listen on this TCP port now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as servers do: old connections may linger
        try:
            listener.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise
    return True


def _ending(code: int | None) -> str:
    if code is None:
        return "no exit code"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
