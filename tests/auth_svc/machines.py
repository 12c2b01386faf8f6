"""Service accounts and their keys, as tests want them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc.aio
from meshboard.auth.v1.auth_service_pb2 import SignUpResponse
from meshboard.auth.v1.service_account_service_pb2 import (
    ApiKey,
    CreateApiKeyRequest,
    CreateServiceAccountRequest,
    ExchangeApiKeyRequest,
    ServiceAccount,
    UpdateServiceAccountRequest,
)
from meshboard.user.v1.workspace_service_pb2 import GetWorkspaceRequest
from sqlalchemy import select

from services.auth_svc.models import AuditEntryRow
from tests.auth_svc.conftest import Services, bearer
from tests.harness import reason_of

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Person:
    """Somebody who calls in a workspace; `metadata` is what their calls carry."""

    user_id: str
    workspace_id: str
    account: SignUpResponse
    metadata: Metadata


@dataclass(frozen=True)
class Machine:
    """A service account with a key."""

    account: ServiceAccount
    key: ApiKey
    secret: str


async def owner_of(services: Services) -> Person:
    """Somebody new in their own workspace."""
    account = await services.sign_up()
    return Person(account.user.user_id, account.workspace.workspace_id, account, bearer(account.access_token))


async def join(services: Services, owner: Person, role: str) -> Person:
    """Somebody new with a role in the owner's workspace, whose calls are about it."""
    account = await services.sign_up()
    await services.admit(owner.workspace_id, owner.metadata, account.user.user_id, account.access_token, role)
    return Person(account.user.user_id, owner.workspace_id, account, bearer(account.access_token))


async def create(services: Services, owner: Person, role: str = "editor", **fields: Any) -> ServiceAccount:
    """A service account."""
    request = CreateServiceAccountRequest(
        **{"workspace_id": owner.workspace_id, "title": "CI", "role": role, **fields}
    )
    response = await services.service_accounts.CreateServiceAccount(request, metadata=owner.metadata)
    return response.service_account


async def machine(
    services: Services, owner: Person, role: str = "editor", scopes: Sequence[str] = (), **fields: Any
) -> Machine:
    """A service account with a key."""
    account = await create(services, owner, role)
    request = CreateApiKeyRequest(
        workspace_id=owner.workspace_id,
        service_account_id=account.service_account_id,
        title="key",
        scopes=scopes,
        **fields,
    )
    response = await services.service_accounts.CreateApiKey(request, metadata=owner.metadata)
    return Machine(account, response.api_key, response.secret)


async def exchange(services: Services, secret: str) -> str:
    """The access token that a key is exchanged for."""
    request = ExchangeApiKeyRequest(api_key=secret)
    return str((await services.service_accounts.ExchangeApiKey(request)).access_token)


async def set_disabled(services: Services, owner: Person, account: ServiceAccount, disabled: bool) -> None:
    """Disables or enables an account."""
    wanted = ServiceAccount(service_account_id=account.service_account_id, disabled=disabled)
    request = UpdateServiceAccountRequest(workspace_id=owner.workspace_id, service_account=wanted)
    request.update_mask.paths.append("disabled")
    await services.service_accounts.UpdateServiceAccount(request, metadata=owner.metadata)


async def outcome_in_workspace(services: Services, token: str, workspace_id: str) -> str:
    """What becomes of a call with the token at another service: "OK", or the reason of the refusal."""
    request = GetWorkspaceRequest(workspace_id=workspace_id)
    try:
        await services.workspaces.GetWorkspace(request, metadata=bearer(token))
    except grpc.aio.AioRpcError as failure:
        return reason_of(failure)
    return "OK"


async def audited(services: Services, subject_id: str) -> list[AuditEntryRow]:
    """The audit entries about somebody, the oldest first, without those of user_svc's events, which come later."""
    async with services.sessions() as session:
        rows = await session.scalars(
            select(AuditEntryRow)
            .where(
                AuditEntryRow.subject_id == subject_id,
                ~AuditEntryRow.kind.like("member.%"),
                ~AuditEntryRow.kind.like("invitation.%"),
            )
            .order_by(AuditEntryRow.time, AuditEntryRow.audit_entry_id)
        )
        return list(rows)
