from typing import Any

import grpc.aio
import pytest
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.struct_pb2 import Struct
from grpc import StatusCode
from meshboard.auth.v1.auth_service_pb2 import (
    BeginPasskeySignInRequest,
    CompleteSignInRequest,
    CompleteSignInResponse,
)
from meshboard.auth.v1.factor_pb2 import Factor
from meshboard.auth.v1.factor_service_pb2 import BeginPasskeyRequest, BeginTotpRequest, DeleteFactorRequest
from sqlalchemy import func, select, update

from services.auth_svc.models import Account, RecoveryCode, Session, Ticket
from services.auth_svc.tickets import Purpose, Tickets
from services.chassis.sealing import Seals
from services.chassis.times import now
from tests.auth_svc.authenticator import PRESENT, Authenticator, spell
from tests.auth_svc.conftest import Services, claims_of
from tests.auth_svc.people import Person, code_of, new_person, outcomes_of, wrong_code_of
from tests.auth_svc.test_passkeys import MALFORMED, broken
from tests.harness import reason_of, refused

WRONG = (StatusCode.UNAUTHENTICATED, "FACTOR_WRONG")
TOKEN_INVALID = (StatusCode.UNAUTHENTICATED, "MFA_TOKEN_INVALID")
DELAYED = (StatusCode.RESOURCE_EXHAUSTED, "SIGN_IN_DELAYED")


@pytest.fixture
async def ada(services: Services) -> Person:
    return await new_person(services)


async def begin_passkey_sign_in(services: Services) -> tuple[str, Struct]:
    begun = await services.auth.BeginPasskeySignIn(BeginPasskeySignInRequest())
    return begun.mfa_token, begun.options


async def session_count(person: Person) -> int:
    async with person.services.sessions() as session:
        count = await session.scalar(
            select(func.count()).select_from(Session).where(Session.user_id == person.user_id)
        )
    return count or 0


async def test_signs_in_with_a_code(services: Services, ada: Person):
    secret, _ = await ada.add_totp()
    before = await session_count(ada)
    first = await ada.first_step()
    assert (first.access_token, first.refresh_token, first.device_token) == ("", "", "")
    assert not first.HasField("user")
    assert not first.HasField("passkey_options")
    assert list(first.factors) == [Factor.RECOVERY_CODES, Factor.TOTP]
    assert await session_count(ada) == before
    signed_in = await ada.second_step(
        CompleteSignInRequest(mfa_token=first.mfa_token, totp_code=code_of(secret, 1))
    )
    assert signed_in.user.user_id == ada.user_id
    claims = claims_of(signed_in.access_token)
    assert (claims["sub"], claims["amr"]) == (ada.user_id, ["pwd", "otp", "mfa"])
    (totp, _) = await ada.factors()
    assert totp.HasField("last_use_time")
    entry = (await ada.audit_entries("session.begun"))[-1]
    assert (entry.outcome, entry.details) == ("DONE", {"methods": ["pwd", "otp", "mfa"]})


async def test_a_code_works_once_even_for_fifty_at_once(ada: Person):
    secret, _ = await ada.add_totp()
    tokens = [(await ada.first_step()).mfa_token for _ in range(10)]
    code = code_of(secret, 1)
    outcomes = await outcomes_of(
        *(
            ada.second_step(CompleteSignInRequest(mfa_token=token, totp_code=code))
            for token in tokens
            for _ in range(5)
        )
    )
    signed_in = [outcome for outcome in outcomes if isinstance(outcome, CompleteSignInResponse)]
    assert len(signed_in) == 1
    refusals = {outcome for outcome in outcomes if not isinstance(outcome, CompleteSignInResponse)}
    assert refusals <= {WRONG, TOKEN_INVALID, DELAYED}


