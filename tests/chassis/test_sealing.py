import pytest

from services.chassis.sealing import Seals, WrongKey

OLD, NEW, OTHER = bytes(32), b"n" * 32, b"o" * 32


def test_opens_what_it_sealed_under_the_same_context_only():
    seals = Seals([NEW])
    sealed = seals.seal(b"secret", "table 1")
    assert b"secret" not in sealed
    assert seals.open(sealed, "table 1") == b"secret"
    assert seals.seal(b"secret", "table 1") != sealed
    with pytest.raises(WrongKey, match="table 2"):
        seals.open(sealed, "table 2")


def test_opens_with_an_earlier_key_and_seals_with_the_present_one():
    sealed = Seals([OLD]).seal(b"secret", "t")
    seals = Seals([NEW, OLD])
    assert seals.open(sealed, "t") == b"secret"
    assert not seals.is_current(sealed)
    assert seals.is_current(seals.seal(b"secret", "t"))


@pytest.mark.parametrize("keys", [[OTHER], [NEW, OTHER]])
def test_refuses_what_no_key_opens(keys: list[bytes]):
    sealed = Seals([OLD]).seal(b"secret", "t")
    with pytest.raises(WrongKey):
        Seals(keys).open(sealed, "t")


@pytest.mark.parametrize("place", [0, 4, 16, -1])
def test_refuses_what_was_changed(place: int):
    seals = Seals([NEW])
    sealed = bytearray(seals.seal(b"secret", "t"))
    sealed[place] ^= 1
    for changed in (bytes(sealed), b"", bytes(sealed[:10])):
        with pytest.raises(WrongKey):
            seals.open(changed, "t")
