"""Who is calling: access tokens of users, and tokens by which services know each other.

Services verify access tokens themselves, more strictly than the gateway: RFC 9068 (`typ: at+jwt`, required claims),
RFC 7515 (`crit`, base64url without padding), RFC 8725 (one algorithm, one issuer, one audience).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn
from uuid import UUID

import jwt
import orjson
import structlog
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from uuid_utils.compat import uuid7

from services.chassis import errors
from services.chassis.rights import Rights

log = structlog.get_logger(__name__)

SERVICES = ("auth", "user", "dashboard", "analytics")
ALGORITHM = "ES256"
AUDIENCE = "meshboard"
ACCESS_TOKEN_TYPE = "at+jwt"  # noqa: S105 - a media type
SERVICE_TOKEN_TYPE = "mesh+jwt"  # noqa: S105 - a media type
SERVICE_TOKEN_KEY = "x-meshboard-service-token"  # noqa: S105 - the name of a header
SERVICE_TOKEN_SECONDS = 60
MAX_TOKEN_BYTES = 4096
# Objects and lists in a header or in claims.
_MAX_CONTAINERS = 32
_REQUIRED = ("iss", "aud", "sub", "exp", "iat", "jti", "client_id", "sid")
_ES256 = ec.ECDSA(SHA256())
# Allowed difference of clocks between machines.
LEEWAY_SECONDS = 5
# The scope of a token that is limited by nothing but the rights of its user.
FULL_SCOPE = "meshboard"


@dataclass(frozen=True, slots=True)
class Claims:
    """What a verified access token says. Times are in seconds since 1970.

    `methods` says how the person was authenticated (RFC 8176), and is empty for service accounts; `scopes` are
    permissions, or FULL_SCOPE; `impersonator_id` is the admin who acts as the user (`act`; RFC 8693, section 4.1).
    """

    user_id: str
    session_id: str
    workspace_id: str
    expire_time: float
    auth_time: int
    token_id: str
    methods: tuple[str, ...] = ()
    scopes: frozenset[str] = frozenset({FULL_SCOPE})
    impersonator_id: str = ""

    @property
    def is_person(self) -> bool:
        """Whether the user's own person calls: no service account, and nobody in its place."""
        return bool(self.methods) and not self.impersonator_id

    @property
    def has_second_factor(self) -> bool:
        """Whether the person has shown a second factor."""
        return "mfa" in self.methods


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is calling. `workspace_id` and `rights` are set when the method's access names a permission."""

    claims: Claims | None = None
    service: str = ""
    workspace: str = ""
    rights: Rights | None = None
    token: str = ""

    @property
    def user_id(self) -> str:
        """The user; raises UNAUTHENTICATED when a service calls for nobody."""
        if self.claims is None:
            raise errors.unauthenticated("TOKEN_MISSING", "The call needs an access token.")
        return self.claims.user_id

    @property
    def session_id(self) -> str:
        """The sign-in session of the token."""
        if self.claims is None:
            raise errors.unauthenticated("TOKEN_MISSING", "The call needs an access token.")
        return self.claims.session_id

    @property
    def workspace_id(self) -> str:
        """The workspace that the call is about; the access stage has settled it."""
        if not self.workspace:
            raise errors.not_found("WORKSPACE_NOT_FOUND", "The call names no workspace.")
        return self.workspace

    def may(self, permission: str) -> bool:
        """Whether the caller has this permission in the workspace, and the token covers it."""
        if self.rights is None or self.claims is None or permission not in self.rights.permissions:
            return False
        return not self.claims.scopes.isdisjoint({FULL_SCOPE, permission})

    def in_workspace(self, rights: Rights) -> Caller:
        """The caller with its rights in a workspace."""
        return replace(self, workspace=rights.workspace_id, rights=rights)


_caller: ContextVar[Caller] = ContextVar("caller")
ANYONE = Caller()


def caller() -> Caller:
    """Who made the call that this code runs for."""
    return _caller.get(ANYONE)


def set_caller(who: Caller) -> None:
    """Sets who is calling, for the rest of this call's context."""
    _caller.set(who)