async def test_a_token_begins_one_session_even_for_many_codes_at_once(ada: Person):
    secret, added = await ada.add_totp()
    before = await session_count(ada)
    token = (await ada.first_step()).mfa_token
    proofs: list[dict[str, Any]] = [{"totp_code": code_of(secret, 1)}] + [
        {"recovery_code": code} for code in added.recovery_codes
    ]
    outcomes = await outcomes_of(
        *(ada.second_step(CompleteSignInRequest(mfa_token=token, **proof)) for proof in proofs)
    )
    signed_in = [outcome for outcome in outcomes if isinstance(outcome, CompleteSignInResponse)]
    assert len(signed_in) == 1
    assert await session_count(ada) == before + 1
    # The codes that came too late have not been used up.
    async with ada.services.sessions() as session:
        left = await session.scalar(
            select(func.count()).select_from(RecoveryCode).where(RecoveryCode.user_id == ada.user_id)
        )
    assert left is not None
    assert left >= 9


async def test_signs_in_with_a_recovery_code_once(ada: Person):
    _, added = await ada.add_totp()
    code = added.recovery_codes[3]
    first = await ada.first_step()
    spelled = code.lower().replace("-", " ")
    signed_in = await ada.second_step(CompleteSignInRequest(mfa_token=first.mfa_token, recovery_code=spelled))
    assert claims_of(signed_in.access_token)["amr"] == ["pwd", "otp", "mfa"]
    (entry,) = await ada.audit_entries("recovery_code.used")
    assert (entry.actor_id, entry.address, entry.details) == (ada.user_id, ada.address, {"left": 9})
    _, codes = await ada.factors()
    assert codes.HasField("last_use_time")
    again = CompleteSignInRequest(mfa_token=(await ada.first_step()).mfa_token, recovery_code=code)
    assert await refused(ada.second_step(again)) == WRONG


async def test_a_recovery_code_works_once_even_for_many_at_once(ada: Person):
    _, added = await ada.add_totp()
    tokens = [(await ada.first_step()).mfa_token for _ in range(8)]
    outcomes = await outcomes_of(
        *(
            ada.second_step(CompleteSignInRequest(mfa_token=token, recovery_code=added.recovery_codes[0]))
            for token in tokens
        )
    )
    assert sum(isinstance(outcome, CompleteSignInResponse) for outcome in outcomes) == 1


async def test_codes_of_others_prove_nothing(services: Services, ada: Person):
    eve = await new_person(services)
    await ada.add_totp()
    secret, added = await eve.add_totp()
    first = await ada.first_step()
    for request in (
        CompleteSignInRequest(mfa_token=first.mfa_token, totp_code=code_of(secret, 1)),
        CompleteSignInRequest(mfa_token=first.mfa_token, recovery_code=added.recovery_codes[0]),
    ):
        assert await refused(ada.second_step(request)) == WRONG


@pytest.mark.parametrize(("synced", "key"), [(False, "hwk"), (True, "swk")])
async def test_signs_in_with_a_passkey_as_the_second_factor(ada: Person, synced: bool, key: str):
    authenticator, _ = await ada.add_passkey(Authenticator(synced=synced))
    first = await ada.first_step()
    assert list(first.factors) == [Factor.PASSKEY, Factor.RECOVERY_CODES]
    asked = MessageToDict(first.passkey_options)
    assert asked["allowCredentials"] == [{"id": spell(authenticator.credential_id), "type": "public-key"}]
    assert (asked["rpId"], asked["userVerification"]) == ("127.0.0.1", "required")
    signed_in = await ada.second_step(
        CompleteSignInRequest(mfa_token=first.mfa_token, passkey=authenticator.get(first.passkey_options))
    )
    assert claims_of(signed_in.access_token)["amr"] == ["pwd", key, "user", "mfa"]


async def test_a_passkey_without_a_counter_can_be_used_repeatedly(ada: Person):
    authenticator, _ = await ada.add_passkey(Authenticator(counts=False))
    for _ in range(2):
        first = await ada.first_step()
        passkey = authenticator.get(first.passkey_options, user_handle="")
        await ada.second_step(CompleteSignInRequest(mfa_token=first.mfa_token, passkey=passkey))


