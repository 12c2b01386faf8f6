"""What is found in texts and hidden, what is left alone, and that no text makes it slow."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meshboard.analytics.v1.source_pb2 import RedactedPattern

from services.analytics_svc.redaction import MAX_MATCHES, REDACTED, BadPatternError, Patterns

ALL = Patterns(RedactedPattern(known=value) for value in RedactedPattern.Known.values() if value)


def own(regex: str) -> Patterns:
    return Patterns([RedactedPattern(regex=regex)])


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        # EMAIL
        ("write to ada@example.org now", "write to [redacted] now"),
        ("Ada.L+tag@Mail.Example.org", "[redacted]"),
        ("jürgen@müller.example", "[redacted]"),
        ("mailto:ada@example.org?subject=x", "mailto:[redacted]?subject=x"),
        (f"{'a' * 500}@example.org", "[redacted]"),
        ("a@b and @home at 5", "a@b and @home at 5"),
        # PAYMENT_CARD
        ("card 4111 1111 1111 1111 ok", "card [redacted] ok"),
        ("5500-0000-0000-0004", "[redacted]"),
        ("378282246310005", "[redacted]"),
        ("3782 822463 10005", "[redacted]"),
        ("4111 1111 1111 1112", "4111 1111 1111 1112"),  # the check digit is wrong
        ("1700000000000", "1700000000000"),  # milliseconds since 1970
        ("41111111111111111111111", "41111111111111111111111"),
        # IP_ADDRESS
        ("from 192.0.2.7, 2001:db8::1 and ::1.", "from [redacted], [redacted] and [redacted]."),
        ("::ffff:192.0.2.7", "[redacted]"),
        ("std::vector at 12:30:45 in 300.1.1.1", "std::vector at 12:30:45 in 300.1.1.1"),
        # PHONE
        ("call +49 30 1234567 now", "call [redacted] now"),
        ("+1 (555) 010-9999", "[redacted]"),
        ("1+1 is +2", "1+1 is +2"),
        # IBAN
        ("to DE89 3704 0044 0532 0130 00 from us", "to [redacted] from us"),
        ("de89370400440532013000", "[redacted]"),
        ("BE68 5390 0754 7034 from us", "[redacted] from us"),
        ("NO93 8601 1117 947", "[redacted]"),
        ("DE88 3704 0044 0532 0130 00", "DE88 3704 0044 0532 0130 00"),
        # percent-encoded
        ("https://x.example/?m=ada%40example.org&n=1", "https://x.example/?m=[redacted]&n=1"),
        ("https://x.example/u/ada%40example.org#top", "https://x.example/u/[redacted]#top"),
        ("?p=%2B49+30+1234567&c=4111+1111+1111+1111", "?p=[redacted]&c=[redacted]"),
        ("?q=a+b%20c", "?q=a+b%20c"),
    ],
)
def test_hides(text: str, hidden: str) -> None:
    assert ALL.replace(text) == hidden
    assert ALL.may_be_in(["before", text, "behind"]) is (text != hidden)


@pytest.mark.parametrize("known", [value for value in RedactedPattern.Known.values() if value])
def test_each_is_looked_for_by_itself(known: "RedactedPattern.Known.ValueType") -> None:
    samples = {
        RedactedPattern.EMAIL: "ada@example.org",
        RedactedPattern.PAYMENT_CARD: "4111111111111111",
        RedactedPattern.IP_ADDRESS: "192.0.2.7",
        RedactedPattern.PHONE: "+49 30 1234567",
        RedactedPattern.IBAN: "DE89370400440532013000",
    }
    pattern = Patterns([RedactedPattern(known=known)])
    assert {one for one, text in samples.items() if pattern.replace(text) == REDACTED} == {known}


def test_an_expression_of_ones_own() -> None:
    patterns = own(r"(?i)\bticket-\d+")
    assert patterns.replace("see Ticket-17 and tickets") == "see [redacted] and tickets"
    assert own("ü+").replace("füür") == "f[redacted]r"
    assert own("secret").replace("a%73ecret=1&secret=2") == "[redacted]=1&[redacted]=2"


@pytest.mark.parametrize(
    ("regex", "text", "found"),
    [
        ("^ada$", "ada", True),
        ("^ada$", "an ada", False),
        (r"\Aada\z", "ada", True),
        (r"(?-m)^ada$", "ada", True),
        (r"(?-m:^ada$)", "ada", True),
        (r"\bada\b", "x ada", True),
        (r"\Bda", "ada", True),
        ("(?s)a.b", "a\nb", True),
    ],
)
def test_one_look_at_many_texts_misses_nothing(regex: str, text: str, found: bool) -> None:
    patterns = own(regex)
    assert (patterns.replace(text) != text) is found
    if found:
        assert patterns.may_be_in(["other", text, "more"])


@settings(deadline=None)
@given(
    st.lists(st.text("ab1@. +%4\n-", max_size=12), max_size=5),
    st.sampled_from([r"^a", r"b$", r"\ba1\b", r"a\n?b", r"[^ab]{3}", r"\A1", r"@\z", "%4|4 "]),
)
def test_what_is_replaced_was_in_sight(texts: list[str], regex: str) -> None:
    patterns = own(regex)
    if any(patterns.replace(text) != text for text in texts):
        assert patterns.may_be_in(texts)


@pytest.mark.parametrize("regex", ["(", "a{1000}{1000}", "(?=x)", r"(a)\1", "a*", "", "x|"])
def test_refuses_an_expression(regex: str) -> None:
    with pytest.raises(BadPatternError):
        own(regex)


def test_a_text_full_of_it_is_hidden_whole() -> None:
    digit = own(r"\d")
    assert digit.replace("1," * MAX_MATCHES) == "[redacted]," * MAX_MATCHES
    assert digit.replace("1," * (MAX_MATCHES + 1)) == REDACTED
    encoded = "&".join(["a%20b"] * (MAX_MATCHES + 1))
    assert ALL.replace(encoded) == encoded
    assert ALL.replace(f"{encoded}&ada%40example.org") == REDACTED


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "piece", ["a", "a@", "a@b.", "1", "1 ", "4111 ", ":", "a:", "1.", "+1 ", "DE00 ", "%41", "+", "("]
)
def test_no_text_is_slow(piece: str) -> None:
    """Quadratic time would be minutes."""
    text = piece * (1_000_000 // len(piece))
    for patterns in (ALL, own(r"(a+)+$"), own(r"(?:\d+ ?)+x")):
        patterns.may_be_in([text])
        patterns.replace(text)
