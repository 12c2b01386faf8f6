"""After the master key has changed: what was encrypted under an older one is encrypted anew."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import InstrumentedAttribute

from services.auth_svc import signing_keys
from services.auth_svc.models import FactorRow, Mail, SigningKeyRow, Ticket
from services.auth_svc.settings import AuthSettings
from services.chassis.sealing import Seals, WrongKey

_BATCH = 100


@dataclass(frozen=True, slots=True)
class Column:
    """A column of sealed values: the purpose of its keys, and the context of a row's value."""

    purpose: str
    key: InstrumentedAttribute[Any]
    sealed: InstrumentedAttribute[Any]
    context: Callable[[Any], str]


# The same purposes and contexts as where these values are sealed.
COLUMNS = (
    Column(
        signing_keys.PURPOSE,
        SigningKeyRow.key_id,
        SigningKeyRow.sealed_key,
        lambda row: f"{signing_keys.CONTEXT} {row.key_id}",
    ),
    Column("tickets", Ticket.token_hash, Ticket.sealed_data, lambda row: str(row.purpose)),
    Column("mails", Mail.mail_id, Mail.sealed_mail, lambda row: "mails"),
    Column("factors", FactorRow.factor_id, FactorRow.sealed_secret, lambda row: f"factors {row.factor_id}"),
)


@dataclass(slots=True)
class Count:
    """How many values of a column are under the present key, were sealed anew, and could not be opened."""

    current: int = 0
    resealed: int = 0
    unreadable: int = 0


async def reseal(db: async_sessionmaker[AsyncSession], settings: AuthSettings) -> dict[str, Count]:
    """Seals anew what needs it, in short transactions; may be interrupted and repeated. Gives counts by table."""
    return {
        str(column.key.class_.__tablename__): await _reseal(
            db, column, Seals(settings.derived_keys(column.purpose))
        )
        for column in COLUMNS
    }


async def _reseal(db: async_sessionmaker[AsyncSession], column: Column, seals: Seals) -> Count:
    count, last = Count(), None
    name = column.sealed.key
    while True:
        async with db.begin() as session:
            rows = (
                await session.scalars(
                    select(column.key.class_)
                    .where(
                        column.sealed.is_not(None),
                        *([column.key > last] if last is not None else []),
                    )
                    .order_by(column.key)
                    .limit(_BATCH)
                    .with_for_update()
                )
            ).all()
            for row in rows:
                sealed, context = getattr(row, name), column.context(row)
                if seals.is_current(sealed):
                    count.current += 1
                    continue
                try:
                    setattr(row, name, seals.seal(seals.open(sealed, context), context))
                    count.resealed += 1
                except WrongKey:
                    count.unreadable += 1
        if len(rows) < _BATCH:
            return count
        last = getattr(rows[-1], column.key.key)
