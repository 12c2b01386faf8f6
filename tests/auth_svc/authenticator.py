"""A passkey's authenticator and its browser in software: what `navigator.credentials` would give (`toJSON()`)."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from typing import Any

import cbor2
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.struct_pb2 import Struct

ORIGIN, RP_ID = "http://127.0.0.1:8080", "127.0.0.1"
# Flags of authenticator data (Web Authentication Level 3, section 6.1).
PRESENT, VERIFIED, BACKUP_ELIGIBLE, BACKED_UP, ATTESTED = 1, 4, 8, 16, 64


class Authenticator:
    """One credential with its ES256 key. What a keyword overrides is what an attacker would have done."""

    def __init__(
        self, *, counts: bool = True, synced: bool = False, credential_id: bytes | None = None
    ) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.credential_id = os.urandom(16) if credential_id is None else credential_id
        self.user_handle = ""
        self.sign_count = 1 if counts else 0
        self.flags = PRESENT | VERIFIED | (BACKUP_ELIGIBLE | BACKED_UP if synced else 0)

    def create(self, options: Struct, **overrides: Any) -> Struct:
        """What `navigator.credentials.create` gives for `options`."""
        asked = MessageToDict(options)
        self.user_handle = asked["user"]["id"]
        public = self.key.public_key().public_numbers()
        cose = {
            1: 2,
            3: -7,
            -1: 1,
            -2: public.x.to_bytes(32),
            -3: public.y.to_bytes(32),
            **overrides.pop("cose", {}),
        }
        attested = (
            bytes(16)
            + len(self.credential_id).to_bytes(2)
            + self.credential_id
            + cbor2.dumps(cose)
            + overrides.pop("trailing", b"")
        )
        data = self._data(overrides, ATTESTED) + attested
        attestation = {"fmt": "none", "attStmt": {}, "authData": data, **overrides.pop("attestation", {})}
        return self._credential(
            {
                "clientDataJSON": self._client_data("webauthn.create", asked, overrides),
                "attestationObject": spell(cbor2.dumps(attestation)),
                "transports": ["internal"],
            },
            overrides,
        )

    def get(self, options: Struct, **overrides: Any) -> Struct:
        """What `navigator.credentials.get` gives for `options`."""
        if self.sign_count:
            self.sign_count += 1
        client_data = self._client_data("webauthn.get", MessageToDict(options), overrides)
        data = self._data(overrides, 0)
        signed = data + hashlib.sha256(read(client_data)).digest()
        response = {
            "clientDataJSON": client_data,
            "authenticatorData": spell(data),
            "signature": spell(self.key.sign(signed, ec.ECDSA(SHA256()))),
            "userHandle": overrides.pop("user_handle", self.user_handle),
        }
        return self._credential(response, overrides)

    def _client_data(self, kind: str, asked: dict[str, Any], overrides: dict[str, Any]) -> str:
        client_data = {
            "type": overrides.pop("type", kind),
            "challenge": overrides.pop("challenge", asked["challenge"]),
            "origin": overrides.pop("origin", ORIGIN),
            "crossOrigin": overrides.pop("cross_origin", False),
        }
        return spell(json.dumps(client_data).encode())

    def _data(self, overrides: dict[str, Any], more_flags: int) -> bytes:
        rp_id: str = overrides.pop("rp_id", RP_ID)
        flags: int = overrides.pop("flags", self.flags) | more_flags
        count: int = overrides.pop("sign_count", self.sign_count)
        return hashlib.sha256(rp_id.encode()).digest() + bytes([flags]) + count.to_bytes(4)

    def _credential(self, response: dict[str, Any], overrides: dict[str, Any]) -> Struct:
        assert not overrides, overrides
        credential_id = spell(self.credential_id)
        credential = {
            "id": credential_id,
            "rawId": credential_id,
            "type": "public-key",
            "authenticatorAttachment": "platform",
            "clientExtensionResults": {},
            "response": response,
        }
        return ParseDict(credential, Struct())


def spell(raw: bytes) -> str:
    """Base64url as browsers write it."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def read(text: str) -> bytes:
    """The inverse of `spell`."""
    return base64.urlsafe_b64decode(text + "===")
