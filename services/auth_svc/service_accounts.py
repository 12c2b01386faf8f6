"""Service accounts, their API keys, and what a key is exchanged for."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import grpc.aio
import structlog
from meshboard.auth.v1 import service_account_service_pb2 as pb
from meshboard.auth.v1.service_account_service_pb2_grpc import ServiceAccountServiceServicer
from meshboard.user.v1.internal_user_service_pb2 import PutServiceUserRequest, RemoveServiceUserRequest
from meshboard.user.v1.internal_user_service_pb2_grpc import InternalUserServiceStub
from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.auth_svc import api_keys, audit
from services.auth_svc.guesses import Guesses
from services.auth_svc.models import ApiKey, ServiceAccount
from services.auth_svc.origins import Origin, origin_of
from services.auth_svc.refresh_tokens import fingerprint
from services.auth_svc.tokens import Tokens
from services.auth_svc.usable_keys import Ended, UsableKeys, end_key, end_keys
from services.chassis import auth, errors
from services.chassis.masks import changed_fields
from services.chassis.paging import Pages
from services.chassis.rights import PERMISSIONS, ROLES
from services.chassis.times import time_of, timestamp_of

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

MAX_KEYS = 50
MUTABLE = ("title", "disabled")
_OWNER = "owner"


@dataclass(frozen=True)
class ServiceAccountServicer(ServiceAccountServiceServicer):
    """`new_id` gives UUIDv7s, whose order is that of creation."""

    db: async_sessionmaker[AsyncSession]
    users: InternalUserServiceStub
    guesses: Guesses
    tokens: Tokens
    pages: Pages
    keys: UsableKeys
    now: Callable[[], datetime]
    new_id: Callable[[], str]

    async def CreateServiceAccount(
        self, request: pb.CreateServiceAccountRequest, context: Context
    ) -> pb.CreateServiceAccountResponse:
        origin = origin_of(context)
        await self._check_role(request.role, origin)
        account = await self._pending_account(request)
        if account.activate_time is None:
            await self._put_user(account, request.role)
            account = await self._activate(account, request.role, origin)
        return pb.CreateServiceAccountResponse(service_account=account_to_pb(account))

    async def GetServiceAccount(
        self, request: pb.GetServiceAccountRequest, context: Context
    ) -> pb.GetServiceAccountResponse:
        async with self.db() as session:
            account = await _find(session, request.service_account_id)
        return pb.GetServiceAccountResponse(service_account=account_to_pb(account))

    async def ListServiceAccounts(
        self, request: pb.ListServiceAccountsRequest, context: Context
    ) -> pb.ListServiceAccountsResponse:
        workspace_id = auth.caller().workspace_id
        page = self.pages.open(request, workspace_id)
        async with self.db() as session:
            rows = await session.scalars(
                select(ServiceAccount)
                .where(
                    ServiceAccount.workspace_id == workspace_id,
                    ServiceAccount.activate_time.is_not(None),
                    page.after(ServiceAccount.service_account_id),
                )
                .order_by(ServiceAccount.service_account_id)
                .limit(page.limit)
            )
        accounts, next_page_token = page.close(rows.all(), lambda account: (account.service_account_id,))
        return pb.ListServiceAccountsResponse(
            service_accounts=map(account_to_pb, accounts), next_page_token=next_page_token
        )

    async def UpdateServiceAccount(
        self, request: pb.UpdateServiceAccountRequest, context: Context
    ) -> pb.UpdateServiceAccountResponse:
        wanted, origin, now = request.service_account, origin_of(context), self.now()
        fields = changed_fields(wanted, request.update_mask, MUTABLE)
        if "title" in fields and not wanted.title:
            raise errors.invalid_fields([("service_account.title", "must have at least 1 character")])
        async with self.db.begin() as session:
            account = await _find(session, wanted.service_account_id, lock=True)
            if wanted.etag and wanted.etag != str(account.version):
                raise errors.etag_mismatch()
            if "title" in fields:
                account.title = wanted.title
            ended: list[Ended] = []
            if "disabled" in fields and wanted.disabled != bool(account.disable_time):
                account.disable_time = now if wanted.disabled else None
                ended = await end_keys(session, account, now) if wanted.disabled else []
                _note(session, "disabled" if wanted.disabled else "enabled", account, origin, now)
            account.version += 1
            account.update_time = now
            if "title" in fields:
                _note(session, "updated", account, origin, now, title=account.title)
        await self.keys.forget(ended)
        if "title" in fields:
            await self._rename(account)
        return pb.UpdateServiceAccountResponse(service_account=account_to_pb(account))

    async def DeleteServiceAccount(
        self, request: pb.DeleteServiceAccountRequest, context: Context
    ) -> pb.DeleteServiceAccountResponse:
        now = self.now()
        async with self.db.begin() as session:
            account = await _find(session, request.service_account_id, lock=True)
            ended = await retire(session, account, now)
            _note(session, "deleted", account, origin_of(context), now)
        await self.keys.forget(ended)
        try:
            await clear(self.db, self.users, account)
        except errors.Error as error:  # the reaper does it
            log.warning("membership_not_removed", error=repr(error), user_id=account.service_account_id)
        return pb.DeleteServiceAccountResponse()

    async def CreateApiKey(
        self, request: pb.CreateApiKeyRequest, context: Context
    ) -> pb.CreateApiKeyResponse:
        _check_scopes(request.scopes)
        expires = request.HasField("expire_time")
        expire_time = time_of(request.expire_time, "expire_time") if expires else None
        secret, caller, now = api_keys.new_api_key(), auth.caller(), self.now()
        async with self.db.begin() as session:
            account = await _find(session, request.service_account_id, lock=True)
            key = await session.scalar(
                insert(ApiKey)
                .values(
                    workspace_id=account.workspace_id,
                    service_account_id=account.service_account_id,
                    api_key_id=self.new_id(),
                    title=request.title,
                    prefix=secret[: api_keys.SHOWN_CHARACTERS],
                    key_hash=fingerprint(secret),
                    scopes=list(dict.fromkeys(request.scopes)),
                    session_id=self.new_id(),
                    expire_time=expire_time,
                    creator_id=caller.user_id,
                    request_id=request.request_id or None,
                    create_time=now,
                )
                .on_conflict_do_nothing(constraint="api_keys_request_once")
                .returning(ApiKey)
            )
            if key is None:
                first = await session.scalars(
                    select(ApiKey).where(
                        ApiKey.workspace_id == caller.workspace_id,
                        ApiKey.creator_id == caller.user_id,
                        ApiKey.request_id == request.request_id,
                    )
                )
                return pb.CreateApiKeyResponse(api_key=key_to_pb(first.one()))
            await _check_room(session, account)
            _note_key(session, "created", key, origin_of(context), now, title=key.title, scopes=key.scopes)
        return pb.CreateApiKeyResponse(api_key=key_to_pb(key), secret=secret)

    async def ListApiKeys(self, request: pb.ListApiKeysRequest, context: Context) -> pb.ListApiKeysResponse:
        page = self.pages.open(request, auth.caller().workspace_id)
        async with self.db() as session:
            account = await _find(session, request.service_account_id)
            rows = await session.scalars(
                select(ApiKey)
                .where(
                    ApiKey.workspace_id == account.workspace_id,
                    ApiKey.service_account_id == account.service_account_id,
                    page.after(ApiKey.api_key_id),
                )
                .order_by(ApiKey.api_key_id)
                .limit(page.limit)
            )
        keys, next_page_token = page.close(rows.all(), lambda key: (key.api_key_id,))
        return pb.ListApiKeysResponse(api_keys=map(key_to_pb, keys), next_page_token=next_page_token)

    async def DeleteApiKey(
        self, request: pb.DeleteApiKeyRequest, context: Context
    ) -> pb.DeleteApiKeyResponse:
        now = self.now()
        identity = (auth.caller().workspace_id, request.service_account_id, request.api_key_id)
        async with self.db.begin() as session:
            key = await session.get(ApiKey, identity, with_for_update=True)
            if key is None:
                raise errors.not_found("API_KEY_NOT_FOUND", "The service account has no such API key.")
            ended = end_key(session, key, now)
            await session.delete(key)
            _note_key(session, "deleted", key, origin_of(context), now)
        await self.keys.forget([ended])
        return pb.DeleteApiKeyResponse()

    async def ExchangeApiKey(
        self, request: pb.ExchangeApiKeyRequest, context: Context
    ) -> pb.ExchangeApiKeyResponse:
        # A key is too long to be guessed, so that a right one is never slowed down: it may share its address with a
        # machine that goes on trying an old one.
        if not api_keys.is_well_formed(request.api_key):
            await self.guesses.address_failed("api-key", origin_of(context))
            raise _key_invalid()
        now = self.now()
        key = await self.keys.find(request.api_key, now)
        if key is None:
            await self._refuse(request.api_key, origin_of(context), now)
            raise _key_invalid()
        if self.keys.is_due(key, now):
            self.keys.note(key, origin_of(context), now)
        access_token, seconds = self.tokens.of_api_key(key)
        return pb.ExchangeApiKeyResponse(access_token=access_token, expires_in_seconds=seconds)

    async def _check_role(self, role: str, origin: Origin) -> None:
        rights = auth.caller().rights
        assert rights is not None, "the access stage settles the rights"
        permissions = ROLES.get(role) or rights.roles.get(role, frozenset())
        if not permissions <= rights.permissions:
            async with self.db.begin() as session:
                audit.record(
                    session, "service_account.created", origin, self.now(), reason="ROLE_TOO_HIGH", role=role
                )
            raise errors.permission_denied(
                "ROLE_TOO_HIGH", "The role has permissions that the caller has not.", role=role
            )
        if not permissions or role == _OWNER:
            known = ", ".join(role for role in (*ROLES, *sorted(rights.roles)) if role != _OWNER)
            raise errors.invalid_argument(
                "ROLE_UNKNOWN", f"There is no such role; these are: {known}.", field="role", role=role
            )

    async def _pending_account(self, request: pb.CreateServiceAccountRequest) -> ServiceAccount:
        """A new account, or the one that an earlier try with the same request id has made or left unfinished."""
        caller, now = auth.caller(), self.now()
        async with self.db.begin() as session:
            account: ServiceAccount | None = await session.scalar(
                insert(ServiceAccount)
                .values(
                    workspace_id=caller.workspace_id,
                    service_account_id=self.new_id(),
                    title=request.title,
                    creator_id=caller.user_id,
                    request_id=request.request_id or None,
                    create_time=now,
                    update_time=now,
                )
                .on_conflict_do_update(
                    constraint="service_accounts_request_once",
                    set_={"update_time": now},
                    where=ServiceAccount.activate_time.is_(None),
                )
                .returning(ServiceAccount)
            )
            if account is None:
                first = await session.scalars(
                    select(ServiceAccount).where(
                        ServiceAccount.workspace_id == caller.workspace_id,
                        ServiceAccount.creator_id == caller.user_id,
                        ServiceAccount.request_id == request.request_id,
                    )
                )
                account = first.one()
        return account

    async def _activate(self, pending: ServiceAccount, role: str, origin: Origin) -> ServiceAccount:
        now = self.now()
        identity = (pending.workspace_id, pending.service_account_id)
        async with self.db.begin() as session:
            account = await session.get(ServiceAccount, identity, with_for_update=True)
            if account is None or account.disable_time:
                raise errors.unavailable("The service account was not made in time: begin again.")
            if account.activate_time is None:
                account.activate_time = account.update_time = now
                _note(session, "created", account, origin, now, title=account.title, role=role)
        return account

    async def _put_user(self, account: ServiceAccount, role: str = "") -> None:
        await self.users.PutServiceUser(
            PutServiceUserRequest(
                user_id=account.service_account_id,
                workspace_id=account.workspace_id,
                display_name=account.title,
                role=role,
            )
        )

    async def _rename(self, account: ServiceAccount) -> None:
        """Gives user_svc the title, and once more when it has changed meanwhile: the newest one stays."""
        identity = (account.workspace_id, account.service_account_id)
        current: ServiceAccount | None = account
        sent = ""
        while current is not None and current.title != sent:
            await self._put_user(current)
            sent = current.title
            async with self.db() as session:
                current = await session.get(ServiceAccount, identity)

    async def _refuse(self, api_key: str, origin: Origin, now: datetime) -> None:
        await self.guesses.address_failed("api-key", origin)
        async with self.db.begin() as session:
            key = await session.scalar(select(ApiKey).where(ApiKey.key_hash == fingerprint(api_key)))
            audit.record(
                session,
                "api_key.exchanged",
                origin,
                now,
                reason="API_KEY_INVALID",
                actor_id="",
                subject_id=key.service_account_id if key else "",
                workspace_id=key.workspace_id if key else "",
                api_key_id=key.api_key_id if key else "",
                prefix=api_key[: api_keys.SHOWN_CHARACTERS],
            )


async def retire(session: AsyncSession, account: ServiceAccount, now: datetime) -> list[Ended]:
    """Ends an account whose row the caller has locked; `clear` then removes what is left of it.

    Forget the keys that this gives after the commit.
    """
    ended = await end_keys(session, account, now)
    await session.flush()
    await session.execute(
        delete(ApiKey).where(
            ApiKey.workspace_id == account.workspace_id,
            ApiKey.service_account_id == account.service_account_id,
        )
    )
    account.activate_time, account.request_id, account.disable_time = None, None, now
    account.update_time = now
    return ended


async def clear(
    db: async_sessionmaker[AsyncSession], users: InternalUserServiceStub, account: ServiceAccount
) -> None:
    """Removes the membership of a retired account, and then its row, so that a crash in between is made up for."""
    await users.RemoveServiceUser(
        RemoveServiceUserRequest(user_id=account.service_account_id, workspace_id=account.workspace_id)
    )
    async with db.begin() as session:
        await session.execute(
            delete(ServiceAccount).where(
                ServiceAccount.workspace_id == account.workspace_id,
                ServiceAccount.service_account_id == account.service_account_id,
                ServiceAccount.activate_time.is_(None),
            )
        )


def account_to_pb(row: ServiceAccount) -> pb.ServiceAccount:
    """The account."""
    return pb.ServiceAccount(
        service_account_id=row.service_account_id,
        workspace_id=row.workspace_id,
        title=row.title,
        disabled=row.disable_time is not None,
        create_time=timestamp_of(row.create_time),
        update_time=timestamp_of(row.update_time),
        etag=str(row.version),
    )


def key_to_pb(row: ApiKey) -> pb.ApiKey:
    """The key, without what is secret."""
    return pb.ApiKey(
        api_key_id=row.api_key_id,
        service_account_id=row.service_account_id,
        title=row.title,
        prefix=row.prefix,
        scopes=row.scopes,
        create_time=timestamp_of(row.create_time),
        expire_time=timestamp_of(row.expire_time) if row.expire_time else None,
        last_use_time=timestamp_of(row.last_use_time) if row.last_use_time else None,
    )


async def _find(session: AsyncSession, service_account_id: str, *, lock: bool = False) -> ServiceAccount:
    identity = (auth.caller().workspace_id, service_account_id)
    account = await session.get(ServiceAccount, identity, with_for_update=lock or None)
    if account is None or account.activate_time is None:
        raise errors.not_found("SERVICE_ACCOUNT_NOT_FOUND", "The workspace has no such service account.")
    return account


async def _check_room(session: AsyncSession, account: ServiceAccount) -> None:
    """Counts the keys, with the new one among them; the lock on the account has others wait."""
    count = await session.scalar(
        select(func.count())
        .select_from(ApiKey)
        .where(
            ApiKey.workspace_id == account.workspace_id,
            ApiKey.service_account_id == account.service_account_id,
        )
    )
    if (count or 0) > MAX_KEYS:
        raise errors.failed_precondition(
            "API_KEY_LIMIT", f"The service account has {MAX_KEYS} API keys: delete one first."
        )


def _check_scopes(scopes: Iterable[str]) -> None:
    for index, scope in enumerate(scopes):
        if scope not in PERMISSIONS:
            raise errors.invalid_argument(
                "SCOPE_UNKNOWN", f"{scope!r} is no permission.", field=f"scopes[{index}]", scope=scope
            )


def _note(
    session: AsyncSession, what: str, account: ServiceAccount, origin: Origin, now: datetime, **details: Any
) -> None:
    audit.record(
        session, f"service_account.{what}", origin, now, subject_id=account.service_account_id, **details
    )


def _note_key(
    session: AsyncSession, what: str, key: ApiKey, origin: Origin, now: datetime, **details: Any
) -> None:
    audit.record(
        session,
        f"api_key.{what}",
        origin,
        now,
        subject_id=key.service_account_id,
        api_key_id=key.api_key_id,
        **details,
    )


def _key_invalid() -> errors.Error:
    return errors.unauthenticated("API_KEY_INVALID", "The API key is not valid.")
