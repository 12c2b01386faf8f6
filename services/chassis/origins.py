"""Where calls come from, as the gateway and browsers say it.

The gateway removes `x-meshboard-…` from what comes in and sets it anew, so that these headers can be believed.
"""

import ipaddress
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

import grpc.aio

ADDRESS_HEADER = "x-meshboard-address"
_HOST = re.compile(r"[a-z0-9._-]+")


def headers_of(context: grpc.aio.ServicerContext[Any, Any]) -> dict[str, str]:
    """The headers of a call, as text."""
    return {key: str(value) for key, value in context.invocation_metadata() or ()}


def address_of(context: grpc.aio.ServicerContext[Any, Any], headers: Mapping[str, str]) -> str:
    """An IPv4 address or, because one subscriber has that many, an IPv6 network of 64 bits; "" when it is neither."""
    told = headers.get(ADDRESS_HEADER)
    if told is None:
        # "ipv4:127.0.0.1:50051", "ipv6:%5B::1%5D:50051" or "unix:…"
        told = unquote(context.peer()).partition(":")[2].rpartition(":")[0].strip("[]")
    return _shortened(told)


@lru_cache(maxsize=1024)
def _shortened(told: str) -> str:
    try:
        address = ipaddress.ip_address(told)
    except ValueError:
        return ""
    if address.version == 4:
        return str(address)
    return str(ipaddress.ip_network((address, 64), strict=False))


def is_allowed(origin: str, allowed: Iterable[str]) -> bool:
    """Whether an `Origin` header (RFC 6454) is one of these, or below one with `*.`."""
    origin = origin.lower()
    for one in allowed:
        before, star, after = one.partition("*")
        if origin == one or (
            star
            and origin.startswith(before)
            and origin.endswith(after)
            and _HOST.fullmatch(origin, len(before), len(origin) - len(after))
        ):
            return True
    return False
