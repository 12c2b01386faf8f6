"""What a User-Agent header tells: browser, operating system, device, and whether a robot sent it."""

import re
from functools import lru_cache
from typing import NamedTuple

from ua_parser import parse

# Programs that uap-core does not count as spiders: libraries, monitors, feed readers, and whoever says "bot".
_ROBOT = re.compile(
    r"bot\b|bot/|crawl|spider|slurp|\bcurl/|\bwget/|python|java/|okhttp|go-http-client|libwww|httpclient|axios|node-fetch"
    r"|\bruby\b|perl|php|scrapy|headless|phantomjs|lighthouse|pingdom|uptime|monitor|\bfeed|\brss\b|facebookexternalhit"
    r"|preview|archiver|validator|ApacheBench",
    re.IGNORECASE,
)


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
