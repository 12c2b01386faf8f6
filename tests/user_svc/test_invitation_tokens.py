import base64
import os
import random
import string
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, cast

import pytest

from services.user_svc.invitation_tokens import PREFIX, invitation_id_of, is_genuine, token_of
from tests.harness import new_id

if TYPE_CHECKING:
    from services.user_svc.models import Invitation

KEY = os.urandom(32)


@dataclass(frozen=True)
class Row:
    """What a token is computed from."""

    invitation_id: str = field(default_factory=new_id)
    workspace_id: str = field(default_factory=new_id)
    email_key: str = "ada@example.org"
    role: str = "viewer"
    team_ids: tuple[str, ...] = (new_id(), new_id())
    inviter_id: str = field(default_factory=new_id)
    expire_time: datetime = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
    generation: int = 1


def genuine(row: Row, token: str, *keys: bytes) -> bool:
    return is_genuine(keys or [KEY], cast("Invitation", row), token)


def made(row: Row, key: bytes = KEY) -> str:
    return token_of(key, cast("Invitation", row))


def test_says_which_invitation_and_holds_for_it():
    row = Row()
    token = made(row)
    assert invitation_id_of(token) == row.invitation_id
    assert genuine(row, token)
    assert len(token) == len(PREFIX) + 64


@pytest.mark.parametrize(
    "change",
    [
        {"invitation_id": new_id()},
        {"workspace_id": new_id()},
        {"email_key": "bob@example.org"},
        {"role": "owner"},
        {"team_ids": ()},
        {"team_ids": (new_id(),)},
        {"inviter_id": new_id()},
        {"expire_time": datetime(2026, 1, 2, 3, 4, 5, 678902, tzinfo=UTC)},
        {"generation": 2},
        # The bytes of one field are not those of another.
        {"email_key": "ada@example.orgviewer", "role": ""},
    ],
    ids=" ".join,
)
def test_holds_for_nothing_else(change: dict[str, Any]):
    row = Row()
    assert not genuine(replace(row, **change), made(row))


def test_the_time_zone_of_the_database_does_not_matter():
    row = Row()
    moved = row.expire_time.astimezone(tz=datetime.now().astimezone().tzinfo)
    assert genuine(replace(row, expire_time=moved), made(row))
    assert not genuine(replace(row, expire_time=moved + timedelta(microseconds=1)), made(row))


def test_earlier_keys_count_and_others_do_not():
    row, other = Row(), os.urandom(32)
    assert genuine(row, made(row, other), KEY, other)
    assert not genuine(row, made(row, other), KEY)


def test_no_mutation_is_taken():
    chance = random.Random(11)
    row = Row()
    token = made(row)
    letters = string.ascii_letters + string.digits + "-_=+/. \n\u00e9"
    seen: set[str] = set()
    while len(seen) < 1000:
        mutation = list(token)
        for _ in range(chance.randint(1, 3)):
            match chance.randrange(3):
                case 0:
                    mutation[chance.randrange(len(mutation))] = chance.choice(letters)
                case 1:
                    del mutation[chance.randrange(len(mutation))]
                case _:
                    mutation.insert(chance.randrange(len(mutation) + 1), chance.choice(letters))
        seen.add("".join(mutation))
        seen.discard(token)
    assert not any(genuine(row, mutation) for mutation in seen)


def test_only_the_one_spelling_counts():
    row = Row()
    token = made(row)
    content = base64.urlsafe_b64decode(token.removeprefix(PREFIX))
    for other in (
        token.removeprefix(PREFIX),
        PREFIX + token,
        f"{token}=",
        f"{token}\n",
        PREFIX + base64.b64encode(content).decode().replace("-", "+").replace("_", "/") + " ",
        PREFIX + base64.urlsafe_b64encode(content + b"x").decode(),
        PREFIX + base64.urlsafe_b64encode(content[:-1]).decode(),
        "",
        PREFIX,
    ):
        assert invitation_id_of(other) is None
        assert not genuine(row, other)
