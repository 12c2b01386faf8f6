import asyncio
from datetime import timedelta
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct
from grpc import StatusCode
from meshboard.auth.v1.auth_service_pb2 import CompleteSignInRequest, RefreshRequest
from meshboard.auth.v1.factor_pb2 import Factor
from meshboard.auth.v1.factor_service_pb2 import (
    BeginPasskeyRequest,
    BeginTotpRequest,
    ConfirmPasskeyRequest,
    ConfirmTotpRequest,
    ConfirmTotpResponse,
    DeleteFactorRequest,
    ListFactorsRequest,
    ReplaceRecoveryCodesRequest,
)
from sqlalchemy import select, update

from services.auth_svc.models import Account, FactorRow, RecoveryCode, Session, Ticket
from tests.auth_svc.authenticator import PRESENT, Authenticator, spell
from tests.auth_svc.conftest import Services, bearer, claims_of
from tests.auth_svc.people import Person, code_of, new_person, outcomes_of, wrong_code_of
from tests.conditions import eventually
from tests.harness import new_id, refused

WRONG = (StatusCode.INVALID_ARGUMENT, "FACTOR_WRONG")
TOKEN_INVALID = (StatusCode.UNAUTHENTICATED, "MFA_TOKEN_INVALID")
DELAYED = (StatusCode.RESOURCE_EXHAUSTED, "SIGN_IN_DELAYED")


@pytest.fixture
async def ada(services: Services) -> Person:
    return await new_person(services)


async def begin_totp(person: Person) -> tuple[str, str]:
    begun = await person.services.factors.BeginTotp(BeginTotpRequest(), metadata=person.metadata)
    return begun.mfa_token, begun.secret


async def confirm_totp(person: Person, mfa_token: str, code: str) -> ConfirmTotpResponse:
    return await person.services.factors.ConfirmTotp(
        ConfirmTotpRequest(mfa_token=mfa_token, code=code, title="Phone"), metadata=person.metadata
    )


async def delete(person: Person, factor_id: str) -> None:
    await person.services.factors.DeleteFactor(
        DeleteFactorRequest(factor_id=factor_id), metadata=person.metadata
    )


async def recovery_code_count(person: Person) -> int:
    async with person.services.sessions() as session:
        found = await session.scalars(
            select(RecoveryCode.code_hash).where(RecoveryCode.user_id == person.user_id)
        )
    return len(found.all())


async def test_adds_an_authenticator_app(services: Services, ada: Person):
    begun = await services.factors.BeginTotp(BeginTotpRequest(), metadata=ada.metadata)
    assert begun.uri.startswith("otpauth://totp/Meshboard:")
    assert f"secret={begun.secret}" in begun.uri
    assert begun.qr_svg.endswith("</svg>\n")
    assert await ada.factors() == []
    confirmed = await confirm_totp(ada, begun.mfa_token, code_of(begun.secret))
    ada.access_token = confirmed.access_token
    assert (confirmed.factor.kind, confirmed.factor.title) == (Factor.TOTP, "Phone")
    assert not confirmed.factor.HasField("last_use_time")
    assert len(set(confirmed.recovery_codes)) == 10
    listed = await ada.factors()
    assert listed[0] == confirmed.factor
    assert [factor.kind for factor in listed] == [Factor.TOTP, Factor.RECOVERY_CODES]
    (entry,) = await ada.audit_entries("factor.added")
    assert (entry.outcome, entry.actor_id, entry.address) == ("DONE", ada.user_id, ada.address)
    assert entry.details == {"factor_id": confirmed.factor.factor_id, "factor_kind": "TOTP"}


async def test_adding_a_factor_puts_a_new_session_in_place_of_the_callers(services: Services, ada: Person):
    other = await services.sign_in(ada.email)
    old_token = ada.access_token
    _, confirmed = await ada.add_totp()
    claims, old_claims = claims_of(ada.access_token), claims_of(old_token)
    assert claims["sid"] != old_claims["sid"]
    assert (claims["sub"], claims["wid"]) == (ada.user_id, old_claims["wid"])
    assert claims["amr"] == ["pwd", "otp", "mfa"]
    await services.auth.Refresh(RefreshRequest(refresh_token=confirmed.refresh_token))

    async def ended() -> bool:
        request = services.factors.ListFactors(ListFactorsRequest(), metadata=bearer(old_token))
        (outcome,) = await outcomes_of(request)
        return outcome == (StatusCode.UNAUTHENTICATED, "SESSION_REVOKED")

    await eventually(ended)
    await services.factors.ListFactors(ListFactorsRequest(), metadata=bearer(other.access_token))
    async with services.sessions() as session:
        old = await session.get_one(Session, old_claims["sid"])
        new = await session.get_one(Session, claims["sid"])
    assert new.end_time == old.end_time


