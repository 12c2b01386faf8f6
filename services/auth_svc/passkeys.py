"""Passkeys: what a browser is asked for, and whether its answer is right (Web Authentication Level 3, section 7)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import structlog
from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Struct
from webauthn import (
    base64url_to_bytes,
    generate_authentication_options,
    generate_registration_options,
    verify_authentication_response,
    verify_registration_response,
)
from webauthn.helpers import (
    bytes_to_base64url,
    decode_credential_public_key,
    decoded_public_key_to_cryptography,
    generate_challenge,
    options_to_json_dict,
    parse_client_data_json,
)
from webauthn.helpers.structs import (
    AuthenticatorSelectionCriteria,
    CredentialDeviceType,
    PublicKeyCredentialDescriptor,
    ResidentKeyRequirement,
    UserVerificationRequirement,
)

log = structlog.get_logger(__name__)

_NAME = "Meshboard"
_DEFAULT_PORTS = {"http": 80, "https": 443}
# Longer than what any authenticator makes.
_LONGEST_FIELD = 32_768
_LONGEST_CREDENTIAL_ID = 1023  # section 7.1, step 25
_CREDENTIAL = ("id", "rawId", "type")
_ATTESTATION = ("clientDataJSON", "attestationObject")
_ASSERTION = ("clientDataJSON", "authenticatorData", "signature", "userHandle")


class WrongPasskey(Exception):
    """What came from the browser is malformed, or no answer to the challenge."""


@dataclass(frozen=True, slots=True)
class NewPasskey:
    """A credential that an authenticator has made."""

    credential_id: bytes
    public_key: bytes
    sign_count: int
    methods: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Assertion:
    """What was signed with a credential. `sign_count` must grow where it is not 0."""

    sign_count: int
    methods: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RelyingParty:
    """Who we are to authenticators: the host of the configured address, whatever a request says of its host.

    `rp_id` is that host without its port, `origin` that of our pages as browsers spell it (RFC 6454).
    """

    rp_id: str
    origin: str

    @classmethod
    def at(cls, public_url: str) -> RelyingParty:
        """The one whose pages are at this URL."""
        url = urlsplit(public_url)
        host = url.hostname or ""
        origin = f"{url.scheme}://[{host}]" if ":" in host else f"{url.scheme}://{host}"
        if url.port and url.port != _DEFAULT_PORTS.get(url.scheme):
            origin += f":{url.port}"
        return cls(host, origin)

    def ask_for_new(
        self, user_id: str, email: str, display_name: str, known: Iterable[bytes], lifetime: timedelta
    ) -> tuple[Struct, str]:
        """Options for `navigator.credentials.create`, and their challenge. `known` are the credentials that exist."""
        challenge = generate_challenge()
        options = generate_registration_options(
            rp_id=self.rp_id,
            rp_name=_NAME,
            user_id=UUID(user_id).bytes,
            user_name=email,
            user_display_name=display_name,
            challenge=challenge,
            timeout=lifetime // timedelta(milliseconds=1),
            # Resident, so that it serves for sign-in without an address; verified, so that it is two factors in one.
            authenticator_selection=AuthenticatorSelectionCriteria(
                resident_key=ResidentKeyRequirement.REQUIRED,
                user_verification=UserVerificationRequirement.REQUIRED,
            ),
            exclude_credentials=[PublicKeyCredentialDescriptor(id=each) for each in known],
        )
        return ParseDict(options_to_json_dict(options), Struct()), bytes_to_base64url(challenge)

    def ask(self, allowed: Iterable[bytes], lifetime: timedelta) -> tuple[Struct, str]:
        """Options for `navigator.credentials.get`, and their challenge. No `allowed` credentials: any of ours."""
        challenge = generate_challenge()
        options = generate_authentication_options(
            rp_id=self.rp_id,
            challenge=challenge,
            timeout=lifetime // timedelta(milliseconds=1),
            allow_credentials=[PublicKeyCredentialDescriptor(id=each) for each in allowed],
            user_verification=UserVerificationRequirement.REQUIRED,
        )
        return ParseDict(options_to_json_dict(options), Struct()), bytes_to_base64url(challenge)

    def registered(self, credential: Struct, challenge: str) -> NewPasskey:
        """The credential that was made for this challenge (section 7.1). Raises WrongPasskey."""
        read = _read(credential, _ATTESTATION)
        try:
            _refuse_frames(read)
            verified = verify_registration_response(
                credential=read,
                expected_challenge=base64url_to_bytes(challenge),
                expected_rp_id=self.rp_id,
                expected_origin=self.origin,
                require_user_verification=True,
            )
            # A key that cannot be used would lock its owner out.
            decoded_public_key_to_cryptography(decode_credential_public_key(verified.credential_public_key))
        except Exception as error:  # the bytes are anyone's, and what reads them raises all kinds of errors
            raise _wrong(error) from error
        if len(verified.credential_id) > _LONGEST_CREDENTIAL_ID:
            raise WrongPasskey("a credential id of more than 1023 bytes")
        return NewPasskey(
            verified.credential_id,
            verified.credential_public_key,
            verified.sign_count,
            _methods(verified.credential_device_type),
        )

    def asserted(self, credential: Struct, challenge: str, public_key: bytes) -> Assertion:
        """What was signed for this challenge (section 7.2). Raises WrongPasskey.

        The caller compares its `sign_count`, whose credential it is, and its user handle.
        """
        read = _read(credential, _ASSERTION)
        try:
            _refuse_frames(read)
            verified = verify_authentication_response(
                credential=read,
                expected_challenge=base64url_to_bytes(challenge),
                expected_rp_id=self.rp_id,
                expected_origin=self.origin,
                credential_public_key=public_key,
                credential_current_sign_count=0,
                require_user_verification=True,
            )
        except Exception as error:  # as above
            raise _wrong(error) from error
        return Assertion(verified.new_sign_count, _methods(verified.credential_device_type))


def credential_id_of(credential: Struct) -> bytes:
    """The id of the credential that somebody says to have used. Raises WrongPasskey."""
    return _decoded(_read(credential, _ASSERTION)["rawId"])


def user_id_of(credential: Struct) -> str:
    """Whose the credential says that it is; "" when it does not. Raises WrongPasskey."""
    handle = _decoded(_read(credential, _ASSERTION)["response"].get("userHandle", ""))
    if not handle:
        return ""
    if len(handle) != 16:
        raise WrongPasskey("a user handle that we have not given")
    return str(UUID(bytes=handle))


def _read(credential: Struct, fields: tuple[str, ...]) -> dict[str, Any]:
    """What we need of `PublicKeyCredential.toJSON()`: text of bounded length in known places, and nothing else."""
    response = credential.fields["response"].struct_value if "response" in credential.fields else Struct()
    return {**_text(credential, _CREDENTIAL), "response": _text(response, fields)}


def _text(struct: Struct, names: tuple[str, ...]) -> dict[str, str]:
    found = {
        name: struct.fields[name].string_value
        for name in names
        if name in struct.fields and struct.fields[name].WhichOneof("kind") != "null_value"
    }
    for name in names:
        if name not in found and name != "userHandle":
            raise WrongPasskey(f"{name} is missing")
    for name, value in found.items():
        if struct.fields[name].WhichOneof("kind") != "string_value" or len(value) > _LONGEST_FIELD:
            raise WrongPasskey(f"{name} is no text, or too long")
        if name != "type" and not re.fullmatch(r"[A-Za-z0-9_-]*=*", value):
            raise WrongPasskey(f"{name} is not base64url")
    return found


def _decoded(text: str) -> bytes:
    try:
        return base64url_to_bytes(text)
    except ValueError as error:
        raise WrongPasskey("not base64url") from error


def _refuse_frames(read: dict[str, Any]) -> None:
    """None of our pages asks from within a page of somebody else (section 7.2, step 14)."""
    client_data = parse_client_data_json(base64url_to_bytes(read["response"]["clientDataJSON"]))
    if client_data.cross_origin:
        raise WrongPasskey("a frame in another page")


def _wrong(error: Exception) -> WrongPasskey:
    log.info("passkey_refused", why=str(error)[:200])
    return WrongPasskey(type(error).__name__)


def _methods(device_type: CredentialDeviceType) -> tuple[str, ...]:
    """RFC 8176: where the key is, that its holder was verified, and that these are two factors."""
    return "hwk" if device_type is CredentialDeviceType.SINGLE_DEVICE else "swk", "user", "mfa"