async def test_signs_in_with_a_passkey_alone(services: Services, ada: Person):
    authenticator, _ = await ada.add_passkey()
    token, options = await begin_passkey_sign_in(services)
    assert MessageToDict(options)["allowCredentials"] == []
    request = CompleteSignInRequest(mfa_token=token, passkey=authenticator.get(options))
    signed_in = await ada.second_step(request)
    assert signed_in.user.user_id == ada.user_id
    assert claims_of(signed_in.access_token)["amr"] == ["hwk", "user", "mfa"]
    assert await refused(ada.second_step(request)) == TOKEN_INVALID


async def test_the_same_assertion_is_refused_for_another_token(services: Services, ada: Person):
    authenticator, _ = await ada.add_passkey()
    token, options = await begin_passkey_sign_in(services)
    passkey = authenticator.get(options)
    await ada.second_step(CompleteSignInRequest(mfa_token=token, passkey=passkey))
    again, _ = await begin_passkey_sign_in(services)
    assert await refused(ada.second_step(CompleteSignInRequest(mfa_token=again, passkey=passkey))) == WRONG
    first = await ada.first_step()
    request = CompleteSignInRequest(mfa_token=first.mfa_token, passkey=passkey)
    assert await refused(ada.second_step(request)) == WRONG


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(
    "overrides",
    [
        {"challenge": spell(bytes(32))},
        {"origin": "https://evil.example.org"},
        {"rp_id": "evil.example.org"},
        {"flags": PRESENT},
        {"user_handle": spell(bytes(16))},
    ],
)
async def test_refuses_a_wrong_assertion(ada: Person, overrides: dict[str, Any], alone: bool):
    authenticator, _ = await ada.add_passkey()
    if alone:
        token, options = await begin_passkey_sign_in(ada.services)
    else:
        first = await ada.first_step()
        token, options = first.mfa_token, first.passkey_options
    wrong = CompleteSignInRequest(mfa_token=token, passkey=authenticator.get(options, **overrides))
    before = await session_count(ada)
    assert await refused(ada.second_step(wrong)) == WRONG
    assert await session_count(ada) == before
    # The token is still good for a right one.
    await ada.second_step(CompleteSignInRequest(mfa_token=token, passkey=authenticator.get(options)))


async def test_a_passkey_alone_must_say_whose_it_is(services: Services, ada: Person):
    authenticator, _ = await ada.add_passkey()
    token, options = await begin_passkey_sign_in(services)
    request = CompleteSignInRequest(mfa_token=token, passkey=authenticator.get(options, user_handle=""))
    assert await refused(ada.second_step(request)) == WRONG


async def test_passkeys_of_others_and_of_nobody_prove_nothing(services: Services, ada: Person):
    eve = await new_person(services)
    await ada.add_passkey()
    hers, _ = await eve.add_passkey()
    first = await ada.first_step()
    for passkey in (
        hers.get(first.passkey_options),
        hers.get(first.passkey_options, user_handle=spell(bytes.fromhex(ada.user_id.replace("-", "")))),
        hers.get(first.passkey_options, user_handle=""),
        Authenticator().get(first.passkey_options),
    ):
        request = CompleteSignInRequest(mfa_token=first.mfa_token, passkey=passkey)
        assert await refused(ada.second_step(request)) == WRONG


async def test_a_counter_that_does_not_grow_is_refused_and_noted(services: Services, ada: Person):
    authenticator, confirmed = await ada.add_passkey()

    async def sign_in(sign_count: int) -> CompleteSignInResponse:
        token, options = await begin_passkey_sign_in(services)
        passkey = authenticator.get(options, sign_count=sign_count)
        return await ada.second_step(CompleteSignInRequest(mfa_token=token, passkey=passkey))

    await sign_in(7)
    for sign_count in (7, 6, 0):
        assert await refused(sign_in(sign_count)) == WRONG
    entries = await ada.audit_entries("factor.used")
    assert len(entries) == 3
    for entry in entries:
        assert (entry.outcome, entry.reason, entry.address) == ("REFUSED", "FACTOR_WRONG", ada.address)
        assert entry.details == {"factor_id": confirmed.factor.factor_id, "cause": "COUNTER_REGRESSED"}
    await sign_in(8)


