"""Addresses, and when two of them are the same."""

import unicodedata


def email_key(email: str) -> str:
    """What identifies the account of an address: spelling and case do not matter (NFC, casefold)."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", email).casefold())
