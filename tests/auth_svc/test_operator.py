"""The operator's commands, on databases of running services."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from meshboard.user.v1.user_service_pb2 import GetMeRequest
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.auth_svc import audit, operator
from services.auth_svc.audit_chain import Sealer, chain_keys
from services.auth_svc.models import AuditEntryRow
from services.auth_svc.origins import Origin
from services.auth_svc.settings import AuthSettings
from services.auth_svc.signing_keys import SigningKeys
from services.chassis.db import OutboxRow
from services.chassis.times import now
from tests.auth_svc.conftest import Services, bearer
from tests.conditions import eventually
from tests.harness import new_id, outcome, refused

Sessions = async_sessionmaker[AsyncSession]


class Operator:
    """Someone at a terminal."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.said = ""

    async def types(self, settings: AuthSettings, *words: str) -> tuple[int, str]:
        """The exit code and stdout of a command."""
        self._capsys.readouterr()
        code = await operator.run(settings, operator.parser().parse_args(words))
        shown = self._capsys.readouterr()
        self.said = shown.err
        # Tests log to stdout; a process of its own does not.
        lines = [line for line in shown.out.splitlines() if not re.search(r" \[(info|warning) ", line)]
        return code, "\n".join(lines)

    async def asks(self, settings: AuthSettings, *words: str) -> tuple[int, Any]:
        """The exit code and the JSON of a command."""
        code, shown = await self.types(settings, *words, "-o", "json")
        return code, json.loads(shown)


@pytest.fixture
def at_terminal(capsys: pytest.CaptureFixture[str]) -> Operator:
    return Operator(capsys)


async def add_entries(sessions: Sessions, count: int, workspace_id: str = "") -> None:
    async with sessions.begin() as session:
        for _ in range(count):
            audit.record(session, "test.happened", Origin(), now(), workspace_id=workspace_id)


async def acts_of_the_operator(sessions: Sessions) -> list[AuditEntryRow]:
    async with sessions() as session:
        rows = await session.scalars(
            select(AuditEntryRow)
            .where(AuditEntryRow.actor_id == "operator")
            .order_by(AuditEntryRow.audit_entry_id)
        )
        return list(rows)


async def test_verify_says_by_its_exit_code_how_it_is(
    settings: AuthSettings, sessions: Sessions, at_terminal: Operator
):
    await add_entries(sessions, 3)
    await Sealer(sessions, chain_keys(settings), now).round()
    nowhere = settings.model_copy(update={"nats_url": "nats://127.0.0.1:1"})
    code, shown = await at_terminal.types(nowhere, "audit", "verify")
    assert code == operator.TAIL_UNKNOWN
    assert "3 positions, 0 published heads, 0 problems" in shown
    assert "cannot be told: no NATS server" in shown
    code, report = await at_terminal.asks(nowhere, "audit", "verify")
    assert (code, report["good"], report["positions"]) == (operator.TAIL_UNKNOWN, False, 3)

    async with sessions.begin() as session:
        await session.execute(text("ALTER TABLE audit_entries DISABLE TRIGGER append_only"))
        await session.execute(text("UPDATE audit_entries SET kind = 'test.other'"))
    code, report = await at_terminal.asks(nowhere, "audit", "verify")
    assert (code, report["problem_count"]) == (operator.DAMAGED, 3)


async def test_export_writes_the_chain(settings: AuthSettings, sessions: Sessions, at_terminal: Operator):
    workspace_id = new_id()
    await add_entries(sessions, 2)
    between = now()
    await add_entries(sessions, 3, workspace_id)
    await Sealer(sessions, chain_keys(settings), now).round()
    await add_entries(sessions, 1)  # without a seal

    async def positions(*options: str) -> list[int]:
        code, shown = await at_terminal.types(settings, "audit", "export", *options)
        assert code == operator.DONE
        lines = [json.loads(line) for line in shown.splitlines()]
        assert all(
            len(bytes.fromhex(line["seal"])) == 36 and line["kind"] == "test.happened" for line in lines
        )
        return [line["position"] for line in lines]

    assert await positions() == [1, 2, 3, 4, 5]
    assert await positions("--since", between.isoformat()) == [3, 4, 5]
    assert await positions("--until", between.isoformat()) == [1, 2]
    assert await positions("--workspace", workspace_id.upper()) == [3, 4, 5]
    assert await positions("--since", "2999-01-01") == []


