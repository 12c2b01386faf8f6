"""Sends files of events through the gateway, each record once.

Each record gets an `insertId` that follows from the content of the file up to it. So a record keeps it when it is sent
again, when the file grows, is renamed or compressed, and what comes twice within 7 days is counted once. Beside that a
state file remembers how far each file has been acknowledged, so that a second run goes on there, whenever that is. The
state is written after each acknowledgement: a crash in between sends a batch again, with the same ids.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import orjson

from cli.access_log import LineRefused
from cli.parts import write_private
from cli.records import FileRefused, Record, Records

BATCH_EVENTS = 1000
BATCH_BYTES = 1 << 20
# So many batches are under way at a time.
WINDOW = 4
PATIENCE_SECONDS = 300.0
_KEPT_MARKS = 1000
_KEPT_REFUSALS = 1000
_RETRIED = frozenset({429, 502, 503, 504})
_EVENT_OF_FIELD = re.compile(r"\bevents\[(\d+)\]")


class SendStopped(Exception):
    """The file was not sent to its end; the message says why. What was acknowledged is remembered."""


class Mark(NamedTuple):
    """A place in a file: after how many records, and the digest of all of them."""

    place: int
    digest: bytes


@dataclass(slots=True)
class Outcome:
    """What became of a file: records that were accepted now, refused now, and passed over because of an earlier run.

    `refusals` are (line, why) of the first 1,000 refused ones.
    """

    accepted: int = 0
    refused: int = 0
    earlier: int = 0
    refusals: list[tuple[int, str]] = field(default_factory=list)

    def refuse(self, line: int, why: str) -> None:
        """Counts a record that was refused."""
        self.refused += 1
        if len(self.refusals) < _KEPT_REFUSALS:
            self.refusals.append((line, why))


@dataclass(slots=True)
class _Batch:
    """Events as JSON with their lines; `marks` is where the file is when all of them are acknowledged."""

    events: list[bytes] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    refusals: list[tuple[int, str]] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    size: int = 0
    position: int = 0


def chain(records: Iterator[Record], name: str) -> Iterator[tuple[Record, Mark]]:
    """Each record with its mark. `name` makes others of the marks of the same content."""
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    for place, record in enumerate(records, 1):
        digest = hashlib.blake2b(digest + record.content, digest_size=16).digest()
        yield record, Mark(place, digest)


class State:
    """The marks up to which files were acknowledged, of all files that begin with the same record."""

    def __init__(self, folder: Path, first: Mark) -> None:
        self._file = folder / f"{first.digest.hex()}.json"
        self._others = self._read()
        self._own: list[Mark] = []

    @staticmethod
    @contextmanager
    def locked(folder: Path, first: Mark) -> Iterator[State]:
        """The state, for this process alone. Raises SendStopped when another has it."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (folder / f"{first.digest.hex()}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SendStopped(
                    "another process sends this file now, or one with the same beginning"
                ) from None
            yield State(folder, first)

    @property
    def marks(self) -> set[Mark]:
        """What was acknowledged earlier."""
        return set(self._others)

    def move(self, marks: list[Mark]) -> None:
        """Remembers how far the file is acknowledged now: replaces what this run has said so far."""
        self._own = marks
        kept = [[mark.place, mark.digest.hex()] for mark in [*self._others, *self._own][-_KEPT_MARKS:]]
        fresh = self._file.with_suffix(".part")
        write_private(fresh, json.dumps({"marks": kept}).encode())
        fresh.replace(self._file)

    def _read(self) -> list[Mark]:
        try:
            marks = json.loads(self._file.read_bytes())["marks"]
            return [Mark(int(place), bytes.fromhex(digest)) for place, digest in marks]
        except (OSError, ValueError, KeyError, TypeError):
            return []  # none yet, or one that a crash of the machine has emptied: the ids still hold


