"""What widgets show: the answers of analytics_svc to their questions, asked by the right of the dashboard.

An answer is kept with its version: asked again, analytics_svc says that it is still the present one, and sends nothing.
Answers are held as they are sent, so that what has not changed is neither read nor written again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import grpc
from meshboard.analytics.v1.internal_query_service_pb2 import (
    RecallWidgetAnswersRequest,
    RunWidgetQueriesRequest,
    WidgetAnswer,
    WidgetQuestion,
)
from meshboard.analytics.v1.internal_query_service_pb2_grpc import InternalQueryServiceStub
from meshboard.dashboard.v1.dashboard_pb2 import WidgetData
from meshboard.dashboard.v1.dashboard_service_pb2 import GetDashboardDataResponse

from services.chassis import errors
from services.chassis.clients import Peer
from services.chassis.deadline import seconds_left
from services.chassis.kept import Kept
from services.dashboard_svc.questions import Question, Tile

QUERY_SECONDS = 10.0
# Told of an answer, by its question's key.
Arrived = Callable[[bytes, "Answer"], None]
_TRANSIENT = {grpc.StatusCode.UNAVAILABLE.value[0], grpc.StatusCode.DEADLINE_EXCEEDED.value[0]}
# The key of GetDashboardDataResponse.widgets: its number, and that a length follows.
_WIDGETS = bytes([GetDashboardDataResponse.WIDGETS_FIELD_NUMBER << 3 | 2])
_NONE = WidgetData(none=WidgetData.NoData()).SerializeToString()


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a question: a serialized WidgetData without a widget's id. `version` is empty for an error."""

    data: bytes
    version: bytes = b""


def is_transient(answer: WidgetData) -> bool:
    """Whether there is no answer for a reason that passes by itself."""
    return answer.HasField("error") and answer.error.code in _TRANSIENT


class Answers:
    """Asks analytics_svc. What fails becomes the `error` of the widget in question."""

    def __init__(self, analytics: Peer, *, per_workspace: int = 64, cached_bytes: int = 64 << 20) -> None:
        """`per_workspace` bounds the calls for one workspace that are under way, `cached_bytes` what is kept."""
        self._queries = analytics.stub(InternalQueryServiceStub)
        self._per_workspace = per_workspace
        self._rooms: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._cached: Kept[tuple[str, bytes], Answer] = Kept(cached_bytes)

    async def data_of(self, workspace_id: str, tiles: Sequence[Tile]) -> list[WidgetData]:
        """The data of each widget, in their order; equal questions are asked once."""
        return [WidgetData.FromString(piece) for piece in await self._pieces(workspace_id, tiles)]

    async def serialized(self, workspace_id: str, tiles: Sequence[Tile]) -> bytes:
        """The same, as a serialized GetDashboardDataResponse."""
        pieces = await self._pieces(workspace_id, tiles)
        return b"".join(_WIDGETS + _length_of(piece) + piece for piece in pieces)

    async def _pieces(self, workspace_id: str, tiles: Sequence[Tile]) -> list[bytes]:
        answers = await self.ask(workspace_id, [question for tile in tiles for question in tile.questions])
        return [data_of_tile(tile, answers) for tile in tiles]

    async def ask(
        self,
        workspace_id: str,
        questions: Iterable[Question],
        seconds: float = QUERY_SECONDS,
        arrived: Arrived | None = None,
    ) -> dict[bytes, Answer]:
        """The answers by the keys of the questions, in one call; in two when of answers that are known one has changed.

        Returns after `seconds`, or shortly before the call's deadline, with errors in place of what is not there yet.
        `arrived` is told of each that analytics_svc gives, as soon as it is there.
        """
        seconds = min(seconds, 0.9 * seconds_left())
        keys = list(dict.fromkeys(question.key for question in questions))
        answers: dict[bytes, Answer] = {}
        failure = errors.unavailable("analytics has left a question out.")
        try:
            if keys:
                async with asyncio.timeout(seconds), self._room(workspace_id):
                    await self._run(workspace_id, keys, seconds, answers, arrived)
        except TimeoutError:
            failure = errors.deadline_exceeded("The query did not finish in time.")
        except errors.Error as error:
            failure = error
        if len(answers) < len(keys):
            missing = _failed(failure)
            answers = {key: answers.get(key, missing) for key in keys}
        return answers

    async def _run(
        self,
        workspace_id: str,
        keys: Sequence[bytes],
        seconds: float,
        answers: dict[bytes, Answer],
        arrived: Arrived | None,
    ) -> None:
        known = {key: kept for key in keys if (kept := self._cached.get((workspace_id, key)))}

        def take(asked: Sequence[bytes], found: Iterable[WidgetAnswer]) -> None:
            for answer in found:
                key = asked[answer.index]
                before = known.get(key)
                if answer.unchanged and before is not None:
                    answers[key] = before
                else:
                    data = _read(answer)
                    answers[key] = Answer(data.SerializeToString(), answer.version)
                    if answer.version:
                        # As whoever asks next is given it.
                        getattr(data, str(data.WhichOneof("outcome"))).cached = True
                        kept = Answer(data.SerializeToString(), answer.version)
                        self._cached.keep((workspace_id, key), kept, len(key) + len(kept.data) + 500)
                if arrived is not None:
                    arrived(key, answers[key])

        # The call has more time than its caller waits, so that what is late is told apart from what is away.
        timeout = seconds + 1
        if arrived is None and len(known) == len(keys):
            recall = RecallWidgetAnswersRequest(workspace_id=workspace_id, questions=_asked(keys, known))
            take(keys, (await self._queries.RecallWidgetAnswers(recall, timeout=timeout)).answers)
        if missing := [key for key in keys if key not in answers]:
            run = RunWidgetQueriesRequest(workspace_id=workspace_id, questions=_asked(missing, known))
            async for response in self._queries.RunWidgetQueries(run, timeout=timeout):
                take(missing, response.answers)

    def _room(self, workspace_id: str) -> asyncio.Semaphore:
        room = self._rooms.get(workspace_id)
        if room is None:
            room = self._rooms[workspace_id] = asyncio.Semaphore(self._per_workspace)
        return room


