"""Access tokens that must be refused, each made from what a valid one consists of, and some that must be accepted.

Sources: RFC 8725 (best current practices of JWT), RFC 7515 (JWS), RFC 9068 (access tokens), and the flaws that
libraries for JWT have had.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.harness import new_id

# The order of the group of P-256 (SEC 2, section 2.4.2).
N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551

Key = ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class Forge:
    """What a valid token is made of, and other secrets that somebody could try in its place."""

    header: Mapping[str, Any]
    claims: Mapping[str, Any]
    key: Key
    other_key: Key
    other_workspace_id: str
    refresh_token: str
    refresh_key: str
    device_token: str
    service_token: str
    service_key: Key
    revoked_session_id: str

    def sign(
        self,
        header: Mapping[str, Any] | str | bytes | None = None,
        claims: Mapping[str, Any] | str | bytes | None = None,
        key: Key | None = None,
    ) -> str:
        """A token with a correct signature (ES256) over whatever it is given; by default a valid one."""
        signing_input = self.unsigned(header, claims)
        return f"{signing_input}.{b64(raw_signature(key or self.key, signing_input.encode()))}"

    def unsigned(
        self,
        header: Mapping[str, Any] | str | bytes | None = None,
        claims: Mapping[str, Any] | str | bytes | None = None,
    ) -> str:
        """Header and claims without a signature."""
        head = self.header if header is None else header
        body = self.claims if claims is None else claims
        return f"{b64(head)}.{b64(body)}"

    def with_header(self, **changes: Any) -> str:
        """A signed token with another header; what is None is left out."""
        return self.sign(header=_changed(self.header, changes))

    def with_claims(self, **changes: Any) -> str:
        """A signed token with other claims; what is None is left out."""
        return self.sign(claims=_changed(self.claims, changes))

    def hmac(self, secret: bytes, algorithm: str = "HS256") -> str:
        """A token whose signature is a MAC."""
        digest = {"HS256": "sha256", "HS384": "sha384", "HS512": "sha512"}[algorithm]
        signing_input = self.unsigned(_changed(self.header, {"alg": algorithm}))
        return f"{signing_input}.{b64(hmac.digest(secret, signing_input.encode(), digest))}"

    def with_signature(self, change: Callable[[bytes], bytes]) -> str:
        """The valid token with another signature of raw bytes."""
        signing_input = self.unsigned()
        return f"{signing_input}.{b64(change(raw_signature(self.key, signing_input.encode())))}"

    def respelled(self, change: Callable[[str, str, str], str]) -> str:
        """The valid token, written in another way."""
        return change(*self.sign().split("."))

    def public_pem(self, key: Key | None = None) -> bytes:
        """The public key as everyone can get it."""
        return (key or self.key).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def public_der(self) -> bytes:
        """The public key in binary."""
        return self.key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    def public_jwk(self, key: Key | None = None) -> dict[str, str]:
        """The public key as the key set shows it."""
        point = (key or self.key).public_key().public_numbers()
        return {
            "kty": "EC",
            "crv": "P-256",
            "x": b64(point.x.to_bytes(32, "big")),
            "y": b64(point.y.to_bytes(32, "big")),
        }


def b64(data: Mapping[str, Any] | str | bytes) -> str:
    """base64url without padding, of JSON where it is an object."""
    if isinstance(data, Mapping):
        data = json.dumps(dict(data))
    raw = data.encode() if isinstance(data, str) else data
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def raw_signature(key: Key, content: bytes) -> bytes:
    """ES256 as JWS has it: r and s, 32 bytes each (RFC 7518, section 3.4)."""
    return raw_pair(*decode_dss_signature(key.sign(content, ec.ECDSA(SHA256()))))


def raw_pair(r: int, s: int) -> bytes:
    """r and s, 32 bytes each."""
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def _changed(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**values, **changes}.items() if value is not None}


def _halves(signature: bytes) -> tuple[int, int]:
    return int.from_bytes(signature[:32]), int.from_bytes(signature[32:])


def _negated(signature: bytes) -> bytes:
    r, s = _halves(signature)
    return raw_pair(r, N - s)


def _der(forge: Forge) -> str:
    signing_input = forge.unsigned()
    return f"{signing_input}.{b64(forge.key.sign(signing_input.encode(), ec.ECDSA(SHA256())))}"


def _trailing_bits(part: str) -> str:
    """Another spelling of the same bytes: the last character of 64 or 32 bytes has bits that stand for nothing."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    return part[:-1] + alphabet[alphabet.index(part[-1]) ^ 1]