@pytest.mark.parametrize(("name", "value"), MALFORMED)
async def test_a_malformed_passkey_is_a_wrong_one(ada: Person, name: str, value: Any):
    """Of who has none: what is read before anything is looked up."""
    token, options = await begin_passkey_sign_in(ada.services)
    passkey = broken(Authenticator().get(options), name, value)
    request = CompleteSignInRequest(mfa_token=token, passkey=passkey)
    assert await refused(ada.second_step(request)) == WRONG


async def test_an_empty_passkey_is_a_wrong_one(ada: Person):
    token, _ = await begin_passkey_sign_in(ada.services)
    contents: list[dict[str, Any]] = [
        {},
        {"response": {}},
        {"id": "", "rawId": "", "type": "", "response": {"a": {"b": []}}},
    ]
    for content in contents:
        request = CompleteSignInRequest(mfa_token=token, passkey=ParseDict(content, Struct()))
        assert await refused(ada.second_step(request)) == WRONG


# With which proofs a ticket begins a session, and whose; every other pair of ticket and proof is refused.
ADA, EVE = "ada", "eve"
GRANTED: dict[tuple[Purpose, bool], dict[str, str]] = {
    (Purpose.SECOND_FACTOR, True): {
        "code": ADA,
        "recovery code": ADA,
        "passkey": ADA,
        "passkey that names nobody": ADA,
    },
    # The account had no passkey when the ticket was given out, so that there is no challenge.
    (Purpose.SECOND_FACTOR, False): {"code": ADA, "recovery code": ADA},
    (Purpose.PASSKEY_SIGN_IN, True): {"passkey": ADA, "passkey of another": EVE},
}


@pytest.mark.parametrize("purpose", Purpose)
@pytest.mark.parametrize("asked", [True, False])
async def test_no_other_token_or_proof_begins_a_session(services: Services, purpose: Purpose, asked: bool):
    ada, eve = await new_person(services), await new_person(services)
    secret, added = await ada.add_totp()
    authenticator, _ = await ada.add_passkey()
    eves_secret, eves = await eve.add_totp()
    eves_authenticator, _ = await eve.add_passkey()
    tickets = Tickets(Seals(services.auth_settings.derived_keys("tickets")), now)
    challenge = spell(bytes(range(64)))
    options = ParseDict({"challenge": challenge}, Struct())
    proofs: dict[str, dict[str, Any]] = {
        "wrong code": {"totp_code": wrong_code_of(secret)},
        "code of another": {"totp_code": code_of(eves_secret, 1)},
        "recovery code of another": {"recovery_code": eves.recovery_codes[0]},
        "passkey for no challenge": {"passkey": authenticator.get(options, challenge="")},
        "passkey of another": {"passkey": eves_authenticator.get(options)},
        "passkey that names nobody": {"passkey": authenticator.get(options, user_handle="")},
        "passkey": {"passkey": authenticator.get(options)},
        "recovery code": {"recovery_code": added.recovery_codes[0]},
        "code": {"totp_code": code_of(secret, 1)},
    }
    names = {ada.user_id: ADA, eve.user_id: EVE}
    for name, proof in proofs.items():
        async with services.sessions.begin() as session:
            holder = None if purpose is Purpose.PASSKEY_SIGN_IN else ada.user_id
            token = tickets.give(session, purpose, holder, {"challenge": challenge} if asked else {})
        before = await session_count(ada) + await session_count(eve)
        (outcome,) = await outcomes_of(ada.second_step(CompleteSignInRequest(mfa_token=token, **proof)))
        who = names[outcome.user.user_id] if isinstance(outcome, CompleteSignInResponse) else None
        assert who == GRANTED.get((purpose, asked), {}).get(name), name
        if who is None:
            known = purpose in {Purpose.SECOND_FACTOR, Purpose.PASSKEY_SIGN_IN}
            assert outcome == (WRONG if known else TOKEN_INVALID), name
        assert await session_count(ada) + await session_count(eve) == before + (who is not None)
        ada.move()


