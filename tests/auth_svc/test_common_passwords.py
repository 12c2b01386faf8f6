from services.auth_svc.common_passwords import is_common


def test_knows_the_common_ones_whatever_their_case() -> None:
    assert is_common("password123")
    assert is_common("PassWord123")
    assert not is_common("correct horse battery")
