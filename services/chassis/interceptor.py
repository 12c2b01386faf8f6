"""What happens around every call, in this order: errors, telemetry, deadline and load shedding, authentication,
validation, access; then the servicer's method.

Authentication comes before validation, so that strangers learn no rules; validation before access, so that
access can rely on well-formed ids.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import grpc
import grpc.aio
import protovalidate
import structlog
from google.protobuf import message

from services.chassis import auth, db, deadline, errors, outbox, telemetry
from services.chassis.access import Access, Metadata, Rule

Context = grpc.aio.ServicerContext[Any, Any]
# Server streams end by themselves; this bounds one that does not.
STREAM_SECONDS = 24 * 3600.0

# Sends a message of a stream; the next may be sent when it returns.
Write = Callable[[Any], Coroutine[Any, Any, None]]


@dataclass(frozen=True, slots=True)
class Handover:
    """What a method that streams may yield in place of messages: who sends them itself, and returns behind the last.

    Thousands of streams that are sent the same cost less when none of them has to wake up for it.
    """

    send: Callable[[Write], Awaitable[None]]


class Interceptor(grpc.aio.ServerInterceptor):
    """The stages, for all methods that have a rule; health and reflection pass by."""

    def __init__(
        self, rules: dict[str, Rule], access: Access, *, max_calls: int, call_seconds: float
    ) -> None:
        self._rules = rules
        self._access = access
        self._door = _Door(max_calls)
        self._call_seconds = call_seconds
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any] | None] = {}

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """Wraps the method's handler, once."""
        path = handler_call_details.method
        if path not in self._handlers:
            handler = await continuation(handler_call_details)
            rule = self._rules.get(path)
            if handler is None or rule is None:
                return handler
            self._handlers[path] = self._wrap(path, rule, handler)
        return self._handlers[path]

    def _wrap(self, path: str, rule: Rule, handler: Any) -> Any:
        stages = _Stages(path, rule, self)
        serializers = (_lenient(handler.request_deserializer), _unless_done(handler.response_serializer))
        if handler.unary_unary and rule.has_body:
            # gRPC itself would leave a call without any message unanswered until its deadline. So a request comes from
            # the gateway whose JSON, after unpacking, ends too early.
            return grpc.stream_unary_rpc_method_handler(
                stages.unary(handler.unary_unary, reads=True), *serializers
            )
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(stages.unary(handler.unary_unary), *serializers)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(stages.stream(handler.unary_stream), *serializers)
        if handler.stream_stream:
            nothing = handler.request_deserializer(b"")
            return grpc.stream_stream_rpc_method_handler(
                stages.exchange(handler.stream_stream, nothing), *serializers
            )
        raise TypeError(f"{path}: a stream of requests with one answer is not supported")

    @property
    def admitted(self) -> _Door:
        """Counts a call in that enters it, or refuses it at the door."""
        return self._door

    @property
    def access(self) -> Access:
        """Who may call."""
        return self._access

    @property
    def call_seconds(self) -> float:
        """How long a unary call without a deadline may take."""
        return self._call_seconds


class _Door:
    """Counts calls in, or refuses them. One for all: what each of thousands of streams holds adds up.

    `count` is how many have come in since the beginning.
    """

    def __init__(self, max_calls: int) -> None:
        self._max_calls = max_calls
        self._under_way = 0
        self.count = 0

    def __enter__(self) -> None:
        if self._under_way >= self._max_calls:
            raise errors.resource_exhausted(
                "OVERLOADED", "The service has too many calls under way.", retry_seconds=1
            )
        self._under_way += 1
        self.count += 1
        telemetry.UNDER_WAY.inc()

    def __exit__(self, *_failure: object) -> None:
        self._under_way -= 1
        telemetry.UNDER_WAY.dec()


