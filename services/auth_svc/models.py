"""The tables of auth_svc."""

from typing import Any

from sqlalchemy import (
    BigInteger,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    LargeBinary,
    Text,
    UniqueConstraint,
    false,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from services.chassis.db import Id, Time

# No account has this id: where there is none, statements run with it, so that the time does not tell.
NOBODY = "00000000-0000-0000-0000-000000000000"


class Table(DeclarativeBase):
    """Tables that only auth_svc reads and writes."""


class Account(Table):
    """Whom an address and a password belong to; pending until `activate_time` is set.

    `workspace_id` is the personal workspace, `last_workspace_id` the one of the last sign-in, `try_time` when the
    sign-up was begun or resumed, `user_update_time` how new the display name is; `verify_time` is set when a mailed
    link has been redeemed. `managing_workspace_id` is set of an account that an admin made, and is its `workspace_id`
    too; it has no password before its owner has chosen one. `deactivate_time` is when an admin has disabled it,
    `state_time` how new that is.
    """

    __tablename__ = "accounts"
    __table_args__ = (
        UniqueConstraint("email_key", name="accounts_email_once"),
        Index("accounts_pending", "try_time", postgresql_where=text("activate_time IS NULL")),
    )

    user_id: Mapped[Id] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(Text)
    email_key: Mapped[str] = mapped_column(Text)
    password_hash: Mapped[str] = mapped_column(Text)
    display_name: Mapped[str] = mapped_column(Text)
    workspace_id: Mapped[Id]
    last_workspace_id: Mapped[Id | None]
    create_time: Mapped[Time]
    try_time: Mapped[Time]
    activate_time: Mapped[Time | None]
    user_update_time: Mapped[Time | None]
    verify_time: Mapped[Time | None]
    disable_time: Mapped[Time | None]
    password_change_time: Mapped[Time | None]
    managing_workspace_id: Mapped[Id | None]
    deactivate_time: Mapped[Time | None]
    state_time: Mapped[Time | None]


class ErasedUser(Table):
    """A user that is gone: what is heard of them later makes no account again."""

    __tablename__ = "erased_users"

    user_id: Mapped[Id] = mapped_column(primary_key=True)
    erase_time: Mapped[Time]


class Session(Table):
    """A sign-in, and the family of its refresh tokens, of which only hashes are here.

    `generation` is that of the newest refresh token. The session ends at `expire_time` unless it is refreshed, and at
    `end_time` in any case. `methods` are those of RFC 8176; `in_cookies` says that a browser keeps the tokens.
    """

    __tablename__ = "sessions"
    __table_args__ = (
        UniqueConstraint("family_hash", name="sessions_family_once"),
        Index("sessions_of_user", "user_id", "session_id"),
        Index("sessions_by_end", "expire_time"),
        Index("sessions_revoked", "revoke_time", postgresql_where=text("revoke_time IS NOT NULL")),
        Index(
            "sessions_by_impersonator",
            "impersonator_session_id",
            postgresql_where=text("impersonator_session_id IS NOT NULL"),
        ),
    )

    session_id: Mapped[Id] = mapped_column(primary_key=True)
    user_id: Mapped[Id] = mapped_column(ForeignKey("accounts.user_id", ondelete="CASCADE"))
    workspace_id: Mapped[Id | None]
    family_hash: Mapped[bytes] = mapped_column(LargeBinary)
    key_hash: Mapped[bytes] = mapped_column(LargeBinary)
    generation: Mapped[int] = mapped_column(server_default=text("1"))
    create_time: Mapped[Time]
    expire_time: Mapped[Time]
    revoke_time: Mapped[Time | None]
    end_time: Mapped[Time] = mapped_column(server_default=text("now() + interval '90 days'"))
    last_use_time: Mapped[Time] = mapped_column(server_default=func.now())
    auth_time: Mapped[Time] = mapped_column(server_default=func.now())
    methods: Mapped[list[str]] = mapped_column(ARRAY(Text), server_default=text("'{pwd}'"))
    in_cookies: Mapped[bool] = mapped_column(server_default=false())
    user_agent: Mapped[str] = mapped_column(Text, server_default="")
    address: Mapped[str] = mapped_column(Text, server_default="")
    impersonator_id: Mapped[Id | None]
    impersonator_session_id: Mapped[Id | None]


class SigningKeyRow(Table):
    """A private key, encrypted; it signs from `activate_time` until the next one does."""

    __tablename__ = "signing_keys"

    key_id: Mapped[str] = mapped_column(Text, primary_key=True)
    sealed_key: Mapped[bytes] = mapped_column(LargeBinary)
    activate_time: Mapped[Time]


class Ticket(Table):
    """A secret that is given out once and redeemed once: a mailed link, or a step of a sign-in (see tickets.py)."""

    __tablename__ = "tickets"
    __table_args__ = (
        Index("tickets_by_user", "user_id", "purpose"),
        Index("tickets_by_end", "expire_time"),
    )

    token_hash: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)
    purpose: Mapped[str] = mapped_column(Text)
    user_id: Mapped[Id | None] = mapped_column(ForeignKey("accounts.user_id", ondelete="CASCADE"))
    sealed_data: Mapped[bytes] = mapped_column(LargeBinary)
    create_time: Mapped[Time]
    expire_time: Mapped[Time]


