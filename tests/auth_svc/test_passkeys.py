from datetime import timedelta
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.struct_pb2 import Struct

from services.auth_svc import passkeys
from services.auth_svc.passkeys import RelyingParty, WrongPasskey
from tests.auth_svc.authenticator import (
    ATTESTED,
    BACKED_UP,
    PRESENT,
    VERIFIED,
    Authenticator,
    read,
    spell,
)
from tests.harness import ISSUER, new_id

US = RelyingParty.at(ISSUER)
MINUTE = timedelta(minutes=1)


@pytest.mark.parametrize(
    ("public_url", "rp_id", "origin"),
    [
        ("https://meshboard.example.org", "meshboard.example.org", "https://meshboard.example.org"),
        ("https://Meshboard.Example.org:443/", "meshboard.example.org", "https://meshboard.example.org"),
        ("https://meshboard.example.org:8443", "meshboard.example.org", "https://meshboard.example.org:8443"),
        ("http://localhost:8080", "localhost", "http://localhost:8080"),
        ("http://127.0.0.1:8080", "127.0.0.1", "http://127.0.0.1:8080"),
        ("http://[::1]:8080", "::1", "http://[::1]:8080"),
    ],
)
def test_the_configured_address_says_who_we_are(public_url: str, rp_id: str, origin: str):
    assert RelyingParty.at(public_url) == RelyingParty(rp_id, origin)


def make() -> tuple[Authenticator, Struct, str]:
    """An authenticator, and what it is asked for."""
    options, challenge = US.ask_for_new(new_id(), "ada@example.org", "Ada", [], MINUTE)
    return Authenticator(), options, challenge


def test_asks_for_a_verified_passkey_that_is_new():
    user_id = new_id()
    options, challenge = US.ask_for_new(user_id, "ada@example.org", "Ada", [b"known"], MINUTE)
    asked = MessageToDict(options)
    assert asked["rp"] == {"id": "127.0.0.1", "name": "Meshboard"}
    assert asked["user"]["name"] == "ada@example.org"
    assert read(asked["user"]["id"]).hex() == user_id.replace("-", "")
    assert asked["authenticatorSelection"] == {
        "residentKey": "required",
        "requireResidentKey": True,
        "userVerification": "required",
    }
    assert asked["attestation"] == "none"
    assert asked["excludeCredentials"] == [{"id": spell(b"known"), "type": "public-key"}]
    assert (asked["challenge"], asked["timeout"]) == (challenge, 60_000)
    assert len(read(challenge)) >= 32


def test_says_where_the_key_is():
    for synced, methods in ((False, ("hwk", "user", "mfa")), (True, ("swk", "user", "mfa"))):
        options, challenge = US.ask_for_new(new_id(), "ada@example.org", "Ada", [], MINUTE)
        authenticator = Authenticator(synced=synced)
        made = US.registered(authenticator.create(options), challenge)
        assert (made.credential_id, made.methods) == (authenticator.credential_id, methods)
        options, challenge = US.ask([], MINUTE)
        asserted = US.asserted(authenticator.get(options), challenge, made.public_key)
        assert (asserted.sign_count, asserted.methods) == (2, methods)


REGISTRATIONS: dict[str, dict[str, Any]] = {
    "wrong challenge": {"challenge": spell(bytes(32))},
    "no challenge": {"challenge": ""},
    "challenge that is no text": {"challenge": [1]},
    "wrong origin": {"origin": "https://evil.example.org"},
    "other port": {"origin": "http://127.0.0.1:8081"},
    "origin that is no text": {"origin": [ISSUER]},
    "frame": {"cross_origin": True},
    "assertion": {"type": "webauthn.get"},
    "other host": {"rp_id": "evil.example.org"},
    "nobody verified": {"flags": PRESENT},
    "nobody present": {"flags": VERIFIED},
    "copy of what cannot be copied": {"flags": PRESENT | VERIFIED | BACKED_UP},
    "unknown attestation": {"attestation": {"fmt": "other"}},
    "attestation that is none": {"attestation": {"fmt": "packed"}},
    "no data": {"attestation": {"authData": b""}},
    "data that is no bytes": {"attestation": {"authData": 7}},
    "more behind the key": {"trailing": b"more"},
    "unknown algorithm": {"cose": {3: -65535}},
    "unknown kind of key": {"cose": {1: 99}},
    "unknown curve": {"cose": {-1: 99}},
    "point that is on no curve": {"cose": {-3: bytes(32)}},
    "coordinate that is no bytes": {"cose": {-2: "x"}},
}


@pytest.mark.parametrize("overrides", REGISTRATIONS.values(), ids=REGISTRATIONS.keys())
def test_refuses_to_register_what_it_has_not_asked_for(overrides: dict[str, Any]):
    authenticator, options, challenge = make()
    with pytest.raises(WrongPasskey):
        US.registered(authenticator.create(options, **overrides), challenge)


def test_refuses_an_id_that_is_empty_or_too_long():
    for length in (0, 1024):
        options, challenge = US.ask_for_new(new_id(), "ada@example.org", "Ada", [], MINUTE)
        credential = Authenticator(credential_id=bytes(length)).create(options)
        with pytest.raises(WrongPasskey):
            US.registered(credential, challenge)