async def test_a_session_in_cookies_stays_in_cookies(services: Services, ada: Person):
    async with services.sessions.begin() as session:
        await session.execute(
            update(Session)
            .where(Session.session_id == claims_of(ada.access_token)["sid"])
            .values(in_cookies=True)
        )
    mfa_token, secret = await begin_totp(ada)
    request = ConfirmTotpRequest(mfa_token=mfa_token, code=code_of(secret), title="Phone")
    device = (("x-meshboard-device-cookie", ada.device_token),)
    call = services.factors.ConfirmTotp(request, metadata=(*ada.metadata, *device))
    confirmed = await call
    assert (confirmed.access_token, confirmed.refresh_token, confirmed.refresh_key) == ("", "", "")
    cookies = dict(
        str(value).partition(";")[0].split("=", 1)
        for key, value in await call.initial_metadata()
        if key == "set-cookie"
    )
    assert set(cookies) == {"mb_session", "mb_refresh", "mb_refresh_key", "mb_device"}
    assert cookies["mb_device"] == ada.device_token
    assert "mfa" in claims_of(cookies["mb_session"])["amr"]


async def test_the_code_of_the_enrolment_is_used(services: Services, ada: Person):
    mfa_token, secret = await begin_totp(ada)
    code = code_of(secret)
    ada.access_token = (await confirm_totp(ada, mfa_token, code)).access_token
    first = await ada.first_step()
    outcome = await refused(ada.second_step(CompleteSignInRequest(mfa_token=first.mfa_token, totp_code=code)))
    assert outcome == (StatusCode.UNAUTHENTICATED, "FACTOR_WRONG")
    await ada.second_step(CompleteSignInRequest(mfa_token=first.mfa_token, totp_code=code_of(secret, 1)))


async def test_a_wrong_code_adds_nothing_and_can_be_corrected(ada: Person):
    mfa_token, secret = await begin_totp(ada)
    assert await refused(confirm_totp(ada, mfa_token, wrong_code_of(secret))) == WRONG
    assert await ada.factors() == []
    (entry,) = await ada.audit_entries("factor.added")
    assert (entry.outcome, entry.reason) == ("REFUSED", "FACTOR_WRONG")
    await confirm_totp(ada, mfa_token, code_of(secret))


async def test_repeated_wrong_codes_delay_the_right_one(ada: Person):
    mfa_token, secret = await begin_totp(ada)
    for _ in range(6):
        assert await refused(confirm_totp(ada, mfa_token, wrong_code_of(secret))) == WRONG
    assert await refused(confirm_totp(ada, mfa_token, code_of(secret))) == DELAYED
    known = (*ada.metadata, ("x-meshboard-device-cookie", ada.device_token))
    request = ConfirmTotpRequest(mfa_token=mfa_token, code=code_of(secret), title="Phone")
    await ada.services.factors.ConfirmTotp(request, metadata=known)


async def test_a_token_works_once_for_its_own_person_and_purpose(services: Services, ada: Person):
    eve = await new_person(services)
    mfa_token, secret = await begin_totp(ada)
    passkey = await services.factors.BeginPasskey(BeginPasskeyRequest(), metadata=ada.metadata)
    for person, token in ((eve, mfa_token), (ada, passkey.mfa_token), (ada, "mbt_unknown")):
        assert await refused(confirm_totp(person, token, code_of(secret))) == TOKEN_INVALID
    credential = Authenticator().create(passkey.options)
    for person, token in ((eve, passkey.mfa_token), (ada, mfa_token), (ada, "mbt_unknown")):
        request = ConfirmPasskeyRequest(mfa_token=token, credential=credential, title="Laptop")
        assert (
            await refused(services.factors.ConfirmPasskey(request, metadata=person.metadata)) == TOKEN_INVALID
        )
    outcomes = await outcomes_of(*(confirm_totp(ada, mfa_token, code_of(secret)) for _ in range(8)))
    (added,) = [outcome for outcome in outcomes if isinstance(outcome, ConfirmTotpResponse)]
    ada.access_token = added.access_token
    assert [factor.kind for factor in await ada.factors()] == [Factor.TOTP, Factor.RECOVERY_CODES]
    assert await refused(confirm_totp(ada, mfa_token, code_of(secret, 1))) == TOKEN_INVALID