def _twice(values: Mapping[str, Any], name: str, value: Any) -> str:
    """JSON in which a name appears twice."""
    return json.dumps(dict(values))[:-1] + f", {json.dumps(name)}: {json.dumps(value)}}}"


def _raw_claim(forge: Forge, name: str, value: str) -> str:
    """A signed token with a claim that is written in JSON, or in what some take for it."""
    rest = json.dumps(_changed(forge.claims, {name: None}))
    return forge.sign(claims=f'{rest[:-1]}, "{name}": {value}}}')


def _unsafe_alphabet(forge: Forge) -> str:
    """Base64 with + and /: signed over this spelling, so that only the alphabet is wrong."""
    claims = {**forge.claims, "note": "???>>>~~~"}
    body = base64.b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    assert "+" in body or "/" in body
    signing_input = f"{b64(forge.header)}.{body}"
    return f"{signing_input}.{b64(raw_signature(forge.key, signing_input.encode()))}"


def _json_serialization(forge: Forge) -> str:
    head, body, signature = forge.sign().split(".")
    return json.dumps({"payload": body, "protected": head, "signature": signature})


def _general_serialization(forge: Forge) -> str:
    head, body, signature = forge.sign().split(".")
    return json.dumps({"payload": body, "signatures": [{"protected": head, "signature": signature}]})


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def _coordinate(forge: Forge) -> bytes:
    return forge.public_jwk()["x"].encode()


def _jwk_text(forge: Forge) -> bytes:
    return json.dumps(forge.public_jwk()).encode()


def _self_signed(forge: Forge, **header: Any) -> str:
    """Signed with a key of somebody's own, which the header brings along or points to."""
    return forge.sign(header={**forge.header, **header}, key=forge.other_key)


def _now() -> int:
    return int(time.time())


Make = Callable[[Forge], str]

