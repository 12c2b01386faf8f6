import asyncio

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from grpc import StatusCode
from meshboard.user.v1.events_pb2 import ProfileUpdated
from meshboard.user.v1.profile_pb2 import Profile
from meshboard.user.v1.profile_service_pb2 import GetProfileRequest, UpdateProfileRequest
from meshboard.user.v1.user_service_pb2 import GetMeRequest
from sqlalchemy import select

from services.chassis.db import OutboxRow
from tests.harness import new_id, refused
from tests.user_svc.conftest import Person, UserSvc

Notifications = Profile.Notifications


async def profile_of(svc: UserSvc, person: Person) -> Profile:
    return (await svc.profiles.GetProfile(GetProfileRequest(), metadata=person.metadata)).profile


async def update(svc: UserSvc, person: Person, profile: Profile, *paths: str) -> Profile:
    request = UpdateProfileRequest(profile=profile, update_mask=FieldMask(paths=paths))
    return (await svc.profiles.UpdateProfile(request, metadata=person.metadata)).profile


async def test_begins_with_what_disturbs_least(svc: UserSvc, owner: Person):
    profile = await profile_of(svc, owner)
    assert profile == Profile(
        theme=Profile.SYSTEM, notifications=Notifications(reports=True, alerts=True), etag="0"
    )


async def test_changes_are_seen_at_once_also_by_get_me(svc: UserSvc, owner: Person):
    before = await svc.users.GetMe(GetMeRequest(), metadata=owner.metadata)
    assert before.profile.etag == "0"
    wanted = Profile(
        locale="DE-latn-ch",
        time_zone="Europe/Zurich",
        theme=Profile.DARK,
        notifications=Notifications(product_news=True),
    )
    updated = await update(svc, owner, wanted)
    assert (updated.locale, updated.time_zone, updated.theme) == ("de-Latn-CH", "Europe/Zurich", Profile.DARK)
    assert updated.notifications == Notifications(product_news=True)
    assert updated == await profile_of(svc, owner)
    assert (await svc.users.GetMe(GetMeRequest(), metadata=owner.metadata)).profile == updated
    async with svc.sessions() as session:
        rows = await session.scalars(
            select(OutboxRow).where(OutboxRow.subject == ProfileUpdated.DESCRIPTOR.full_name)
        )
        events = [ProfileUpdated.FromString(row.payload) for row in rows]
    assert [e.profile for e in events if e.user_id == owner.user_id] == [updated]


async def test_changes_one_kind_of_mail_and_leaves_the_others(svc: UserSvc, owner: Person):
    path = "notifications.product_news"
    updated = await update(svc, owner, Profile(notifications=Notifications(product_news=True)), path)
    assert updated.notifications == Notifications(product_news=True, reports=True, alerts=True)
    updated = await update(svc, owner, Profile(theme=Profile.DARK), "notifications")
    assert updated.notifications == Notifications()
    assert updated.theme == Profile.SYSTEM


async def test_a_star_changes_all(svc: UserSvc, owner: Person):
    await update(svc, owner, Profile(locale="fr", time_zone="UTC", theme=Profile.DARK))
    updated = await update(svc, owner, Profile(), "*")
    assert (updated.locale, updated.time_zone, updated.theme) == ("", "", Profile.SYSTEM)
    assert updated.notifications == Notifications()


@pytest.mark.parametrize(
    "path", ["etag", "update_time", "nonsense", "notifications.security", "notifications.x", "locale.x"]
)
async def test_rejects_other_fields(svc: UserSvc, owner: Person, path: str):
    assert await refused(update(svc, owner, Profile(), path)) == (
        StatusCode.INVALID_ARGUMENT,
        "UPDATE_MASK_INVALID",
    )


@pytest.mark.parametrize(
    "profile",
    [
        Profile(time_zone="Mars/Olympus"),
        Profile(time_zone="../../etc/passwd"),
        Profile(time_zone="europe/zurich"),
        Profile(locale="deutsch please"),
        Profile(locale="d"),
        Profile(locale="de_CH"),
        Profile(locale="de-" + "x" * 40),
        Profile(theme=9),  # type: ignore[arg-type]  # what an older client cannot know
    ],
)
async def test_rejects_what_is_unknown(svc: UserSvc, owner: Person, profile: Profile):
    assert await refused(update(svc, owner, profile)) == (StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")
    assert (await profile_of(svc, owner)).etag == "0"


@pytest.mark.parametrize("locale", ["de", "pt-BR", "zh-Hans-CN", "es-419", "ca-valencia", "de-1996", "yue"])
async def test_accepts_tags_of_languages(svc: UserSvc, owner: Person, locale: str):
    assert (await update(svc, owner, Profile(locale=locale))).locale == locale


async def test_of_two_changes_of_one_etag_one_counts(svc: UserSvc, owner: Person):
    for etag in ("0", "1"):
        outcomes = await asyncio.gather(
            *(
                refused(update(svc, owner, Profile(locale=locale, etag=etag)))
                for locale in ("de", "fr", "it", "rm")
            ),
            return_exceptions=True,
        )
        lost = [outcome for outcome in outcomes if outcome == (StatusCode.ABORTED, "ETAG_MISMATCH")]
        assert len(lost) == 3
    assert (await profile_of(svc, owner)).etag == "2"


async def test_needs_a_user(svc: UserSvc):
    token = svc.identity.token(sub=new_id())
    nobody = Person("", "", "", (("authorization", f"Bearer {token}"),))
    assert await refused(update(svc, nobody, Profile(locale="de"))) == (
        StatusCode.NOT_FOUND,
        "USER_NOT_FOUND",
    )
