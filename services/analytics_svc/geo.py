"""Where an address is, from a file in MaxMind's format (https://maxmind.github.io/MaxMind-DB/), such as GeoLite2-City.

Addresses are looked up while their events are received, and forgotten: what is kept is the name of a place.
"""

import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import maxminddb
import structlog
from meshboard.analytics.v1.event_log_pb2 import LoggedEvent

log = structlog.get_logger(__name__)

# How often it is looked whether the file was replaced.
CHECK_SECONDS = 60.0
_REMEMBERED = 50_000


class GeoDatabase:
    """Reads a file, also after another one has been renamed into its place (writing over it would end the process).

    Raises OSError or InvalidDatabaseError.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open()

    def place_of(self, address: str) -> bytes:
        """`country`, `region` and `city` of an address as a serialized LoggedEvent; nothing when it is not known."""
        if time.monotonic() >= self._next_check:
            self._check()
        return self._find(address)

    def _open(self) -> None:
        changed = self._path.stat().st_mtime_ns
        reader = maxminddb.open_database(self._path)  # mapped: all processes share what they read of it
        self._changed, self._next_check = changed, time.monotonic() + CHECK_SECONDS

        @lru_cache(maxsize=_REMEMBERED)
        def find(address: str) -> bytes:
            try:
                found = reader.get(address.removeprefix("::ffff:"))  # IPv4 written as IPv6
            except ValueError:  # no address, or one of IPv6 in a database of IPv4
                return b""
            return _place(found).SerializeToString() if isinstance(found, dict) else b""

        self._find = find

    def _check(self) -> None:
        self._next_check = time.monotonic() + CHECK_SECONDS
        try:
            if self._path.stat().st_mtime_ns != self._changed:
                self._open()
                log.info("geo_database_replaced")
        except (OSError, maxminddb.InvalidDatabaseError) as error:
            log.error("geo_database_unusable", error=str(error))


def _place(record: Mapping[str, Any]) -> LoggedEvent:
    """Of a record of MaxMind's and DB-IP's databases, or of one with plain texts such as IPinfo's."""
    country = record.get("country")
    code = country.get("iso_code") if isinstance(country, dict) else record.get("country_code") or country
    regions = record.get("subdivisions")
    region = _name(regions[0]) if isinstance(regions, list) and regions else _name(record.get("region"))
    return LoggedEvent(
        country=code if isinstance(code, str) and len(code) == 2 else "",
        region=region,
        city=_name(record.get("city")),
    )


def _name(value: object) -> str:
    """A text as it is, else the English name, else the first there is."""
    if isinstance(value, dict):
        names = value.get("names") or {}
        value = names.get("en") or next(iter(names.values()), "")
    return value if isinstance(value, str) else ""