ASSERTIONS: dict[str, dict[str, Any]] = {
    "wrong challenge": {"challenge": spell(bytes(32))},
    "no challenge": {"challenge": ""},
    "wrong origin": {"origin": "https://evil.example.org"},
    "frame": {"cross_origin": True},
    "registration": {"type": "webauthn.create"},
    "other host": {"rp_id": "evil.example.org"},
    "nobody verified": {"flags": PRESENT},
    "nobody present": {"flags": VERIFIED},
    "copy of what cannot be copied": {"flags": PRESENT | VERIFIED | BACKED_UP},
    "more than was signed": {"flags": PRESENT | VERIFIED | ATTESTED},
}


@pytest.mark.parametrize("overrides", ASSERTIONS.values(), ids=ASSERTIONS.keys())
def test_refuses_an_assertion_that_it_has_not_asked_for(overrides: dict[str, Any]):
    authenticator, options, challenge = make()
    made = US.registered(authenticator.create(options), challenge)
    options, challenge = US.ask([made.credential_id], MINUTE)
    US.asserted(authenticator.get(options), challenge, made.public_key)
    with pytest.raises(WrongPasskey):
        US.asserted(authenticator.get(options, **overrides), challenge, made.public_key)


def test_refuses_the_signature_of_another_key():
    authenticator, options, challenge = make()
    made = US.registered(authenticator.create(options), challenge)
    options, challenge = US.ask([], MINUTE)
    other = Authenticator(credential_id=made.credential_id)
    with pytest.raises(WrongPasskey):
        US.asserted(other.get(options), challenge, made.public_key)


def deep(levels: int) -> dict[str, Any]:
    """An object in an object in …"""
    return {"a": deep(levels - 1)} if levels else {}


MALFORMED: list[tuple[str, Any]] = [
    ("id", None),
    ("id", 7),
    ("rawId", None),
    ("rawId", "not base64url!"),
    ("rawId", "A"),
    ("rawId", "x" * 2_000_000),
    ("rawId", "AAAA"),  # not what id says
    ("rawId", {}),
    ("type", None),
    ("type", "password"),
    ("type", ["public-key"]),
    ("response", None),
    ("response", "text"),
    ("response", []),
    ("response", deep(25)),
    ("clientDataJSON", None),
    ("clientDataJSON", ""),
    ("clientDataJSON", True),
    ("clientDataJSON", "A"),
    ("clientDataJSON", spell(b"\xff\xfe")),
    ("clientDataJSON", spell(b"[]")),
    ("clientDataJSON", spell(b"{}")),
    ("clientDataJSON", spell(b"[" * 20_000)),
    ("clientDataJSON", spell(b'{"type":1,"challenge":2,"origin":3}')),
    ("attestationObject", None),
    ("attestationObject", ""),
    ("attestationObject", spell(b"\x9f" * 20_000)),
    ("attestationObject", spell(b"\xa1\x61a")),
    ("authenticatorData", None),
    ("authenticatorData", ""),
    ("authenticatorData", spell(bytes(36))),
    ("authenticatorData", [1]),
    ("signature", None),
    ("signature", ""),
    ("signature", spell(b"no signature")),
    ("signature", "AAAA===A"),
    ("userHandle", 7),
    ("userHandle", spell(b"short")),
    ("userHandle", "A"),
]


def broken(credential: Struct, name: str, value: Any) -> Struct:
    """The credential with another value in one place; None takes it away."""
    content = MessageToDict(credential)
    place = content if name in {"id", "rawId", "type", "response"} else content["response"]
    if value is None:
        place.pop(name, None)
    else:
        place[name] = value
    return ParseDict(content, Struct())


def judge(credential: Struct, challenge: str, public_key: bytes) -> None:
    """Everything that is read of an assertion."""
    passkeys.credential_id_of(credential)
    passkeys.user_id_of(credential)
    US.asserted(credential, challenge, public_key)


@pytest.mark.parametrize(("name", "value"), MALFORMED)
def test_refuses_what_is_malformed(name: str, value: Any):
    authenticator, options, challenge = make()
    created = authenticator.create(options)
    made = US.registered(created, challenge)
    if name not in {"authenticatorData", "signature", "userHandle"}:
        with pytest.raises(WrongPasskey):
            US.registered(broken(created, name, value), challenge)
    options, challenge = US.ask([], MINUTE)
    if name != "attestationObject":
        credential = broken(authenticator.get(options), name, value)
        with pytest.raises(WrongPasskey):
            judge(credential, challenge, made.public_key)


def test_reads_an_answer_without_or_with_an_empty_user_handle():
    authenticator, options, challenge = make()
    made = US.registered(authenticator.create(options), challenge)
    options, challenge = US.ask([], MINUTE)
    for value in (None, ""):
        credential = broken(authenticator.get(options), "userHandle", value)
        assert passkeys.user_id_of(credential) == ""
        US.asserted(credential, challenge, made.public_key)
    content = MessageToDict(authenticator.get(options))
    content["response"]["userHandle"] = None
    assert passkeys.user_id_of(ParseDict(content, Struct())) == ""