async def test_an_unknown_token_begins_no_session(ada: Person):
    secret, _ = await ada.add_totp()
    for unknown in ("mbt_unknown", ada.access_token[:500]):
        request = CompleteSignInRequest(mfa_token=unknown, totp_code=code_of(secret, 1))
        assert await refused(ada.second_step(request)) == TOKEN_INVALID


async def test_the_steps_of_adding_a_factor_sign_nobody_in(services: Services, ada: Person):
    begun = await services.factors.BeginTotp(BeginTotpRequest(), metadata=ada.metadata)
    request = CompleteSignInRequest(mfa_token=begun.mfa_token, totp_code=code_of(begun.secret))
    assert await refused(ada.second_step(request)) == TOKEN_INVALID
    asked = await services.factors.BeginPasskey(BeginPasskeyRequest(), metadata=ada.metadata)
    passkey = Authenticator().get(asked.options)
    request = CompleteSignInRequest(mfa_token=asked.mfa_token, passkey=passkey)
    assert await refused(ada.second_step(request)) == TOKEN_INVALID


async def test_the_first_step_counts_for_five_minutes(services: Services, ada: Person):
    secret, _ = await ada.add_totp()
    first = await ada.first_step()
    async with services.sessions.begin() as session:
        (ticket,) = await session.scalars(
            select(Ticket).where(Ticket.user_id == ada.user_id, Ticket.purpose == "second-factor")
        )
        assert (ticket.expire_time - ticket.create_time).total_seconds() == 300
        ticket.expire_time = ticket.create_time
    request = CompleteSignInRequest(mfa_token=first.mfa_token, totp_code=code_of(secret, 1))
    assert await refused(ada.second_step(request)) == TOKEN_INVALID


async def test_a_removed_factor_proves_nothing(services: Services, ada: Person):
    secret, confirmed = await ada.add_totp()
    first = await ada.first_step()
    await services.factors.DeleteFactor(
        DeleteFactorRequest(factor_id=confirmed.factor.factor_id), metadata=ada.metadata
    )
    for request in (
        CompleteSignInRequest(mfa_token=first.mfa_token, totp_code=code_of(secret, 1)),
        CompleteSignInRequest(mfa_token=first.mfa_token, recovery_code=confirmed.recovery_codes[0]),
    ):
        assert await refused(ada.second_step(request)) == WRONG


@pytest.mark.parametrize(
    "change", [{"disable_time": now()}, {"activate_time": None}], ids=["disabled", "pending"]
)
async def test_the_passkey_of_an_account_that_is_not_in_use_is_a_wrong_one(
    services: Services, ada: Person, change: dict[str, Any]
):
    authenticator, _ = await ada.add_passkey()
    token, options = await begin_passkey_sign_in(services)
    async with services.sessions.begin() as session:
        await session.execute(update(Account).where(Account.user_id == ada.user_id).values(**change))
    before = await session_count(ada)
    request = CompleteSignInRequest(mfa_token=token, passkey=authenticator.get(options))
    assert await refused(ada.second_step(request)) == WRONG
    assert await session_count(ada) == before


async def test_an_account_that_is_disabled_between_the_steps_gets_no_session(services: Services, ada: Person):
    secret, _ = await ada.add_totp()
    first = await ada.first_step()
    async with services.sessions.begin() as session:
        await session.execute(
            update(Account).where(Account.user_id == ada.user_id).values(disable_time=now())
        )
    before = await session_count(ada)
    request = CompleteSignInRequest(mfa_token=first.mfa_token, totp_code=code_of(secret, 1))
    assert await refused(ada.second_step(request)) == (StatusCode.PERMISSION_DENIED, "ACCOUNT_DISABLED")
    assert await session_count(ada) == before