_recheck: ContextVar[Callable[[], Awaitable[None]]] = ContextVar("recheck")


def set_recheck(recheck: Callable[[], Awaitable[None]]) -> None:
    """Sets how this call's authentication and access are checked once more."""
    _recheck.set(recheck)


async def recheck() -> None:
    """Checks again that the caller may do what it is doing: for streams, at least every second.

    Raises UNAUTHENTICATED when the token has expired or the session has ended, NOT_FOUND or PERMISSION_DENIED when the
    right is gone, UNAVAILABLE when that cannot be told.
    """
    await _recheck.get()()


_require: ContextVar[Callable[[str, str, str], Awaitable[None]]] = ContextVar("require")


def set_require(require: Callable[[str, str, str], Awaitable[None]]) -> None:
    """Sets how it is decided whether this call's caller has a permission on one more resource."""
    _require.set(require)


async def require(permission: str, field: str, resource_id: str) -> None:
    """Checks that the caller has a permission on a resource that the request names otherwise than by its id.

    `field` is what its id is called in requests, such as `dashboard_id`; with an empty `resource_id` the workspace is
    meant. Raises NOT_FOUND or PERMISSION_DENIED, exactly as the `access` option would.
    """
    await _require.get()(permission, field, resource_id)


# Compact JWS


class _Malformed(ValueError):
    """Not a token that this system would have made."""


