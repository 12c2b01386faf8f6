"""Logs, metrics and traces.

Logs are JSON lines on standard output; the field `log` names the stream: `application`, `access`, `error` or `audit`.
Traces are off unless an OTLP address is set; with it, spans of every hop share the trace of the `traceparent` header
(W3C Trace Context).
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import orjson
import structlog
from opentelemetry import context, trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from sqlalchemy import Engine
    from sqlalchemy.engine import ExceptionContext

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
CALLS = Counter("meshboard_rpc_calls_total", "Calls by method and gRPC code.", ["method", "code"])
SECONDS = Histogram("meshboard_rpc_seconds", "Seconds from receipt to answer.", ["method"], buckets=_BUCKETS)
UNDER_WAY = Gauge("meshboard_rpc_under_way", "Calls under way.", multiprocess_mode="livesum")

_tracing = False
_write_access: Callable[[MutableMapping[str, Any]], None] = lambda _event: None  # noqa: E731 - until `start`
_NO_SPAN = nullcontext()
# Baggage is not passed on: whoever calls from outside could fill it.
_propagator = TraceContextTextMapPropagator()
_MAX_STATEMENT = 2000


def start(service: str, *, level: str = "info", otlp_endpoint: str = "") -> None:
    """Sets up logs and, with an address (`host:port` of an OTLP receiver by gRPC), traces."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            stamp := _stamp(service),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(_line),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.BytesLoggerFactory(file=sys.stdout.buffer),
        cache_logger_on_first_use=True,
    )
    if logging.getLevelNamesMapping()[level.upper()] <= logging.INFO:
        global _write_access  # noqa: PLW0603 - one log for the process
        _write_access = partial(_write, structlog.BytesLogger(sys.stdout.buffer).msg, stamp)
    logging.basicConfig(handlers=[_Structured()], level=logging.WARNING, force=True)
    if otlp_endpoint:
        _start_tracing(service, otlp_endpoint)


def _stamp(service: str) -> Any:
    def stamp(_logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event.setdefault("log", "error" if method in {"error", "exception", "critical"} else "application")
        event["service"] = service
        event["time"] = datetime.now(UTC).isoformat(timespec="milliseconds")
        if (trace_id := current_trace_id()) and "trace_id" not in event:
            event["trace_id"] = trace_id
        return event

    return stamp


def access(**fields: Any) -> None:
    """Adds a line about a call to the access log: as structlog would, in a third of the time, for each call has one."""
    _write_access({"event": "call", "log": "access", "level": "info", **fields})


def _write(write: Callable[[bytes], None], stamp: Any, event: MutableMapping[str, Any]) -> None:
    write(_line(stamp(None, "info", event), repr))


def _line(event: MutableMapping[str, Any], default: Callable[[Any], Any]) -> bytes:
    try:
        return orjson.dumps(event, default)
    except TypeError:  # half a surrogate pair, or a number beyond 64 bits
        return json.dumps(event, default=default).encode()


class _Structured(logging.Handler):
    """Passes what libraries log on to the one format."""

    def emit(self, record: logging.LogRecord) -> None:
        structlog.get_logger(record.name).log(
            record.levelno, record.getMessage(), logger=record.name, exc_info=record.exc_info
        )


def _start_tracing(service: str, endpoint: str) -> None:
    # Imported here: the exporter costs 20 MB that nobody should pay who does not trace.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    global _tracing  # noqa: PLW0603 - one switch for the process
    provider = TracerProvider(resource=Resource.create({"service.name": f"meshboard-{service}"}))
    # A receiver that hangs must not hold up the end of the process.
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=True, timeout=1)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=500))
    trace.set_tracer_provider(provider)
    _tracing = True


def stop() -> None:
    """Sends the spans that wait."""
    provider = trace.get_tracer_provider()
    if _tracing and hasattr(provider, "shutdown"):
        provider.shutdown()


