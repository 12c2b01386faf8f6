import pytest

from services.chassis.emails import email_key


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Ada@Example.org", "ada@example.ORG"),
        ("caf\u00e9@example.org", "cafe\u0301@example.org"),
        ("STRASSE@example.org", "stra\u00dfe@example.org"),
        ("\u1e9e\u0301@example.org", "ss\u0301@example.org"),
    ],
)
def test_spellings_of_one_address(one: str, other: str):
    assert email_key(one) == email_key(other)


def test_addresses_that_differ():
    assert email_key("ada@example.org") != email_key("ada@example.com")
    assert email_key("a.da@example.org") != email_key("ada@example.org")