async def test_an_account_is_disabled_and_enabled_by_its_address(services: Services, at_terminal: Operator):
    signed_up = await services.sign_up()
    email = signed_up.user.email
    code, answer = await at_terminal.asks(services.auth_settings, "accounts", "disable", email.upper())
    assert (code, answer) == (
        operator.DONE,
        {"user_id": signed_up.user.user_id, "state": "disabled", "ended_sessions": 1},
    )

    async def ended() -> bool:
        call = services.users.GetMe(GetMeRequest(), metadata=bearer(signed_up.access_token))
        return (await outcome(call))[1] == "SESSION_REVOKED"

    await eventually(ended, seconds=5)
    assert (await refused(services.sign_in(email)))[1] == "ACCOUNT_DISABLED"
    code, answer = await at_terminal.asks(services.auth_settings, "accounts", "enable", email)
    assert (code, answer["state"], answer["ended_sessions"]) == (operator.DONE, "enabled", 0)
    await services.sign_in(email)
    acts = [
        (act.kind, act.subject_id)
        for act in await acts_of_the_operator(services.sessions)
        if act.subject_id == signed_up.user.user_id
    ]
    assert acts == [
        ("account.disabled", signed_up.user.user_id),
        ("account.enabled", signed_up.user.user_id),
    ]
    async with services.sessions() as session:
        rows = await session.scalars(select(OutboxRow).order_by(OutboxRow.id.desc()))
        actors = {row.headers.get("Actor") for row in rows if row.subject.endswith("SessionRevoked")}
    assert "operator" in actors


async def test_an_unknown_address_is_said_to_be_so(
    settings: AuthSettings, sessions: Sessions, at_terminal: Operator
):
    assert await at_terminal.types(settings, "accounts", "disable", "nobody@example.org") == (1, "")
    assert at_terminal.said == "No account has this address.\n"
    assert await acts_of_the_operator(sessions) == []


async def test_signing_keys_are_listed_rotated_and_retired(
    settings: AuthSettings, sessions: Sessions, at_terminal: Operator
):
    await SigningKeys(sessions, settings, now).load()
    _, answer = await at_terminal.asks(settings, "keys", "list")
    ((first,), states) = [key["key_id"] for key in answer["keys"]], [key["state"] for key in answer["keys"]]
    assert states == ["signs"]
    assert await at_terminal.types(settings, "keys", "retire", first) == (1, "")
    assert "only signing key" in at_terminal.said

    code, made = await at_terminal.asks(settings, "keys", "rotate")
    assert (code, made["is_new"]) == (operator.DONE, True)
    _, repeated = await at_terminal.asks(settings, "keys", "rotate")
    assert repeated == {**made, "is_new": False}
    _, answer = await at_terminal.asks(settings, "keys", "list")
    assert [key["state"] for key in answer["keys"]] == ["signs", "next"]

    assert await at_terminal.asks(settings, "keys", "retire", first) == (
        operator.DONE,
        {"retired": first, "signs": made["key_id"]},
    )
    assert await at_terminal.types(settings, "keys", "retire", first) == (1, "")
    _, answer = await at_terminal.asks(settings, "keys", "list")
    assert [(key["key_id"], key["state"]) for key in answer["keys"]] == [(made["key_id"], "signs")]
    assert [(act.kind, act.details) for act in await acts_of_the_operator(sessions)] == [
        ("signing_key.created", {"key_id": made["key_id"]}),
        ("signing_key.retired", {"key_id": first}),
    ]


async def test_reseal_reports_and_is_noted_when_it_did_something(
    settings: AuthSettings, sessions: Sessions, at_terminal: Operator
):
    await SigningKeys(sessions, settings, now).load()
    nothing = {"current": 0, "resealed": 0, "unreadable": 0}
    code, answer = await at_terminal.asks(settings, "keys", "reseal")
    assert (code, answer["signing_keys"], answer["mails"]) == (0, {**nothing, "current": 1}, nothing)
    assert await acts_of_the_operator(sessions) == []
    file = settings.master_key_file
    assert file is not None
    older = file.read_text()
    file.write_text(f"{'A' * 43}=\n{older}")
    code, answer = await at_terminal.asks(settings, "keys", "reseal")
    assert (code, answer["signing_keys"]) == (0, {**nothing, "resealed": 1})
    (act,) = await acts_of_the_operator(sessions)
    assert (act.kind, act.details["tables"][0]) == ("secrets.resealed", "signing_keys 1")
    file.write_text(older)
    code, answer = await at_terminal.asks(settings, "keys", "reseal")
    assert (code, answer["signing_keys"]) == (1, {**nothing, "unreadable": 1})
    assert await at_terminal.types(settings, "keys", "list") == (1, "")
    assert "older master key" in at_terminal.said


async def test_says_that_postgres_is_away(settings: AuthSettings, at_terminal: Operator, tmp_path: Path):
    away = settings.model_copy(update={"postgres_url": f"postgresql://auth:x@/auth?host={tmp_path}"})
    for words in (("audit", "verify"), ("keys", "list"), ("accounts", "enable", "a@example.org")):
        assert await at_terminal.types(away, *words) == (operator.AWAY, "")
        assert at_terminal.said == "PostgreSQL does not answer: start the mesh first.\n"
