"""Questions that live dashboards ask again and again: each once, however many of them show its answer.

A `Line` asks when one of its sources ticks, when its sliding range has moved, or when it failed. Those that ask at the
same time are asked in one call.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import Context
from typing import Any

import structlog
from meshboard.dashboard.v1.dashboard_pb2 import WidgetData

from services.dashboard_svc import cursors
from services.dashboard_svc.answers import QUERY_SECONDS, Answer, Answers, is_transient
from services.dashboard_svc.questions import Question

log = structlog.get_logger(__name__)

# Between two starts of a query.
LEAST_SECONDS = 0.25
# A passing failure is shown in place of data when it has come this often in a row.
PATIENCE = 3
LONGEST_RETRY_SECONDS = 30.0
# A sliding range is drawn with about this many points: it moves when it has moved by one.
POINTS = 300
# Questions in one call, as the contract has it.
_AT_ONCE = 200

# Told that the answer is another one, or what the line has failed of.
Told = Callable[[BaseException | None], None]
_Batch = dict[bytes, tuple[Question, asyncio.Future[Answer]]]


def slide_seconds(question: Question) -> float | None:
    """How often the answer changes because time goes by; None when it does not."""
    return max(1.0, question.last_seconds / POINTS) if question.last_seconds else None


class Line:
    """The answer to one question of a workspace, asked again when it is stale."""

    def __init__(self, workspace_id: str, question: Question) -> None:
        self.workspace_id = workspace_id
        self.question = question
        self.stale = asyncio.Event()
        self.answer: Answer | None = None
        self.digest = b""
        self.told: set[Told] = set()
        self.task: asyncio.Task[None] | None = None

    async def follow(self, ask: Callable[[Line], asyncio.Future[Answer]]) -> None:
        """Keeps the answer current until cancelled: at once, but LEAST_SECONDS after the last time."""
        failures = 0
        while True:
            self.stale.clear()
            start = time.monotonic()
            answer = await ask(self)
            failures = failures + 1 if _fails(answer) else 0
            if self._take(answer, failures):
                for told in tuple(self.told):
                    told(None)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._pause(failures)):
                    await self.stale.wait()
            await asyncio.sleep(max(0.0, start + LEAST_SECONDS - time.monotonic()))

    def _take(self, answer: Answer, failures: int) -> bool:
        """Says whether watchers see a difference."""
        if self.answer is not None:
            if 0 < failures < PATIENCE:
                return False
            if answer.version and answer.version == self.answer.version:
                return False
        digest = cursors.digest(WidgetData.FromString(answer.data))
        different = digest != self.digest
        self.answer, self.digest = answer, digest
        return different

    def _pause(self, failures: int) -> float | None:
        if failures:
            return min(2.0 ** (failures - 1), LONGEST_RETRY_SECONDS)
        seconds = slide_seconds(self.question)
        # Ranges of one length move at the same instants, so that they are asked for in one call.
        return None if seconds is None else seconds - time.monotonic() % seconds


class Lines:
    """The lines of this process."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._lines: dict[tuple[str, bytes], Line] = {}
        self._sources: dict[str, set[Line]] = {}
        self._batches: dict[str, _Batch] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def join(self, workspace_id: str, question: Question, told: Told) -> Line:
        """The line of a question; `told` hears of it until it leaves."""
        key = (workspace_id, question.key)
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = Line(workspace_id, question)
            for source_id in question.source_ids:
                self._sources.setdefault(source_id, set()).add(line)
            line.task = self._start(line.follow(self._ask))
            line.task.add_done_callback(lambda task: self._done(line, task))
        line.told.add(told)
        return line

    def leave(self, line: Line, told: Told) -> None:
        """The opposite; a line that tells nobody ends."""
        line.told.discard(told)
        if not line.told:
            self._forget(line)
            if line.task is not None:
                line.task.cancel()

    def ticked(self, source_id: str) -> None:
        """Has those asked again that the source's events can change."""
        for line in self._sources.get(source_id, ()):
            line.stale.set()

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def followed_sources(self) -> set[str]:
        """The sources whose ticks matter to someone."""
        return set(self._sources)

    def _forget(self, line: Line) -> None:
        key = (line.workspace_id, line.question.key)
        if self._lines.get(key) is not line:
            return
        del self._lines[key]
        for source_id in line.question.source_ids:
            lines = self._sources[source_id]
            lines.discard(line)
            if not lines:
                del self._sources[source_id]

    def _done(self, line: Line, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (failure := task.exception()):
            log.error("line_failed", workspace_id=line.workspace_id, exc_info=failure)
            self._forget(line)
            for told in tuple(line.told):
                told(failure)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        # In an empty context: the work belongs to no call, has no caller's token and no call's deadline.
        task = asyncio.create_task(work, context=Context())
        self._tasks.add(task)  # nothing else holds a task until it has ended
        task.add_done_callback(self._tasks.discard)
        return task

    # In one call

    def _ask(self, line: Line) -> asyncio.Future[Answer]:
        batch = self._batches.get(line.workspace_id)
        if batch is None or len(batch) >= _AT_ONCE:
            batch = self._batches[line.workspace_id] = {}
            self._start(self._run(line.workspace_id, batch))
        answer = asyncio.get_running_loop().create_future()
        batch[line.question.key] = (line.question, answer)
        return answer

    async def _run(self, workspace_id: str, batch: _Batch) -> None:
        await asyncio.sleep(0)  # for those that hear of the same tick
        if self._batches.get(workspace_id) is batch:
            del self._batches[workspace_id]

        def arrived(key: bytes, answer: Answer) -> None:
            future = batch[key][1]
            if not future.done():
                future.set_result(answer)

        questions = [question for question, _ in batch.values()]
        try:
            answers = await self._answers.ask(workspace_id, questions, QUERY_SECONDS, arrived)
        except Exception as failure:
            for _, future in batch.values():
                if not future.done():
                    future.set_exception(failure)
            return
        for key, answer in answers.items():
            arrived(key, answer)


def _fails(answer: Answer) -> bool:
    return not answer.version and is_transient(WidgetData.FromString(answer.data))
