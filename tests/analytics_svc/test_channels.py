"""How visitors came: each rule by an example, and all of them against the oracle, on the real store."""

import itertools
from typing import Any

from meshboard.analytics.v1.query_pb2 import Breakdown, Query

from services.analytics_svc.channels import REFERRERS
from services.analytics_svc.compiler import compile_query
from services.analytics_svc.event_store import EventStore
from services.analytics_svc.tables import insert_events
from tests.analytics_svc import oracle
from tests.analytics_svc.conftest import Analytics
from tests.analytics_svc.oracle import Row
from tests.analytics_svc.test_compiler import NOW, batch_of
from tests.harness import new_id

SHOP = "https://www.shop.example/cart"

# The query of the address, the referrer, the channel and who referred.
EXAMPLES = [
    ("", "", "direct", ""),
    ("", "https://shop.example/", "internal", ""),
    ("", "https://blog.shop.example/", "internal", ""),
    ("", "https://workshop.example/", "referral", "workshop.example"),
    ("", "https://www.google.com/", "organic_search", "Google"),
    ("", "https://www.google.co.uk/", "organic_search", "Google"),
    ("", "https://google.com.au/search?q=a", "organic_search", "Google"),
    ("", "https://notgoogle.com/", "referral", "notgoogle.com"),
    ("", "https://google.com.evil.example/", "referral", "google.com.evil.example"),
    ("", "https://mail.google.com/", "email", "Gmail"),
    ("", "android-app://com.google.android.gm/", "email", "Gmail"),
    ("", "https://news.google.com/", "referral", "Google News"),
    ("", "https://gemini.google.com/", "ai_assistant", "Gemini"),
    ("", "https://L.FACEBOOK.com/l.php", "organic_social", "Facebook"),
    ("", "https://t.co/abc", "organic_social", "X"),
    ("", "https://news.ycombinator.com/item?id=1", "organic_social", "Hacker News"),
    ("", "https://m.youtube.com/watch", "organic_video", "YouTube"),
    ("", "https://www.amazon.de/dp/1", "organic_shopping", "Amazon"),
    ("", "https://www.partner.example/", "referral", "partner.example"),
    ("utm_source=chatgpt.com", "", "ai_assistant", ""),
    ("utm_source=newsletter", "", "email", ""),
    ("utm_source=Partner", "https://www.google.com/", "referral", "Google"),
    ("utm_source=ig", "", "organic_social", ""),
    ("utm_source=shop&utm_medium=E-Mail", "https://mail.google.com/", "email", "Gmail"),
    ("utm_source=google&utm_medium=CPC", "", "paid_search", ""),
    ("utm_source=fb&utm_medium=paid_social", "", "paid_social", ""),
    ("utm_source=youtube&utm_medium=cpv", "", "paid_video", ""),
    ("utm_source=amazon&utm_medium=cpc", "", "paid_shopping", ""),
    ("utm_source=google&utm_medium=cpc&utm_campaign=spring_shop", "", "paid_shopping", ""),
    ("utm_source=google&utm_medium=cpc&utm_campaign=workshops", "", "paid_search", ""),
    ("utm_source=google&utm_medium=cpc&utm_campaign=a-cross-network", "", "cross_network", ""),
    ("utm_source=partner&utm_medium=cpc", "", "paid_other", ""),
    ("utm_source=partner&utm_medium=cpm", "", "display", ""),
    ("utm_source=fb&utm_medium=cpm", "", "paid_social", ""),
    ("utm_medium=banner", "", "display", ""),
    ("dclid=a", "", "display", ""),
    ("gclid=a", "https://www.google.com/", "paid_search", "Google"),
    ("a=1&msclkid=b", "", "paid_search", ""),
    ("gclid=", "", "direct", ""),
    ("notgclid=b", "", "direct", ""),
    ("utm_medium=social", "", "organic_social", ""),
    ("utm_medium=organic", "", "organic_search", ""),
    ("utm_medium=affiliate&utm_source=google", "", "affiliates", ""),
    ("utm_medium=podcast", "", "audio", ""),
    ("utm_medium=sms", "", "sms", ""),
    ("utm_medium=web_push", "", "push", ""),
    ("utm_medium=referral", "", "referral", ""),
    ("utm_medium=qr", "", "other", ""),
]


