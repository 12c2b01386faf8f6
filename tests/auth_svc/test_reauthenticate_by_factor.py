import grpc
from meshboard.auth.v1.account_service_pb2 import ReauthenticateRequest, ReauthenticateResponse
from meshboard.auth.v1.auth_service_pb2 import BeginPasskeySignInRequest, BeginPasskeySignInResponse

from tests.auth_svc.conftest import Services, claims_of
from tests.auth_svc.people import Person, code_of, new_person, outcomes_of, wrong_code_of
from tests.harness import refused

FACTOR_WRONG = (grpc.StatusCode.UNAUTHENTICATED, "FACTOR_WRONG")
MFA_TOKEN_INVALID = (grpc.StatusCode.UNAUTHENTICATED, "MFA_TOKEN_INVALID")


async def prove(person: Person, request: ReauthenticateRequest) -> ReauthenticateResponse:
    return await person.services.accounts.Reauthenticate(request, metadata=person.metadata)


async def asked(person: Person) -> BeginPasskeySignInResponse:
    return await person.services.auth.BeginPasskeySignIn(
        BeginPasskeySignInRequest(), metadata=person.from_here
    )


async def test_a_code_proves_who_calls_once(services: Services):
    person = await new_person(services)
    secret, _ = await person.add_totp()
    assert (
        await refused(prove(person, ReauthenticateRequest(totp_code=wrong_code_of(secret)))) == FACTOR_WRONG
    )
    code = code_of(secret, ahead=1)  # that of now has confirmed the factor
    proved = await prove(person, ReauthenticateRequest(totp_code=code))
    before, after = claims_of(person.access_token), claims_of(proved.access_token)
    assert before["sid"] != after["sid"]
    assert {"pwd", "otp", "mfa"} <= set(after["amr"])
    person.access_token = proved.access_token
    assert await refused(prove(person, ReauthenticateRequest(totp_code=code))) == FACTOR_WRONG


async def test_a_passkey_proves_who_calls_once(services: Services):
    person = await new_person(services)
    authenticator, _ = await person.add_passkey()
    begun = await asked(person)
    request = ReauthenticateRequest(passkey=authenticator.get(begun.options), mfa_token=begun.mfa_token)
    proved = await prove(person, request)
    assert claims_of(proved.access_token)["sid"] != claims_of(person.access_token)["sid"]
    person.access_token = proved.access_token
    assert await refused(prove(person, request)) == MFA_TOKEN_INVALID


async def test_the_passkey_of_somebody_else_is_wrong(services: Services):
    person, other = await new_person(services), await new_person(services)
    await person.add_passkey()
    authenticator, _ = await other.add_passkey()
    begun = await asked(person)
    request = ReauthenticateRequest(passkey=authenticator.get(begun.options), mfa_token=begun.mfa_token)
    assert await refused(prove(person, request)) == FACTOR_WRONG


async def test_of_many_proofs_at_once_with_one_passkey_one_counts(services: Services):
    person = await new_person(services)
    authenticator, _ = await person.add_passkey()
    begun = await asked(person)
    request = ReauthenticateRequest(passkey=authenticator.get(begun.options), mfa_token=begun.mfa_token)
    outcomes = await outcomes_of(*(prove(person, request) for _ in range(10)))
    assert len([each for each in outcomes if isinstance(each, ReauthenticateResponse)]) == 1
