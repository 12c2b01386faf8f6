import pytest

from services.chassis.origins import is_allowed


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("https://shop.example", True),
        ("HTTPS://Shop.Example", True),
        ("http://shop.example", False),
        ("https://shop.example:8443", False),
        ("https://shop.example.evil.example", False),
        ("https://evilshop.example", False),
        ("https://a.sub.example", True),
        ("https://a.b.sub.example", True),
        ("https://sub.example", False),
        ("https://.sub.example", False),
        ("https://evil.example/.sub.example", False),
        ("https://evil.example#.sub.example", False),
        ("https://evil.example:1@x.sub.example", False),
        ("http://localhost:3000", True),
        ("null", False),
        ("*", False),
    ],
)
def test_tells_origins_apart(origin: str, allowed: bool) -> None:
    assert (
        is_allowed(origin, ["https://shop.example", "https://*.sub.example", "http://localhost:3000"])
        is allowed
    )