async def test_a_token_ends_after_ten_minutes(services: Services, ada: Person):
    mfa_token, secret = await begin_totp(ada)
    async with services.sessions.begin() as session:
        ticket = (
            await session.scalars(
                select(Ticket).where(Ticket.user_id == ada.user_id, Ticket.purpose == "add-totp")
            )
        ).one()
        assert (ticket.expire_time - ticket.create_time).total_seconds() == 600
        ticket.expire_time = ticket.create_time
    assert await refused(confirm_totp(ada, mfa_token, code_of(secret))) == TOKEN_INVALID


async def test_adds_a_passkey(services: Services, ada: Person):
    authenticator, confirmed = await ada.add_passkey()
    assert (confirmed.factor.kind, confirmed.factor.title) == (Factor.PASSKEY, "Laptop")
    assert len(confirmed.recovery_codes) == 10
    assert claims_of(ada.access_token)["amr"] == ["pwd", "hwk", "user", "mfa"]
    (entry,) = await ada.audit_entries("factor.added")
    assert entry.details == {"factor_id": confirmed.factor.factor_id, "factor_kind": "PASSKEY"}
    begun = await services.factors.BeginPasskey(BeginPasskeyRequest(), metadata=ada.metadata)
    asked = MessageToDict(begun.options)
    assert asked["excludeCredentials"] == [{"id": spell(authenticator.credential_id), "type": "public-key"}]
    async with services.sessions() as session:
        account = await session.get_one(Account, ada.user_id)
    assert (asked["user"]["name"], asked["user"]["displayName"]) == (account.email, account.display_name)


async def test_a_second_factor_brings_no_new_recovery_codes(ada: Person):
    await ada.add_totp()
    _, confirmed = await ada.add_passkey()
    assert list(confirmed.recovery_codes) == []
    assert await recovery_code_count(ada) == 10
    assert claims_of(ada.access_token)["amr"] == ["pwd", "otp", "mfa", "hwk", "user"]


@pytest.mark.parametrize(
    "overrides",
    [
        {"challenge": spell(bytes(32))},
        {"origin": "https://evil.example.org"},
        {"rp_id": "evil.example.org"},
        {"flags": PRESENT},
        {"attestation": {"authData": b"\xff" * 60_000}},
    ],
)
async def test_refuses_a_passkey_that_is_no_answer(ada: Person, overrides: dict[str, Any]):
    begun = await ada.services.factors.BeginPasskey(BeginPasskeyRequest(), metadata=ada.metadata)
    credential = Authenticator().create(begun.options, **overrides)
    request = ConfirmPasskeyRequest(mfa_token=begun.mfa_token, credential=credential, title="Laptop")
    assert await refused(ada.services.factors.ConfirmPasskey(request, metadata=ada.metadata)) == WRONG
    assert await ada.factors() == []
    (entry,) = await ada.audit_entries("factor.added")
    assert (entry.outcome, entry.reason) == ("REFUSED", "FACTOR_WRONG")


async def test_a_challenge_makes_one_passkey(ada: Person):
    begun = await ada.services.factors.BeginPasskey(BeginPasskeyRequest(), metadata=ada.metadata)
    outcomes = []
    for _ in range(2):
        request = ConfirmPasskeyRequest(
            mfa_token=begun.mfa_token, credential=Authenticator().create(begun.options), title="Laptop"
        )
        outcomes.append(ada.services.factors.ConfirmPasskey(request, metadata=ada.metadata))
    # Both are under way, and either may be the first.
    found = await outcomes_of(*outcomes)
    (made,) = (outcome for outcome in found if not isinstance(outcome, tuple))
    (loser,) = (outcome for outcome in found if isinstance(outcome, tuple))
    ada.access_token = made.access_token
    assert loser in (TOKEN_INVALID, (StatusCode.UNAUTHENTICATED, "SESSION_REVOKED"))
    assert len(await ada.factors()) == 2


