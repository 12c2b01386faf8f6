"""The page that share links lead to, and the headers that say what may run in it and who may frame it."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).with_name("shared_page.html").read_bytes()


def _hash_of(tag: str) -> str:
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), PAGE, flags=re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"


# Nothing but the script and the style of the file (Content Security Policy Level 3, section 2.3.1).
_POLICY = (
    f"default-src 'none'; script-src {_hash_of('script')}; style-src {_hash_of('style')}; connect-src 'self';"
    " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors "
)


def headers(allowed_origins: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """What the page is sent with; pages of these origins may frame it, without any nobody's."""
    ancestors = " ".join(("'self'", *allowed_origins)) if allowed_origins else "'none'"
    return (
        ("content-security-policy", _POLICY + ancestors),
        ("referrer-policy", "no-referrer"),
        ("cross-origin-opener-policy", "same-origin"),
        ("x-robots-tag", "noindex"),
    )