def data_of_tile(tile: Tile, answers: Mapping[bytes, Answer]) -> bytes:
    """The data of a widget, serialized: each field once, as the gateway reads it. A sparkline may be missing."""
    if tile.problem is not None:
        return WidgetData(widget_id=tile.widget_id, error=tile.problem).SerializeToString()
    data = WidgetData(widget_id=tile.widget_id).SerializeToString()
    if tile.html:
        data += WidgetData(none=WidgetData.NoData(html=tile.html)).SerializeToString()
    else:
        data += _NONE if tile.question is None else answers[tile.question.key].data
    if tile.sparkline is not None:
        line = WidgetData.FromString(answers[tile.sparkline.key].data)
        if line.HasField("result"):
            data += WidgetData(sparkline=line.result).SerializeToString()
    return data


def _asked(keys: Sequence[bytes], known: Mapping[bytes, Answer]) -> list[WidgetQuestion]:
    questions = [WidgetQuestion.FromString(key) for key in keys]
    for key, question in zip(keys, questions, strict=True):
        if key in known:
            question.known_version = known[key].version
    return questions


def _read(answer: WidgetAnswer) -> WidgetData:
    match answer.WhichOneof("answer"):
        case "result":
            return WidgetData(result=answer.result)
        case "funnel":
            return WidgetData(funnel=answer.funnel)
        case "retention":
            return WidgetData(retention=answer.retention)
        case _:
            return WidgetData(error=errors.from_peer(answer.error, "analytics").status())


def _failed(error: errors.Error) -> Answer:
    return Answer(WidgetData(error=error.status()).SerializeToString())


def _length_of(piece: bytes) -> bytes:
    """A length as protobuf has it: seven bits a byte, the last without the eighth."""
    length, written = len(piece), bytearray()
    while length > 0x7F:
        written.append(length & 0x7F | 0x80)
        length >>= 7
    written.append(length)
    return bytes(written)
