import grpc
import pytest
from google.api.httpbody_pb2 import HttpBody
from grpc import StatusCode
from meshboard.user.v1.avatar_service_pb2 import DeleteAvatarRequest, GetAvatarRequest, SetAvatarRequest
from meshboard.user.v1.user_pb2 import User
from meshboard.user.v1.user_service_pb2 import GetMeRequest
from sqlalchemy import select

from services.user_svc.models import Avatar
from tests.harness import refused
from tests.user_svc.conftest import Person, UserSvc
from tests.user_svc.test_pictures import CANARY, JPEG, PNG, WEBP, opened, with_metadata


async def put(svc: UserSvc, person: Person, data: bytes, content_type: str = "image/png") -> User:
    request = SetAvatarRequest(image=HttpBody(content_type=content_type, data=data))
    return (await svc.avatars.SetAvatar(request, metadata=person.metadata)).user


async def get(
    svc: UserSvc, person: Person, user_id: str, version: int = 0
) -> tuple[HttpBody, dict[str, str]]:
    call = svc.avatars.GetAvatar(GetAvatarRequest(user_id=user_id, version=version), metadata=person.metadata)
    headers = {key: str(value) for key, value in await call.initial_metadata()}
    return (await call).image, headers


def version_of(user: User) -> int:
    path, _, version = user.avatar_url.partition("?version=")
    assert path == f"/v1/users/{user.user_id}/avatar"
    return int(version)


async def test_is_shown_to_members_of_the_workspace_and_to_nobody_else(svc: UserSvc, owner: Person):
    viewer, stranger = await svc.join(owner, "viewer"), await svc.person()
    user = await put(svc, owner, PNG)
    image, headers = await get(svc, viewer, owner.user_id, version_of(user))
    assert image.content_type == "image/webp"
    assert opened(image.data).size == (256, 192)
    assert headers["cache-control"] == "private, max-age=31536000, immutable"
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert headers["content-disposition"].startswith("inline")
    _, headers = await get(svc, owner, owner.user_id, version_of(user) + 1)
    assert headers["cache-control"] == "private, no-cache"
    for person, user_id in ((stranger, owner.user_id), (owner, viewer.user_id), (owner, stranger.user_id)):
        outcome = await refused(
            svc.avatars.GetAvatar(GetAvatarRequest(user_id=user_id), metadata=person.metadata)
        )
        assert outcome == (StatusCode.NOT_FOUND, "AVATAR_NOT_FOUND")


async def test_the_url_changes_with_each_picture(svc: UserSvc, owner: Person):
    urls = set()
    for data in (PNG, JPEG, WEBP):
        user = await put(svc, owner, data, "application/octet-stream")
        urls.add(user.avatar_url)
        me = (await svc.users.GetMe(GetMeRequest(), metadata=owner.metadata)).user
        assert me.avatar_url == user.avatar_url
    deleted = (await svc.avatars.DeleteAvatar(DeleteAvatarRequest(), metadata=owner.metadata)).user
    assert deleted.avatar_url == ""
    again = (await svc.avatars.DeleteAvatar(DeleteAvatarRequest(), metadata=owner.metadata)).user
    assert again == deleted
    async with svc.sessions() as session:
        assert await session.get(Avatar, owner.user_id) is None
    urls.add((await put(svc, owner, PNG)).avatar_url)
    assert len(urls) == 4


async def test_keeps_nothing_of_the_file(svc: UserSvc, owner: Person):
    await put(svc, owner, with_metadata("JPEG"))
    async with svc.sessions() as session:
        kept = await session.scalar(select(Avatar.image).where(Avatar.user_id == owner.user_id))
    assert kept
    assert CANARY not in kept


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "neither PNG nor JPEG nor WebP"),
        (PNG + b"PK\x05\x06", "something else behind it"),
        (PNG[:-20], "cut off"),
        (bytes((1 << 20) + 1), "1 MiB"),
    ],
)
async def test_rejects_other_files_naming_the_field(svc: UserSvc, owner: Person, data: bytes, what: str):
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await put(svc, owner, data)
    assert what in (failure.value.details() or "")
    assert await refused(put(svc, owner, data)) == (StatusCode.INVALID_ARGUMENT, "AVATAR_INVALID")
    empty = svc.avatars.SetAvatar(SetAvatarRequest(), metadata=owner.metadata)
    assert await refused(empty) == (StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")
