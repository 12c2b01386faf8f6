"""Codes of authenticator apps: RFC 6238 with SHA-1, 6 digits and steps of 30 seconds, which all apps know."""

import io
from datetime import datetime

import pyotp
import segno
from pyotp.utils import strings_equal

ISSUER = "Meshboard"
# One step of tolerance each way, for clocks that differ and codes that are typed slowly (RFC 6238, section 5.2).
_TOLERANCE = (1, 0, -1)


def new_secret() -> str:
    """160 random bits in base32, as RFC 4226, section 4, recommends."""
    return pyotp.random_base32(32)


def uri_of(secret: str, email: str) -> str:
    """The secret as `otpauth://totp/…`, which apps read."""
    return pyotp.TOTP(secret, name=email, issuer=ISSUER).provisioning_uri()


def qr_svg(uri: str) -> str:
    """The URI as a QR code: an SVG document."""
    document = io.BytesIO()
    segno.make(uri, micro=False).save(document, kind="svg", scale=4)
    return document.getvalue().decode()


def step_of(secret: str, code: str, time: datetime) -> int | None:
    """The step whose code it is, the latest one first; None when it is that of no step near this time.

    The caller sees to it that steps only grow, so that a code works once (RFC 6238, section 5.2).
    """
    totp = pyotp.TOTP(secret)
    now = totp.timecode(time)
    # All are compared, so that the time does not tell which one was right.
    right = [now + n for n in _TOLERANCE if strings_equal(totp.generate_otp(now + n), code)]
    return right[0] if right else None