async def test_a_passkey_belongs_to_one_account(services: Services, ada: Person):
    authenticator, _ = await ada.add_passkey()
    eve = await new_person(services)
    for person in (ada, eve):
        begun = await services.factors.BeginPasskey(BeginPasskeyRequest(), metadata=person.metadata)
        request = ConfirmPasskeyRequest(
            mfa_token=begun.mfa_token, credential=authenticator.create(begun.options), title="Again"
        )
        outcome = await refused(services.factors.ConfirmPasskey(request, metadata=person.metadata))
        assert outcome == (StatusCode.ALREADY_EXISTS, "PASSKEY_EXISTS")
    assert await eve.factors() == []


async def test_an_account_has_ten_factors_at_most_even_at_once(services: Services, ada: Person):
    # Sessions of their own, because each addition ends the one that it was made in.
    people = []
    for _ in range(12):
        signed_in = await services.sign_in(ada.email)
        people.append(Person(services, ada.user_id, ada.email, signed_in.access_token, "", ada.address))
    await ada.add_totp()
    outcomes = await outcomes_of(*(person.add_passkey() for person in people))
    limit = (StatusCode.FAILED_PRECONDITION, "FACTOR_LIMIT")
    assert outcomes.count(limit) == 3
    assert len(await ada.factors()) == 11
    assert await recovery_code_count(ada) == 10
    begun = await services.factors.BeginPasskey(BeginPasskeyRequest(), metadata=ada.metadata)
    request = ConfirmPasskeyRequest(
        mfa_token=begun.mfa_token, credential=Authenticator().create(begun.options), title="One more"
    )
    assert await refused(services.factors.ConfirmPasskey(request, metadata=ada.metadata)) == limit
    await delete(ada, (await ada.factors())[0].factor_id)
    await services.factors.ConfirmPasskey(request, metadata=ada.metadata)


async def test_first_factors_at_once_share_one_set_of_recovery_codes(services: Services, ada: Person):
    signed_in = await services.sign_in(ada.email)
    other = Person(services, ada.user_id, ada.email, signed_in.access_token, "", ada.address)
    (_, one), (_, two) = await asyncio.gather(ada.add_passkey(), other.add_passkey())
    assert sorted([len(one.recovery_codes), len(two.recovery_codes)]) == [0, 10]
    assert await recovery_code_count(ada) == 10
    assert len(await ada.factors()) == 3


