"""Slows down who guesses passwords and codes, without locking anyone else out.

Failures are counted three ways: by account and address together, by account, and by address. A device that the
account was used on before shows it by its device token, and is counted by itself alone: so guesses from elsewhere
cost the owner of the account nothing (OWASP, "Slow Down Online Guessing Attacks with Device Cookies"). Unknown
accounts count like known ones.
"""

import base64
import binascii
import hmac
import secrets
from contextlib import AbstractAsyncContextManager

from redis.asyncio import Redis

from services.auth_svc.origins import Origin
from services.auth_svc.settings import AuthSettings
from services.chassis import errors
from services.chassis.guesses import Attempt, Count, Counts

DEVICE_PREFIX = "mbd_"
_NONCE_BYTES = 16


class Guesses:
    """Counts in Redis; `key` are the 32 bytes that device tokens are signed with."""

    def __init__(self, redis: Redis, settings: AuthSettings, key: bytes) -> None:
        self._counted = Counts(redis, "auth", _delayed)
        self._settings = settings
        self._key = key

    def attempt(
        self, what: str, subject: str, origin: Origin, device_token: str = ""
    ) -> AbstractAsyncContextManager[Attempt]:
        """Surrounds a guess at something of `subject`, which says what it was by `settle`.

        Raises RESOURCE_EXHAUSTED (SIGN_IN_DELAYED) while a delay lasts, UNAVAILABLE without Redis.
        """
        return self._counted.attempt(self._counts(what, subject, origin, device_token))

    async def check_address(self, what: str, origin: Origin) -> None:
        """Raises as `attempt` does, for secrets that are too long to be guessed: only who tries many is slowed down."""
        await self._counted.check(self._counts(what, "", origin, ""))

    async def address_failed(self, what: str, origin: Origin) -> None:
        """Counts a failure of an address alone."""
        await self._counted.failed(self._counts(what, "", origin, ""))

    def device_token(self, user_id: str) -> str:
        """Shows from now on that a device is known to the account."""
        return self._spell(user_id, secrets.token_bytes(_NONCE_BYTES))

    def knows_device(self, user_id: str, token: str) -> bool:
        """Whether the token was given to a device for this account."""
        try:
            raw = base64.urlsafe_b64decode(token.removeprefix(DEVICE_PREFIX) + "==")
        except (binascii.Error, ValueError):
            return False
        # To the letter: failures are counted by the token, which must not have a second spelling.
        spelled = self._spell(user_id, raw[:_NONCE_BYTES])
        return hmac.compare_digest(spelled.encode(), token.encode())

    def _spell(self, user_id: str, nonce: bytes) -> str:
        mac = hmac.digest(self._key, nonce + user_id.encode(), "sha256")
        return DEVICE_PREFIX + base64.urlsafe_b64encode(nonce + mac).rstrip(b"=").decode()

    def _counts(self, what: str, subject: str, origin: Origin, device_token: str) -> list[Count]:
        s = self._settings
        if device_token:
            name = f"{what} {subject} device {device_token}"
            return [Count(name, s.guess_free_failures, s.guess_longest_delay_seconds, 16, True)]
        address = Count(
            f"{what} from {origin.address}",
            s.guess_free_failures_of_address,
            s.guess_longest_delay_seconds,
            64,
            False,
        )
        if not subject:
            return [address]
        return [
            Count(
                f"{what} {subject} from {origin.address}",
                s.guess_free_failures,
                s.guess_longest_delay_seconds,
                16,
                True,
            ),
            Count(
                f"{what} {subject}",
                s.guess_free_failures_of_account,
                # Who is at the second factor knows the password: that is no stranger who could harm the owner so.
                s.guess_longest_delay_seconds
                if what == "second-factor"
                else s.guess_longest_delay_of_account_seconds,
                32,
                True,
            ),
            address,
        ]


def _delayed(seconds: float) -> errors.Error:
    return errors.resource_exhausted("SIGN_IN_DELAYED", "Too many failed tries: wait.", retry_seconds=seconds)