class Mail(Table):
    """A mail that waits to be sent, encrypted because of its link."""

    __tablename__ = "mails"
    __table_args__ = (Index("mails_by_try", "try_time"),)

    mail_id: Mapped[Id] = mapped_column(primary_key=True)
    sealed_mail: Mapped[bytes] = mapped_column(LargeBinary)
    create_time: Mapped[Time]
    try_time: Mapped[Time]
    try_count: Mapped[int] = mapped_column(server_default=text("0"))


class EmailChange(Table):
    """A change of address under way: approved from the present one, confirmed from the new one."""

    __tablename__ = "email_changes"

    user_id: Mapped[Id] = mapped_column(ForeignKey("accounts.user_id", ondelete="CASCADE"), primary_key=True)
    change_id: Mapped[Id]
    new_email: Mapped[str] = mapped_column(Text)
    approve_time: Mapped[Time | None]
    confirm_time: Mapped[Time | None]
    create_time: Mapped[Time]


class FactorRow(Table):
    """A second factor: `sealed_secret` and `last_step` of an authenticator app, the others of a passkey.

    The recovery codes of an account are one row, too.
    """

    __tablename__ = "factors"
    __table_args__ = (
        UniqueConstraint("credential_id", name="factors_credential_once"),
        Index("factors_by_user", "user_id", "create_time"),
    )

    factor_id: Mapped[Id] = mapped_column(primary_key=True)
    user_id: Mapped[Id] = mapped_column(ForeignKey("accounts.user_id", ondelete="CASCADE"))
    kind: Mapped[str] = mapped_column(Text)
    title: Mapped[str] = mapped_column(Text)
    sealed_secret: Mapped[bytes | None] = mapped_column(LargeBinary)
    credential_id: Mapped[bytes | None] = mapped_column(LargeBinary)
    public_key: Mapped[bytes | None] = mapped_column(LargeBinary)
    sign_count: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    last_step: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    create_time: Mapped[Time]
    last_use_time: Mapped[Time | None]


class RecoveryCode(Table):
    """A recovery code that has not been used."""

    __tablename__ = "recovery_codes"

    user_id: Mapped[Id] = mapped_column(ForeignKey("accounts.user_id", ondelete="CASCADE"), primary_key=True)
    code_hash: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)