async def test_lists_pages_of_the_callers_factors_alone(services: Services, ada: Person):
    eve = await new_person(services)
    await eve.add_passkey()
    await ada.add_totp("One")
    await ada.add_passkey(title="Two")
    titles, token = [], ""
    while True:
        request = ListFactorsRequest(page_size=1, page_token=token)
        page = await services.factors.ListFactors(request, metadata=ada.metadata)
        titles += [factor.title for factor in page.factors]
        token = page.next_page_token
        if not token:
            break
        foreign = services.factors.ListFactors(ListFactorsRequest(page_token=token), metadata=eve.metadata)
        assert await refused(foreign) == (StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID")
    assert titles == ["One", "Recovery codes", "Two"]


async def test_removes_a_factor_and_keeps_sessions(services: Services, ada: Person):
    _, confirmed = await ada.add_totp()
    await ada.add_passkey()
    await delete(ada, confirmed.factor.factor_id)
    assert [factor.kind for factor in await ada.factors()] == [Factor.RECOVERY_CODES, Factor.PASSKEY]
    (entry,) = await ada.audit_entries("factor.removed")
    assert entry.details == {"factor_id": confirmed.factor.factor_id, "factor_kind": "TOTP"}
    assert list((await ada.first_step()).factors) == [Factor.PASSKEY, Factor.RECOVERY_CODES]


async def test_recovery_codes_go_with_the_last_factor(ada: Person):
    _, confirmed = await ada.add_totp()
    await delete(ada, confirmed.factor.factor_id)
    assert await ada.factors() == []
    assert await recovery_code_count(ada) == 0
    signed_in = await ada.first_step()
    assert (signed_in.mfa_token, list(signed_in.factors)) == ("", [])
    assert claims_of(signed_in.access_token)["amr"] == ["pwd"]


async def test_removes_no_factor_of_others_and_no_recovery_codes(services: Services, ada: Person):
    eve = await new_person(services)
    _, confirmed = await ada.add_totp()
    _, codes = await ada.factors()
    for person, factor_id in ((eve, confirmed.factor.factor_id), (ada, codes.factor_id), (ada, new_id())):
        assert await refused(delete(person, factor_id)) == (StatusCode.NOT_FOUND, "FACTOR_NOT_FOUND")
    assert len(await ada.factors()) == 2


async def test_replaces_recovery_codes(services: Services, ada: Person):
    _, confirmed = await ada.add_totp()
    replaced = await services.factors.ReplaceRecoveryCodes(
        ReplaceRecoveryCodesRequest(), metadata=ada.metadata
    )
    assert len({*replaced.recovery_codes, *confirmed.recovery_codes}) == 20
    first = await ada.first_step()
    old = CompleteSignInRequest(mfa_token=first.mfa_token, recovery_code=confirmed.recovery_codes[0])
    assert await refused(ada.second_step(old)) == (StatusCode.UNAUTHENTICATED, "FACTOR_WRONG")
    new = CompleteSignInRequest(mfa_token=first.mfa_token, recovery_code=replaced.recovery_codes[0])
    await ada.second_step(new)
    assert len(await ada.audit_entries("recovery_codes.replaced")) == 1


async def test_there_are_no_recovery_codes_without_a_factor(services: Services, ada: Person):
    outcome = await refused(
        services.factors.ReplaceRecoveryCodes(ReplaceRecoveryCodesRequest(), metadata=ada.metadata)
    )
    assert outcome == (StatusCode.FAILED_PRECONDITION, "FACTOR_MISSING")
    assert await recovery_code_count(ada) == 0


async def test_changes_need_a_recent_sign_in(services: Services, ada: Person):
    signed_in = await services.sign_in(ada.email)
    async with services.sessions.begin() as session:
        row = await session.get_one(Session, claims_of(signed_in.access_token)["sid"])
        row.auth_time -= timedelta(seconds=services.auth_settings.recent_seconds + 60)
    refreshed = await services.auth.Refresh(RefreshRequest(refresh_token=signed_in.refresh_token))
    metadata = bearer(refreshed.access_token)
    await services.factors.ListFactors(ListFactorsRequest(), metadata=metadata)
    for call in (
        services.factors.BeginTotp(BeginTotpRequest(), metadata=metadata),
        services.factors.ConfirmTotp(
            ConfirmTotpRequest(mfa_token="mbt_", code="000000", title="Phone"), metadata=metadata
        ),
        services.factors.BeginPasskey(BeginPasskeyRequest(), metadata=metadata),
        services.factors.ConfirmPasskey(
            ConfirmPasskeyRequest(mfa_token="mbt_", credential=Struct(), title="Laptop"), metadata=metadata
        ),
        services.factors.DeleteFactor(DeleteFactorRequest(factor_id=new_id()), metadata=metadata),
        services.factors.ReplaceRecoveryCodes(ReplaceRecoveryCodesRequest(), metadata=metadata),
    ):
        assert await refused(call) == (StatusCode.PERMISSION_DENIED, "REAUTHENTICATION_REQUIRED")


async def test_a_session_that_ends_meanwhile_adds_nothing(services: Services, ada: Person):
    mfa_token, secret = await begin_totp(ada)
    async with services.sessions.begin() as session:
        row = await session.get_one(Session, claims_of(ada.access_token)["sid"])
        row.revoke_time = row.create_time  # not announced, so that the call itself is let in
    outcome = await refused(confirm_totp(ada, mfa_token, code_of(secret)))
    assert outcome == (StatusCode.UNAUTHENTICATED, "SESSION_REVOKED")
    async with services.sessions() as session:
        assert (await session.scalar(select(FactorRow).where(FactorRow.user_id == ada.user_id))) is None
