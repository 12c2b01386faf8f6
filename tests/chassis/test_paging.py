import base64
import random
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from meshboard.user.v1.team_service_pb2 import ListTeamsRequest
from meshboard.user.v1.workspace_service_pb2 import ListMembersRequest
from sqlalchemy import Column, DateTime, Integer, MetaData, Table, Text, column, delete, insert, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.schema import CreateTable
from uuid_utils.compat import uuid7

from services.chassis.db import GrantRow
from services.chassis.errors import Error
from services.chassis.paging import DEFAULT_SIZE, LARGEST_SIZE, Pages

Sessions = async_sessionmaker[AsyncSession]
PAGES = Pages(bytes(32))


def token_after(last: tuple[Any, ...], request: ListTeamsRequest, scope: str = "w1") -> str:
    page = PAGES.open(request, scope)
    rows = [last] * page.limit
    return page.close(rows, lambda row: row)[1]


def refused(request: Any, scope: str = "w1", pages: Pages = PAGES) -> bool:
    with pytest.raises(Error) as raised:
        pages.open(request, scope)
    error = raised.value
    return (
        error.code is grpc.StatusCode.INVALID_ARGUMENT
        and error.reason == "PAGE_TOKEN_INVALID"
        and error.violations[0][0] == "page_token"
    )


@pytest.mark.parametrize(
    ("asked", "given_size"),
    [(0, DEFAULT_SIZE), (1, 1), (1000, LARGEST_SIZE), (1001, LARGEST_SIZE), (2**31 - 1, LARGEST_SIZE)],
)
def test_sizes_are_coerced(asked: int, given_size: int) -> None:
    page = PAGES.open(ListTeamsRequest(page_size=asked), "w1")
    assert (page.size, page.limit) == (given_size, given_size + 1)


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(Error) as raised:
        PAGES.open(ListTeamsRequest(page_size=-1), "w1")
    assert raised.value.violations[0][0] == "page_size"


@given(st.sets(st.integers()), st.integers(1, 5))
def test_a_list_in_memory_has_pages_too(values: set[int], size: int) -> None:
    rows, found, page_token = sorted(values), list[int](), ""
    while True:
        page = PAGES.open(ListTeamsRequest(page_size=size, page_token=page_token), "w1")
        part, page_token = page.close(page.rest(rows, lambda row: (row,)), lambda row: (row,))
        found += part
        if not page_token:
            break
    assert found == rows


def test_a_list_that_someone_else_keeps_has_tokens_of_ours() -> None:
    page = PAGES.open(ListTeamsRequest(), "w1")
    assert page.start is None
    token = page.token((1, "theirs"))
    assert PAGES.open(ListTeamsRequest(page_token=token), "w1").start == [1, "theirs"]
    assert refused(ListTeamsRequest(page_token=token), "w2")


def test_the_last_page_has_no_token() -> None:
    page = PAGES.open(ListTeamsRequest(page_size=3), "w1")
    assert page.close(["a", "b", "c"], lambda row: (row,)) == (["a", "b", "c"], "")
    rows, token = page.close(["a", "b", "c", "d"], lambda row: (row,))
    assert rows == ["a", "b", "c"]
    assert token


def test_a_token_shows_nothing() -> None:
    token = token_after(("somebody@example.com",), ListTeamsRequest())
    assert b"somebody" not in base64.urlsafe_b64decode(token + "==")


def test_another_size_may_follow() -> None:
    token = token_after(("a",), ListTeamsRequest(workspace_id="w1", page_size=2))
    PAGES.open(ListTeamsRequest(workspace_id="w1", page_size=7, page_token=token), "w1")


def test_a_token_of_elsewhere_is_refused() -> None:
    token = token_after(("a",), ListTeamsRequest(workspace_id="w1"))
    assert refused(ListTeamsRequest(workspace_id="w2", page_token=token))  # another query
    assert refused(ListTeamsRequest(workspace_id="w1", page_token=token), scope="w2")  # another workspace
    assert refused(ListMembersRequest(workspace_id="w1", page_token=token))  # another RPC
    assert refused(ListTeamsRequest(workspace_id="w1", page_token=token), pages=Pages(bytes(31) + b"1"))


def test_a_token_for_other_columns_is_refused() -> None:
    token = token_after(("a",), ListTeamsRequest())
    page = PAGES.open(ListTeamsRequest(page_token=token), "w1")
    with pytest.raises(Error, match="page token"):
        page.after(column("title"), column("team_id"))


ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_=+/. \n"
TOKEN = token_after(("title", "id"), ListTeamsRequest())


