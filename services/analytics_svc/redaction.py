"""Finds what is not to be kept in texts: well-known things, and what a regular expression says.

Senders choose the texts, so every pattern takes time that grows with the length of the text and no faster: those below
have possessive quantifiers or bounded ones, and regular expressions of users run in RE2.
"""

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from urllib.parse import unquote, unquote_plus

import re2
from meshboard.analytics.v1.source_pb2 import RedactedPattern

REDACTED = "[redacted]"
# A text in which a user's expression matches more often is hidden whole, and one that is encoded in more places where
# anything is found: each of these costs microseconds.
MAX_MATCHES = 20
_REGEX_BYTES = 2 << 20

# Where two values of a URL's query, or two parts of its path, meet.
_SEPARATORS = re.compile(r"[/?&#=;]+")
_ENCODED_PIECE = re.compile(r"[^/?&#=;%+]*+[%+][^/?&#=;]*+")


class BadPatternError(ValueError):
    """A regular expression cannot be used."""


# Well-known patterns


@dataclass(frozen=True, slots=True)
class _Known:
    """What something looks like. The search for it is quick where a pattern begins with a set of characters.

    `end` says where in the text it ends if the match is one indeed, else 0. `sign` is in every text that has it.
    `before` is the number of characters that belong to it and stand before the match.
    """

    pattern: re.Pattern[str]
    end: Callable[[re.Match[str]], int] = re.Match.end
    sign: str = ""
    before: int = 0

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        if self.sign in text:
            for match in self.pattern.finditer(text):
                if end := self.end(match):
                    yield match.start() - self.before, end


def _end_of_card(match: re.Match[str]) -> int:
    """The check digit is that of Luhn (ISO/IEC 7812-1)."""
    total = 0
    for place, digit in enumerate(int(c) for c in reversed(match[0]) if c.isdigit()):
        total += digit if place % 2 == 0 else digit * 2 - 9 * (digit > 4)
    return 0 if total % 10 else match.end()


def _end_of_iban(match: re.Match[str]) -> int:
    """The check digits are those of ISO 13616. What follows is left out, though it may look like one more group."""
    start = match.start() - 2
    text = match.string[start : match.end()]
    left = _IBAN_LENGTHS.get(text[:2].upper(), 99)
    end = 0
    for end, character in enumerate(text, 1):  # noqa: B007 - read after the loop
        left -= character != " "
        if not left:
            break
    plain = text[:end].replace(" ", "")
    if left or int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 != 1:
        return 0
    return start + end


def _end_of_address(match: re.Match[str]) -> int:
    text = match[0]
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return 0
    return match.end()


def _end_of_phone(match: re.Match[str]) -> int:
    return match.end() if 8 <= sum(c.isdigit() for c in match[0]) <= 15 else 0


# Of the SWIFT IBAN registry.
_IBAN_LENGTHS = {
    country: length
    for length, countries in {
        15: "NO",
        16: "BE",
        18: "DK FI FO GL NL",
        19: "MK SI",
        20: "AT BA EE KZ LT LU XK",
        21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA",
        23: "AE GI IL IQ TL",
        24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "LY PT ST",
        26: "IS TR",
        27: "FR GR IT MC MR SM",
        28: "AL AZ BY CY DO GT HU LB PL SV",
        29: "BR EG PS QA UA",
        30: "JO KW MU",
        31: "MT SC",
        32: "LC",
    }.items()
    for country in countries.split()
}
_IPV4 = r"(?:\d{1,3}\.){3}\d{1,3}"
_KNOWN = {
    RedactedPattern.EMAIL: _Known(re.compile(r"(?<![\w.%+'-])[\w.%+'-]++@[\w-]++(?:\.[\w-]++)++"), sign="@"),
    RedactedPattern.PAYMENT_CARD: _Known(
        re.compile(
            r"[2-6](?<![\d.].)"
            r"(?:\d{12,18}|\d{3}([ -])\d{4}\1\d{4}\1\d{1,7}|\d{3}([ -])\d{6}\2\d{4,5})(?!\d)",
            re.ASCII,
        ),
        _end_of_card,
    ),
    RedactedPattern.IP_ADDRESS: _Known(
        re.compile(
            rf"(?=[0-9A-Fa-f:])(?<![\w.:])"
            rf"(?:{_IPV4}|(?:[0-9A-Fa-f]{{0,4}}:){{2,7}}(?:{_IPV4}|[0-9A-Fa-f]{{1,4}})?)(?![\w:]|\.\d)",
            re.ASCII,
        ),
        _end_of_address,
    ),
    RedactedPattern.PHONE: _Known(
        re.compile(r"\+(?<!\w.)\d{1,3}(?:[ ./-]?\(?\d{1,4}\)?){2,7}(?!\d)", re.ASCII),
        _end_of_phone,
        sign="+",
    ),
    RedactedPattern.IBAN: _Known(
        re.compile(
            r"\d(?<=[A-Za-z]{2}.)(?<!\w...)\d"
            r"(?:[A-Za-z0-9]{11,30}|(?: [A-Za-z0-9]{4}){2,7}(?: [A-Za-z0-9]{1,4})?)(?!\w)",
            re.ASCII,
        ),
        _end_of_iban,
        before=2,
    ),
}


