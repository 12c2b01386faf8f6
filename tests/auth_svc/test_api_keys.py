import string
import zlib

from hypothesis import given
from hypothesis import strategies as st

from services.auth_svc.api_keys import PREFIX, checksum, is_well_formed, new_api_key

DIGITS = string.digits + string.ascii_uppercase + string.ascii_lowercase


def test_a_new_key_is_well_formed():
    keys = {new_api_key() for _ in range(100)}
    assert len(keys) == 100
    for key in keys:
        assert is_well_formed(key)
        assert key.startswith(PREFIX)
        assert len(key) == 42
        assert set(key[4:]) <= set(DIGITS)


@given(st.text(max_size=60))
def test_the_checksum_is_the_crc_32_in_base_62(body: str):
    spelled = checksum(body)
    assert len(spelled) == 6
    value = 0
    for digit in spelled:
        value = value * 62 + DIGITS.index(digit)
    assert value == zlib.crc32(body.encode())


def test_a_known_checksum():
    assert checksum("") == "000000"
    assert checksum("123456789") == "3jZRME"  # the check value of CRC-32: cbf43926


@given(st.integers(0, 41), st.sampled_from(DIGITS + "_-é"))
def test_any_other_character_is_noticed(position: int, character: str):
    key = PREFIX + "0" * 32 + checksum(PREFIX + "0" * 32)
    changed = key[:position] + character + key[position + 1 :]
    assert is_well_formed(changed) == (changed == key)


@given(st.text(max_size=128))
def test_nothing_else_is_well_formed(text: str):
    assert not is_well_formed(text)


def test_a_key_that_was_cut_or_padded_is_not_well_formed():
    key = new_api_key()
    for changed in (key[:-1], key + "0", key[1:], key + "\n", " " + key):
        assert not is_well_formed(changed)