BROKEN: dict[str, Make] = {
    # ---- another algorithm
    "alg none": lambda f: f.unsigned({**f.header, "alg": "none"}) + ".",
    "alg None": lambda f: f.unsigned({**f.header, "alg": "None"}) + ".",
    "alg NONE": lambda f: f.unsigned({**f.header, "alg": "NONE"}) + ".",
    "alg nOnE": lambda f: f.unsigned({**f.header, "alg": "nOnE"}) + ".",
    "alg none, signed": lambda f: f.with_header(alg="none"),
    "alg NONE, signed": lambda f: f.with_header(alg="NONE"),
    "alg empty": lambda f: f.with_header(alg=""),
    "alg missing": lambda f: f.with_header(alg=None),
    "alg as a list": lambda f: f.with_header(alg=["ES256"]),
    "alg in lower case": lambda f: f.with_header(alg="es256"),
    "alg ES384": lambda f: f.with_header(alg="ES384"),
    "alg ES256K": lambda f: f.with_header(alg="ES256K"),
    "alg RS256": lambda f: f.with_header(alg="RS256"),
    "alg PS256": lambda f: f.with_header(alg="PS256"),
    "alg EdDSA": lambda f: f.with_header(alg="EdDSA"),
    "HS256 with the PEM": lambda f: f.hmac(f.public_pem()),
    "HS256 with the stripped PEM": lambda f: f.hmac(f.public_pem().strip()),
    "HS256 with the DER": lambda f: f.hmac(f.public_der()),
    "HS256 with the JWK": lambda f: f.hmac(_jwk_text(f)),
    "HS256 with the x-coordinate": lambda f: f.hmac(_coordinate(f)),
    "HS256 with nothing": lambda f: f.hmac(b""),
    "HS384 with the PEM": lambda f: f.hmac(f.public_pem(), "HS384"),
    "HS512 with the PEM": lambda f: f.hmac(f.public_pem(), "HS512"),
    # ---- a key that the token brings along
    "jwk": lambda f: _self_signed(f, jwk=f.public_jwk(f.other_key)),
    "jwk, our own": lambda f: f.with_header(jwk=f.public_jwk()),
    "jku": lambda f: _self_signed(f, jku="http://127.0.0.1:1/jwks.json"),
    "x5u": lambda f: _self_signed(f, x5u="http://127.0.0.1:1/certificate.pem"),
    "x5c": lambda f: _self_signed(f, x5c=[base64.b64encode(f.public_pem(f.other_key)).decode()]),
    "x5t": lambda f: _self_signed(f, x5t=b64(hashlib.sha1(f.public_pem(f.other_key)).digest())),
    # ---- the name of the key
    "kid missing": lambda f: f.with_header(kid=None),
    "kid empty": lambda f: f.with_header(kid=""),
    "kid as a path": lambda f: f.with_header(kid="../../../../dev/null"),
    "kid as a URL": lambda f: f.with_header(kid="http://127.0.0.1:1/key"),
    "kid with SQL": lambda f: f.with_header(kid="x' UNION SELECT 'secret' --"),
    "kid with a command": lambda f: f.with_header(kid="key|id"),
    "kid with a NUL": lambda f: f.with_header(kid=f.header["kid"] + "\0"),
    "kid very long": lambda f: f.with_header(kid="k" * 2000),
    "kid as a list": lambda f: f.with_header(kid=[f.header["kid"]]),
    "kid as an object": lambda f: f.with_header(kid={"kid": f.header["kid"]}),
    "kid as a number": lambda f: f.with_header(kid=1),
    "kid null": lambda f: f.sign(header={**f.header, "kid": None}),
    "kid of a key that nobody has": lambda f: f.with_header(kid=new_id()),
    "kid of a service": lambda f: f.sign(header={**f.header, "kid": "dashboard"}, key=f.service_key),
    # ---- the signature
    "signature of another key": lambda f: f.sign(key=f.other_key),
    "signature of another token": lambda f: f.unsigned() + "." + f.with_claims(jti=new_id()).split(".")[2],
    "r = s = 0": lambda f: f.with_signature(lambda _: raw_pair(0, 0)),
    "r = 0": lambda f: f.with_signature(lambda raw: raw_pair(0, _halves(raw)[1])),
    "s = 0": lambda f: f.with_signature(lambda raw: raw_pair(_halves(raw)[0], 0)),
    "r = n": lambda f: f.with_signature(lambda raw: raw_pair(N, _halves(raw)[1])),
    "s = n": lambda f: f.with_signature(lambda raw: raw_pair(_halves(raw)[0], N)),
    "r = s = 1": lambda f: f.with_signature(lambda _: raw_pair(1, 1)),
    "r and s swapped": lambda f: f.with_signature(lambda raw: raw[32:] + raw[:32]),
    "signature in DER": _der,
    "signature empty": lambda f: f.unsigned() + ".",
    "signature truncated": lambda f: f.with_signature(lambda raw: raw[:63]),
    "signature extended": lambda f: f.with_signature(lambda raw: raw + b"\0"),
    "signature twice": lambda f: f.with_signature(lambda raw: raw + raw),
    "one bit flipped": lambda f: f.with_signature(lambda raw: bytes([raw[0] ^ 1]) + raw[1:]),
    # ---- other headers
    "crit unknown": lambda f: f.with_header(crit=["future"], future=True),
    "crit empty": lambda f: f.with_header(crit=[]),
    "crit with a known claim": lambda f: f.with_header(crit=["exp"], exp=_now() + 600),
    "b64 false": lambda f: f.with_header(crit=["b64"], b64=False),
    "b64 false without crit": lambda f: f.with_header(b64=False),
    "zip": lambda f: f.with_header(zip="DEF"),
    "cty": lambda f: f.with_header(cty="JWT"),
    "a token inside": lambda f: f.sign(header={**f.header, "cty": "JWT"}, claims=f.sign()),
    "typ missing": lambda f: f.with_header(typ=None),
    "typ JWT": lambda f: f.with_header(typ="JWT"),
    "typ of services": lambda f: f.with_header(typ="mesh+jwt"),
    "typ in upper case": lambda f: f.with_header(typ="AT+JWT"),
    "typ in full": lambda f: f.with_header(typ="application/at+jwt"),
    "typ of logout tokens": lambda f: f.with_header(typ="logout+jwt"),
    "header with a name twice": lambda f: f.sign(header=_twice(f.header, "alg", "ES256")),
    "header with none and ES256": lambda f: f.sign(
        header=_twice({**f.header, "alg": "none"}, "alg", "ES256")
    ),
    "header as a list": lambda f: f.sign(header=json.dumps([dict(f.header)])),
    "header as text": lambda f: f.sign(header='"ES256"'),
    "header in UTF-16": lambda f: f.sign(header=json.dumps(dict(f.header)).encode("utf-16")),
    "header with a byte order mark": lambda f: f.sign(header=json.dumps(dict(f.header)).encode("utf-8-sig")),
    "header of 1 MB": lambda f: f.with_header(kid="k" * 1_000_000),
    # ---- the spelling
    "padding": lambda f: f.sign() + "==",
    "padding of the claims": lambda f: f.respelled(lambda h, c, s: f"{h}.{c}=.{s}"),
    "trailing bits": lambda f: f.respelled(lambda h, c, s: f"{h}.{c}.{_trailing_bits(s)}"),
    "URL-unsafe alphabet": _unsafe_alphabet,
    "a space inside": lambda f: f.respelled(lambda h, c, s: f"{h}. {c}.{s}"),
    "a tab inside": lambda f: f.respelled(lambda h, c, s: f"{h}.{c[:9]}\t{c[9:]}.{s}"),
    "a newline inside": lambda f: f.respelled(lambda h, c, s: f"{h}.{c[:9]}\n{c[9:]}.{s}"),
    "a comma behind": lambda f: f.sign() + ",",
    "a second token behind": lambda f: f"{f.sign()},{f.sign()}",
    "quotes around": lambda f: f'"{f.sign()}"',
    "percent-encoded dots": lambda f: f.sign().replace(".", "%2E"),
    "full-width dots": lambda f: f.sign().replace(".", "．"),
    "Cyrillic a": lambda f: f.respelled(lambda h, c, s: f"{h}.{c}.{'а' + s[1:]}"),
    "a dot more": lambda f: f.sign() + ".",
    "two parts": lambda f: f.unsigned(),
    "four parts": lambda f: f.sign() + ".e30",
    "five parts": lambda f: ".".join(
        [b64({"alg": "dir", "enc": "A256GCM"}), "", "AAAA", b64(f.claims), "AAAA"]
    ),
    "five parts of ours": lambda f: f.respelled(lambda h, c, s: f"{h}..{c}.{c}.{s}"),
    "JSON serialization": _json_serialization,
    "general JSON serialization": _general_serialization,
    "over 4096 bytes": lambda f: f.with_claims(note="x" * 4096),
    # ---- the claims
    "claims as a list": lambda f: f.sign(claims=json.dumps([dict(f.claims)])),
    "claims with a name twice": lambda f: f.sign(claims=_twice(f.claims, "sub", new_id())),
    "claims in UTF-16": lambda f: f.sign(claims=json.dumps(dict(f.claims)).encode("utf-16")),
    "claims in UTF-32": lambda f: f.sign(claims=json.dumps(dict(f.claims)).encode("utf-32-le")),
    "claims with a byte order mark": lambda f: f.sign(claims=json.dumps(dict(f.claims)).encode("utf-8-sig")),
    "claims nested deeply": lambda f: f.with_claims(act={"sub": new_id(), "act": _nested(500)}),
    "claims nested in what nobody reads": lambda f: f.with_claims(note=_nested(120)),
    "iss missing": lambda f: f.with_claims(iss=None),
    "iss of another": lambda f: f.with_claims(iss="http://elsewhere.example"),
    "iss with a slash behind": lambda f: f.with_claims(iss=f.claims["iss"] + "/"),
    "iss as a list": lambda f: f.with_claims(iss=[f.claims["iss"]]),
    "another environment": lambda f: f.sign(
        header={**f.header, "kid": new_id()},
        claims={**f.claims, "iss": "https://staging.example.org"},
        key=f.other_key,
    ),
    "another environment with our name": lambda f: f.sign(
        header={**f.header, "kid": new_id()}, key=f.other_key
    ),
    "aud missing": lambda f: f.with_claims(aud=None),
    "aud of another": lambda f: f.with_claims(aud="elsewhere"),
    "aud of a service": lambda f: f.with_claims(aud="user"),
    "aud with another": lambda f: f.with_claims(aud=["meshboard", "elsewhere"]),
    "aud empty": lambda f: f.with_claims(aud=[]),
    "exp missing": lambda f: f.with_claims(exp=None),
    "exp as text": lambda f: f.with_claims(exp=str(_now() + 600)),
    "exp true": lambda f: f.with_claims(exp=True),
    "exp null": lambda f: f.sign(claims={**f.claims, "exp": None}),
    "exp NaN": lambda f: _raw_claim(f, "exp", "NaN"),
    "exp Infinity": lambda f: _raw_claim(f, "exp", "Infinity"),
    "NaN in what nobody reads": lambda f: _raw_claim(f, "note", "NaN"),
    "exp 1e999": lambda f: _raw_claim(f, "exp", "1e999"),
    "exp negative": lambda f: f.with_claims(exp=-1),
    "exp zero": lambda f: f.with_claims(exp=0),
    "exp past": lambda f: f.with_claims(exp=_now() - 1),
    "exp long past": lambda f: f.with_claims(iat=_now() - 7200, exp=_now() - 6600),
    "iat missing": lambda f: f.with_claims(iat=None),
    "iat in the future": lambda f: f.with_claims(iat=_now() + 300),
    "iat as text": lambda f: f.with_claims(iat="now"),
    "iat NaN": lambda f: _raw_claim(f, "iat", "NaN"),
    "nbf in the future": lambda f: f.with_claims(nbf=_now() + 300),
    "nbf as text": lambda f: f.with_claims(nbf="now"),
    "auth_time as text": lambda f: f.with_claims(auth_time="now"),
    "auth_time in the future": lambda f: f.with_claims(auth_time=_now() + 300),
    "sub missing": lambda f: f.with_claims(sub=None),
    "sub empty": lambda f: f.with_claims(sub=""),
    "sub as a number": lambda f: f.with_claims(sub=42),
    "sub no id": lambda f: f.with_claims(sub="admin' --"),
    "sub half a character": lambda f: _raw_claim(f, "sub", '"\\ud800"'),
    "sid missing": lambda f: f.with_claims(sid=None),
    "sid empty": lambda f: f.with_claims(sid=""),
    "sid no id": lambda f: f.with_claims(sid="' OR true --"),
    "sid in another spelling": lambda f: f.with_claims(sid=f.claims["sid"].upper()),
    "sid as a list": lambda f: f.with_claims(sid=[f.claims["sid"]]),
    "jti missing": lambda f: f.with_claims(jti=None),
    "jti as a number": lambda f: f.with_claims(jti=7),
    "client_id missing": lambda f: f.with_claims(client_id=None),
    "client_id as a list": lambda f: f.with_claims(client_id=["meshboard"]),
    "wid no id": lambda f: f.with_claims(wid="any"),
    "wid as a list": lambda f: f.with_claims(wid=[f.claims["wid"]]),
    "scope as a list": lambda f: f.with_claims(scope=["meshboard"]),
    "amr as text": lambda f: f.with_claims(amr="pwd mfa"),
    "amr with a number": lambda f: f.with_claims(amr=["pwd", 2]),
    "act without sub": lambda f: f.with_claims(act={"client_id": "meshboard"}),
    "act as text": lambda f: f.with_claims(act=new_id()),
    "act no id": lambda f: f.with_claims(act={"sub": "admin"}),
    # ---- something else in its place
    "a refresh token": lambda f: f.refresh_token,
    "a refresh key": lambda f: f.refresh_key,
    "a device token": lambda f: f.device_token,
    "a service token": lambda f: f.service_token,
    "a service's signature": lambda f: f.sign(key=f.service_key),
    "an API key": lambda _: "mba_" + "A" * 60,
    "a write key": lambda _: "mbw_" + "A" * 43,
    "two dots": lambda _: "..",
    "null": lambda _: "null",
    "a token of an ended session": lambda f: f.with_claims(sid=f.revoked_session_id),
}

# With another reason than TOKEN_INVALID where a service looks at them itself.
REASONS = {
    **dict.fromkeys(["exp negative", "exp zero", "exp past", "exp long past"], "TOKEN_EXPIRED"),
    "a token of an ended session": "SESSION_REVOKED",
}

VALID: dict[str, Make] = {
    "plain": lambda f: f.sign(),
    "in another workspace": lambda f: f.with_claims(wid=f.other_workspace_id),
    "in no workspace": lambda f: f.with_claims(wid=""),
    "with all optional claims": lambda f: f.with_claims(
        amr=["pwd", "otp", "mfa"],
        scope="meshboard",
        auth_time=_now(),
        nbf=_now(),
        unknown={"to": ["come"]},
    ),
    "from a clock that is ahead": lambda f: f.with_claims(
        iat=_now() + 3, nbf=_now() + 3, auth_time=_now() + 3
    ),
    # (r, n - s) is as good a signature as (r, s), and RFC 7518 asks for neither of the two: half of all signatures of
    # ES256 have the greater s. Nothing hangs on it, because what counts of a token are its claims, not its bytes.
    "with the negated s": lambda f: f.with_signature(_negated),
}