class ServiceAccount(Table):
    """A member of a workspace that is a program. `version` is the etag.

    Nobody sees an account without `activate_time`: it is not a member yet, or not for long. `update_time` is then when
    making it was last tried.
    """

    __tablename__ = "service_accounts"
    __table_args__ = (
        UniqueConstraint("service_account_id", name="service_accounts_id_once"),
        UniqueConstraint("workspace_id", "creator_id", "request_id", name="service_accounts_request_once"),
        Index("service_accounts_pending", "update_time", postgresql_where=text("activate_time IS NULL")),
    )

    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    service_account_id: Mapped[Id] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(Text)
    activate_time: Mapped[Time | None]
    disable_time: Mapped[Time | None]
    version: Mapped[int] = mapped_column(server_default=text("1"))
    creator_id: Mapped[Id]
    request_id: Mapped[str | None] = mapped_column(Text)
    create_time: Mapped[Time]
    update_time: Mapped[Time]


class ApiKey(Table):
    """An API key, as its hash. `session_id` is what the claim `sid` of its tokens says."""

    __tablename__ = "api_keys"
    __table_args__ = (
        ForeignKeyConstraint(
            ["workspace_id", "service_account_id"],
            ["service_accounts.workspace_id", "service_accounts.service_account_id"],
            ondelete="CASCADE",
        ),
        UniqueConstraint("key_hash", name="api_keys_hash_once"),
        UniqueConstraint("session_id", name="api_keys_session_once"),
        UniqueConstraint("workspace_id", "creator_id", "request_id", name="api_keys_request_once"),
    )

    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    service_account_id: Mapped[Id] = mapped_column(primary_key=True)
    api_key_id: Mapped[Id] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(Text)
    prefix: Mapped[str] = mapped_column(Text)
    key_hash: Mapped[bytes] = mapped_column(LargeBinary)
    scopes: Mapped[list[str]] = mapped_column(ARRAY(Text))
    session_id: Mapped[Id]
    expire_time: Mapped[Time | None]
    last_use_time: Mapped[Time | None]
    creator_id: Mapped[Id]
    request_id: Mapped[str | None] = mapped_column(Text)
    create_time: Mapped[Time]


class EndedKey(Table):
    """What the claim `sid` of an API key's tokens said, until the key was deleted or disabled."""

    __tablename__ = "ended_keys"
    __table_args__ = (Index("ended_keys_by_time", "revoke_time"),)

    session_id: Mapped[Id] = mapped_column(primary_key=True)
    revoke_time: Mapped[Time]


class AuditEntryRow(Table):
    """An act that matters to security. Rows are added and never changed."""

    __tablename__ = "audit_entries"
    __table_args__ = (
        Index("audit_entries_by_workspace", "workspace_id", text("time DESC"), text("audit_entry_id DESC")),
        Index("audit_entries_by_actor", "actor_id", text("time DESC"), text("audit_entry_id DESC")),
        Index("audit_entries_by_subject", "subject_id", text("time DESC"), text("audit_entry_id DESC")),
    )

    audit_entry_id: Mapped[Id] = mapped_column(primary_key=True)
    time: Mapped[Time]
    kind: Mapped[str] = mapped_column(Text)
    outcome: Mapped[str] = mapped_column(Text)
    reason: Mapped[str] = mapped_column(Text)
    actor_id: Mapped[str] = mapped_column(Text)
    impersonator_id: Mapped[str] = mapped_column(Text)
    subject_id: Mapped[str] = mapped_column(Text)
    workspace_id: Mapped[Id | None]
    session_id: Mapped[str] = mapped_column(Text)
    address: Mapped[str] = mapped_column(Text)
    details: Mapped[dict[str, Any]] = mapped_column(JSONB)


class AuditUnsealed(Table):
    """An entry that waits for its place in the chain."""

    __tablename__ = "audit_unsealed"

    audit_entry_id: Mapped[Id] = mapped_column(primary_key=True)


class AuditSeal(Table):
    """The place of an entry in the chain, and its seal. Rows are added and never changed."""

    __tablename__ = "audit_seals"

    position: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    audit_entry_id: Mapped[Id] = mapped_column(unique=True)
    seal: Mapped[bytes] = mapped_column(LargeBinary)