class _Stages:
    """The stages of one method."""

    def __init__(self, path: str, rule: Rule, interceptor: Interceptor) -> None:
        self._path = path
        self._rule = rule
        self._interceptor = interceptor
        self._seconds = telemetry.SECONDS.labels(rule.method)
        self._ok = telemetry.CALLS.labels(rule.method, "OK")

    def unary(
        self, method: Callable[..., Awaitable[Any]], *, reads: bool = False
    ) -> Callable[..., Awaitable[Any]]:
        """Wraps a method that gives one answer; with `reads` its request is read here, and may be missing."""

        async def call(request: Any, context: Context) -> Any:
            start = time.perf_counter()
            metadata = _metadata(context)
            with telemetry.span(self._path[1:], "SERVER", carrier=metadata):
                try:
                    with self._interceptor.admitted:
                        async with asyncio.timeout(self._deadline(context, self._interceptor.call_seconds)):
                            if reads:
                                request = await context.read()
                            if request is grpc.aio.EOF:
                                request = _Unreadable("it has no message")
                            await self._enter(request, metadata)
                            response = await method(request, context)
                except BaseException as failure:
                    await self._fail(failure, context, start)
                self._done("OK", start)
                return response

        return call

    def stream(self, method: Callable[..., AsyncGenerator[Any, None]]) -> Callable[..., Awaitable[None]]:
        """Wraps a method that gives a stream of answers."""

        async def enter(request: Any, metadata: Metadata) -> Any:
            await self._enter(request, metadata)
            return request

        return self._streaming(method, enter)

    def exchange(
        self, method: Callable[..., AsyncGenerator[Any, None]], nothing: message.Message
    ) -> Callable[..., Awaitable[None]]:
        """Wraps a method that takes a stream of requests and gives a stream of answers.

        The first request decides who may call, so it has the time of a unary call; the others are only validated.
        """

        async def enter(requests: AsyncIterator[Any], metadata: Metadata) -> Any:
            async with asyncio.timeout(self._interceptor.call_seconds):
                first = await anext(requests, None)
            await self._enter(nothing if first is None else first, metadata)
            return _validated(first, requests)

        return self._streaming(method, enter)

    def _streaming(
        self,
        method: Callable[..., AsyncGenerator[Any, None]],
        enter: Callable[[Any, Metadata], Awaitable[Any]],
    ) -> Callable[..., Awaitable[None]]:
        """`enter` takes what the method is given through the stages, and gives what reaches the method."""

        async def call(arriving: Any, context: Context) -> None:
            start = time.perf_counter()
            metadata = _metadata(context)
            with telemetry.span(self._path[1:], "SERVER", carrier=metadata):
                try:
                    with self._interceptor.admitted:
                        self._deadline(context, STREAM_SECONDS)
                        async with aclosing(method(await enter(arriving, metadata), context)) as responses:
                            async for response in responses:
                                if isinstance(response, Handover):
                                    await response.send(context.write)
                                else:
                                    await context.write(response)
                except grpc.aio.BaseError:  # written to who has gone away
                    self._done("CANCELLED", start)
                    raise
                except BaseException as failure:
                    await self._fail(failure, context, start)
                self._done("OK", start)

        return call

    def _deadline(self, context: Context, at_most: float) -> float:
        remaining = context.time_remaining()
        if remaining is not None:
            # gRPC ends a call at the caller's deadline by itself, without a reason: the answer must be there before.
            at_most = min(at_most, remaining - min(0.25, remaining / 4))
        deadline.set_deadline(at_most)
        return at_most

    async def _enter(self, request: message.Message, metadata: Metadata) -> None:
        access = self._interceptor.access
        caller = await access.authenticate(self._rule, metadata)
        _require_readable(request)
        if (key := metadata.get("idempotency-key")) and "request_id" in request.DESCRIPTOR.fields_by_name:
            request.request_id = request.request_id or key  # type: ignore[attr-defined]
        validate(request)
        auth.set_caller(await access.authorize(self._rule, request, metadata, caller))
        outbox.actor.set(_actor(auth.caller()))
        auth.set_recheck(lambda: self._recheck(request, metadata))
        auth.set_require(lambda *what: access.require(auth.caller(), *what))

    async def _recheck(self, request: message.Message, metadata: Metadata) -> None:
        access = self._interceptor.access
        caller = await access.authenticate(self._rule, metadata)
        auth.set_caller(await access.authorize(self._rule, request, metadata, caller))

    async def _fail(self, failure: BaseException, context: Context, start: float) -> NoReturn:
        error = error_of(failure)
        if error is None:  # the caller went away
            self._done("CANCELLED", start)
            raise failure
        if error.code is grpc.StatusCode.INTERNAL:
            structlog.get_logger("error").error("fault", rpc=self._rule.method, exc_info=failure)
        self._done(error.code.name, start, error.reason)
        await context.abort(
            error.code, error.message, ((errors.DETAILS_KEY, error.status().SerializeToString()),)
        )
        raise AssertionError("abort raises")

    def _done(self, code: str, start: float, reason: str = "") -> None:
        seconds = time.perf_counter() - start
        self._seconds.observe(seconds)
        (self._ok if code == "OK" else telemetry.CALLS.labels(self._rule.method, code)).inc()
        telemetry.note(error=reason or ("" if code == "OK" else code), rpc_code=code)
        who = auth.caller()
        telemetry.access(
            rpc=self._rule.method,
            code=code,
            reason=reason,
            ms=round(seconds * 1000, 2),
            user_id=who.claims.user_id if who.claims else "",
            caller=who.service,
            workspace_id=who.workspace,
        )


