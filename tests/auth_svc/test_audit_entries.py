"""Lists and exports of the audit log, against what a look at every row gives."""

import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from meshboard.auth.v1.audit_pb2 import AuditEntry
from meshboard.auth.v1.audit_service_pb2 import (
    AuditFilter,
    ExportAuditEntriesRequest,
    ListAuditEntriesRequest,
    ListOwnAuditEntriesRequest,
)
from meshboard.auth.v1.audit_service_pb2_grpc import (
    AuditServiceStub,
    add_AuditServiceServicer_to_server,
)
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.auth_svc import audit_entries
from services.auth_svc.audit_chain import Sealer, chain_keys
from services.auth_svc.audit_entries import AuditServicer
from services.auth_svc.models import AuditEntryRow, AuditSeal, AuditUnsealed
from services.auth_svc.settings import AuthSettings
from services.chassis import db
from services.chassis.paging import Pages
from services.chassis.times import now, timestamp_of
from tests.auth_svc.conftest import Services, bearer, claims_of
from tests.conditions import eventually
from tests.harness import Identity, Member, make_settings, new_id, refused, serving
from tests.parts import Parts

KINDS = ("session.begun", "session.ended", "session_key.made", "account.disabled", "sessions.all")
START = datetime(2026, 3, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


@dataclass
class Log:
    """A log with 400 entries of two workspaces and none, and a server that shows it."""

    audit: AuditServiceStub
    identity: Identity
    sessions: async_sessionmaker[AsyncSession]
    admin: Member
    neighbour: Member
    people: list[str]
    rows: list[AuditEntryRow]
    positions: dict[str, int]

    @property
    def by_id(self) -> dict[str, AuditEntryRow]:
        """The rows by id."""
        return {row.audit_entry_id: row for row in self.rows}

    def newest_first(self, condition: Callable[[AuditEntryRow], bool]) -> list[str]:
        """The ids of the rows that fulfil the condition."""
        rows = sorted(self.rows, key=lambda row: (row.time, row.audit_entry_id), reverse=True)
        return [row.audit_entry_id for row in rows if condition(row)]

    async def pages(self, list_page: Any, request: Any, caller: Member) -> list[AuditEntry]:
        """All pages of a list."""
        entries: list[AuditEntry] = []
        while True:
            response = await list_page(request, metadata=caller.metadata)
            entries += response.audit_entries
            if not response.next_page_token:
                return entries
            assert len(response.audit_entries) == request.page_size
            request.page_token = response.next_page_token

    async def export(self, caller: Member, wanted: AuditFilter | None = None) -> list[list[AuditEntry]]:
        """The chunks of an export."""
        request = ExportAuditEntriesRequest(workspace_id=caller.workspace_id, filter=wanted)
        stream = self.audit.ExportAuditEntries(request, metadata=caller.metadata)
        return [list(response.audit_entries) async for response in stream]


@pytest.fixture(scope="module")
async def log(parts: Parts, identity: Identity) -> AsyncIterator[Log]:
    url = await parts.fresh_database("auth")
    await db.migrate(url, "services.auth_svc")
    settings = make_settings(AuthSettings, parts, identity.keys, url)
    sessions = db.connect(url)
    admin, neighbour = identity.member("admin"), identity.member("owner")
    people = [admin.user_id, neighbour.user_id, new_id()]
    chance = random.Random(7)
    rows = [
        AuditEntryRow(
            audit_entry_id=new_id(),
            # Some at the same instant, so that the id has to decide.
            time=START + chance.randrange(60) * MINUTE,
            kind=chance.choice(KINDS),
            outcome=chance.choice(["DONE", "REFUSED"]),
            reason="",
            actor_id=chance.choice([*people, ""]),
            impersonator_id=chance.choice(["", "", "", new_id()]),
            subject_id=chance.choice([*people, ""]),
            workspace_id=chance.choice([admin.workspace_id, neighbour.workspace_id, None]),
            session_id=new_id(),
            address="192.0.2.1",
            details={"title": "Größe", "number": 3, "methods": ["pwd"], "yes": True},
        )
        for _ in range(400)
    ]
    async with sessions.begin() as session:
        session.add_all(rows)
        # The last ones are not sealed.
        session.add_all(AuditUnsealed(audit_entry_id=row.audit_entry_id) for row in rows[:380])
    sealer = Sealer(sessions, chain_keys(settings), now)
    while await sealer.round():
        pass
    async with sessions() as session:
        seals = await session.scalars(select(AuditSeal))
        positions = {seal.audit_entry_id: seal.position for seal in seals}
    servicer = AuditServicer(sessions, Pages(bytes(32)))
    async with serving(
        settings,
        [lambda server: add_AuditServiceServicer_to_server(servicer, server)],
        identity.access("auth"),
    ) as (channel, _):
        stub = AuditServiceStub(channel)
        yield Log(stub, identity, sessions, admin, neighbour, people, rows, positions)
    await db.engine(sessions).dispose()


def at(time: datetime) -> Timestamp:
    return timestamp_of(time)


Holds = Callable[[Log, AuditEntryRow], bool]


def in_workspace(log: Log, member: Member, holds: Holds) -> Callable[[AuditEntryRow], bool]:
    return lambda row: row.workspace_id == member.workspace_id and holds(log, row)


FILTERS: list[tuple[Callable[[Log], AuditFilter], Holds]] = [
    (lambda log: AuditFilter(), lambda log, row: True),
    (lambda log: AuditFilter(kinds=["session.begun"]), lambda log, row: row.kind == "session.begun"),
    (lambda log: AuditFilter(kinds=["session.*"]), lambda log, row: row.kind.startswith("session.")),
    (
        lambda log: AuditFilter(kinds=["session_key.*", "account.disabled"]),
        lambda log, row: row.kind in {"session_key.made", "account.disabled"},
    ),
    (lambda log: AuditFilter(kinds=["%.*", "session"]), lambda log, row: False),
    (lambda log: AuditFilter(actor_id=log.people[2]), lambda log, row: row.actor_id == log.people[2]),
    (
        lambda log: AuditFilter(subject_id=log.people[2].upper()),
        lambda log, row: row.subject_id == log.people[2],
    ),
    (lambda log: AuditFilter(outcome=AuditEntry.REFUSED), lambda log, row: row.outcome == "REFUSED"),
    (
        lambda log: AuditFilter(start_time=at(START + 10 * MINUTE), end_time=at(START + 20 * MINUTE)),
        lambda log, row: START + 10 * MINUTE <= row.time < START + 20 * MINUTE,
    ),
    (
        lambda log: AuditFilter(
            kinds=["session.*"], outcome=AuditEntry.DONE, start_time=at(START + 5 * MINUTE)
        ),
        lambda log, row: (
            row.kind.startswith("session.") and row.outcome == "DONE" and row.time >= START + 5 * MINUTE
        ),
    ),
]


@pytest.mark.parametrize("number", range(len(FILTERS)))
@pytest.mark.parametrize("page_size", [7, 1000])
async def test_a_workspace_has_its_entries_and_no_others(log: Log, number: int, page_size: int):
    make, holds = FILTERS[number]
    for member in (log.admin, log.neighbour):
        request = ListAuditEntriesRequest(
            workspace_id=member.workspace_id, filter=make(log), page_size=page_size
        )
        entries = await log.pages(log.audit.ListAuditEntries, request, member)
        expected = log.newest_first(in_workspace(log, member, holds))
        assert [entry.audit_entry_id for entry in entries] == expected
        assert {entry.workspace_id for entry in entries} <= {member.workspace_id}
        assert [entry.position for entry in entries] == [log.positions.get(found, 0) for found in expected]


@pytest.mark.parametrize("number", range(len(FILTERS)))
@pytest.mark.parametrize("page_size", [7, 1000])
async def test_everybody_has_their_own_entries(log: Log, number: int, page_size: int):
    make, holds = FILTERS[number]
    for member in (log.admin, log.neighbour):
        request = ListOwnAuditEntriesRequest(filter=make(log), page_size=page_size)
        entries = await log.pages(log.audit.ListOwnAuditEntries, request, member)
        expected = [
            found
            for found in log.newest_first(partial(holds, log))
            if member.user_id in {log.by_id[found].actor_id, log.by_id[found].subject_id}
        ]
        assert [entry.audit_entry_id for entry in entries] == expected


async def test_of_acts_of_others_only_the_act_is_shown(log: Log):
    me = log.admin.user_id
    request = ListOwnAuditEntriesRequest(page_size=1000)
    kinds_of_acts = set()
    for entry in await log.pages(log.audit.ListOwnAuditEntries, request, log.admin):
        row = log.by_id[entry.audit_entry_id]
        by_another = bool(row.impersonator_id) or row.actor_id not in {me, ""}
        kinds_of_acts.add(by_another)
        shown = (entry.workspace_id, entry.session_id, entry.address)
        assert shown == (
            ("", "", "") if by_another else (row.workspace_id or "", row.session_id, row.address)
        )
        assert (entry.kind, entry.actor_id) == (row.kind, row.actor_id)
    assert kinds_of_acts == {True, False}


async def test_an_export_has_all_that_is_sealed_the_oldest_first(log: Log, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(audit_entries, "_CHUNK", 10)
    for number, (make, holds) in enumerate(FILTERS):
        chunks = await log.export(log.admin, make(log))
        expected = [
            found for found in log.newest_first(in_workspace(log, log.admin, holds)) if found in log.positions
        ]
        found = [entry.audit_entry_id for chunk in chunks for entry in chunk]
        assert found == list(reversed(expected)), number
        assert all(len(chunk) == 10 for chunk in chunks[:-1])
        assert all(entry.position for chunk in chunks for entry in chunk)


async def test_an_export_ends_with_the_right(log: Log, monkeypatch: pytest.MonkeyPatch):
    class EndsAfter(set[str]):
        """The session is alive for three looks."""

        looks = 3

        def __contains__(self, session_id: object) -> bool:
            self.looks -= 1
            return self.looks < 0

    monkeypatch.setattr(audit_entries, "_CHUNK", 1)
    monkeypatch.setattr(audit_entries, "_RECHECK_SECONDS", 0.0)
    member = log.identity.member("admin", log.admin.workspace_id)
    monkeypatch.setattr(log.identity, "revoked", EndsAfter())
    request = ExportAuditEntriesRequest(workspace_id=member.workspace_id)
    stream = log.audit.ExportAuditEntries(request, metadata=member.metadata)
    seen = 0

    async def read_all() -> None:
        nonlocal seen
        async for _ in stream:
            seen += 1

    assert await refused(read_all()) == (grpc.StatusCode.UNAUTHENTICATED, "SESSION_REVOKED")
    assert seen == 2


async def test_who_may_not_see_the_log(log: Log):
    workspace_id = log.admin.workspace_id
    editor, stranger = log.identity.member("editor", workspace_id), log.neighbour
    for member, outcome in (
        (editor, (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_MISSING")),
        (stranger, (grpc.StatusCode.NOT_FOUND, "WORKSPACE_NOT_FOUND")),
    ):
        listing = ListAuditEntriesRequest(workspace_id=workspace_id)
        assert await refused(log.audit.ListAuditEntries(listing, metadata=member.metadata)) == outcome
        exporting = ExportAuditEntriesRequest(workspace_id=workspace_id)
        stream = log.audit.ExportAuditEntries(exporting, metadata=member.metadata)
        assert await refused(stream.read()) == outcome


async def test_own_entries_are_for_the_person_alone(log: Log):
    token = log.identity.token(sub=log.admin.user_id, amr=None)
    call = log.audit.ListOwnAuditEntries(ListOwnAuditEntriesRequest(), metadata=bearer(token))
    assert await refused(call) == (grpc.StatusCode.PERMISSION_DENIED, "PERSON_REQUIRED")


async def test_refuses_what_is_no_page_of_this_list(log: Log):
    first = await log.audit.ListAuditEntries(
        ListAuditEntriesRequest(workspace_id=log.admin.workspace_id, page_size=1),
        metadata=log.admin.metadata,
    )
    for member, request in (
        (log.neighbour, ListAuditEntriesRequest(workspace_id=log.neighbour.workspace_id)),
        (log.admin, ListAuditEntriesRequest(filter=AuditFilter(kinds=["session.*"]))),
    ):
        request.workspace_id, request.page_token = member.workspace_id, first.next_page_token
        outcome = await refused(log.audit.ListAuditEntries(request, metadata=member.metadata))
        assert outcome == (grpc.StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID")


@pytest.mark.parametrize(
    "wanted",
    [
        AuditFilter(kinds=[""]),
        AuditFilter(actor_id="someone"),
        AuditFilter(start_time=Timestamp(seconds=1 << 60)),
        AuditFilter(kinds=["a"] * 21),
    ],
)
async def test_refuses_a_filter_that_makes_no_sense(log: Log, wanted: AuditFilter):
    request = ListAuditEntriesRequest(workspace_id=log.admin.workspace_id, filter=wanted)
    outcome = await refused(log.audit.ListAuditEntries(request, metadata=log.admin.metadata))
    assert outcome == (grpc.StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")


async def test_a_sign_in_is_in_the_log_and_without_secrets(services: Services):
    """By way of the real services: recorded, sealed within seconds, listed; and nobody's secret is in any row."""
    password = f"a passphrase {new_id()}"
    signed_up = await services.sign_up(password=password)
    with pytest.raises(grpc.aio.AioRpcError):
        await services.sign_in(signed_up.user.email, f"wrong {password}")
    signed_in = await services.sign_in(signed_up.user.email, password)
    async with grpc.aio.insecure_channel(services.auth_settings.listen) as channel:
        stub = AuditServiceStub(channel)

        async def listed() -> bool:
            response = await stub.ListOwnAuditEntries(
                ListOwnAuditEntriesRequest(filter=AuditFilter(kinds=["session.begun"])),
                metadata=bearer(signed_in.access_token),
            )
            begun = [entry for entry in response.audit_entries if entry.position]
            return {(AuditEntry.Outcome.Name(entry.outcome), entry.reason) for entry in begun} == {
                ("DONE", ""),
                ("REFUSED", "CREDENTIALS_WRONG"),
            }

        await eventually(listed)
    secrets = {
        password,
        signed_up.user.email,
        *(signed_up.access_token, signed_up.refresh_token, signed_up.refresh_key),
        *(signed_in.access_token, signed_in.refresh_token, signed_in.refresh_key, signed_in.device_token),
    }
    assert "" not in secrets
    assert claims_of(signed_in.access_token)["sub"] == signed_up.user.user_id
    async with services.sessions() as session:
        rows = await session.scalars(select(AuditEntryRow))
        texts = [str({**vars(row)}) for row in rows]
    assert texts
    assert not [text for text in texts for secret in secrets if secret in text]
