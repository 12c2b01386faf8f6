"""What a session gives its client: an access token, a refresh token with its key; in the answer, or as cookies."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import grpc.aio
from meshboard.auth.v1.usable_key_pb2 import UsableKey
from uuid_utils.compat import uuid7

from services.auth_svc import refresh_tokens
from services.auth_svc.guesses import Guesses
from services.auth_svc.models import Session
from services.auth_svc.origins import Origin
from services.auth_svc.refresh_tokens import RefreshToken
from services.auth_svc.sessions import Begun, Going
from services.auth_svc.settings import AuthSettings
from services.auth_svc.signing_keys import SigningKeys
from services.chassis import errors
from services.chassis.auth import ACCESS_TOKEN_TYPE, AUDIENCE, FULL_SCOPE, sign

Context = grpc.aio.ServicerContext[Any, Any]

ACCESS_COOKIE, REFRESH_COOKIE, REFRESH_KEY_COOKIE, DEVICE_COOKIE = (
    "mb_session",
    "mb_refresh",
    "mb_refresh_key",
    "mb_device",
)
_REFRESH_PATH = "/v1/auth:refresh"
_DEVICE_SECONDS = 400 * 86_400  # the most that browsers keep


@dataclass(frozen=True)
class Tokens:
    """Makes tokens. `refresh_token_keys` are 32 bytes each: the first one signs, all are accepted."""

    settings: AuthSettings
    keys: SigningKeys
    guesses: Guesses
    refresh_token_keys: list[bytes]
    now: Callable[[], datetime]

    async def give(self, context: Context, begun: Begun, *, device_token: str = "") -> dict[str, Any]:
        """The tokens of a session that begins, as fields of the answer; those of a browser leave as cookies.

        `device_token` is the one that the device has shown; without one it gets one, unless somebody is impersonated.
        """
        row = begun.session
        refresh_token = refresh_tokens.spell(begun.refresh_token, self.refresh_token_keys[0])
        if not device_token and not row.impersonator_id:
            device_token = self.guesses.device_token(row.user_id)
        return await self._answer(
            context,
            row,
            {"refresh_token": refresh_token, "refresh_key": begun.refresh_key, "device_token": device_token},
        )

    async def give_next(self, context: Context, row: Session | Going, token: RefreshToken) -> dict[str, Any]:
        """The tokens of a session that goes on."""
        refresh_token = refresh_tokens.spell(token, self.refresh_token_keys[0])
        return await self._answer(context, row, {"refresh_token": refresh_token})

    def read_refresh_token(self, spelled: str) -> RefreshToken | None:
        """The refresh token, when we have made it."""
        for key in self.refresh_token_keys:
            if token := refresh_tokens.read(spelled, key):
                return token
        return None

    async def take_back_cookies(self, context: Context) -> None:
        """Has a browser forget its session, and keep that it is known."""
        names = ((ACCESS_COOKIE, "/"), (REFRESH_COOKIE, _REFRESH_PATH), (REFRESH_KEY_COOKIE, _REFRESH_PATH))
        await _send_cookies(context, [_cookie(name, "", 0, path) for name, path in names])

    def of_api_key(self, key: UsableKey) -> tuple[str, int]:
        """An access token of a service account, and for how many seconds it is valid."""
        seconds = self._seconds(key.expire_time.ToDatetime(UTC) if key.HasField("expire_time") else None)
        access_token = self._sign(
            {
                "sub": key.service_account_id,
                "client_id": key.api_key_id,
                "sid": key.session_id,
                "wid": key.workspace_id,
                "scope": " ".join(key.scopes) or FULL_SCOPE,
            },
            seconds,
        )
        return access_token, seconds

    def access_token(self, row: Session | Going) -> str:
        """An access token of the session."""
        claims: dict[str, Any] = {
            "sub": row.user_id,
            "client_id": "meshboard",
            "sid": row.session_id,
            "wid": row.workspace_id or "",
            "amr": list(row.methods),
            "auth_time": int(row.auth_time.timestamp()),
            "scope": FULL_SCOPE,
        }
        if row.impersonator_id:
            claims["act"] = {"sub": row.impersonator_id}
        return self._sign(claims, self._seconds(row.end_time))

    def _seconds(self, end_time: datetime | None) -> int:
        """For how long an access token is valid that does not outlive `end_time`."""
        seconds = self.settings.access_token_seconds
        if end_time is None:
            return seconds
        return max(0, min(seconds, int((end_time - self.now()).total_seconds())))

    def _sign(self, claims: dict[str, Any], seconds: int) -> str:
        """A token of RFC 9068."""
        key, issued = self.keys.current(), int(self.now().timestamp())
        of_all = {
            "iss": self.settings.public_url,
            "aud": AUDIENCE,
            "exp": issued + seconds,
            "iat": issued,
            "jti": str(uuid7()),
        }
        return sign(ACCESS_TOKEN_TYPE, {**of_all, **claims}, key.key_id, key.private)

    async def _answer(
        self, context: Context, row: Session | Going, secrets: dict[str, str]
    ) -> dict[str, Any]:
        seconds = self._seconds(row.end_time)
        access_token = self.access_token(row)
        if not row.in_cookies:
            return {"access_token": access_token, "expires_in_seconds": seconds, **secrets}
        lifetime = int((row.expire_time - self.now()).total_seconds())
        cookies = [_cookie(ACCESS_COOKIE, access_token, seconds, "/")]
        for name, field, path, kept_seconds in (
            (REFRESH_COOKIE, "refresh_token", _REFRESH_PATH, lifetime),
            (REFRESH_KEY_COOKIE, "refresh_key", _REFRESH_PATH, lifetime),
            (DEVICE_COOKIE, "device_token", "/v1", _DEVICE_SECONDS),
        ):
            if secrets.get(field):
                cookies.append(_cookie(name, secrets[field], kept_seconds, path))
        await _send_cookies(context, cookies)
        return {"expires_in_seconds": seconds}

    def check_page(self, origin: Origin) -> None:
        """Lets only pages of ours ask for cookies: else another page could sign its visitor in as somebody else.

        Raises PERMISSION_DENIED (ORIGIN_REFUSED).
        """
        if origin.page.rstrip("/") != self.settings.public_url.rstrip("/"):
            raise errors.permission_denied(
                "ORIGIN_REFUSED", "Only a page of this installation can have its session in cookies."
            )


def _cookie(name: str, value: str, seconds: int, path: str) -> str:
    """RFC 6265. The session is Lax, so that who follows a link to us arrives signed in; no link needs the others."""
    same_site = "Lax" if name == ACCESS_COOKIE else "Strict"
    return f"{name}={value}; Path={path}; Max-Age={seconds}; HttpOnly; Secure; SameSite={same_site}"


async def _send_cookies(context: Context, cookies: list[str]) -> None:
    await context.send_initial_metadata(tuple(("set-cookie", cookie) for cookie in cookies))
