"""Work that is done once for all who ask for it at the same time: one statement, one commit."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from contextvars import Context
from typing import Generic, TypeVar

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")

_AT_MOST = 100
_GATHER_SECONDS = 0.003


class Together(Generic[Asked, Answer]):
    """Gathers what is asked while earlier work is under way, and has it all done by the next.

    Who comes alone is served at once. In company one waits for more of it, so that the more ask, the less each costs:
    until as many have come as there were when the last work ended, with those whom it has served, and at most 3 ms (as
    PostgreSQL's commit_delay does). `work` gives an answer to each of at most 100 questions, in their order, within
    `seconds`; what it raises, all of them get.
    """

    def __init__(
        self, work: Callable[[Sequence[Asked]], Awaitable[Sequence[Answer]]], *, seconds: float
    ) -> None:
        self._work = work
        self._seconds = seconds
        self._waiting: list[tuple[Asked, asyncio.Future[Answer]]] = []
        self._enough = 1
        self._are_enough = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    async def ask(self, asked: Asked) -> Answer:
        """The answer to this; it is worked out to the end, also when the caller goes away."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((asked, answer))
        if len(self._waiting) >= self._enough:
            self._are_enough.set()
        if self._running is None or self._running.done():
            # In an empty context: it works for several calls, and has none's deadline.
            self._running = asyncio.create_task(self._run(), context=Context())
        return await answer

    async def _run(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:_AT_MOST], self._waiting[_AT_MOST:]
            try:
                async with asyncio.timeout(self._seconds):
                    answers = await self._work([asked for asked, _ in batch])
            except Exception as error:
                for _, answer in batch:
                    if not answer.done():  # else the caller went away
                        answer.set_exception(error)
            else:
                for (_, answer), found in zip(batch, answers, strict=True):
                    if not answer.done():
                        answer.set_result(found)
            if self._waiting:
                await self._gather(min(_AT_MOST, len(batch) + len(self._waiting)))

    async def _gather(self, enough: int) -> None:
        self._enough = enough
        self._are_enough.clear()
        if len(self._waiting) < enough:
            with suppress(TimeoutError):
                async with asyncio.timeout(_GATHER_SECONDS):
                    await self._are_enough.wait()
