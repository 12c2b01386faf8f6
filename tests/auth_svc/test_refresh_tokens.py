from hypothesis import given
from hypothesis import strategies as st

from services.auth_svc.refresh_tokens import RefreshToken, read, spell

KEY = bytes(32)
tokens = st.builds(
    RefreshToken, st.binary(min_size=16, max_size=16), st.integers(min_value=1, max_value=2**32 - 1)
)


@given(tokens)
def test_what_is_spelled_can_be_read(token: RefreshToken):
    assert read(spell(token, KEY), KEY) == token


@given(tokens, st.integers(min_value=0), st.characters())
def test_one_changed_character_makes_it_invalid(token: RefreshToken, position: int, character: str):
    spelled = spell(token, KEY)
    position %= len(spelled)
    changed = spelled[:position] + character + spelled[position + 1 :]
    assert read(changed, KEY) == (token if changed == spelled else None)


@given(tokens)
def test_another_key_reads_nothing(token: RefreshToken):
    assert read(spell(token, KEY), b"\x01" * 32) is None


@given(st.text())
def test_anything_else_is_not_a_token(text: str):
    assert read(text, KEY) is None
    assert read("mbr_" + text, KEY) is None


def test_successors_differ_and_do_not_show_the_next():
    token = RefreshToken(bytes(16), 1)
    assert spell(token.successor(), KEY) != spell(token, KEY)
    assert token.successor().successor() == RefreshToken(bytes(16), 3)
