"""Where a call comes from, as the gateway says it: address, device, cookies, page.

The gateway removes `x-meshboard-…` from what comes in and sets it anew, so that these headers can be believed.
"""

import ipaddress
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import grpc.aio

_ADDRESS_HEADER = "x-meshboard-address"
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
    headers = {key: str(value) for key, value in context.invocation_metadata() or ()}
    # "ipv4:127.0.0.1:50051", "ipv6:%5B::1%5D:50051" or "unix:…"
    peer = unquote(context.peer()).partition(":")[2].rpartition(":")[0].strip("[]")
    return Origin(
        address=_network(headers.get(_ADDRESS_HEADER, peer)),
        user_agent=headers.get("user-agent", "")[:300],
        page=headers.get("origin", ""),
        refresh_cookie=headers.get(_REFRESH_COOKIE_HEADER, ""),
        refresh_key_cookie=headers.get(_REFRESH_KEY_COOKIE_HEADER, ""),
        device_cookie=headers.get(_DEVICE_COOKIE_HEADER, ""),
    )


def _network(text: str) -> str:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return ""
    if address.version == 4:
        return str(address)
    return str(ipaddress.ip_network((address, 64), strict=False))
