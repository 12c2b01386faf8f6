"""Write keys: several at once, expiry, rotation with an overlap, origins, and what is kept of them."""

from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from meshboard.analytics.v1.ingest_service_pb2 import Event, IngestRequest
from meshboard.analytics.v1.source_pb2 import Source
from meshboard.analytics.v1.source_service_pb2 import (
    DeleteSourceRequest,
    GetSourceRequest,
    RotateWriteKeyRequest,
    UpdateSourceRequest,
)
from meshboard.analytics.v1.write_key_pb2 import WriteKey
from meshboard.analytics.v1.write_key_service_pb2 import (
    CreateWriteKeyRequest,
    DeleteWriteKeyRequest,
    ListWriteKeysRequest,
    UpdateWriteKeyRequest,
)
from sqlalchemy import select, text, update

from services.analytics_svc import write_keys
from services.analytics_svc.models import WriteKey as WriteKeyRow
from services.analytics_svc.write_keys import HEADER, hash_of, new_write_key
from tests.analytics_svc.conftest import Analytics
from tests.analytics_svc.test_sources import announced
from tests.harness import Member, new_id, refused

INVALID = (grpc.StatusCode.UNAUTHENTICATED, "WRITE_KEY_INVALID")
EXPIRED = (grpc.StatusCode.UNAUTHENTICATED, "WRITE_KEY_EXPIRED")


async def create(analytics: Analytics, member: Member, source: Source, **fields: Any) -> tuple[WriteKey, str]:
    request = CreateWriteKeyRequest(**{"source_id": source.source_id, "title": "Server", **fields})
    made = await analytics.keys.CreateWriteKey(request, metadata=member.metadata)
    return made.write_key, made.secret


async def list_keys(analytics: Analytics, member: Member, source: Source, **page: Any) -> list[WriteKey]:
    request = ListWriteKeysRequest(source_id=source.source_id, **page)
    return list((await analytics.keys.ListWriteKeys(request, metadata=member.metadata)).write_keys)


def in_seconds(seconds: float) -> Timestamp:
    time = Timestamp()
    time.FromDatetime(datetime.now(UTC) + timedelta(seconds=seconds))
    return time


