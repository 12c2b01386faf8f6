"""The forge of a running mesh: its real signing key, taken from its database with its master key."""

from __future__ import annotations

from typing import Any

import aiohttp
import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from services.auth_svc.settings import AuthSettings
from services.auth_svc.signing_keys import SigningKey, SigningKeys
from services.chassis import db
from services.chassis.auth import ServiceTokens
from services.chassis.times import now
from tests.mesh.people import Person
from tests.parts import Mesh
from tests.security.jwt_corpus import Forge


def auth_settings_of(mesh: Mesh) -> AuthSettings:
    """What auth_svc of this mesh was started with."""
    (part,) = (part for part in mesh.stack.parts() if part.name == "auth_svc")
    prefix = "MESHBOARD_"
    values = {n.removeprefix(prefix).lower(): v for n, v in part.env.items() if n.startswith(prefix)}
    return AuthSettings(**values)  # type: ignore[arg-type]


async def signing_key_of(settings: AuthSettings) -> SigningKey:
    """The key that signs now."""
    sessions = db.connect(settings.postgres_url)
    keys = SigningKeys(sessions, settings, now)
    await keys.load()
    await db.engine(sessions).dispose()
    return keys.current()


async def forge_of(mesh: Mesh, http: aiohttp.ClientSession) -> Forge:
    """A forge with a new person, who has a second workspace, and a session that has ended."""
    ann = await Person(http, mesh.gateway_url).sign_up()
    other = await ann.post("/v1/workspaces", {"title": "Other"})
    credentials = {"email": ann.email, "password": ann.password}
    ended = await ann.post("/v1/auth:signIn", credentials)
    again = Person(http, mesh.gateway_url)
    again.headers["authorization"] = f"Bearer {ended['accessToken']}"
    await again.post("/v1/auth:signOut", {})
    token = ann.account["accessToken"]
    settings = auth_settings_of(mesh)
    service_key = load_pem_private_key((settings.keys_dir / "dashboard.key.pem").read_bytes(), None)
    assert isinstance(service_key, ec.EllipticCurvePrivateKey)
    return Forge(
        header=jwt.get_unverified_header(token),
        claims=claims_of(token),
        key=(await signing_key_of(settings)).private,
        other_key=ec.generate_private_key(ec.SECP256R1()),
        other_workspace_id=other["workspace"]["workspaceId"],
        refresh_token=ann.account["refreshToken"],
        refresh_key=ann.account["refreshKey"],
        device_token=ann.account["deviceToken"],
        service_token=ServiceTokens("dashboard", settings.keys_dir).issue("user"),
        service_key=service_key,
        revoked_session_id=claims_of(ended["accessToken"])["sid"],
    )


def claims_of(token: str) -> dict[str, Any]:
    """What an access token says, unverified."""
    claims: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    return claims
