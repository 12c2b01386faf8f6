from meshboard.user.v1.user_service_pb2 import GetMeRequest

from tests.auth_svc.conftest import Services, bearer, new_email


async def test_gives_tokens_that_work_elsewhere(services: Services):
    email = new_email()
    signed_up = await services.sign_up(email)
    assert signed_up.expires_in_seconds == 600
    assert signed_up.refresh_token.startswith("mbr_")
    assert signed_up.refresh_key.startswith("mbk_")
    me = await services.users.GetMe(GetMeRequest(), metadata=bearer(signed_up.access_token))
    assert me.user == signed_up.user
    assert me.user.email == email