async def _validated(first: message.Message | None, rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """A stream's requests, of which the first has been validated."""
    if first is not None:
        yield first
    async for request in rest:
        _require_readable(request)
        validate(request)
        yield request


def _metadata(context: Context) -> dict[str, str]:
    """The text metadata of a call; of a key that is there twice the first value, of a second authorization none."""
    pairs: dict[str, str] = {}
    for key, value in context.invocation_metadata() or ():
        if key in pairs:
            if key == "authorization":
                pairs[key] = ""
        elif isinstance(value, str):
            pairs[sys.intern(key)] = value  # streams keep it
    return pairs


class _Unreadable(NamedTuple):
    """Stands for a request that cannot be parsed: what its caller is told is said behind authentication."""

    why: str


def _lenient(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """gRPC itself would log a fault, and show the caller the exception."""

    def parse_or_tell(data: bytes) -> Any:
        try:
            return parse(data)
        except message.DecodeError as error:
            return _Unreadable(str(error))

    return parse_or_tell


def _unless_done(serialize: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """A method may give its response as the bytes that it has kept of it: they go out as they are."""
    return lambda response: response if isinstance(response, bytes) else serialize(response)


def _require_readable(request: Any) -> None:
    if isinstance(request, _Unreadable):
        raise errors.invalid_argument("REQUEST_MALFORMED", f"The request cannot be read: {request.why}")


def error_of(failure: BaseException) -> errors.Error | None:
    """What the caller is told; None when it has gone away."""
    match failure:
        case errors.Error():
            return failure
        case asyncio.CancelledError():
            return None
        case TimeoutError():
            return errors.deadline_exceeded()
        case _ if db.is_away(failure):
            return errors.unavailable("The database does not answer.")
        case _ if getattr(getattr(failure, "orig", failure), "sqlstate", "") == "22021":
            # The one character that protobuf's strings can hold and Postgres' cannot.
            return errors.invalid_fields([("", "a text holds the character U+0000")])
        case ConnectionError():
            return errors.unavailable("Something that the service needs does not answer.")
        case _:
            return errors.internal()


def validate(request: message.Message, place: str = "") -> None:
    """Raises INVALID_ARGUMENT (VALIDATION_FAILED) naming each field that breaks a rule of the contract.

    `place` is where the message stands in the request, if it is a part: `questions[3]`.
    """
    violations = protovalidate.collect_violations(request)
    if violations:
        raise errors.invalid_fields([(_path(v.proto.field, place), v.proto.message) for v in violations])


def _path(field: Any, path: str = "") -> str:
    """`events[3].time`, from protovalidate's path; `path` is what it begins with."""
    for element in field.elements if field is not None else ():
        path += f".{element.field_name}" if path else element.field_name
        subscript = element.subscript
        if subscript is not None:
            path += f"[{subscript.value}]"
    return path


def warm_up(*requests: message.Message) -> None:
    """Compiles the rules of messages: the first validation of a kind takes milliseconds."""
    for request in requests:
        protovalidate.collect_violations(request)


def _actor(who: auth.Caller) -> str:
    """Who causes what this call changes, for the events that tell of it; an impersonator comes after a comma."""
    if who.claims and who.claims.impersonator_id:
        return f"{who.claims.user_id},{who.claims.impersonator_id}"
    return who.claims.user_id if who.claims else f"service:{who.service}" if who.service else ""