async def found(store: EventStore, addresses: list[tuple[str, str]], *names: str) -> list[list[Any]]:
    """What the store says of each pair of an address and a referrer."""
    workspace_id, source_id = new_id(), new_id()
    rows = [
        Row(source_id, 1_500_000_000_000, {"event": f"{i:05}", "url": url, "referrer": referrer}, {})
        for i, (url, referrer) in enumerate(addresses)
    ]
    await insert_events(store, [batch_of(workspace_id, source_id, rows)], token=source_id)
    query = Query(source_ids=[source_id], limit=50_000)
    query.breakdowns.extend(Breakdown(property=name) for name in ("event", *names))
    compiled = compile_query(query, workspace_id, NOW)
    answered = (await store.query(compiled.sql, compiled.params)).rows
    return [cells[1:-1] for cells in sorted(answered)]


async def test_tells_channels_and_referrers(store: EventStore) -> None:
    addresses = [(f"{SHOP}?{query}", referrer) for query, referrer, _, _ in EXAMPLES]
    answered = await found(store, addresses, "channel", "referrer_name")
    assert answered == [[channel, name] for _, _, channel, name in EXAMPLES]


async def test_what_has_no_address_has_no_channel(store: EventStore) -> None:
    assert await found(store, [("", ""), ("", "https://a.example/")], "channel") == [[""], ["referral"]]


async def test_agrees_with_the_oracle(store: EventStore) -> None:
    sources = ["", "google", "fb", "youtube", "amazon", "partner", "newsletter", "claude"]
    mediums = [
        "",
        "cpc",
        "cpm",
        "ppc",
        "paid-social",
        "display",
        "email",
        "newsletter",
        "affiliate",
        "podcast",
    ]
    mediums += ["sms", "push", "social", "organic", "referral", "strange"]
    campaigns = ["", "shop", "x-cross-network"]
    ads = ["", "&gclid=1", "&dclid=1"]
    referrers = ["", SHOP, "https://www.bing.com/", "https://m.facebook.com/", "https://a.example/"]
    addresses = [
        (f"{SHOP}?utm_source={source}&utm_medium={medium}&utm_campaign={campaign}{ad}", referrer)
        for source, medium, campaign, ad, referrer in itertools.product(
            sources, mediums, campaigns, ads, referrers
        )
    ]
    answered = await found(store, addresses, "channel")
    rows = [Row("", 0, {"url": url, "referrer": referrer}, {}) for url, referrer in addresses]
    assert answered == [[oracle.channel(row)] for row in rows]


async def test_knows_each_host_by_itself_and_with_something_before_it(store: EventStore) -> None:
    hosts = [
        (name.replace(".*", ".fr"), referrer.title)
        for referrer in REFERRERS
        for name in referrer.names.split()
        if "." in name
    ]
    addresses = [(SHOP, f"https://{prefix}{host}/") for host, _ in hosts for prefix in ("", "a.b.")]
    answered = await found(store, addresses, "referrer_name")
    assert answered == [[title] for _, title in hosts for _ in range(2)]


def test_nobody_is_known_by_a_name_of_somebody_else() -> None:
    names = [name for referrer in REFERRERS for name in referrer.names.split()]
    assert len(names) == len(set(names))


async def test_filters_by_channel_beside_visits_and_persons(analytics: Analytics) -> None:
    member = analytics.identity.member("owner")
    source, write_key = await analytics.source(member)
    come = {"url": SHOP, "referrer": "https://www.google.com/"}
    await analytics.send(
        write_key, [come, {"url": SHOP, "referrer": SHOP}, {"url": SHOP, "distinctId": "bob"}]
    )
    await analytics.until_count(member, source, 3)
    answer = await analytics.ask(
        member,
        source,
        breakdowns=[{"property": "channel"}],
        measures=[
            {"aggregation": "UNIQUE", "property": "visit_id", "alias": "visits"},
            {"aggregation": "UNIQUE", "property": "person_id", "alias": "people"},
        ],
        filters=[{"property": "channel", "operator": "NOT_EQUAL", "values": ["internal"]}],
    )
    assert sorted(answer["rows"]) == [["direct", 1, 1], ["organic_search", 1, 1]]