# Regular expressions of users


_WHOLE_TEXT = re.compile(r"\\[Az]|\(\?\w*-")


class _Regex:
    """An expression of RE2, which works on UTF-8. Raises BadPatternError."""

    def __init__(self, pattern: str) -> None:
        options = re2.Options()
        options.log_errors = False
        options.never_capture = True
        options.max_mem = _REGEX_BYTES
        try:
            self._compiled = re2.compile(pattern.encode(), options)
        except re2.error as error:
            (why,) = error.args
            raise BadPatternError(
                f"is no regular expression of RE2: {why.decode(errors='replace')}"
            ) from error
        if self._compiled.search(b"") is not None:
            raise BadPatternError("matches the empty text")
        # Finds in lines whatever the expression finds in one of them alone; None where that is not so.
        self._lines = (
            None if _WHOLE_TEXT.search(pattern) else re2.compile(f"(?m:{pattern})".encode(), options)
        )

    def may_be_in(self, lines: bytes) -> bool:
        return self._lines is None or self._lines.search(lines) is not None

    def spans(self, data: bytes) -> Iterator[tuple[int, int]]:
        for match in self._compiled.finditer(data):
            if match.end() > match.start():
                yield match.span()

    def replace(self, text: str) -> str:
        data = text.encode()
        pieces, place = [], 0
        for count, (start, end) in enumerate(self.spans(data)):
            if count == MAX_MATCHES:
                return REDACTED
            pieces += [data[place:start], REDACTED.encode()]
            place = end
        return b"".join([*pieces, data[place:]]).decode() if pieces else text


class Patterns:
    """Patterns of a source. Raises BadPatternError."""

    def __init__(self, patterns: Iterable[RedactedPattern]) -> None:
        patterns = list(patterns)
        self._known = [_KNOWN[p.known] for p in patterns if p.HasField("known")]
        self._regexes = [_Regex(p.regex) for p in patterns if p.HasField("regex")]

    def may_be_in(self, texts: Iterable[str]) -> bool:
        """False when nothing is found in any of the texts: one look for all of them."""
        lines = "\n".join(texts)
        if _is_encoded(lines):
            lines = "\n".join([lines, *_decoded(_SEPARATORS.sub("\n", lines))])
        return _any(known.spans(lines) for known in self._known) or any(
            own.may_be_in(lines.encode()) for own in self._regexes
        )

    def replace(self, text: str) -> str:
        """The text without what is found in it, also percent-encoded."""
        for known in self._known:
            text = _replace(text, known.spans(text))
        for own in self._regexes:
            text = own.replace(text)
        if not _is_encoded(text):
            return text
        pieces = list(islice(_ENCODED_PIECE.finditer(text), MAX_MATCHES + 1))
        if len(pieces) > MAX_MATCHES:
            return REDACTED if self.may_be_in([text]) else text
        return _ENCODED_PIECE.sub(lambda m: REDACTED if any(map(self._is_in, _decoded(m[0]))) else m[0], text)

    def _is_in(self, text: str) -> bool:
        return _any(known.spans(text) for known in self._known) or _any(
            own.spans(text.encode()) for own in self._regexes
        )


def _is_encoded(text: str) -> bool:
    return "%" in text or "+" in text


def _decoded(text: str) -> set[str]:
    """The text with a plus as a space, as in queries, and as itself."""
    return {unquote_plus(text), unquote(text)}


def _any(found: Iterable[Iterator[object]]) -> bool:
    return any(next(spans, None) is not None for spans in found)


def _replace(text: str, spans: Iterator[tuple[int, int]]) -> str:
    pieces, place = [], 0
    for start, end in spans:
        pieces += [text[place:start], REDACTED]
        place = end
    return "".join([*pieces, text[place:]]) if pieces else text
