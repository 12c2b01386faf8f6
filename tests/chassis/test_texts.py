import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.chassis import errors
from services.chassis.texts import clean_name


@pytest.mark.parametrize(
    "name",
    [
        "Ada",
        "Анна Smith",  # two alphabets, in two words
        "Ἀθηνᾶ",
        "李小龍",
        "محمد",
        "نیم\u200cفاصله",  # a joiner that Persian needs
        "क्\u200dष",
        "Zoë O'Brien-Ångström",
        "Ada 👩\u200d💻",
        "England 🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
        '<script>alert("1")</script>',  # text like any other
        "x' OR 1=1 --",
    ],
)
def test_keeps_names(name: str):
    assert clean_name(name, "display_name") == unicodedata.normalize("NFC", name)


def test_gives_one_spelling():
    assert clean_name("  Zoe\u0308 \u00a0 Smith ", "display_name") == "Zoë Smith"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "   ",
        "\u3000",
        "a\x00b",
        "a\nb",
        "a\tb",
        "a\x7fb",
        "a\u0085b",
        "a\u2028b",
        "Ada\u202egnp.exe",
        "a\u2066b",
        "a\u200eb",
        "a\u200bb",
        "a\u200db",
        "\u200d",
        "a\u00adb",
        "a\ufeffb",
        "\u3164",
        "a\ue000b",
        "аdmin",  # the first letter is Cyrillic
        "Pαypal",
    ],
)
def test_refuses_what_deceives(name: str):
    with pytest.raises(errors.Error) as refused:
        clean_name(name, "user.display_name")
    assert refused.value.reason == "VALIDATION_FAILED"
    assert refused.value.violations[0][0] == "user.display_name"


@given(st.text(max_size=100))
def test_what_is_kept_stays_the_same(text: str):
    try:
        name = clean_name(text, "title")
    except errors.Error:
        return
    assert clean_name(name, "title") == name
    assert unicodedata.is_normalized("NFC", name)
    assert not any(unicodedata.category(character) in {"Cc", "Zl", "Zp"} for character in name)
