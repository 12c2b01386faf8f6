"""Batches of events to send: the example's access log, over and over, each event with an `insert_id` of its own."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from google.protobuf import json_format
from meshboard.analytics.v1.event_log_pb2 import LoggedBatch
from meshboard.analytics.v1.ingest_service_pb2 import Event, IngestRequest

from cli.access_log import LineRefused, event_of
from cli.demo import LOG, read_log
from services.analytics_svc.user_agents import parse_user_agent


def json_batches(events: int, size: int, run: str) -> list[bytes]:
    """Bodies of `POST /v1/events:ingest` with `size` events each, `events` in all. `run` keeps insert ids apart."""
    numbered = ({**event, "insertId": f"{run}-{number}"} for number, event in _repeated(_lines()))
    return [
        json.dumps({"events": list(itertools.islice(numbered, size))}).encode() for _ in range(events // size)
    ]


def grpc_batches(events: int, size: int, run: str) -> list[bytes]:
    """The same events as serialized IngestRequests."""
    numbered = _repeated(_messages())
    bodies = []
    for _ in range(events // size):
        request = IngestRequest()
        for number, event in itertools.islice(numbered, size):
            request.events.append(event)
            request.events[-1].insert_id = f"{run}-{number}"
        bodies.append(request.SerializeToString())
    return bodies


def logged_batches(events: int, size: int, run: str, workspace_id: str, source_id: str) -> list[bytes]:
    """The same events as the pipeline hands them to the store: serialized LoggedBatches, user agents parsed."""
    bodies = []
    for sequence, body in enumerate(grpc_batches(events, size, run), 1):
        batch = LoggedBatch.FromString(body)
        batch.workspace_id, batch.source_id, batch.sequence = workspace_id, source_id, sequence
        batch.receive_time.GetCurrentTime()
        for event in batch.events:
            browser, system, device, is_robot = parse_user_agent(event.user_agent)
            event.browser, event.os, event.device, event.is_robot = browser, system, device, is_robot
        bodies.append(batch.SerializeToString())
    return bodies


def _repeated(events: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    return enumerate(itertools.cycle(events))


@lru_cache
def _messages() -> list[Event]:
    return [json_format.ParseDict(event, Event()) for event in _lines()]


@lru_cache
def _lines() -> list[dict[str, Any]]:
    events = []
    for _, line in read_log(LOG):
        try:
            events.append(event_of(line, ""))
        except LineRefused:  # the one line of the log that is cut off
            continue
    return events