@given(st.integers(1, len(TOKEN) - 1), st.integers(1, len(ALPHABET) - 1), st.sampled_from("RICA"))
def test_a_changed_token_is_refused(place: int, shift: int, change: str) -> None:
    other = ALPHABET[(ALPHABET.index(TOKEN[place]) + shift) % len(ALPHABET)]
    before, rest = TOKEN[:place], TOKEN[place:]
    changed = {"R": before + other + rest[1:], "I": before + other + rest, "C": before, "A": TOKEN + other}
    assert refused(ListTeamsRequest(page_token=changed[change]))


def test_no_accident_makes_a_token() -> None:
    """10,000 tokens that differ from a real one in a few places."""
    chance = random.Random(1)
    for _ in range(10_000):
        changed = list(TOKEN)
        for _ in range(chance.randint(1, 4)):
            changed[chance.randrange(len(changed))] = chance.choice(ALPHABET)
        token = "".join(changed)
        assert token == TOKEN or refused(ListTeamsRequest(page_token=token)), token


@given(st.text(min_size=1, max_size=100))
def test_an_invented_token_is_refused(token: str) -> None:
    assert refused(ListTeamsRequest(page_token=token))


KEYS = st.tuples(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20) | st.sampled_from("aA bäz"),
    st.integers(-(2**31), 2**31 - 1),
    st.integers(-(10**15), 10**15).map(
        lambda n: datetime(2000, 1, 1, tzinfo=UTC) + timedelta(microseconds=n)
    ),
)


things = Table(
    "things",
    MetaData(),
    Column("title", Text),
    Column("number", Integer),
    Column("moment", DateTime(timezone=True)),
    prefixes=["TEMPORARY"],
    postgresql_on_commit="DROP",
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=st.lists(KEYS, unique=True, max_size=40), size=st.integers(1, 12), descending=st.booleans())
async def test_the_pages_are_the_list(
    db: Sessions, keys: list[tuple[str, int, datetime]], size: int, descending: bool
) -> None:
    """In the order of the database, whatever its collation."""
    columns = list(things.columns)
    order = [column.desc() if descending else column.asc() for column in columns]
    async with db() as session:
        await session.execute(CreateTable(things))
        if keys:
            await session.execute(
                insert(things), [dict(zip(things.columns.keys(), key, strict=True)) for key in keys]
            )
        whole = (await session.execute(select(things).order_by(*order))).all()
        paged: list[Any] = []
        token = ""
        while token or not paged:
            page = PAGES.open(ListTeamsRequest(page_size=size, page_token=token), "w1")
            found = await session.execute(
                select(things)
                .where(page.after(*columns, descending=descending))
                .order_by(*order)
                .limit(page.limit)
            )
            rows, token = page.close(found.all(), tuple)
            assert len(rows) == size or not token
            paged += rows
            if not rows:
                break
    assert paged == whole
    assert len(paged) == len(keys)


async def test_ids_of_the_tables_are_keys(db: Sessions) -> None:
    """Ids are strings here and uuids there; a grant that is deleted meanwhile makes none repeat or hide."""
    workspace_id = str(uuid7())
    grants = [
        {
            "workspace_id": workspace_id,
            "grant_id": str(uuid7()),
            "resource_type": "thing",
            "resource_id": str(uuid7()),
            "subject_type": "workspace",
            "role": "viewer",
            "effect": "ALLOW",
            "creator_id": workspace_id,
        }
        for _ in range(5)
    ]

    async def list_grants(session: AsyncSession, token: str) -> tuple[list[str], str]:
        page = PAGES.open(ListTeamsRequest(page_size=2, page_token=token), workspace_id)
        found = await session.scalars(
            select(GrantRow)
            .where(page.after(GrantRow.create_time, GrantRow.grant_id))
            .order_by(GrantRow.create_time, GrantRow.grant_id)
            .limit(page.limit)
        )
        rows, token = page.close(found.all(), lambda row: (row.create_time, row.grant_id))
        return [row.grant_id for row in rows], token

    async with db.begin() as session:
        await session.execute(insert(GrantRow), grants)
        first, token = await list_grants(session, "")
        await session.execute(delete(GrantRow).where(GrantRow.grant_id.in_([first[0], first[1]])))
        second, token = await list_grants(session, token)
        third, token = await list_grants(session, token)
    assert first + second + third == [grant["grant_id"] for grant in grants]
    assert token == ""
