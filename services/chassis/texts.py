"""Names and titles that people choose: in one spelling, and without what deceives the eye.

Nothing is escaped here: a name is text for whoever shows it, whatever stands in it.
"""

from __future__ import annotations

import re
import unicodedata

from services.chassis import errors

# Letters of these look alike; a word takes them from one of them (Unicode Technical Standard 39, section 5.1).
_ALIKE = frozenset({"LATIN", "CYRILLIC", "GREEK", "ARMENIAN", "COPTIC", "CHEROKEE"})
# Control, private use, surrogates, and separators of lines and paragraphs.
_NEVER = frozenset({"Cc", "Co", "Cs", "Zl", "Zp"})
_JOINERS = "\u200c\u200d"
_TAGS_OF_FLAGS = range(0xE0020, 0xE0080)


def clean_name(text: str, field: str) -> str:
    """The name in NFC, without spaces around it; a run of spaces within it becomes one.

    Raises INVALID_ARGUMENT (VALIDATION_FAILED), naming the field, when nothing is left, and for control characters,
    invisible ones, those that turn the direction of writing, and words of several alphabets that look alike.
    """
    name = re.sub(
        r"[ \u00a0\u2000-\u200a\u202f\u205f\u3000]+", " ", unicodedata.normalize("NFC", text)
    ).strip(" ")
    if not name:
        raise errors.invalid_fields([(field, "must have at least 1 character")])
    for before, character in zip(" " + name, name, strict=False):
        if _hides(before, character):
            raise errors.invalid_fields([(field, "has a character that cannot be seen")])
    for word in re.split(r"[^\w]+", name):
        if len({script for letter in word if (script := _script(letter)) in _ALIKE}) > 1:
            raise errors.invalid_fields([(field, "mixes alphabets that look alike in one word")])
    return name


def _hides(before: str, character: str) -> bool:
    category = unicodedata.category(character)
    if category in _NEVER:
        return True
    if character in _JOINERS:
        # They shape Arabic and Indic letters and join emoji; after anything else they only hide (RFC 5892, appendix A).
        return (
            not (before.isalpha() or unicodedata.category(before) in {"So", "Sk", "Mn", "Mc"})
            or before.isascii()
        )
    if ord(character) in _TAGS_OF_FLAGS:  # of the flags of England, Scotland and Wales
        return ord(before) not in {0x1F3F4, *_TAGS_OF_FLAGS}
    return category == "Cf" or character in "\u115f\u1160\u3164\uffa0\u2800\u034f"


def _script(letter: str) -> str:
    return unicodedata.name(letter, "").partition(" ")[0] if letter.isalpha() else ""
