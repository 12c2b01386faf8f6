"""The keys that are published, and what is signed with them."""

import json
import time

import jwt
from google.protobuf.json_format import MessageToDict
from meshboard.auth.v1.auth_service_pb2 import GetJwksRequest
from sqlalchemy import select

from services.auth_svc.models import SigningKeyRow
from tests.auth_svc.conftest import Services, claims_of
from tests.harness import ISSUER


async def test_any_library_verifies_tokens_with_it(services: Services):
    signed_up = await services.sign_up()
    answer = await services.auth.GetJwks(GetJwksRequest())
    keys = jwt.PyJWKSet.from_json(json.dumps(MessageToDict(answer)))
    header = jwt.get_unverified_header(signed_up.access_token)
    assert header == {"alg": "ES256", "typ": "at+jwt", "kid": answer.keys[0].kid}
    claims = jwt.decode(
        signed_up.access_token, keys[header["kid"]], ["ES256"], audience="meshboard", issuer=ISSUER
    )
    assert set(claims) == {
        *("iss", "aud", "sub", "exp", "iat", "jti", "client_id", "sid", "wid", "amr", "auth_time", "scope")
    }
    assert claims["sub"] == signed_up.user.user_id
    assert claims["wid"] == signed_up.workspace.workspace_id
    assert (claims["client_id"], claims["amr"]) == ("meshboard", ["pwd"])
    assert claims["exp"] - claims["iat"] == 600
    assert abs(claims["iat"] - time.time()) < 60


async def test_each_token_has_an_id_of_its_own(services: Services):
    signed_up = await services.sign_up()
    signed_in = await services.sign_in(signed_up.user.email)
    first, second = claims_of(signed_up.access_token), claims_of(signed_in.access_token)
    assert first["jti"] != second["jti"]
    assert first["sid"] != second["sid"]


async def test_publishes_nothing_private(services: Services):
    answer = MessageToDict(await services.auth.GetJwks(GetJwksRequest()))
    for key in answer["keys"]:
        assert set(key) == {"kty", "crv", "x", "y", "kid", "alg", "use"}
        assert (len(key["x"]), len(key["y"])) == (43, 43)
    async with services.sessions() as session:
        rows = (await session.scalars(select(SigningKeyRow))).all()
    # A PKCS8 key of P-256 names its curve: in the clear these bytes would be there.
    assert rows
    assert all(bytes.fromhex("06082a8648ce3d030107") not in row.sealed_key for row in rows)
