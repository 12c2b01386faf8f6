"""Where a call comes from, as the gateway says it: address, device, cookies, page.

The gateway removes `x-meshboard-…` from what comes in and sets it anew, so that these headers can be believed.
"""

from dataclasses import dataclass
from typing import Any

import grpc.aio

from services.chassis.origins import address_of, headers_of

_REFRESH_COOKIE_HEADER = "x-meshboard-refresh-cookie"
_REFRESH_KEY_COOKIE_HEADER = "x-meshboard-refresh-key-cookie"
_DEVICE_COOKIE_HEADER = "x-meshboard-device-cookie"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a call comes from.

    `address` is an IPv4 address or, because one subscriber has that many, an IPv6 network of 64 bits. `page` is the
    origin of the page that makes the call (`Origin`; RFC 6454), "" outside of browsers.
    """

    address: str = ""
    user_agent: str = ""
    page: str = ""
    refresh_cookie: str = ""
    refresh_key_cookie: str = ""
    device_cookie: str = ""


def origin_of(context: grpc.aio.ServicerContext[Any, Any]) -> Origin:
    """Where the call comes from."""
    headers = headers_of(context)
    return Origin(
        address=address_of(context, headers),
        user_agent=headers.get("user-agent", "")[:300],
        page=headers.get("origin", ""),
        refresh_cookie=headers.get(_REFRESH_COOKIE_HEADER, ""),
        refresh_key_cookie=headers.get(_REFRESH_KEY_COOKIE_HEADER, ""),
        device_cookie=headers.get(_DEVICE_COOKIE_HEADER, ""),
    )
