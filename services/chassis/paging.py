"""Pages of a list: a token says where the last page ended, and nobody but us can make or change one.

Paging is by key, not by offset: the next page begins after the sort key of the last row, so that rows which come
and go meanwhile make no other row repeat or hide, and the last page costs as little as the first. In a servicer:

    page = self.pages.open(request, caller.workspace_id)
    async with self.db() as session:
        rows = await session.scalars(
            select(Team)
            .where(Team.workspace_id == caller.workspace_id, page.after(Team.title, Team.team_id))
            .order_by(Team.title, Team.team_id)
            .limit(page.limit)
        )
    teams, next_page_token = page.close(rows.all(), lambda team: (team.title, team.team_id))
"""

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, TypeVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from google.protobuf.message import Message
from sqlalchemy import ColumnElement, literal, true, tuple_
from sqlalchemy.orm import InstrumentedAttribute

from services.chassis.errors import Error, invalid_argument

DEFAULT_SIZE = 50
LARGEST_SIZE = 1000

_NONCE_BYTES = 12

Key = Sequence[str | int | float | datetime]
Row = TypeVar("Row")


class Pages:
    """Opens and closes the pages of all lists of a service; `key` are 32 bytes, the same in all replicas."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    def open(self, request: Message, scope: str) -> "Page":
        """Reads `page_size` and `page_token` of a list request.

        A token holds for requests that differ in the page only, and in the same `scope`: the workspace, or
        what else confines the list. Raises INVALID_ARGUMENT, reason PAGE_TOKEN_INVALID, for any other token.
        """
        size: int = getattr(request, "page_size")  # noqa: B009 - messages have no common type with it
        token: str = getattr(request, "page_token")  # noqa: B009
        if size < 0:
            raise invalid_argument("VALIDATION_FAILED", "A page has no negative size.", field="page_size")
        query = _fingerprint(request, scope)
        return Page(
            self._cipher,
            query,
            min(size or DEFAULT_SIZE, LARGEST_SIZE),
            self._read(token, query) if token else None,
        )

    def _read(self, token: str, query: bytes) -> list[Any]:
        try:
            sealed = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
            # A decoder ignores foreign characters and spare bits: only the one spelling that we write counts.
            if _spell(sealed) != token:
                raise _invalid()
            content = self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], query)
        except (binascii.Error, ValueError, InvalidTag):
            raise _invalid() from None
        return [_revive(value) for value in json.loads(content)]


class Page:
    """One page of a list. Select `limit` rows: the one too many says that there is another page."""

    def __init__(self, cipher: AESGCM, query: bytes, size: int, last: list[Any] | None) -> None:
        self._cipher = cipher
        self._query = query
        self._last = last
        self.size = size
        self.limit = size + 1

    @property
    def last(self) -> tuple[Any, ...] | None:
        """Where the last page ended, for lists that have a way of their own to go on; None on the first page."""
        return None if self._last is None else tuple(self._last)

    def after(
        self, *columns: InstrumentedAttribute[Any] | ColumnElement[Any], descending: bool = False
    ) -> ColumnElement[bool]:
        """The condition that a row comes after the last page, in a list ordered by these columns.

        All of them ascend, or all descend. Together they are unique, and none is null.
        """
        if self._last is None:
            return true()
        if len(self._last) != len(columns):  # the list was sorted otherwise when the token was made
            raise _invalid()
        row = tuple_(*columns)
        last = tuple_(
            *(literal(value, column.type) for value, column in zip(self._last, columns, strict=True))
        )
        return row < last if descending else row > last

    def rest(self, rows: Sequence[Row], key: Callable[[Row], Key]) -> Sequence[Row]:
        """As `after`, for a short list in memory that is sorted by `key`."""
        last = self._last
        return rows if last is None else [row for row in rows if list(key(row)) > last]

    def close(self, rows: Sequence[Row], key: Callable[[Row], Key]) -> tuple[Sequence[Row], str]:
        """Gives the rows of this page, and the token of the next one, "" when this is the last.

        `key` gives the values of the columns that `after` compares: strings, numbers or times.
        """
        if len(rows) <= self.size:
            return rows, ""
        page = rows[: self.size]
        return page, self.token(key(page[-1]))

    @property
    def start(self) -> Sequence[Any] | None:
        """What the token was made from; None on the first page. For lists that someone else keeps."""
        return self._last

    def token(self, last: Key) -> str:
        """The token of the page after this."""
        content = json.dumps(list(last), default=_preserve, ensure_ascii=False, separators=(",", ":"))
        nonce = os.urandom(_NONCE_BYTES)
        return _spell(nonce + self._cipher.encrypt(nonce, content.encode(), self._query))


def _fingerprint(request: Message, scope: str) -> bytes:
    query = type(request)()
    query.CopyFrom(request)
    query.ClearField("page_size")
    query.ClearField("page_token")
    query.DiscardUnknownFields()
    # The type of the request stands for the RPC: no two share one.
    parts = (
        request.DESCRIPTOR.full_name.encode(),
        scope.encode(),
        query.SerializeToString(deterministic=True),
    )
    return hashlib.sha256(b"".join(len(part).to_bytes(4, "big") + part for part in parts)).digest()


def _spell(sealed: bytes) -> str:
    return base64.urlsafe_b64encode(sealed).rstrip(b"=").decode()


def _preserve(value: object) -> dict[str, str]:
    if isinstance(value, datetime):
        return {"time": value.isoformat()}
    raise TypeError(f"a sort key cannot hold {value!r}")


def _revive(value: Any) -> Any:
    return datetime.fromisoformat(value["time"]) if isinstance(value, dict) else value


def _invalid() -> Error:
    return invalid_argument(
        "PAGE_TOKEN_INVALID",
        "The page token is not of this list: start at the first page.",
        field="page_token",
    )
