"""What a process relies on to decide by itself: the keys of access tokens, ended sessions, and rights.

auth_svc and user_svc own these. They announce each change on NATS, and their relays send a heartbeat once everything
committed is announced; while it does not come, the owners are asked instead.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog
from cryptography.hazmat.primitives.asymmetric import ec
from meshboard.auth.v1 import (
    auth_service_pb2,
    auth_service_pb2_grpc,
    internal_auth_service_pb2,
    internal_auth_service_pb2_grpc,
)
from meshboard.auth.v1 import (
    events_pb2 as auth_events_pb2,
)
from meshboard.user.v1 import events_pb2 as user_events_pb2
from meshboard.user.v1 import internal_user_service_pb2, internal_user_service_pb2_grpc, workspace_pb2

from services.chassis.auth import FetchKeys, Revocations, TokenVerifier, public_key_from_jwk
from services.chassis.bus import Bus, Received
from services.chassis.clients import Peer
from services.chassis.permissions import permission_set
from services.chassis.rights import Fetch, Rights, RightsCache
from services.chassis.times import time_of

log = structlog.get_logger(__name__)

Load = Callable[[], Awaitable[set[str]]]
Ask = Callable[[str], Awaitable[bool]]


def keys_of(auth: Peer) -> FetchKeys:
    """Fetches the public keys from auth_svc."""
    stub = auth.stub(auth_service_pb2_grpc.AuthServiceStub)

    async def fetch() -> dict[str, ec.EllipticCurvePublicKey]:
        response = await stub.GetJwks(auth_service_pb2.GetJwksRequest())
        return {key.kid: public_key_from_jwk(key.x, key.y) for key in response.keys}

    return fetch


def sessions_of(auth: Peer) -> tuple[Load, Ask]:
    """Asks auth_svc which sessions have ended, and whether one is alive."""
    stub = auth.stub(internal_auth_service_pb2_grpc.InternalAuthServiceStub)

    async def load() -> set[str]:
        response = await stub.ListRevocations(internal_auth_service_pb2.ListRevocationsRequest())
        return {revocation.session_id for revocation in response.revocations}

    async def ask(session_id: str) -> bool:
        request = internal_auth_service_pb2.CheckSessionRequest(session_id=session_id)
        return bool((await stub.CheckSession(request)).alive)

    return load, ask


def rights_of(user: Peer) -> Fetch:
    """Asks user_svc for rights."""
    stub = user.stub(internal_user_service_pb2_grpc.InternalUserServiceStub)

    async def fetch(user_id: str, workspace_id: str) -> Rights:
        request = internal_user_service_pb2.GetRightsRequest(user_id=user_id, workspace_id=workspace_id)
        return rights_from_pb((await stub.GetRights(request)).rights)

    return fetch


def rights_from_pb(rights: workspace_pb2.Rights) -> Rights:
    """The chassis' form of the message."""
    return Rights(
        user_id=rights.user_id,
        workspace_id=rights.workspace_id,
        role=rights.role,
        permissions=permission_set(tuple(rights.permissions)),
        team_ids=frozenset(rights.team_ids),
        version=rights.version,
        second_factor_required=rights.second_factor_required,
        roles={role.name: permission_set(tuple(role.permissions)) for role in rights.custom_roles},
        expire_time=time_of(rights.expire_time, "expire_time") if rights.HasField("expire_time") else None,
    )


async def follow_keys(bus: Bus, issuer: str, fetch: FetchKeys) -> TokenVerifier:
    """Verifies by the keys of auth_svc, without those that it has announced to be gone."""
    verifier = TokenVerifier(issuer, fetch)

    def retired(message: Received) -> None:
        verifier.retire(auth_events_pb2.SigningKeyRetired.FromString(message.payload).key_id)

    await bus.listen(auth_events_pb2.SigningKeyRetired.DESCRIPTOR.full_name, retired)
    return verifier


async def follow_revocations(bus: Bus, load: Load, ask: Ask) -> Revocations:
    """Follows the sessions that end."""
    pulse = await bus.pulse("beat.auth")
    revocations = Revocations(pulse.fresh, load, ask)

    def revoked(message: Received) -> None:
        revocations.revoke(auth_events_pb2.SessionRevoked.FromString(message.payload).session_id)

    await bus.listen(auth_events_pb2.SessionRevoked.DESCRIPTOR.full_name, revoked)
    bus.on_gap(revocations.gap)
    return revocations


async def follow_rights(bus: Bus, fetch: Fetch) -> RightsCache:
    """Follows the changes of rights."""
    pulse = await bus.pulse("beat.user")
    rights = RightsCache(fetch, pulse.fresh)

    def changed(message: Received) -> None:
        event = user_events_pb2.RightsChanged.FromString(message.payload)
        rights.changed(event.workspace_id, event.version)

    await bus.listen(user_events_pb2.RightsChanged.DESCRIPTOR.full_name, changed)
    bus.on_gap(rights.clear)
    return rights