async def test_several_keys_work_and_each_ends_alone(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, first = await analytics.source(member)
    key, second = await create(analytics, member, source)
    assert key.prefix == second[:10]
    for secret in (first, second):
        await analytics.send(secret, [{}])
    await analytics.keys.DeleteWriteKey(
        DeleteWriteKeyRequest(source_id=source.source_id, write_key_id=key.write_key_id),
        metadata=member.metadata,
    )
    assert await refused(analytics.send(second, [{}])) == INVALID
    await analytics.send(first, [{}])
    assert [one.title for one in await list_keys(analytics, member, source)] == ["First"]
    assert await announced(analytics, member.workspace_id) == [
        "SourceCreated",
        "WriteKeyCreated",
        "WriteKeyDeleted",
    ]


async def test_a_source_shows_its_newest_key(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, first = await analytics.source(member)

    async def shown() -> str:
        request = GetSourceRequest(source_id=source.source_id)
        return str(
            (await analytics.sources.GetSource(request, metadata=member.metadata)).source.write_key_prefix
        )

    key, second = await create(analytics, member, source)
    assert await shown() == second[:10]
    request = DeleteWriteKeyRequest(source_id=source.source_id, write_key_id=key.write_key_id)
    await analytics.keys.DeleteWriteKey(request, metadata=member.metadata)
    assert await shown() == first[:10]


async def test_lists_pages_and_shows_no_secret(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, first = await analytics.source(member)
    secrets = [first, *[(await create(analytics, member, source, title=f"k{i}"))[1] for i in range(3)]]
    request = ListWriteKeysRequest(source_id=source.source_id, page_size=3)
    page = await analytics.keys.ListWriteKeys(request, metadata=member.metadata)
    rest = await list_keys(analytics, member, source, page_size=3, page_token=page.next_page_token)
    listed = [*page.write_keys, *rest]
    assert [key.title for key in listed] == ["First", "k0", "k1", "k2"]
    assert [key.prefix for key in listed] == [secret[:10] for secret in secrets]
    assert not any(secret in str(listed) for secret in secrets)


async def test_a_repeat_shows_no_secret_again(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, _ = await analytics.source(member)
    key, secret = await create(analytics, member, source, request_id="once")
    assert secret
    assert await create(analytics, member, source, request_id="once") == (key, "")
    assert len(await list_keys(analytics, member, source)) == 2


async def test_an_expired_key_is_refused_and_can_be_prolonged(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, _ = await analytics.source(member)
    key, secret = await create(analytics, member, source, expire_time=in_seconds(3600))
    await analytics.send(secret, [{}])

    async def set_expiry(time: Timestamp | None) -> WriteKey:
        wanted = WriteKey(source_id=source.source_id, write_key_id=key.write_key_id, expire_time=time)
        request = UpdateWriteKeyRequest(write_key=wanted, update_mask=FieldMask(paths=["expire_time"]))
        changed: WriteKey = (await analytics.keys.UpdateWriteKey(request, metadata=member.metadata)).write_key
        return changed

    await set_expiry(in_seconds(-1))
    assert await refused(analytics.send(secret, [{}])) == EXPIRED
    assert not (await set_expiry(None)).HasField("expire_time")
    await analytics.send(secret, [{}])


async def test_a_remembered_key_expires_at_its_time(analytics: Analytics) -> None:
    """No change announces it: the process that remembers the key looks at the clock."""
    member = analytics.identity.member("editor")
    source, _ = await analytics.source(member)
    _, secret = await create(analytics, member, source, expire_time=in_seconds(60))
    await analytics.write_keys.admit(secret, "")
    clock = analytics.write_keys.now
    analytics.write_keys.now = lambda: clock() + timedelta(seconds=61)
    try:
        assert await refused(analytics.send(secret, [{}])) == EXPIRED
    finally:
        analytics.write_keys.now = clock


async def test_a_new_key_expires_in_the_future(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, _ = await analytics.source(member)
    call = create(analytics, member, source, expire_time=in_seconds(-5))
    assert await refused(call) == (grpc.StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")


async def test_rotation_ends_all_others_at_once(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, first = await analytics.source(member)
    _, second = await create(analytics, member, source)
    for secret in (first, second):  # so that they are remembered
        await analytics.send(secret, [{}])
    request = RotateWriteKeyRequest(source_id=source.source_id)
    rotated = await analytics.sources.RotateWriteKey(request, metadata=member.metadata)
    for secret in (first, second):
        assert await refused(analytics.send(secret, [{}])) == INVALID
    await analytics.send(rotated.write_key, [{}])
    (key,) = await list_keys(analytics, member, source)
    assert (key.title, key.prefix) == ("Server", rotated.write_key[:10])
    assert rotated.source.write_key_prefix == key.prefix


async def test_rotation_leaves_an_overlap(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, first = await analytics.source(member)
    soon = in_seconds(60)
    _, second = await create(analytics, member, source, expire_time=soon)
    request = RotateWriteKeyRequest(source_id=source.source_id, overlap_seconds=3600)
    rotated = await analytics.sources.RotateWriteKey(request, metadata=member.metadata)
    for secret in (first, second, rotated.write_key):
        await analytics.send(secret, [{}])
    keys = await list_keys(analytics, member, source)
    left = keys[0].expire_time.ToDatetime(UTC) - datetime.now(UTC)
    assert timedelta(minutes=59) < left <= timedelta(hours=1)
    assert keys[1].expire_time.seconds == soon.seconds  # it ends before the overlap does
    assert not keys[2].HasField("expire_time")


async def test_a_source_has_room_for_50_keys(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, _ = await analytics.source(member)
    async with analytics.db.begin() as session:
        for _ in range(48):
            key = new_write_key()
            session.add(
                WriteKeyRow(
                    workspace_id=member.workspace_id,
                    source_id=source.source_id,
                    write_key_id=new_id(),
                    title="k",
                    prefix=key.prefix,
                    key_hash=key.hash,
                    creator_id=member.user_id,
                    create_time=datetime.now(UTC),
                )
            )
    await create(analytics, member, source)
    call = create(analytics, member, source)
    assert await refused(call) == (grpc.StatusCode.FAILED_PRECONDITION, "WRITE_KEY_LIMIT")
    assert len(await list_keys(analytics, member, source, page_size=100)) == 50


async def test_keys_of_another_source_are_absent(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, _ = await analytics.source(member)
    other, secret = await analytics.source(member)
    (key,) = await list_keys(analytics, member, other)
    absent = (grpc.StatusCode.NOT_FOUND, "WRITE_KEY_NOT_FOUND")
    delete = DeleteWriteKeyRequest(source_id=source.source_id, write_key_id=key.write_key_id)
    assert await refused(analytics.keys.DeleteWriteKey(delete, metadata=member.metadata)) == absent
    wanted = WriteKey(source_id=source.source_id, write_key_id=key.write_key_id, title="Mine")
    change = UpdateWriteKeyRequest(write_key=wanted)
    assert await refused(analytics.keys.UpdateWriteKey(change, metadata=member.metadata)) == absent
    await analytics.send(secret, [{}])


async def test_a_deleted_source_ends_its_keys(analytics: Analytics) -> None:
    member = analytics.identity.member("admin")
    source, first = await analytics.source(member)
    _, second = await create(analytics, member, source)
    for secret in (first, second):
        await analytics.send(secret, [{}])
    request = DeleteSourceRequest(source_id=source.source_id)
    await analytics.sources.DeleteSource(request, metadata=member.metadata)
    for secret in (first, second):
        assert await refused(analytics.send(secret, [{}])) == INVALID
    async with analytics.db() as session:
        left = select(WriteKeyRow).where(WriteKeyRow.source_id == source.source_id)
        assert (await session.scalars(left)).all() == []


async def test_notes_the_minute_of_the_last_use(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, first = await analytics.source(member)
    await create(analytics, member, source)
    await analytics.send(first, [{}])
    await analytics.write_keys.note_uses()
    used, unused = await list_keys(analytics, member, source)
    assert timedelta(0) <= datetime.now(UTC) - used.last_use_time.ToDatetime(UTC) < timedelta(minutes=2)
    assert used.last_use_time.seconds % 60 == 0
    assert not unused.HasField("last_use_time")
    # What is noted is never older than what is there.
    later = datetime.now(UTC) + timedelta(hours=1)
    async with analytics.db.begin() as session:
        await session.execute(
            update(WriteKeyRow)
            .where(WriteKeyRow.write_key_id == used.write_key_id)
            .values(last_use_time=later)
        )
    await analytics.send(first, [{}])
    await analytics.write_keys.note_uses()
    assert (await list_keys(analytics, member, source))[0].last_use_time.ToDatetime(UTC) == later


async def test_a_key_made_by_code_of_before_is_known(analytics: Analytics) -> None:
    """Code from before several keys writes the only one into the source, and replaces it there."""
    member = analytics.identity.member("editor")
    source_id, old, new = new_id(), new_write_key(), new_write_key()
    async with analytics.db.begin() as session:
        await session.execute(
            text("""
                INSERT INTO sources (
                    workspace_id, source_id, title, write_key_hash, write_key_prefix, creator_id,
                    create_time, update_time
                ) VALUES (:workspace_id, :source_id, 'Old', :hash, :prefix, :creator_id, now(), now())
            """),
            {
                "workspace_id": member.workspace_id,
                "source_id": source_id,
                "hash": old.hash,
                "prefix": old.prefix,
                "creator_id": member.user_id,
            },
        )
    await analytics.send(old.secret, [{}])
    async with analytics.db.begin() as session:
        await session.execute(
            text(
                "UPDATE sources SET write_key_hash = :hash, write_key_prefix = :prefix WHERE source_id = :id"
            ),
            {"hash": new.hash, "prefix": new.prefix, "id": source_id},
        )
    await analytics.write_keys.forget(hash_of(old.secret))  # as that code does
    await analytics.send(new.secret, [{}])
    assert await refused(analytics.send(old.secret, [{}])) == INVALID
    request = RotateWriteKeyRequest(source_id=source_id)
    await analytics.sources.RotateWriteKey(request, metadata=member.metadata)
    async with analytics.db() as session:  # that code refuses it too
        left = await session.scalar(
            text("SELECT write_key_hash FROM sources WHERE source_id = :id"), {"id": source_id}
        )
    assert left is None


# Origins


async def test_takes_events_of_allowed_origins_only(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, secret = await analytics.source(member)
    request = IngestRequest(events=[Event(event="view", distinct_id="ada")])

    async def send(*origin: str) -> None:
        metadata = [(HEADER, secret), *(("origin", one) for one in origin)]
        await analytics.ingest.Ingest(request, metadata=metadata)

    await send("https://anywhere.example")
    changed = Source(source_id=source.source_id, allowed_origins=["https://shop.example"])
    await analytics.sources.UpdateSource(UpdateSourceRequest(source=changed), metadata=member.metadata)
    await send("https://shop.example")
    await send()  # a server's
    for other in ("https://anywhere.example", "null"):
        assert await refused(send(other)) == (grpc.StatusCode.PERMISSION_DENIED, "ORIGIN_NOT_ALLOWED")


@pytest.mark.parametrize(
    "origin",
    ["shop.example", "https://shop.example/", "https://*", "https://*.*.example", "ftp://a", "null", ""],
)
async def test_refuses_what_is_no_origin(analytics: Analytics, origin: str) -> None:
    member = analytics.identity.member("editor")
    source, _ = await analytics.source(member)
    changed = Source(source_id=source.source_id, allowed_origins=[origin])
    call = analytics.sources.UpdateSource(UpdateSourceRequest(source=changed), metadata=member.metadata)
    assert await refused(call) == (grpc.StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")


def test_keys_are_long_and_recognised() -> None:
    key = new_write_key()
    assert key.secret.startswith(write_keys.PREFIX)
    assert len(key.secret) == 47
    assert new_write_key().secret != key.secret