def _decode_part(part: str) -> bytes:
    """Strict base64url (RFC 7515 section 2): no padding, no other characters, no bits left over."""
    try:
        raw = base64.b64decode(part + "=" * (-len(part) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise _Malformed("not base64url") from error
    if base64.urlsafe_b64encode(raw).rstrip(b"=").decode() != part:
        raise _Malformed("not canonical base64url")
    return raw


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise _Malformed("a name appears twice")
    return keys


def _no_constant(name: str) -> NoReturn:
    raise _Malformed(f"{name} is not JSON")


def _json_object(part: str) -> dict[str, Any]:
    raw = _decode_part(part)
    if raw.count(b"{") + raw.count(b"[") > _MAX_CONTAINERS:
        raise _Malformed("nested too deeply")
    try:
        # RFC 7515 section 4 has UTF-8 only; given bytes, `loads` would take UTF-16 and byte order marks too.
        value = json.loads(raw.decode(), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _Malformed("not JSON") from error
    if not isinstance(value, dict):
        raise _Malformed("not an object")
    return value


def _encode_part(raw: bytes) -> bytes:
    return base64.urlsafe_b64encode(raw).rstrip(b"=")


@lru_cache(maxsize=32)
def _header(token_type: str, key_id: str) -> bytes:
    return _encode_part(orjson.dumps({"alg": ALGORITHM, "typ": token_type, "kid": key_id}))


def sign(token_type: str, claims: Mapping[str, Any], key_id: str, key: ec.EllipticCurvePrivateKey) -> str:
    """A compact JWS of the claims (RFC 7515, section 7.1), by ES256 (RFC 7518, section 3.4)."""
    signed = _header(token_type, key_id) + b"." + _encode_part(orjson.dumps(claims))
    r, s = decode_dss_signature(key.sign(signed, _ES256))
    return (signed + b"." + _encode_part(r.to_bytes(32) + s.to_bytes(32))).decode()


@dataclass(frozen=True, slots=True)
class _Parsed:
    header: dict[str, Any]
    claims: dict[str, Any]
    signed: bytes
    signature: bytes


def _parse(token: str, token_type: str) -> _Parsed:
    """Splits a compact JWS and checks its header, before any key is looked at."""
    if len(token) > MAX_TOKEN_BYTES or not token.isascii():
        raise _Malformed("too long")
    parts = token.split(".")
    if len(parts) != 3:
        raise _Malformed("not three parts")
    header = _json_object(parts[0])
    if set(header) != {"alg", "typ", "kid"}:
        raise _Malformed("unexpected header")
    if header["alg"] != ALGORITHM or header["typ"] != token_type or not isinstance(header["kid"], str):
        raise _Malformed("wrong header")
    signature = _decode_part(parts[2])
    if len(signature) != 64:
        raise _Malformed("wrong signature length")
    return _Parsed(header, _json_object(parts[1]), f"{parts[0]}.{parts[1]}".encode(), signature)


def _check_signature(parsed: _Parsed, key: ec.EllipticCurvePublicKey) -> None:
    """ES256 (RFC 7518 section 3.4)."""
    r, s = int.from_bytes(parsed.signature[:32]), int.from_bytes(parsed.signature[32:])
    try:
        key.verify(encode_dss_signature(r, s), parsed.signed, _ES256)
    except InvalidSignature as error:
        raise _Malformed("wrong signature") from error


def _check_times(claims: dict[str, Any]) -> None:
    """NumericDate (RFC 7519 section 2); all but `exp` lie in the past."""
    latest = time.time() + LEEWAY_SECONDS
    for name in ("exp", "iat", "nbf", "auth_time"):
        value = claims.get(name, 0 if name in {"nbf", "auth_time"} else None)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise _Malformed(f"{name} is not a number")
        if name != "exp" and value > latest:
            raise _Malformed("not valid yet")


def _check_id(value: Any, what: str) -> None:
    """A UUID in its one spelling: two spellings would be two sessions to who compares text."""
    try:
        canonical = isinstance(value, str) and str(UUID(value)) == value
    except ValueError:
        canonical = False
    if not canonical:
        raise _Malformed(f"{what} is no id")


def _check_ids(claims: dict[str, Any]) -> None:
    for name in ("sub", "sid", "jti"):
        _check_id(claims[name], name)
    if claims.get("wid", "") != "":
        _check_id(claims["wid"], "wid")
    if not isinstance(claims["client_id"], str):
        raise _Malformed("client_id is not text")


def _optional(claims: dict[str, Any]) -> tuple[tuple[str, ...], str, str]:
    """`amr`, `scope` and the subject of `act`; without a scope a token may do nothing."""
    methods, scope, act = claims.get("amr", []), claims.get("scope", ""), claims.get("act", {})
    if not isinstance(methods, list) or not isinstance(scope, str) or not isinstance(act, dict):
        raise _Malformed("a claim has another type")
    if not all(isinstance(method, str) for method in methods):
        raise _Malformed("not text")
    if act:
        _check_id(act.get("sub"), "act.sub")
    return tuple(methods), scope, act.get("sub", "")


def _invalid() -> errors.Error:
    return errors.unauthenticated("TOKEN_INVALID", "The access token is not valid.")


Keys = dict[str, ec.EllipticCurvePublicKey]
FetchKeys = Callable[[], Awaitable[Keys]]


class TokenVerifier:
    """Verifies access tokens by the public keys of auth_svc, and remembers verified signatures until they expire.

    Keys are fetched when they are older than `ttl_seconds`, and, at most once a second, when a token names an unknown
    one. While auth_svc does not answer, the keys at hand are used.
    """

    def __init__(
        self, issuer: str, fetch_keys: FetchKeys, *, ttl_seconds: float = 60, size: int = 10_000
    ) -> None:
        self._issuer = issuer
        self._fetch_keys = fetch_keys
        self._ttl = ttl_seconds
        self._size = size
        self._keys: Keys = {}
        self._retired: set[str] = set()
        self._fetch_time = float("-inf")
        self._fetching = asyncio.Lock()
        self._verified: OrderedDict[str, tuple[Claims, str]] = OrderedDict()

    def retire(self, key_id: str) -> None:
        """Refuses what this key has signed from now on, also while the key set that is fetched still has it."""
        self._retired.add(key_id)
        self._keys.pop(key_id, None)

    async def verify(self, token: str) -> Claims:
        """The claims of the token; raises UNAUTHENTICATED (TOKEN_INVALID or TOKEN_EXPIRED)."""
        known = self._verified.get(token)
        if known and known[1] in self._keys and time.monotonic() - self._fetch_time < self._ttl:
            claims = known[0]
        else:
            claims = await self._verify(token)
        if claims.expire_time <= time.time():
            self._verified.pop(token, None)
            raise errors.unauthenticated("TOKEN_EXPIRED", "The access token has expired: refresh it.")
        return claims

    async def _verify(self, token: str) -> Claims:
        try:
            parsed = _parse(token, ACCESS_TOKEN_TYPE)
            key_id = parsed.header["kid"]
            key = await self._key(key_id)
            _check_signature(parsed, key)
            claims = parsed.claims
            if missing := [name for name in _REQUIRED if name not in claims]:
                raise _Malformed(f"lacks {missing[0]}")
            if claims["iss"] != self._issuer or claims["aud"] != AUDIENCE:
                raise _Malformed("for someone else")
            _check_times(claims)
            _check_ids(claims)
            methods, scope, impersonator_id = _optional(claims)
        except _Malformed as error:
            log.info("token_refused", why=str(error))
            raise _invalid() from error
        verified = Claims(
            user_id=claims["sub"],
            session_id=claims["sid"],
            workspace_id=claims.get("wid", ""),
            expire_time=claims["exp"],
            auth_time=claims.get("auth_time", claims["iat"]),
            token_id=claims["jti"],
            methods=methods,
            scopes=frozenset(scope.split()),
            impersonator_id=impersonator_id,
        )
        self._verified[token] = (verified, key_id)
        if len(self._verified) > self._size:
            self._verified.popitem(last=False)
        return verified

    async def _key(self, key_id: str) -> ec.EllipticCurvePublicKey:
        if key_id in self._retired:
            raise _Malformed("retired key")
        age = time.monotonic() - self._fetch_time
        if age >= self._ttl or (key_id not in self._keys and age >= 1):
            await self._refresh(age)
        if key_id not in self._keys:
            if not self._keys:
                raise errors.unavailable("The keys that tokens are signed with cannot be fetched.")
            raise _Malformed("unknown key")
        return self._keys[key_id]

    async def _refresh(self, age: float) -> None:
        async with self._fetching:
            if time.monotonic() - self._fetch_time < age:
                return  # someone else has just done it
            try:
                fetched = await self._fetch_keys()
                self._keys = {key_id: key for key_id, key in fetched.items() if key_id not in self._retired}
            except errors.Error:
                log.warning("keys_not_fetched")
                if not self._keys:
                    raise
            self._fetch_time = time.monotonic()


def public_key_from_jwk(x: str, y: str) -> ec.EllipticCurvePublicKey:
    """A P-256 key from its coordinates (RFC 7518 section 6.2); ValueError when they are not on the curve."""
    numbers = ec.EllipticCurvePublicNumbers(
        int.from_bytes(_decode_part(x)), int.from_bytes(_decode_part(y)), ec.SECP256R1()
    )
    return numbers.public_key()


# Tokens of services


class ServiceTokens:
    """Signs tokens as this service, one a callee, and verifies those of the other services.

    `keys_dir` holds `<service>.key.pem` of this service and `<service>.pub.pem` of all.
    """

    def __init__(self, service: str, keys_dir: Path) -> None:
        self.service = service
        key = load_pem_private_key((keys_dir / f"{service}.key.pem").read_bytes(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise TypeError(f"{keys_dir}/{service}.key.pem must hold a P-256 key")
        self._key = key
        self._public: Keys = {}
        for name in SERVICES:
            public = load_pem_public_key((keys_dir / f"{name}.pub.pem").read_bytes())
            if not isinstance(public, ec.EllipticCurvePublicKey):
                raise TypeError(f"{keys_dir}/{name}.pub.pem must hold a P-256 key")
            self._public[name] = public
        self._issued: dict[str, tuple[str, float]] = {}
        self._verified: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def issue(self, audience: str) -> str:
        """A token for calls to `audience`, valid for at least half a minute."""
        token, expire_time = self._issued.get(audience, ("", 0.0))
        now = time.time()
        if expire_time - now < SERVICE_TOKEN_SECONDS / 2:
            expire_time = now + SERVICE_TOKEN_SECONDS
            claims = {
                "iss": self.service,
                "aud": audience,
                "iat": int(now),
                "exp": int(expire_time),
                "jti": str(uuid7()),
            }
            header = {"typ": SERVICE_TOKEN_TYPE, "kid": self.service}
            token = jwt.encode(claims, self._key, ALGORITHM, headers=header)
            self._issued[audience] = (token, expire_time)
        return token

    def sign(self, token_type: str, claims: dict[str, Any]) -> str:
        """A statement of this service, as a compact JWS of another type than the tokens that it calls with."""
        assert token_type not in {SERVICE_TOKEN_TYPE, ACCESS_TOKEN_TYPE}
        return jwt.encode(claims, self._key, ALGORITHM, headers={"typ": token_type, "kid": self.service})

    def verify(self, token: str) -> str:
        """The name of the service that calls; raises UNAUTHENTICATED."""
        service, expire_time = self._verified.get(token, ("", 0.0))
        if not service:
            service, expire_time = self._verify(token)
            self._verified[token] = (service, expire_time)
            if len(self._verified) > 1000:
                self._verified.popitem(last=False)
        if expire_time <= time.time():
            raise errors.unauthenticated("TOKEN_EXPIRED", "The service token has expired.")
        return service

    def _verify(self, token: str) -> tuple[str, float]:
        try:
            parsed = _parse(token, SERVICE_TOKEN_TYPE)
            name = parsed.header["kid"]
            if name not in self._public:
                raise _Malformed("unknown service")
            _check_signature(parsed, self._public[name])
            claims = parsed.claims
            if claims.get("iss") != name or claims.get("aud") != self.service:
                raise _Malformed("for someone else")
            if "exp" not in claims or "iat" not in claims:
                raise _Malformed("lacks a time")
            _check_times(claims)
            if claims["exp"] > claims["iat"] + SERVICE_TOKEN_SECONDS + 1:
                raise _Malformed("valid for too long")
        except _Malformed as error:
            log.warning("service_token_refused", why=str(error))
            raise errors.unauthenticated("TOKEN_INVALID", "The service token is not valid.") from error
        return name, float(claims["exp"])


# Sessions that have ended before their tokens expire


class Revocations:
    """Knows which sessions have ended.

    `fresh` says whether announcements arrive. When they do not, `ask(session_id)` asks auth_svc; when some may be
    missing, `load()` fetches all that are still of interest.
    """

    def __init__(
        self,
        fresh: Callable[[], bool],
        load: Callable[[], Awaitable[set[str]]],
        ask: Callable[[str], Awaitable[bool]],
    ) -> None:
        self._fresh = fresh
        self._load = load
        self._ask = ask
        self._revoked: OrderedDict[str, None] = OrderedDict()
        self._complete = False
        self._generation = 0
        self._loading = asyncio.Lock()

    def revoke(self, session_id: str) -> None:
        """Notes that a session has ended."""
        self._revoked[session_id] = None
        if len(self._revoked) > 1_000_000:
            self._revoked.popitem(last=False)

    def gap(self) -> None:
        """Notes that announcements may have been missed."""
        self._complete = False
        self._generation += 1

    async def check(self, session_id: str) -> None:
        """Raises UNAUTHENTICATED (SESSION_REVOKED) when the session has ended; UNAVAILABLE when that cannot be told."""
        if session_id in self._revoked:
            raise self._ended()
        if not self._fresh():
            self.gap()
            if not await self._ask(session_id):
                raise self._ended()
        elif not self._complete:
            await self._catch_up()
            if session_id in self._revoked:
                raise self._ended()

    async def _catch_up(self) -> None:
        async with self._loading:
            while not self._complete:
                generation = self._generation
                for session_id in await self._load():
                    self.revoke(session_id)
                # A gap while loading means loading again.
                self._complete = generation == self._generation

    @staticmethod
    def _ended() -> errors.Error:
        return errors.unauthenticated("SESSION_REVOKED", "The session has ended: sign in again.")
