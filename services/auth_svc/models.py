"""The tables of auth_svc."""

from sqlalchemy import ForeignKey, Index, LargeBinary, Text, UniqueConstraint, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from services.chassis.db import Id, Time


class Table(DeclarativeBase):
    """Tables that only auth_svc reads and writes."""


class Account(Table):
    """Whom an address and a password belong to; pending until `activate_time` is set.

    `workspace_id` is the personal workspace, `last_workspace_id` the one of the last sign-in, `try_time` when the
    sign-up was begun or resumed, `user_update_time` how new the display name is.
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


class Session(Table):
    """A sign-in, and the family of its refresh tokens, of which only hashes are here.

    `generation` is that of the newest refresh token.
    """

    __tablename__ = "sessions"
    __table_args__ = (
        UniqueConstraint("family_hash", name="sessions_family_once"),
        Index("sessions_by_user", "user_id"),
        Index("sessions_by_end", "expire_time"),
        Index("sessions_revoked", "revoke_time", postgresql_where=text("revoke_time IS NOT NULL")),
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


class SigningKeyRow(Table):
    """A private key, encrypted; it signs from `activate_time` until the next one does."""

    __tablename__ = "signing_keys"

    key_id: Mapped[str] = mapped_column(Text, primary_key=True)
    sealed_key: Mapped[bytes] = mapped_column(LargeBinary)
    activate_time: Mapped[Time]
