"""Second factors as pages in a browser use them: JSON through the gateway."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.struct_pb2 import Struct

from tests.auth_svc.authenticator import Authenticator
from tests.auth_svc.people import code_of
from tests.mesh.people import Person
from tests.parts import Mesh

pytestmark = pytest.mark.xdist_group("mesh")


async def sign_in(person: Person) -> Any:
    return await person.post("/v1/auth:signIn", {"email": person.email, "password": person.password})


def carry(person: Person, answer: Any) -> None:
    person.headers["authorization"] = f"Bearer {answer['accessToken']}"


async def test_an_authenticator_app_and_a_recovery_code(ann: Person):
    begun = await ann.post("/v1/auth/factors:beginTotp", {})
    confirm = {"mfaToken": begun["mfaToken"], "code": code_of(begun["secret"]), "title": "Phone"}
    confirmed = await ann.post("/v1/auth/factors:confirmTotp", confirm)
    carry(ann, confirmed)
    listed = await ann.get("/v1/auth/factors")
    assert [factor["kind"] for factor in listed["factors"]] == ["TOTP", "RECOVERY_CODES"]

    first = await sign_in(ann)
    assert (first["accessToken"], first["factors"]) == ("", ["RECOVERY_CODES", "TOTP"])
    complete = {"mfaToken": first["mfaToken"], "totpCode": "000000"}
    if complete["totpCode"] != code_of(begun["secret"]):
        refused = await ann.call("POST", "/v1/auth:completeSignIn", complete)
        assert (refused.status, refused.reason) == (401, "FACTOR_WRONG")
    complete["totpCode"] = code_of(begun["secret"], 1)
    carry(ann, await ann.post("/v1/auth:completeSignIn", complete))
    await ann.get("/v1/users/me")

    complete = {"mfaToken": (await sign_in(ann))["mfaToken"], "recoveryCode": confirmed["recoveryCodes"][0]}
    carry(ann, await ann.post("/v1/auth:completeSignIn", complete))
    replaced = await ann.post("/v1/auth/factors:replaceRecoveryCodes", {})
    assert len(replaced["recoveryCodes"]) == 10
    gone = await ann.call("DELETE", f"/v1/auth/factors/{listed['factors'][0]['factorId']}")
    assert gone.status == 200
    assert (await sign_in(ann))["mfaToken"] == ""


async def test_a_passkey_in_the_place_of_the_password(mesh: Mesh, ann: Person):
    authenticator = Authenticator()

    def made(method: Any, options: Any) -> Any:
        return MessageToDict(method(ParseDict(options, Struct()), origin=mesh.gateway_url))

    begun = await ann.post("/v1/auth/factors:beginPasskey", {})
    credential = made(authenticator.create, begun["options"])
    confirm = {"mfaToken": begun["mfaToken"], "credential": credential, "title": "Laptop"}
    await ann.post("/v1/auth/factors:confirmPasskey", confirm)
    ann.headers.clear()
    asked = await ann.post("/v1/auth:beginPasskeySignIn", {})
    complete = {
        "mfaToken": asked["mfaToken"],
        "passkey": made(authenticator.get, asked["options"]),
        "cookies": True,
    }
    signed_in = await ann.call("POST", "/v1/auth:completeSignIn", complete, origin=mesh.gateway_url)
    assert signed_in.status == 200, signed_in
    assert signed_in.body["accessToken"] == ""
    assert signed_in.body["user"]["userId"] == ann.user_id
