"""How a visitor came: the channel of an event, and who referred it, as SQL over columns that every event has.

The names of channels follow GA4's default channel group (https://support.google.com/analytics/answer/9756891). What is
tagged goes before what the browser says: an address with `utm_` parameters or the mark of an advertisement has been
made to tell where its visitors come from.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

Kind = Literal["search", "social", "video", "shopping", "email", "ai", "site"]


class Referrer(NamedTuple):
    """Somebody who is known to send visitors.

    `names` are hosts, which stand for those below them too (of several the nearest), and other words that are used in
    `utm_source`; a host that ends in `.*` has one for each country.
    """

    title: str
    kind: Kind
    names: str


REFERRERS = (
    Referrer("Google", "search", "google google.* com.google.android.googlequicksearchbox adwords googleads"),
    Referrer("Bing", "search", "bing bing.com"),
    Referrer("DuckDuckGo", "search", "duckduckgo duckduckgo.com"),
    Referrer("Yahoo", "search", "yahoo yahoo.*"),
    Referrer("Yandex", "search", "yandex yandex.* ya.ru"),
    Referrer("Baidu", "search", "baidu baidu.com"),
    Referrer("Ecosia", "search", "ecosia ecosia.org"),
    Referrer("Brave Search", "search", "search.brave.com"),
    Referrer("Startpage", "search", "startpage startpage.com"),
    Referrer("Qwant", "search", "qwant qwant.com"),
    Referrer("Kagi", "search", "kagi kagi.com"),
    Referrer("Naver", "search", "naver naver.com"),
    Referrer("Seznam", "search", "seznam seznam.cz"),
    Referrer("Sogou", "search", "sogou sogou.com"),
    Referrer("AOL", "search", "aol search.aol.com"),
    Referrer("Ask", "search", "ask.com"),
    Referrer("Swisscows", "search", "swisscows.com"),
    Referrer("MetaGer", "search", "metager.de metager.org"),
    Referrer("Facebook", "social", "facebook fb facebook.com fb.com fb.me facebook_ads com.facebook.katana"),
    Referrer("Instagram", "social", "instagram ig instagram.com com.instagram.android"),
    Referrer("Threads", "social", "threads threads.net threads.com"),
    Referrer("WhatsApp", "social", "whatsapp whatsapp.com wa.me"),
    Referrer("X", "social", "x twitter t.co x.com twitter.com"),
    Referrer("LinkedIn", "social", "linkedin linkedin.com lnkd.in com.linkedin.android"),
    Referrer("Reddit", "social", "reddit reddit.com redd.it com.reddit.frontpage"),
    Referrer("Pinterest", "social", "pinterest pinterest.* pin.it"),
    Referrer("Hacker News", "social", "hackernews hn news.ycombinator.com hckrnews.com"),
    Referrer("Lobsters", "social", "lobsters lobste.rs"),
    Referrer("Mastodon", "social", "mastodon mastodon.social mastodon.online fosstodon.org hachyderm.io"),
    Referrer("Bluesky", "social", "bluesky bsky bsky.app"),
    Referrer("Telegram", "social", "telegram t.me telegram.org telegram.me org.telegram.messenger"),
    Referrer("Discord", "social", "discord discord.com discordapp.com"),
    Referrer("Slack", "social", "slack slack.com com.slack"),
    Referrer("Snapchat", "social", "snapchat snapchat.com"),
    Referrer("Tumblr", "social", "tumblr tumblr.com"),
    Referrer("VK", "social", "vk vkontakte vk.com"),
    Referrer("Weibo", "social", "weibo weibo.com weibo.cn"),
    Referrer("WeChat", "social", "wechat weixin weixin.qq.com"),
    Referrer("Quora", "social", "quora quora.com"),
    Referrer("Stack Overflow", "social", "stackoverflow stackoverflow.com"),
    Referrer("Product Hunt", "social", "producthunt producthunt.com"),
    Referrer("Medium", "social", "medium.com"),
    Referrer("Xing", "social", "xing xing.com"),
    Referrer("YouTube", "video", "youtube yt youtube.com youtu.be"),
    Referrer("Vimeo", "video", "vimeo vimeo.com"),
    Referrer("TikTok", "video", "tiktok tiktok.com"),
    Referrer("Twitch", "video", "twitch twitch.tv"),
    Referrer("Dailymotion", "video", "dailymotion dailymotion.com"),
    Referrer("Bilibili", "video", "bilibili bilibili.com"),
    Referrer("Amazon", "shopping", "amazon amazon.*"),
    Referrer("eBay", "shopping", "ebay ebay.*"),
    Referrer("Etsy", "shopping", "etsy etsy.com"),
    Referrer("AliExpress", "shopping", "aliexpress aliexpress.com"),
    Referrer("Walmart", "shopping", "walmart walmart.com"),
    Referrer("Google Shopping", "shopping", "shopping.google.com"),
    Referrer("Gmail", "email", "gmail mail.google.com com.google.android.gm"),
    Referrer("Outlook", "email", "outlook outlook.live.com outlook.office.com outlook.office365.com"),
    Referrer("Yahoo Mail", "email", "mail.yahoo.com"),
    Referrer("Proton Mail", "email", "mail.proton.me"),
    Referrer("Mailchimp", "email", "mailchimp list-manage.com campaign-archive.com"),
    Referrer("E-mail", "email", "email e-mail e_mail newsletter"),
    Referrer("ChatGPT", "ai", "chatgpt openai chatgpt.com chat.openai.com"),
    Referrer("Claude", "ai", "claude claude.ai"),
    Referrer("Gemini", "ai", "gemini gemini.google.com"),
    Referrer("Copilot", "ai", "copilot copilot.microsoft.com"),
    Referrer("Perplexity", "ai", "perplexity perplexity.ai"),
    Referrer("DeepSeek", "ai", "deepseek chat.deepseek.com"),
    Referrer("Mistral", "ai", "mistral chat.mistral.ai"),
    Referrer("GitHub", "site", "github github.com"),
    Referrer("GitLab", "site", "gitlab gitlab.com"),
    Referrer("Wikipedia", "site", "wikipedia wikipedia.org"),
    Referrer("Google News", "site", "news.google.com"),
    Referrer("Google Docs", "site", "docs.google.com"),
    Referrer("Substack", "site", "substack substack.com"),
)

_COUNTRY = ".*"
_BY_NAME = {name: referrer for referrer in REFERRERS for name in referrer.names.split()}


def _alternatives(names: Iterable[str]) -> str:
    return "|".join(sorted(map(re.escape, names)))


def _pattern() -> str:
    """Finds the name in `_BY_NAME` that a host goes by; the prefix is the shortest, so that it is the nearest."""
    hosts = _alternatives(name for name in _BY_NAME if "." in name and not name.endswith(_COUNTRY))
    countries = _alternatives(name.removesuffix(_COUNTRY) for name in _BY_NAME if name.endswith(_COUNTRY))
    return rf"^(?:.*?\.)??(?:({hosts})|({countries})(?:\.com|\.co)?\.[a-z]{{2,3}})$"


# What the SQL below reads as parameters, so that it is short wherever it stands.
PARAMETERS: Mapping[str, str | list[str]] = {
    "referrer_pattern": _pattern(),
    "referrer_names": [name.removesuffix(_COUNTRY) for name in _BY_NAME],
    "referrer_kinds": [referrer.kind for referrer in _BY_NAME.values()],
    "referrer_titles": [referrer.title for referrer in _BY_NAME.values()],
}


def _about(column: str, what: str, default: str = "''") -> str:
    """SQL of what is known of a host or a `utm_source`. A text that many rows have costs once for all of them."""
    known = f"replaceRegexpOne(lower({column}), {{referrer_pattern:String}}, '\\\\1\\\\2')"
    names, values = "{referrer_names:Array(String)}", f"{{referrer_{what}:Array(String)}}"
    return f"transform({known}, {names}, {values}, {default})"


# The classes of `utm_medium`; the first that fits. What is paid by impressions is a banner, unless it is known where.
_MEDIUMS = {
    "display": "display|banner|expandable|interstitial",
    "impressions": "cpm",
    "paid": ".*cp.*|ppc|retargeting|paid.*",
    "social": "social|social[-_ ]?(?:network|media)|sm",
    "video": ".*video.*",
    "search": "organic",
    "email": "e[-_ ]?mail|newsletter",
    "affiliates": "affiliates?",
    "audio": "audio|podcast",
    "sms": "sms",
    "push": "(?:.*[-_ ])?push|.*notification.*",
    "referral": "referral|app|link",
}
_MEDIUM = (
    "multiIf(utm_medium = '', '', "
    + ", ".join(
        f"match(lower(utm_medium), '^(?:{pattern})$'), '{medium}'" for medium, pattern in _MEDIUMS.items()
    )
    + ", 'other')"
)
_WITHOUT_WWW = "replaceRegexpOne(lower({}), '^www\\\\.', '')"

# Names and their SQL, each in words of those before it. Own is a host that is the page's, above it, or below it. The
# marks of advertisements are Google's and Microsoft's of searches, and Google's of banners.
_TERMS = {
    "own_host": _WITHOUT_WWW.format("host"),
    "from_host": _WITHOUT_WWW.format("referrer_host"),
    "is_own": "own_host != '' AND (from_host = own_host OR endsWith(from_host, concat('.', own_host))"
    " OR endsWith(own_host, concat('.', from_host)))",
    "is_referred": "from_host != '' AND NOT is_own",
    "medium": _MEDIUM,
    "kind": f"multiIf(utm_source != '', {_about('utm_source', 'kinds')},"
    f" is_referred, {_about('referrer_host', 'kinds')}, '')",
    "is_ad": "match(url, '[?&](?:gclid|gbraid|wbraid|msclkid)=[^&#]')",
    "is_banner": "match(url, '[?&]dclid=[^&#]') OR medium IN ('display', 'impressions')",
    "is_paid": "is_ad OR medium IN ('paid', 'impressions')",
    "is_shopping": "kind = 'shopping' OR match(lower(utm_campaign), '(?:^|[^a-z])shop(?:ping)?(?:$|[^a-z])')",
}
# Conditions and the channel where they hold; the first that does. An event without an address is of no channel.
_CHANNELS = (
    ("url = '' AND referrer_host = ''", "''"),
    ("is_paid AND position(lower(utm_campaign), 'cross-network') > 0", "'cross_network'"),
    ("is_paid AND is_shopping", "'paid_shopping'"),
    ("is_paid AND kind IN ('search', 'social', 'video')", "concat('paid_', kind)"),
    ("is_banner", "'display'"),
    ("is_ad", "'paid_search'"),
    ("is_paid", "'paid_other'"),
    ("is_shopping", "'organic_shopping'"),
    ("medium IN ('email', 'affiliates', 'audio', 'sms', 'push')", "medium"),
    ("medium IN ('social', 'video')", "concat('organic_', medium)"),
    ("kind IN ('search', 'social', 'video')", "concat('organic_', kind)"),
    ("medium = 'search'", "'organic_search'"),
    ("kind = 'email'", "'email'"),
    ("kind = 'ai'", "'ai_assistant'"),
    ("medium = 'other'", "'other'"),
    ("medium = 'referral' OR utm_source != '' OR is_referred", "'referral'"),
    ("is_own", "'internal'"),
    ("1", "'direct'"),
)
# Not multiIf, in which the engine computes terms anew for each condition that names them: that costs ten times as much.
_CHANNEL = "arrayElement([{values}], indexOf([{conditions}], 1))".format(
    values=", ".join(value for _, value in _CHANNELS),
    conditions=", ".join(f"toBool({condition})" for condition, _ in _CHANNELS),
)
_REFERRER_NAME = f"if(is_referred, {_about('referrer_host', 'titles', 'from_host')}, '')"

COLUMNS = {"channel": _CHANNEL, "referrer_name": _REFERRER_NAME}


def with_channels(rows: str, names: Iterable[str]) -> str:
    """A subquery that gives the columns of `rows`, which are events, and those of COLUMNS that are named."""
    terms = ", ".join(f"{sql} AS {name}" for name, sql in _TERMS.items())
    columns = ", ".join(f"{COLUMNS[name]} AS {name}" for name in names)
    return f"(WITH {terms} SELECT *, {columns} FROM {rows} AS event)"  # noqa: S608 - of texts written here