class Gateway:
    """Takes batches to `url`, and waits up to `patience` seconds for a gateway that is away or over its limits."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        url: str,
        write_key: str,
        *,
        patience: float = PATIENCE_SECONDS,
        waiting: Callable[[str], None] = lambda why: None,
    ) -> None:
        self._http = http
        self._url = url.rstrip("/") + "/v1/events:ingest"
        self._headers = {"X-Write-Key": write_key, "Content-Type": "application/json"}
        self._patience = patience
        self._waiting = waiting

    async def send(self, events: list[bytes]) -> dict[int, str]:
        """Sends events; gives the places of those that were refused, and why. Raises SendStopped."""
        if not events:
            return {}
        status, answer = await self._post(b'{"events":[' + b",".join(events) + b"]}")
        if status == 200:
            return {refused["index"]: refused["message"] for refused in answer["refused"]}
        if status not in {400, 413}:
            raise SendStopped(f"the gateway answers {status}: {_message(answer)}")
        # The gateway could not read the batch as a whole. Where it says which event is at fault, this one is left out.
        if found := _EVENT_OF_FIELD.search(json.dumps(answer)):
            at = int(found[1])
            if at < len(events):
                return await self._without(events, at, _message(answer))
        if len(events) == 1:
            return {0: _message(answer)}
        middle = len(events) // 2
        first, second = await self.send(events[:middle]), await self.send(events[middle:])
        return first | {middle + index: why for index, why in second.items()}

    async def _without(self, events: list[bytes], at: int, why: str) -> dict[int, str]:
        rest = events[:at] + events[at + 1 :]
        refused = await self.send(rest) if rest else {}
        return {index + (index >= at): text for index, text in refused.items()} | {at: why}

    async def _post(self, body: bytes) -> tuple[int, Any]:
        deadline = time.monotonic() + self._patience
        pause = 0.25
        while True:
            wait = pause = min(pause * 2, 10.0)
            try:
                # A redirect would take the key to another server.
                async with self._http.post(
                    self._url, data=body, headers=self._headers, allow_redirects=False
                ) as response:
                    content = await response.read()
                    if response.status not in _RETRIED:
                        return response.status, _json(content)
                    why = f"{response.status}: {_message(_json(content))}"
                    wait = max(_seconds(response.headers.get("Retry-After", "")), pause)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                why = str(error) or type(error).__name__
            if time.monotonic() + wait > deadline:
                raise SendStopped(f"the gateway takes nothing now: {why}")
            self._waiting(why)
            await asyncio.sleep(wait)


async def send_file(
    records: Callable[[], Records],
    gateway: Gateway,
    folder: Path,
    outcome: Outcome,
    *,
    name: str = "",
    progress: Callable[[int], None] = lambda position: None,
) -> None:
    """Sends what a file has beyond what was acknowledged earlier, and counts it in `outcome`; the state is in `folder`.

    `records` opens the file. `progress` is told how many bytes of it are done. Raises SendStopped and FileRefused.
    """
    first = _first(records, name)
    if first is None:
        return
    with State.locked(folder, first) as state:
        outcome.earlier = _acknowledged(records, name, state.marks)
        pending: deque[tuple[_Batch, asyncio.Task[dict[int, str]]]] = deque()

        async def settle() -> None:
            batch, task = pending[0]
            refused = await task
            pending.popleft()
            by_line = [(batch.lines[index], why) for index, why in refused.items()]
            for line, why in sorted(batch.refusals + by_line):
                outcome.refuse(line, why)
            outcome.accepted += len(batch.events) - len(refused)
            if not outcome.accepted and not outcome.earlier:
                _stop_when_nothing_fits(outcome)
                return  # nothing is remembered: the file may have been read in the wrong way
            state.move(batch.marks)
            progress(batch.position)

        try:
            with records() as file:
                for batch in _batches(file, name, outcome.earlier):
                    pending.append((batch, asyncio.create_task(gateway.send(batch.events))))
                    if len(pending) >= WINDOW:
                        await settle()
            while pending:
                await settle()
        except FileRefused:
            while pending:
                await settle()
            raise
        finally:
            for _, task in pending:
                task.cancel()
            await asyncio.gather(*(task for _, task in pending), return_exceptions=True)


def _first(records: Callable[[], Records], name: str) -> Mark | None:
    with records() as file:
        return next((mark for _, mark in chain(iter(file), name)), None)


def _acknowledged(records: Callable[[], Records], name: str, marks: set[Mark]) -> int:
    """How many records of the file were acknowledged earlier: up to the last of its marks."""
    last = max((mark.place for mark in marks), default=0)
    if not last:
        return 0
    count = 0
    with records() as file:
        for _, mark in chain(iter(file), name):
            if mark in marks:
                count = mark.place
            if mark.place >= last:
                break
    return count


def _batches(file: Records, name: str, earlier: int) -> Iterator[_Batch]:
    """What is new in a file; where it is damaged, what comes before that, then FileRefused."""
    batch, whole = _Batch(), None
    try:
        for record, mark in chain(iter(file), name):
            if record.whole:
                whole = mark
            if mark.place <= earlier:
                continue
            _add(batch, file, record, mark)
            # A line without an end may grow: then it is another one, and the file goes on before it.
            batch.marks = [mark] if record.whole or whole is None else [whole, mark]
            batch.position = file.position()
            if len(batch.events) + len(batch.refusals) >= BATCH_EVENTS or batch.size >= BATCH_BYTES:
                yield batch
                batch = _Batch()
    except FileRefused:
        if batch.marks:
            yield batch
        raise
    if batch.marks:
        yield batch


def _add(batch: _Batch, file: Records, record: Record, mark: Mark) -> None:
    try:
        event = file.event(record, mark.digest.hex())
        encoded = orjson.dumps(event) if event is not None else b""
    except LineRefused as error:
        batch.refusals.append((record.line, str(error)))
    except orjson.JSONEncodeError as error:
        batch.refusals.append((record.line, f"it cannot be sent as JSON: {error}"))
    else:
        if encoded:
            batch.events.append(encoded)
            batch.lines.append(record.line)
            batch.size += len(encoded)


def _stop_when_nothing_fits(outcome: Outcome) -> None:
    if outcome.refused >= BATCH_EVENTS:
        line, why = outcome.refusals[0]
        raise SendStopped(f"none of the first {outcome.refused:,} records is an event. Line {line}: {why}")


def _json(content: bytes) -> Any:
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:
        return content.decode(errors="replace")[:200]


def _message(answer: Any) -> str:
    return str(answer.get("message", answer)) if isinstance(answer, dict) else str(answer)


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
