import base64
import xml.etree.ElementTree as ET
from datetime import UTC, datetime
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from services.auth_svc import totp

# RFC 6238, appendix B, to six digits.
SECRET = base64.b32encode(b"12345678901234567890").decode()
VECTORS = [(1111111109, "081804"), (1111111111, "050471"), (1234567890, "005924"), (20000000000, "353130")]


@pytest.mark.parametrize(("seconds", "code"), VECTORS)
def test_knows_the_codes_of_the_standard_one_step_early_and_late(seconds: int, code: str):
    for shift in (-30, 0, 30):
        time = datetime.fromtimestamp(seconds + shift, UTC)
        assert totp.step_of(SECRET, code, time) == seconds // 30
    for shift in (-60, 60):
        assert totp.step_of(SECRET, code, datetime.fromtimestamp(seconds + shift, UTC)) is None


def test_takes_what_is_no_code_for_none():
    for text in ("", "00592", "0059244", "٠٠٥٩٢٤", "abcdef"):
        assert totp.step_of(SECRET, text, datetime.fromtimestamp(1234567890, UTC)) is None


def test_secrets_have_160_bits():
    secrets = {totp.new_secret() for _ in range(20)}
    assert len(secrets) == 20
    assert {len(base64.b32decode(secret)) for secret in secrets} == {20}


def test_the_uri_and_its_picture_say_whose_secret_it_is():
    uri = totp.uri_of(SECRET, "ada+x@example.org")
    url = urlsplit(uri)
    assert (url.scheme, url.netloc, unquote(url.path)) == ("otpauth", "totp", "/Meshboard:ada+x@example.org")
    assert parse_qs(url.query) == {"secret": [SECRET], "issuer": ["Meshboard"]}
    assert ET.fromstring(totp.qr_svg(uri)).tag == "{http://www.w3.org/2000/svg}svg"