def span(
    name: str,
    kind: str = "INTERNAL",
    carrier: Mapping[str, str] | None = None,
    links: Iterable[Mapping[str, str]] = (),
    **attributes: str | int | float,
) -> AbstractContextManager[None]:
    """A span around a piece of work: a child of `carrier`'s trace context when it has one, else of the current span.

    `links` are the carriers of other traces that the work belongs to; without a recorded trace of `carrier`, the first
    of them that is recorded takes its place. CLIENT and PRODUCER spans exist within a trace only: what a process asks
    of others by itself, again and again, is none. An exception is noted by its reason or type, because its text may
    quote what was sent.
    """
    return _span(name, kind, carrier, links, attributes) if _tracing else _NO_SPAN


@contextmanager
def _span(
    name: str,
    kind: str,
    carrier: Mapping[str, str] | None,
    links: Iterable[Mapping[str, str]],
    attributes: Mapping[str, str | int | float],
) -> Iterator[None]:
    parents = [_extract(other) for other in (carrier or {}, *links)]
    parent = next((p for p in parents if _span_context(p).trace_flags.sampled), parents[0])
    if kind in {"CLIENT", "PRODUCER"} and not _span_context(parent).is_valid:
        yield
        return
    with trace.get_tracer("meshboard").start_as_current_span(
        name,
        parent,
        trace.SpanKind[kind],
        attributes,
        [trace.Link(_span_context(p)) for p in parents if p is not parent and _span_context(p).is_valid],
        record_exception=False,
        set_status_on_exception=False,
    ) as current:
        try:
            yield
        except Exception as failure:
            if current.is_recording() and "error.type" not in getattr(current, "attributes", {}):
                _fail(current, getattr(failure, "reason", "") or type(failure).__name__)
            raise


def note(*, error: str = "", **attributes: str | int | float) -> None:
    """Adds attributes to the current span; `error` is the reason or type of a failure."""
    if not _tracing:
        return
    current = trace.get_current_span()
    current.set_attributes(attributes)
    if error:
        _fail(current, error)


def _fail(current: trace.Span, why: str) -> None:
    current.set_attribute("error.type", why)
    current.set_status(trace.StatusCode.ERROR)


def _extract(carrier: Mapping[str, str]) -> Context:
    return _propagator.extract(carrier, context.get_current())


def _span_context(of: Context | None = None) -> trace.SpanContext:
    return trace.get_current_span(of).get_span_context()


def trace_statements(engine: Engine) -> None:
    """Makes a span of each statement of an engine, with its text and without its values, while traces are on."""
    if not _tracing:
        return
    from sqlalchemy import event  # noqa: PLC0415 - 25 MB that the event store can do without

    tracer = trace.get_tracer("meshboard")
    database = engine.url.database or ""

    def before(_c: object, _cursor: object, statement: str, _p: object, execution: Any, _many: bool) -> None:
        if execution is not None and _span_context().is_valid:
            operation = statement.split(None, 1)[0].upper()
            execution.meshboard_span = tracer.start_span(
                f"{operation} {database}",
                kind=trace.SpanKind.CLIENT,
                attributes={
                    "db.system.name": "postgresql",
                    "db.namespace": database,
                    "db.query.text": statement[:_MAX_STATEMENT],
                },
            )

    def after(_c: object, _cursor: object, _s: str, _p: object, execution: Any, _many: bool) -> None:
        if current := getattr(execution, "meshboard_span", None):
            current.end()

    def failed(failure: ExceptionContext) -> None:
        if current := getattr(failure.execution_context, "meshboard_span", None):
            _fail(current, type(failure.original_exception).__name__)
            current.end()

    event.listen(engine, "before_cursor_execute", before)
    event.listen(engine, "after_cursor_execute", after)
    event.listen(engine, "handle_error", failed)


def trace_headers() -> dict[str, str]:
    """The headers that carry the current trace to the next hop; empty when traces are off."""
    headers: dict[str, str] = {}
    if _tracing:
        _propagator.inject(headers)
    return headers


def current_trace_id() -> str:
    """The trace's id as 32 hex digits; empty when there is none."""
    if not _tracing:
        return ""
    current = _span_context()
    return f"{current.trace_id:032x}" if current.is_valid else ""


def tracing() -> bool:
    """Whether traces are on."""
    return _tracing


def forget_worker(pid: int) -> None:
    """Takes what a worker that has ended had in use out of the metrics."""
    multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]


def metrics() -> bytes:
    """All metrics in Prometheus' text format; with several workers, those of all of them."""
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
    return generate_latest()
