"""What a source says of its events, as senders meet it at the gateway."""

from __future__ import annotations

import aiohttp
import pytest
from meshboard.analytics.v1.ingest_service_pb2 import Event, IngestRequest

from tests.conditions import eventually
from tests.mesh.people import Person
from tests.parts import Mesh

pytestmark = pytest.mark.xdist_group("mesh")

EVENTS = {"events": [{"event": "view", "distinctId": "ada"}]}


async def test_pages_of_other_origins_are_refused(mesh: Mesh, ann: Person, stranger: Person):
    source_id, key = await ann.new_source()
    changed = {"allowedOrigins": ["https://shop.example"]}
    answer = await ann.call("PATCH", f"/v1/sources/{source_id}", changed)
    assert answer.status == 200, answer

    async def send(origin: str) -> tuple[int, str]:
        headers = {"x-write-key": key, **({"origin": origin} if origin else {})}
        answer = await stranger.call("POST", "/v1/events:ingest", EVENTS, **headers)
        if origin:  # so that the page can read why
            assert answer.headers["access-control-allow-origin"] == origin
        return answer.status, "" if answer.status == 200 else answer.reason

    async def send_by_web(http: aiohttp.ClientSession, origin: str) -> str:
        """Gives the code of gRPC."""
        message = IngestRequest(
            write_key=key, events=[Event(event="view", distinct_id="ada")]
        ).SerializeToString()
        url = f"{mesh.gateway_url}/meshboard.analytics.v1.IngestService/Ingest"
        headers = {"content-type": "application/grpc-web+proto", "origin": origin}
        data = bytes(1) + len(message).to_bytes(4) + message
        async with http.post(url, data=data, headers=headers) as response:
            body = await response.read()
            return response.headers.get("grpc-status") or body.rpartition(b"grpc-status:")[2][:1].decode()

    assert await send("https://shop.example") == (200, "")
    assert await send("") == (200, "")
    assert await send("https://other.example") == (403, "ORIGIN_NOT_ALLOWED")
    assert await send_by_web(stranger.http, "https://shop.example") == "0"
    assert await send_by_web(stranger.http, "https://other.example") == "7"


async def test_an_exhausted_quota_says_when_there_is_room(ann: Person, stranger: Person):
    source_id, key = await ann.new_source()
    await ann.call("PATCH", f"/v1/sources/{source_id}", {"eventsPerDay": "2"})
    for _ in range(2):
        await stranger.send(key, *EVENTS["events"])
    answer = await stranger.call("POST", "/v1/events:ingest", EVENTS, **{"x-write-key": key})
    assert (answer.status, answer.reason) == (429, "QUOTA_EXHAUSTED")
    (retry,) = [d for d in answer.body["details"] if d["@type"].endswith("RetryInfo")]
    assert 0 < float(retry["retryDelay"].rstrip("s")) <= 86_400

    async def counted() -> bool:
        days = (await ann.get(f"/v1/sources/{source_id}/usage"))["days"]
        return [day["eventCount"] for day in days] == ["2"]

    await eventually(counted)


async def test_a_key_for_each_sender(ann: Person, stranger: Person):
    source_id, first = await ann.new_source()
    path = f"/v1/sources/{source_id}/writeKeys"
    made = await ann.post(path, {"title": "Server"}, **{"idempotency-key": "once"})
    again = await ann.post(path, {"title": "Server"}, **{"idempotency-key": "once"})
    assert (again["writeKey"], again["secret"]) == (made["writeKey"], "")
    for key in (first, made["secret"]):
        await stranger.send(key, *EVENTS["events"])
    key_path = f"{path}/{made['writeKey']['writeKeyId']}"
    renamed = await ann.call("PATCH", key_path, {"title": "Shop server"})
    assert renamed.body["writeKey"]["title"] == "Shop server"
    assert (await ann.call("DELETE", key_path)).status == 200

    async def refused() -> bool:
        answer = await stranger.call("POST", "/v1/events:ingest", EVENTS, **{"x-write-key": made["secret"]})
        return answer.status == 401 and answer.reason == "WRITE_KEY_INVALID"

    await eventually(refused, seconds=4)
    await stranger.send(first, *EVENTS["events"])
    rotated = await ann.post(f"/v1/sources/{source_id}:rotateWriteKey", {"overlapSeconds": 60})
    for key in (first, rotated["writeKey"]):
        await stranger.send(key, *EVENTS["events"])
    keys = (await ann.get(path))["writeKeys"]
    assert [bool(key.get("expireTime")) for key in keys] == [True, False]


async def test_rules_are_set_as_json(ann: Person, stranger: Person):
    source_id, key = await ann.new_source()
    answer = await ann.call(
        "PATCH",
        f"/v1/sources/{source_id}?updateMask=redactedPatterns,redactedProperties,robots",
        {"redactedPatterns": [{"known": "EMAIL"}], "redactedProperties": ["password"], "robots": "DROP"},
    )
    assert answer.status == 200, answer
    event = {
        "event": "view",
        "distinctId": "a@b.example",
        "properties": {"mail": "a@b.example", "password": "x"},
    }
    await stranger.send(key, event)

    async def hidden() -> bool:
        names = ["distinct_id", "properties.mail", "properties.password"]
        result = await ann.run_query(sourceIds=[source_id], breakdowns=[{"property": name} for name in names])
        return bool(result["rows"]) and result["rows"][0][1:3] == ["[redacted]", ""]

    await eventually(hidden)
    answer = await ann.call("PATCH", f"/v1/sources/{source_id}", {"redactedPatterns": [{"regex": "("}]})
    assert (answer.status, answer.reason) == (400, "REDACTED_PATTERN_INVALID")
