"""Any RPC of the contracts, called by its name: gRPC to its service, gRPC through the gateway, and JSON."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

import aiohttp
import grpc
import grpc.aio
from google.api import annotations_pb2
from google.protobuf import json_format
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

from services.chassis.errors import DETAILS_KEY
from tests.contract.test_contracts import METHODS
from tests.harness import reason_of

BY_NAME: Mapping[str, MethodDescriptor] = {m.full_name.removeprefix("meshboard."): m for m in METHODS}
SECONDS = 20


def owner_of(name: str) -> str:
    """The service that the package of an RPC belongs to."""
    return name.partition(".")[0]


def method_of(name: str) -> MethodDescriptor:
    """The method of a name, without what stands behind a `#`."""
    return BY_NAME[name.partition("#")[0]]


async def natively(
    channel: grpc.aio.Channel, name: str, body: Mapping[str, Any], headers: Mapping[str, str]
) -> str:
    """OK, or the reason (the code where there is none) of a gRPC call; of a stream its first message counts."""
    method = method_of(name)
    request_type, response_type = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
    request = json_format.ParseDict(dict(body), request_type())
    path = f"/{method.containing_service.full_name}/{method.name}"
    codec = (request_type.SerializeToString, response_type.FromString)
    options: dict[str, Any] = {"metadata": tuple(headers.items()), "timeout": SECONDS}
    try:
        if method.client_streaming:
            exchange = channel.stream_stream(path, *codec)(iter([request]), **options)
            await exchange.read()
            exchange.cancel()
        elif method.server_streaming:
            stream = channel.unary_stream(path, *codec)(request, **options)
            await stream.read()
            stream.cancel()
        else:
            await channel.unary_unary(path, *codec)(request, **options)
    except grpc.aio.AioRpcError as failure:
        known = any(key == DETAILS_KEY for key, _ in failure.trailing_metadata() or ())
        return reason_of(failure) if known else failure.code().name
    return "OK"


def has_route(name: str) -> bool:
    """Whether there is JSON for it."""
    return method_of(name).GetOptions().Extensions[annotations_pb2.http].WhichOneof("pattern") is not None


def http_of(name: str, body: Mapping[str, Any]) -> tuple[str, str, list[tuple[str, str]], str | bytes]:
    """The verb, the path, the query and the body of a request."""
    rule = method_of(name).GetOptions().Extensions[annotations_pb2.http]
    verb = str(rule.WhichOneof("pattern"))
    rest = json.loads(json.dumps(body))

    def take(match: re.Match[str]) -> str:
        *parents, last = match[1].split(".")
        holder = rest
        for parent in parents:
            holder = holder[parent]
        return quote(str(holder.pop(last)), safe="")

    path = re.sub(r"{([\w.]+)}", take, getattr(rule, verb))
    if rule.body == "*":
        return verb.upper(), path, [], json.dumps([rest] if method_of(name).client_streaming else rest)
    if rule.body and _is_file(name, rule.body):
        return verb.upper(), path, [], base64.b64decode(rest[rule.body]["data"])
    data = json.dumps(rest.pop(rule.body)) if rule.body else ""
    return verb.upper(), path, list(_flat(rest)), data


def _is_file(name: str, field: str) -> bool:
    body = method_of(name).input_type.fields_by_name[field].message_type
    return body is not None and body.full_name == "google.api.HttpBody"


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Fields as a query has them: `subject.userId=…`."""
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            for item in value:
                yield from _flat({name: item}, prefix)
        else:
            yield f"{prefix}{name}", str(value).lower() if isinstance(value, bool) else str(value)


async def as_json(
    http: aiohttp.ClientSession, url: str, name: str, body: Mapping[str, Any], headers: Mapping[str, str]
) -> str:
    """OK, or the reason of a JSON call; of a stream the first line counts."""
    verb, path, query, data = http_of(name, body)
    kind = "application/octet-stream" if isinstance(data, bytes) else "application/json"
    sent = {"content-type": kind, **headers}
    async with http.request(verb, url + path, params=query, data=data or None, headers=sent) as response:
        if response.status == 200:
            if method_of(name).server_streaming:
                await response.content.readline()
            return "OK"
        answer = await response.json()
    infos = [detail for detail in answer["details"] if detail["@type"].endswith("google.rpc.ErrorInfo")]
    assert len(infos) == 1, (name, answer)
    return str(infos[0]["reason"])
