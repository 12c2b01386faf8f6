"""Errors that a caller is told about: a gRPC code, a reason from the catalogue, a message, and what is wrong where.

Servicers raise what these functions return; only the interceptor turns it into a status (google.rpc.Status with
exactly one ErrorInfo, https://google.aip.dev/193).
"""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2, message
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "meshboard"
DETAILS_KEY = "grpc-status-details-bin"
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class Error(Exception):
    """What a caller is told: `violations` are (field path, what is wrong); `retry_seconds` says when a retry helps."""

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        *,
        metadata: dict[str, str] | None = None,
        violations: tuple[tuple[str, str], ...] = (),
        retry_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.metadata = metadata or {}
        self.violations = violations
        self.retry_seconds = retry_seconds

    def status(self) -> status_pb2.Status:
        """The error as google.rpc.Status."""
        info = error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=self.metadata)
        details: list[message.Message] = [info]
        if self.violations:
            request = error_details_pb2.BadRequest()
            for field, description in self.violations:
                request.field_violations.add(field=field, description=description)
            details.append(request)
        if self.retry_seconds is not None:
            delay = duration_pb2.Duration()
            delay.FromMilliseconds(int(self.retry_seconds * 1000))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        return status


def _error(code: grpc.StatusCode, reason: str, text: str, metadata: dict[str, Any], **more: Any) -> Error:
    return Error(code, reason, text, metadata={key: str(value) for key, value in metadata.items()}, **more)


def invalid_argument(reason: str, text: str, /, *, field: str | None = None, **metadata: Any) -> Error:
    """The request is wrong whatever the state; `field` is the path of the field."""
    violations = ((field, text),) if field else ()
    return _error(grpc.StatusCode.INVALID_ARGUMENT, reason, text, metadata, violations=violations)


def invalid_fields(violations: list[tuple[str, str]]) -> Error:
    """Fields break the rules of the contract."""
    field, description = violations[0]
    more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
    text = f"{field}: {description}{more}" if field else f"{description}{more}"
    return Error(grpc.StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED", text, violations=tuple(violations))


def not_found(reason: str, text: str, /, **metadata: Any) -> Error:
    """The resource is absent, or out of the caller's sight: the two are told apart nowhere."""
    return _error(grpc.StatusCode.NOT_FOUND, reason, text, metadata)


def already_exists(reason: str, text: str, /, **metadata: Any) -> Error:
    """What the caller wants to create is there."""
    return _error(grpc.StatusCode.ALREADY_EXISTS, reason, text, metadata)


def permission_denied(reason: str, text: str, /, **metadata: Any) -> Error:
    """The caller sees the resource but may not do this."""
    return _error(grpc.StatusCode.PERMISSION_DENIED, reason, text, metadata)


def unauthenticated(reason: str, text: str, /, **metadata: Any) -> Error:
    """The caller has not shown who it is."""
    return _error(grpc.StatusCode.UNAUTHENTICATED, reason, text, metadata)


def failed_precondition(reason: str, text: str, /, **metadata: Any) -> Error:
    """The state forbids it; a retry does not help until the state changes."""
    return _error(grpc.StatusCode.FAILED_PRECONDITION, reason, text, metadata)


def aborted(reason: str, text: str, /, **metadata: Any) -> Error:
    """Someone else was faster; read again and repeat."""
    return _error(grpc.StatusCode.ABORTED, reason, text, metadata)


def etag_mismatch() -> Error:
    """The row has changed since the caller read its etag."""
    return aborted(
        "ETAG_MISMATCH", "The resource has changed since it was read: read it again and repeat the change."
    )


def resource_exhausted(
    reason: str, text: str, /, *, retry_seconds: float | None = None, **metadata: Any
) -> Error:
    """A limit is reached; `retry_seconds` says when it will have room."""
    return _error(grpc.StatusCode.RESOURCE_EXHAUSTED, reason, text, metadata, retry_seconds=retry_seconds)


def unavailable(
    text: str, /, *, reason: str = "DEPENDENCY_UNAVAILABLE", retry_seconds: float = 1.0, **metadata: Any
) -> Error:
    """Something that this service needs does not answer."""
    return _error(grpc.StatusCode.UNAVAILABLE, reason, text, metadata, retry_seconds=retry_seconds)


def deadline_exceeded(text: str = "The call did not finish in time.") -> Error:
    """The call's time is up."""
    return Error(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_PASSED", text)


def internal() -> Error:
    """A fault of ours; the caller learns nothing of it."""
    return Error(grpc.StatusCode.INTERNAL, "INTERNAL_FAULT", "The service has a fault.")


def from_rpc(failure: grpc.aio.AioRpcError, peer: str) -> Error:
    """What a peer answered, as an error of ours.

    An answer to the caller (not found, invalid, denied, …) is passed on with its reason; whatever says that the peer
    itself does not work becomes UNAVAILABLE.
    """
    for key, value in failure.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            error = from_peer(status_pb2.Status.FromString(value), peer)
            if error.code is not grpc.StatusCode.UNAVAILABLE:
                return error
    if failure.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return deadline_exceeded(f"{peer} did not answer in time.")
    return unavailable(f"{peer} does not answer.", peer=peer)


def from_peer(status: status_pb2.Status, peer: str) -> Error:
    """What a peer said in an answer, as an error of ours, by the same rule."""
    error = from_status(status)
    return unavailable(f"{peer} does not answer.", peer=peer) if error.code in _PEER_FAULTS else error


_PEER_FAULTS = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.UNAUTHENTICATED,
    }
)


def from_status(status: status_pb2.Status) -> Error:
    """The inverse of `Error.status`."""
    reason, metadata, violations, retry = "INTERNAL_FAULT", {}, [], None
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo.FromString(detail.value)
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            request = error_details_pb2.BadRequest.FromString(detail.value)
            violations = [(v.field, v.description) for v in request.field_violations]
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay.ToMilliseconds() / 1000
    return Error(
        _CODES.get(status.code, grpc.StatusCode.UNKNOWN),
        reason,
        status.message,
        metadata=metadata,
        violations=tuple(violations),
        retry_seconds=retry,
    )
