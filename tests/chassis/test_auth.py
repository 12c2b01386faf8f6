"""Tokens: what is accepted, and everything else that is not."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from services.chassis import auth, errors
from tests.conditions import eventually
from tests.harness import ISSUER, Identity, new_id


def b64(data: bytes | str | dict[str, Any]) -> str:
    raw = (
        json.dumps(data).encode()
        if isinstance(data, dict)
        else data.encode()
        if isinstance(data, str)
        else data
    )
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def signed(identity: Identity, header: dict[str, Any] | str, claims: dict[str, Any] | str) -> str:
    """A token with a correct signature over whatever it is given."""
    signing_input = f"{b64(header)}.{b64(claims)}"
    key = jwt.get_algorithm_by_name("ES256")
    return f"{signing_input}.{b64(key.sign(signing_input.encode(), identity.key))}"


def good_claims(**changes: Any) -> dict[str, Any]:
    now = int(time.time())
    claims = {
        "iss": ISSUER,
        "aud": "meshboard",
        "sub": new_id(),
        "sid": new_id(),
        "jti": new_id(),
        "client_id": "meshboard",
        "iat": now,
        "exp": now + 600,
        **changes,
    }
    return {name: value for name, value in claims.items() if value is not None}


def good_header(identity: Identity, **changes: Any) -> dict[str, Any]:
    header = {"alg": "ES256", "typ": "at+jwt", "kid": identity.key_id, **changes}
    return {name: value for name, value in header.items() if value is not None}


async def refused(identity: Identity, token: str) -> str:
    with pytest.raises(errors.Error) as caught:
        await auth.TokenVerifier(ISSUER, identity.fetch_keys).verify(token)
    assert caught.value.code.name == "UNAUTHENTICATED"
    return caught.value.reason


async def test_accepts_a_good_token(identity: Identity):
    user_id = new_id()
    claims = await auth.TokenVerifier(ISSUER, identity.fetch_keys).verify(identity.token(sub=user_id))
    assert claims.user_id == user_id


async def test_the_hand_made_control_is_accepted(identity: Identity):
    token = signed(identity, good_header(identity), good_claims())
    await auth.TokenVerifier(ISSUER, identity.fetch_keys).verify(token)


@pytest.mark.parametrize(
    "changes",
    [
        {"alg": "none"},
        {"alg": "None"},
        {"alg": "HS256"},
        {"alg": "RS256"},
        {"typ": "JWT"},
        {"typ": None},
        {"typ": "AT+JWT"},
        {"kid": None},
        {"kid": 7},
        {"kid": "../../dev/null"},
        {"kid": "' OR 1=1 --"},
        {"crit": ["exp"]},
        {"jwk": {"kty": "EC"}},
        {"jku": "http://127.0.0.1/keys"},
        {"x5u": "http://127.0.0.1/cert"},
        {"b64": False},
    ],
)
async def test_refuses_headers(identity: Identity, changes: dict[str, Any]):
    token = signed(identity, good_header(identity, **changes), good_claims())
    assert await refused(identity, token) == "TOKEN_INVALID"


@pytest.mark.parametrize(
    "changes",
    [
        {"iss": "http://elsewhere"},
        {"iss": None},
        {"aud": "other"},
        {"aud": ["meshboard", "other"]},
        {"aud": None},
        {"sub": None},
        {"sub": 5},
        {"sid": None},
        {"jti": None},
        {"client_id": None},
        {"iat": None},
        {"iat": "now"},
        {"iat": int(time.time()) + 3600},
        {"nbf": int(time.time()) + 3600},
        {"exp": None},
        {"exp": "never"},
        {"exp": True},
    ],
)
async def test_refuses_claims(identity: Identity, changes: dict[str, Any]):
    token = signed(identity, good_header(identity), good_claims(**changes))
    assert await refused(identity, token) == "TOKEN_INVALID"


async def test_tells_that_a_token_has_expired(identity: Identity):
    token = identity.token(exp=int(time.time()) - 1)
    assert await refused(identity, token) == "TOKEN_EXPIRED"


async def test_a_remembered_token_expires_too(identity: Identity):
    verifier = auth.TokenVerifier(ISSUER, identity.fetch_keys)
    token = identity.token(exp=time.time() + 0.2)
    await verifier.verify(token)

    async def expired() -> bool:
        try:
            await verifier.verify(token)
        except errors.Error as error:
            return error.reason == "TOKEN_EXPIRED"
        return False

    await eventually(expired)


async def test_refuses_other_spellings_of_a_good_token(identity: Identity):
    token = identity.token()
    head, body, signature = token.split(".")
    raw = base64.urlsafe_b64decode(signature + "==")
    last = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_".index(signature[-1])
    malleable = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"[last ^ 1]
    for wrong in (
        f"{token}=",
        f"{head}.{body}.{signature}==",
        f"{head}.{body}.{signature[:-1]}{malleable}",
        f"{head}.{body}.",
        f"{head}.{body}",
        f"{head}.{body}.{signature}.x",
        f"{head}.{body}.{b64(bytes(64))}",
        f"{head}.{body}.{b64(raw[:63])}",
        f"{head}.{body}.{b64(raw + bytes(8))}",
        f" {token}",
        token.replace(".", "..", 1),
        f"{head}.{body}.{'é' * 86}",
        "",
        "x" * 10_000,
        f"{b64('[]')}.{body}.{signature}",
        f"{b64('{')}.{body}.{signature}",
    ):
        assert await refused(identity, wrong) == "TOKEN_INVALID", wrong


async def test_refuses_names_that_appear_twice(identity: Identity):
    claims = json.dumps(good_claims())
    twice = claims[:-1] + f', "sub": "{new_id()}"}}'
    assert await refused(identity, signed(identity, good_header(identity), twice)) == "TOKEN_INVALID"


async def test_refuses_a_public_key_used_as_a_secret(identity: Identity):
    pem = identity.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    signing_input = f"{b64(good_header(identity, alg='HS256'))}.{b64(good_claims())}"
    mac = hmac.new(pem, signing_input.encode(), hashlib.sha256).digest()
    assert await refused(identity, f"{signing_input}.{b64(mac)}") == "TOKEN_INVALID"


async def test_refuses_another_key_under_a_known_name(identity: Identity):
    stranger = Identity(identity.keys)
    assert await refused(identity, stranger.token()) == "TOKEN_INVALID"


class Keys:
    """Counts fetches; gives keys, or fails."""

    def __init__(self, identity: Identity) -> None:
        self.keys = {identity.key_id: identity.key.public_key()}
        self.count = 0
        self.down = False

    async def fetch(self) -> auth.Keys:
        self.count += 1
        if self.down:
            raise errors.unavailable("auth does not answer.")
        return dict(self.keys)


async def test_an_outage_of_the_keys_does_not_stop_known_ones(identity: Identity):
    keys = Keys(identity)
    verifier = auth.TokenVerifier(ISSUER, keys.fetch, ttl_seconds=0)
    await verifier.verify(identity.token())
    keys.down = True
    await verifier.verify(identity.token())
    assert keys.count >= 2


async def test_without_any_key_the_call_is_unavailable(identity: Identity):
    keys = Keys(identity)
    keys.down = True
    with pytest.raises(errors.Error) as caught:
        await auth.TokenVerifier(ISSUER, keys.fetch).verify(identity.token())
    assert caught.value.code.name == "UNAVAILABLE"


async def test_a_retired_key_is_refused_once_it_is_gone(identity: Identity):
    keys = Keys(identity)
    verifier = auth.TokenVerifier(ISSUER, keys.fetch, ttl_seconds=0)
    token = identity.token()
    await verifier.verify(token)
    keys.keys = {"new": ec.generate_private_key(ec.SECP256R1()).public_key()}
    with pytest.raises(errors.Error) as caught:
        await verifier.verify(token)
    assert caught.value.reason == "TOKEN_INVALID"


# Service tokens


async def test_a_key_that_was_announced_as_retired_is_refused_while_it_is_still_served(identity: Identity):
    verifier = auth.TokenVerifier(ISSUER, identity.fetch_keys, ttl_seconds=0)
    token = identity.token()
    await verifier.verify(token)
    verifier.retire(identity.key_id)
    for known in (token, identity.token()):
        with pytest.raises(errors.Error) as caught:
            await verifier.verify(known)
        assert caught.value.reason == "TOKEN_INVALID"


def test_services_know_each_other(identity: Identity):
    token = auth.ServiceTokens("dashboard", identity.keys).issue("user")
    assert auth.ServiceTokens("user", identity.keys).verify(token) == "dashboard"


def test_a_service_token_is_for_one_callee(identity: Identity):
    token = auth.ServiceTokens("dashboard", identity.keys).issue("user")
    with pytest.raises(errors.Error) as caught:
        auth.ServiceTokens("analytics", identity.keys).verify(token)
    assert caught.value.reason == "TOKEN_INVALID"


def test_an_access_token_is_no_service_token(identity: Identity):
    with pytest.raises(errors.Error):
        auth.ServiceTokens("user", identity.keys).verify(identity.token())


# Ended sessions


class Owner:
    """What auth_svc knows of sessions."""

    def __init__(self) -> None:
        self.revoked: set[str] = set()
        self.loads = 0
        self.asks = 0

    async def load(self) -> set[str]:
        self.loads += 1
        return set(self.revoked)

    async def ask(self, session_id: str) -> bool:
        self.asks += 1
        return session_id not in self.revoked


async def ended(revocations: auth.Revocations, session_id: str) -> bool:
    try:
        await revocations.check(session_id)
    except errors.Error as error:
        return error.reason == "SESSION_REVOKED"
    return False


async def test_revocations_are_loaded_once_and_followed():
    owner = Owner()
    owner.revoked = {"before"}
    revocations = auth.Revocations(lambda: True, owner.load, owner.ask)
    assert await ended(revocations, "before")
    assert not await ended(revocations, "later")
    revocations.revoke("later")
    assert await ended(revocations, "later")
    assert (owner.loads, owner.asks) == (1, 0)


async def test_a_gap_is_caught_up():
    owner = Owner()
    revocations = auth.Revocations(lambda: True, owner.load, owner.ask)
    assert not await ended(revocations, "missed")
    owner.revoked = {"missed"}
    revocations.gap()
    assert await ended(revocations, "missed")


async def test_without_announcements_each_call_asks():
    owner = Owner()
    fresh = True
    revocations = auth.Revocations(lambda: fresh, owner.load, owner.ask)
    assert not await ended(revocations, "session")
    fresh = False
    owner.revoked = {"session"}
    assert await ended(revocations, "session")
    assert owner.asks == 1
    fresh = True
    owner.revoked = {"session", "meanwhile"}
    assert await ended(revocations, "meanwhile"), "what happened in the silence is caught up"
