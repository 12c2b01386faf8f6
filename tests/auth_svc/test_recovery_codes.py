import re

from services.auth_svc.recovery_codes import fingerprint_of, new_codes


def test_are_ten_codes_of_80_bits_that_are_easy_to_read():
    codes = new_codes()
    assert len(set(codes)) == 10
    for code in codes:
        assert re.fullmatch(r"([0-9A-HJKMNP-TV-Z]{4}-){3}[0-9A-HJKMNP-TV-Z]{4}", code)


def test_can_be_typed_in_many_ways():
    right = fingerprint_of("01AB-CDEF-GH10-VWXY")
    for typed in ("01abcdefgh10vwxy", " 01AB CDEF GH10 VWXY ", "O1AB-CDEF-GHIO-VWXY", "oLab-cdef-ghl0-vwxy"):
        assert fingerprint_of(typed) == right
    for typed in ("", "01AB-CDEF-GH10-VWXZ", "01AB-CDEF-GH10", "01AB-CDEF-GH10-VWXY-0"):
        assert fingerprint_of(typed) != right
