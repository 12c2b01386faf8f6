"""Sources: create, list, change, rotate, delete, and the grants on them."""

from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from meshboard.analytics.v1.source_pb2 import Source
from meshboard.analytics.v1.source_service_pb2 import (
    BatchUpdateSourceGrantsRequest,
    CreateSourceGrantRequest,
    CreateSourceRequest,
    DeleteSourceGrantRequest,
    DeleteSourceRequest,
    GetSourceRequest,
    ListSourceGrantsRequest,
    ListSourcesRequest,
    RotateWriteKeyRequest,
    UpdateSourceRequest,
)
from meshboard.user.v1.grant_pb2 import Grant, NewGrant, Subject
from sqlalchemy import select

from services.analytics_svc.models import WriteKey
from services.analytics_svc.write_keys import PREFIX, hash_of
from services.chassis.db import OutboxRow
from tests.analytics_svc.conftest import Analytics
from tests.harness import Member, new_id, reason_of


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    """The code and the reason that a call fails with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), reason_of(caught.value)


async def announced(analytics: Analytics, workspace_id: str) -> list[str]:
    """The names of the domain events of a workspace."""
    async with analytics.db() as session:
        rows = await session.scalars(select(OutboxRow).order_by(OutboxRow.id))
        return [
            row.subject.rpartition(".")[2] for row in rows if row.headers.get("Workspace-Id") == workspace_id
        ]


async def list_sources(analytics: Analytics, member: Member, **page: Any) -> list[str]:
    response = await analytics.sources.ListSources(ListSourcesRequest(**page), metadata=member.metadata)
    return [source.source_id for source in response.sources]


async def test_shows_the_key_once_and_keeps_its_hash(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    request = CreateSourceRequest(title="Shop", request_id="once")
    made = await analytics.sources.CreateSource(request, metadata=member.metadata)
    assert made.write_key.startswith(PREFIX)
    assert made.write_key.startswith(made.source.write_key_prefix)
    again = await analytics.sources.CreateSource(request, metadata=member.metadata)
    assert again.source == made.source
    assert again.write_key == ""
    async with analytics.db() as session:
        keys = await session.scalars(
            select(WriteKey.key_hash).where(WriteKey.source_id == made.source.source_id)
        )
    assert keys.all() == [hash_of(made.write_key)]
    assert await announced(analytics, member.workspace_id) == ["SourceCreated"]


async def test_viewers_create_none(analytics: Analytics) -> None:
    member = analytics.identity.member("viewer")
    call = analytics.sources.CreateSource(CreateSourceRequest(title="Shop"), metadata=member.metadata)
    assert await refusal(call) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")


async def test_the_creator_owns_it(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, _ = await analytics.source(member)
    member.become("viewer")
    await analytics.sources.DeleteSource(
        DeleteSourceRequest(source_id=source.source_id), metadata=member.metadata
    )
    call = analytics.sources.GetSource(GetSourceRequest(source_id=source.source_id), metadata=member.metadata)
    assert await refusal(call) == (grpc.StatusCode.NOT_FOUND, "SOURCE_NOT_FOUND")
    assert await announced(analytics, member.workspace_id) == ["SourceCreated", "SourceDeleted"]


async def test_is_absent_for_strangers(analytics: Analytics) -> None:
    source, _ = await analytics.source(analytics.identity.member("editor"))
    stranger = analytics.identity.member("owner")
    for source_id in (source.source_id, new_id()):
        call = analytics.sources.GetSource(GetSourceRequest(source_id=source_id), metadata=stranger.metadata)
        assert await refusal(call) == (grpc.StatusCode.NOT_FOUND, "SOURCE_NOT_FOUND")
        ask = analytics.ask(stranger, Source(source_id=source_id))
        assert await refusal(ask) == (grpc.StatusCode.NOT_FOUND, "SOURCE_NOT_FOUND")


async def test_lists_what_may_be_seen_newest_first(analytics: Analytics) -> None:
    owner = analytics.identity.member("owner")
    made = [(await analytics.source(owner))[0].source_id for _ in range(5)]
    viewer = analytics.identity.member("viewer", owner.workspace_id)
    analytics.users.subjects.add((owner.workspace_id, viewer.user_id))
    await analytics.sources.CreateSourceGrant(
        CreateSourceGrantRequest(
            source_id=made[1], subject=Subject(user_id=viewer.user_id), role="viewer", effect=Grant.DENY
        ),
        metadata=owner.metadata,
    )
    assert await list_sources(analytics, owner) == made[::-1]
    assert await list_sources(analytics, viewer) == [made[4], made[3], made[2], made[0]]
    first = await analytics.sources.ListSources(ListSourcesRequest(page_size=3), metadata=viewer.metadata)
    rest = await list_sources(analytics, viewer, page_size=3, page_token=first.next_page_token)
    assert [s.source_id for s in first.sources] + rest == [made[4], made[3], made[2], made[0]]


async def test_updates_the_title_under_an_etag(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, key = await analytics.source(member)

    async def update(mask: list[str], **fields: Any) -> Source:
        request = UpdateSourceRequest(source=Source(source_id=source.source_id, **fields))
        if mask:
            request.update_mask.CopyFrom(FieldMask(paths=mask))
        response = await analytics.sources.UpdateSource(request, metadata=member.metadata)
        changed: Source = response.source
        return changed

    changed = await update(["title"], title="Store", etag=source.etag)
    assert changed.title == "Store"
    assert changed.etag != source.etag
    assert await refusal(update([], title="Late", etag=source.etag)) == (
        grpc.StatusCode.ABORTED,
        "ETAG_MISMATCH",
    )
    assert await refusal(update(["create_time"])) == (grpc.StatusCode.INVALID_ARGUMENT, "UPDATE_MASK_INVALID")
    assert await refusal(update(["title"])) == (grpc.StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")
    assert (await analytics.send(key, [{}])).accepted_count == 1


async def test_an_old_key_ends_at_once(analytics: Analytics) -> None:
    member = analytics.identity.member("editor")
    source, old = await analytics.source(member)
    await analytics.send(old, [{}])
    rotated = await analytics.sources.RotateWriteKey(
        RotateWriteKeyRequest(source_id=source.source_id), metadata=member.metadata
    )
    assert await refusal(analytics.send(old, [{}])) == (grpc.StatusCode.UNAUTHENTICATED, "WRITE_KEY_INVALID")
    assert (await analytics.send(rotated.write_key, [{}])).accepted_count == 1
    await analytics.until_count(member, source, 2)
    assert rotated.source.write_key_prefix != source.write_key_prefix
    assert await announced(analytics, member.workspace_id) == ["SourceCreated", "WriteKeyRotated"]


async def test_grants_give_and_withhold(analytics: Analytics) -> None:
    owner = analytics.identity.member("admin")
    source, _ = await analytics.source(owner)
    viewer = analytics.identity.member("viewer", owner.workspace_id)
    analytics.users.subjects.add((owner.workspace_id, viewer.user_id))
    subject = Subject(user_id=viewer.user_id)
    call: Any
    rename = UpdateSourceRequest(source=Source(source_id=source.source_id, title="Mine"))
    call = analytics.sources.UpdateSource(rename, metadata=viewer.metadata)
    assert await refusal(call) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")

    request = CreateSourceGrantRequest(
        source_id=source.source_id, subject=subject, role="editor", request_id="r"
    )
    made = await analytics.sources.CreateSourceGrant(request, metadata=owner.metadata)
    again = await analytics.sources.CreateSourceGrant(request, metadata=owner.metadata)
    assert again == made
    request.request_id = "another"
    call = analytics.sources.CreateSourceGrant(request, metadata=owner.metadata)
    assert await refusal(call) == (grpc.StatusCode.ALREADY_EXISTS, "GRANT_EXISTS")
    await analytics.sources.UpdateSource(rename, metadata=viewer.metadata)

    listed = await analytics.sources.ListSourceGrants(
        ListSourceGrantsRequest(source_id=source.source_id), metadata=owner.metadata
    )
    assert [(g.role, g.subject.user_id) for g in listed.grants] == [
        ("owner", owner.user_id),
        ("editor", viewer.user_id),
    ]
    delete = DeleteSourceGrantRequest(source_id=source.source_id, grant_id=made.grant.grant_id)
    await analytics.sources.DeleteSourceGrant(delete, metadata=owner.metadata)
    call = analytics.sources.DeleteSourceGrant(delete, metadata=owner.metadata)
    assert await refusal(call) == (grpc.StatusCode.NOT_FOUND, "GRANT_NOT_FOUND")


async def test_grants_name_members_and_roles_only(analytics: Analytics) -> None:
    owner = analytics.identity.member("admin")
    source, _ = await analytics.source(owner)

    def grant(subject: Subject, role: str) -> Any:
        request = CreateSourceGrantRequest(source_id=source.source_id, subject=subject, role=role)
        return analytics.sources.CreateSourceGrant(request, metadata=owner.metadata)

    stranger = Subject(user_id=new_id())
    assert await refusal(grant(stranger, "viewer")) == (grpc.StatusCode.INVALID_ARGUMENT, "SUBJECT_UNKNOWN")
    everyone = Subject(workspace=True)
    assert await refusal(grant(everyone, "king")) == (grpc.StatusCode.INVALID_ARGUMENT, "ROLE_UNKNOWN")
    assert (await grant(everyone, "viewer")).grant.subject.workspace


async def test_grants_change_together(analytics: Analytics) -> None:
    owner = analytics.identity.member("admin")
    source, _ = await analytics.source(owner)
    everyone = Subject(workspace=True)
    old = await analytics.sources.CreateSourceGrant(
        CreateSourceGrantRequest(source_id=source.source_id, subject=everyone, role="viewer"),
        metadata=owner.metadata,
    )
    request = BatchUpdateSourceGrantsRequest(
        source_id=source.source_id,
        create=[NewGrant(subject=everyone, role="viewer", effect=Grant.DENY)],
        delete_grant_ids=[old.grant.grant_id],
    )
    (made,) = (await analytics.sources.BatchUpdateSourceGrants(request, metadata=owner.metadata)).grants
    listed = await analytics.sources.ListSourceGrants(
        ListSourceGrantsRequest(source_id=source.source_id), metadata=owner.metadata
    )
    assert listed.grants[1:] == [made]
    call = analytics.sources.BatchUpdateSourceGrants(request, metadata=owner.metadata)
    assert await refusal(call) == (grpc.StatusCode.NOT_FOUND, "GRANT_NOT_FOUND")