@pytest.mark.parametrize("kind", ["totp_code", "recovery_code", "passkey"])
async def test_repeated_wrong_proofs_delay_right_ones_but_not_on_known_devices(
    services: Services, ada: Person, kind: str
):
    secret, _ = await ada.add_totp()
    authenticator, _ = await ada.add_passkey()
    first = await ada.first_step()
    wrong: dict[str, Any] = {
        "totp_code": wrong_code_of(secret),
        "recovery_code": "0000-0000-0000-0000",
        "passkey": Authenticator().get(first.passkey_options),
    }
    for _ in range(6):
        request = CompleteSignInRequest(mfa_token=first.mfa_token, **{kind: wrong[kind]})
        assert await refused(ada.second_step(request)) == WRONG
    right = CompleteSignInRequest(mfa_token=first.mfa_token, totp_code=code_of(secret, 1))
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await ada.second_step(right)
    assert (failure.value.code(), reason_of(failure.value)) == DELAYED
    by_passkey = CompleteSignInRequest(
        mfa_token=first.mfa_token, passkey=authenticator.get(first.passkey_options)
    )
    assert await refused(ada.second_step(by_passkey)) == DELAYED
    right.device_token = ada.device_token
    await ada.second_step(right)
    entries = await ada.audit_entries("session.begun")
    assert [entry.reason for entry in entries].count("FACTOR_WRONG") == 6


async def test_failures_from_many_addresses_count_for_the_account(services: Services, ada: Person):
    secret, _ = await ada.add_totp()
    first = await ada.first_step()
    wrong = CompleteSignInRequest(mfa_token=first.mfa_token, totp_code=wrong_code_of(secret))
    for _ in range(services.auth_settings.guess_free_failures_of_account + 1):
        ada.move()
        assert await refused(ada.second_step(wrong)) == WRONG
    ada.move()
    right = CompleteSignInRequest(mfa_token=first.mfa_token, totp_code=code_of(secret, 1))
    assert await refused(ada.second_step(right)) == DELAYED


async def test_wrong_passkeys_alone_count_for_the_address(services: Services, ada: Person):
    authenticator, _ = await ada.add_passkey()
    token, options = await begin_passkey_sign_in(services)
    wrong = CompleteSignInRequest(mfa_token=token, passkey=Authenticator().get(options))
    for _ in range(services.auth_settings.guess_free_failures_of_address + 1):
        assert await refused(ada.second_step(wrong)) == WRONG
    right = CompleteSignInRequest(mfa_token=token, passkey=authenticator.get(options))
    assert await refused(ada.second_step(right)) == DELAYED
    right.device_token = ada.device_token
    signed_in = await ada.second_step(right)
    assert signed_in.user.user_id == ada.user_id


async def test_a_page_gets_its_session_in_cookies(services: Services, ada: Person):
    secret, _ = await ada.add_totp()
    first = await ada.first_step()
    request = CompleteSignInRequest(mfa_token=first.mfa_token, totp_code=code_of(secret, 1), cookies=True)
    outcome = await refused(
        services.auth.CompleteSignIn(
            request, metadata=(*ada.from_here, ("origin", "https://evil.example.org"))
        )
    )
    assert outcome == (StatusCode.PERMISSION_DENIED, "ORIGIN_REFUSED")
    page = ("origin", services.auth_settings.public_url)
    call = services.auth.CompleteSignIn(request, metadata=(*ada.from_here, page))
    signed_in = await call
    assert (signed_in.access_token, signed_in.refresh_token, signed_in.device_token) == ("", "", "")
    names = {
        str(value).partition("=")[0] for key, value in await call.initial_metadata() if key == "set-cookie"
    }
    assert names == {"mb_session", "mb_refresh", "mb_refresh_key", "mb_device"}
