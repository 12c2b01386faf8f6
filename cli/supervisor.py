"""Starts the parts of a mesh, keeps them running, and stops them in reverse order."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from cli.parts import Part, launch, private_directory, surroundings

LOG_BYTES = 10 * 1024 * 1024
READY_SECONDS = 60.0
STOP_SECONDS = 3.0  # for each of the three layers: gateway, services, servers
FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 30.0
HEALTHY_SECONDS = 30.0  # a part that lived this long starts again at the first backoff


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

    Entering returns when every part is ready and raises StartFailed, with everything stopped again, when one is
    not within `ready_seconds`. Output goes to `data_dir`/logs/NAME.log. `say` gets one line for each thing
    worth telling. `changed` is called after each start or end of a process.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        data_dir: Path,
        *,
        say: Callable[[str], None] = lambda line: None,
        changed: Callable[[], None] = lambda: None,
        ready_seconds: float = READY_SECONDS,
    ) -> None:
        self.children = {part.name: Child(part) for part in parts}
        self.logs = data_dir / "logs"
        self.pids_file = data_dir / "run" / "pids.json"
        self._say = say
        self._changed = changed
        self._ready_seconds = ready_seconds
        self._ready = {part.name: asyncio.Event() for part in parts}
        self._gone = {part.name: asyncio.Event() for part in parts}
        self._news = asyncio.Condition()  # notified when a part has become ready
        self._keepers: dict[str, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Supervisor:
        private_directory(self.logs)
        private_directory(self.pids_file.parent, mode=0o711)
        sweep(self.pids_file)
        try:
            await self._start_all()
        except BaseException:
            await self.stop_all()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop_all()

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

    async def stop(self, name: str) -> None:
        """Stops one part and leaves it stopped until `start`."""
        keeper = self._keepers.pop(name, None)
        if keeper is not None:
            keeper.cancel()
            with suppress(asyncio.CancelledError):
                await keeper
        await self._end(self.children[name])
        self._ready[name].clear()
        self._gone[name].set()
        self._note()

    async def start(self, name: str) -> None:
        """Starts a part that `stop` stopped, and waits until it is ready."""
        await self._start(self.children[name])

    async def stop_all(self) -> None:
        """Stops each part once those that need it have stopped; kills what takes too long."""

        async def stop(name: str) -> None:
            needing = [child.part.name for child in self.children.values() if name in child.part.after]
            await asyncio.gather(*(self._gone[other].wait() for other in needing))
            await self.stop(name)

        await asyncio.gather(*(stop(name) for name in reversed(self.children)))
        self.pids_file.unlink(missing_ok=True)

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
            _kill_group(child.process.pid)  # workers that outlived it would hold its port
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

    async def _end(self, child: Child) -> None:
        process = child.process
        if process is None:
            return
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.send_signal(child.part.stop_signal)
            try:
                async with asyncio.timeout(STOP_SECONDS):
                    await process.wait()
            except TimeoutError:
                self._say(f"✗ {child.part.name} did not stop in {STOP_SECONDS:.0f} s and was killed")
        _kill_group(process.pid)
        await process.wait()

    def _note(self) -> None:
        """Writes which processes are ours, for `sweep` after a crash of this one."""
        running = [child for child in self.children.values() if child.running and child.process]
        content = {
            c.part.name: {"pid": c.process.pid, "start_time": c.start_time} for c in running if c.process
        }
        fresh = self.pids_file.with_suffix(".new")
        fresh.write_text(json.dumps(content))
        fresh.replace(self.pids_file)
        self._changed()


def sweep(pids_file: Path) -> None:
    """Ends the processes that an earlier supervisor, killed itself, left in `pids_file`, and no others."""
    if not pids_file.exists():
        return
    left = [(entry["pid"], entry["start_time"]) for entry in json.loads(pids_file.read_text()).values()]
    deadline = time.monotonic() + STOP_SECONDS
    while any(is_running(*one) for one in left) and time.monotonic() < deadline:
        time.sleep(0.05)  # on Linux they were told to stop when their supervisor ended
    for pid, began in left:
        if is_running(pid, began):
            _kill_group(pid)
    while any(is_running(*one) for one in left):
        time.sleep(0.02)
    pids_file.unlink()


def start_time(pid: int) -> str:
    """Returns when the process started, in the system's own notation; "" when there is none with this id.

    Together with the id it names a process for good: ids are used again.
    """
    stat = Path(f"/proc/{pid}/stat")
    if sys.platform == "linux":
        try:
            # proc(5): the name of the program, which may hold anything, ends at the last parenthesis.
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return ""
        return "" if fields[0] == "Z" else fields[19]
    shown = subprocess.run(
        ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return shown.stdout.strip()


def is_running(pid: int, began: str) -> bool:
    """Says whether the process `pid` is still the one that started at `began` (see start_time)."""
    return began != "" and start_time(pid) == began


def _kill_group(pid: int) -> None:
    """Kills what is left of the process group of a child, which start_new_session made."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _ending(code: int | None) -> str:
    if code is None:
        return "no exit code"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
