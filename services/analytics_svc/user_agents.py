"""What a User-Agent header tells: browser, operating system, device, and whether a robot sent it."""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

from meshboard.analytics.v1.event_log_pb2 import LoggedEvent
from meshboard.analytics.v1.source_pb2 import Source
from ua_parser import parse

# Programs that uap-core does not count as spiders: libraries, monitors, feed readers, and whoever says "bot".
_ROBOT = re.compile(
    r"bot\b|bot/|crawl|spider|slurp|\bcurl/|\bwget/|python|java/|okhttp|go-http-client|libwww|httpclient|axios|node-fetch"
    r"|\bruby\b|perl|php|scrapy|headless|phantomjs|lighthouse|pingdom|uptime|monitor|\bfeed|\brss\b|facebookexternalhit"
    r"|preview|archiver|validator|ApacheBench",
    re.IGNORECASE,
)

_REMEMBERED = 10_000


class UserAgent(NamedTuple):
    """Families; empty when they are not known."""

    browser: str
    os: str
    device: str
    is_robot: bool


# There are few different ones, and parsing costs far more than looking up.
@lru_cache(maxsize=50_000)
def parse_user_agent(header: str) -> UserAgent:
    """Parses a header, with the regular expressions of https://github.com/ua-parser/uap-core."""
    result = parse(header)
    device = result.device.family if result.device else ""
    is_robot = device == "Spider" or _ROBOT.search(header) is not None
    return UserAgent(
        browser=result.user_agent.family if result.user_agent else "",
        os=result.os.family if result.os else "",
        device=device,
        is_robot=is_robot,
    )


class AgentFields:
    """What user agents tell, as the fields of a serialized LoggedEvent. The last 10,000 are remembered.

    `new_at_once` is how many new ones are parsed while the sender of a batch waits.
    """

    def __init__(self, new_at_once: int = 16) -> None:
        self._new_at_once = new_at_once
        self._forget()

    def of(self, headers: Sequence[bytes], robots: Source.Robots.ValueType) -> list[bytes] | None:
        """The fields for each of the headers, with robots marked as a source wants them; none for an empty header.

        None when there is a robot and the source wants none, or when too many are new.
        """
        known = self._unmarked if robots == Source.KEEP else self._marked
        try:
            found = [known[header] for header in headers]
        except KeyError:
            if not self._learn(headers):
                return None
            found = [known[header] for header in headers]
        if robots == Source.DROP and not self._robots.isdisjoint(headers):
            return None
        return found

    def _forget(self) -> None:
        self._marked = {b"": b""}
        self._unmarked = {b"": b""}
        self._robots: set[bytes] = set()

    def _learn(self, headers: Iterable[bytes]) -> bool:
        """Whether all of them are known now."""
        if len(self._marked) > _REMEMBERED:
            self._forget()
        new = set(headers).difference(self._marked)
        for header in islice(new, self._new_at_once):
            browser, os, device, is_robot = parse_user_agent(header.decode())
            fields = LoggedEvent(browser=browser, os=os, device=device)
            self._unmarked[header] = fields.SerializeToString()
            fields.is_robot = is_robot
            self._marked[header] = fields.SerializeToString()
            if is_robot:
                self._robots.add(header)
        return len(new) <= self._new_at_once
