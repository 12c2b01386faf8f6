"""Grants on the resources of a service: making, listing and taking them back. `rights` evaluates them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Literal, Protocol

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from meshboard.user.v1 import grant_pb2
from meshboard.user.v1.events_pb2 import MemberRemoved, TeamDeleted
from meshboard.user.v1.internal_user_service_pb2 import CheckSubjectsRequest
from meshboard.user.v1.internal_user_service_pb2_grpc import InternalUserServiceStub
from sqlalchemy import ColumnElement, delete, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import auth, errors, inbox, outbox, rights
from services.chassis.access import Resource
from services.chassis.clients import Peer
from services.chassis.db import GrantRow
from services.chassis.paging import Pages
from services.chassis.times import time_of, timestamp_of


class CreateRequest(Protocol):
    """What the services' requests to make a grant have in common."""

    @property
    def subject(self) -> grant_pb2.Subject: ...
    @property
    def role(self) -> str: ...
    @property
    def effect(self) -> grant_pb2.Grant.Effect.ValueType: ...
    @property
    def expire_time(self) -> Timestamp: ...
    @property
    def request_id(self) -> str: ...
    def HasField(self, field_name: Literal["expire_time"], /) -> bool: ...


class Grants:
    """The grants on one type of resource.

    `created` and `deleted` make the domain events that tell of a grant.
    """

    def __init__(
        self,
        db: async_sessionmaker[AsyncSession],
        resource: Resource,
        user: Peer,
        pages: Pages,
        *,
        created: Callable[[GrantRow], Message],
        deleted: Callable[[GrantRow], Message],
        now: Callable[[], datetime],
        new_id: Callable[[], str],
    ) -> None:
        self._db = db
        self._resource = resource
        self._users = user.stub(InternalUserServiceStub)
        self._pages = pages
        self._created = created
        self._deleted = deleted
        self._now = now
        self._new_id = new_id

    def own(self, session: AsyncSession, resource_id: str) -> None:
        """Makes the caller an owner of a resource that it creates in this transaction."""
        caller = auth.caller()
        session.add(
            GrantRow(
                workspace_id=caller.workspace_id,
                grant_id=self._new_id(),
                resource_type=self._resource.type,
                resource_id=resource_id,
                subject_type=rights.USER,
                subject_id=caller.user_id,
                role="owner",
                effect=rights.ALLOW,
                creator_id=caller.user_id,
                create_time=self._now(),
            )
        )

    async def forget(self, session: AsyncSession, resource_id: str) -> None:
        """Deletes the grants on a resource that is deleted in this transaction."""
        await session.execute(delete(GrantRow).where(*self._on(resource_id)))

    async def create(self, resource_id: str, request: CreateRequest) -> grant_pb2.Grant:
        """Makes a grant, in place of an equal one that has expired.

        Raises INVALID_ARGUMENT (ROLE_UNKNOWN, SUBJECT_UNKNOWN, VALIDATION_FAILED), ALREADY_EXISTS (GRANT_EXISTS).
        """
        caller, now = auth.caller(), self._now()
        if request.role not in rights.ROLES:
            raise errors.invalid_argument(
                "ROLE_UNKNOWN", "There is no such role.", field="role", known=", ".join(rights.ROLES)
            )
        expire_time = time_of(request.expire_time, "expire_time") if request.HasField("expire_time") else None
        if expire_time and expire_time <= now:
            raise errors.invalid_fields([("expire_time", "is not in the future")])
        subject_type, subject_id = _subject_of(request.subject)
        await self._require_subject(subject_type, subject_id)
        async with self._db.begin() as session:
            await self._hold(session, resource_id)
            await session.execute(
                delete(GrantRow).where(
                    *self._on(resource_id),
                    GrantRow.subject_type == subject_type,
                    GrantRow.subject_id.is_not_distinct_from(subject_id),
                    GrantRow.role == request.role,
                    GrantRow.expire_time <= now,
                )
            )
            row = await session.scalar(
                insert(GrantRow)
                .values(
                    workspace_id=caller.workspace_id,
                    grant_id=self._new_id(),
                    resource_type=self._resource.type,
                    resource_id=resource_id,
                    subject_type=subject_type,
                    subject_id=subject_id,
                    role=request.role,
                    effect=rights.DENY if request.effect == grant_pb2.Grant.DENY else rights.ALLOW,
                    expire_time=expire_time,
                    creator_id=caller.user_id,
                    request_id=request.request_id or None,
                    create_time=now,
                )
                .on_conflict_do_nothing()
                .returning(GrantRow)
            )
            if row is None:
                return grant_to_pb(await self._repeated(session, resource_id, request.request_id))
            outbox.add(session, self._created(row), workspace_id=caller.workspace_id)
        return grant_to_pb(row)

    async def list(self, resource_id: str, request: Message) -> tuple[list[grant_pb2.Grant], str]:
        """A page of the grants on a resource, expired ones too, the oldest first; and the token of the next page."""
        page = self._pages.open(request, auth.caller().workspace_id)
        async with self._db() as session:
            rows = await session.scalars(
                select(GrantRow)
                .where(*self._on(resource_id), page.after(GrantRow.grant_id))
                .order_by(GrantRow.grant_id)
                .limit(page.limit)
            )
        grants, next_page_token = page.close(rows.all(), lambda row: (row.grant_id,))
        return [grant_to_pb(row) for row in grants], next_page_token

    async def delete(self, resource_id: str, grant_id: str) -> None:
        """Takes a grant back. Raises NOT_FOUND (GRANT_NOT_FOUND)."""
        async with self._db.begin() as session:
            row = await session.scalar(
                delete(GrantRow)
                .where(*self._on(resource_id), GrantRow.grant_id == grant_id)
                .returning(GrantRow)
            )
            if row is None:
                raise errors.not_found("GRANT_NOT_FOUND", f"The {self._resource.type} has no such grant.")
            outbox.add(session, self._deleted(row), workspace_id=row.workspace_id)

    async def on_member_removed(self, session: AsyncSession, event: MemberRemoved) -> None:
        """Takes the member's grants back, so that coming back does not bring them along.

        Grants made after the event stay: then the user has come back before the event was heard.
        """
        rows = await session.scalars(
            delete(GrantRow)
            .where(
                GrantRow.workspace_id == event.workspace_id,
                GrantRow.resource_type == self._resource.type,
                GrantRow.subject_type == rights.USER,
                GrantRow.subject_id == event.user_id,
                GrantRow.create_time <= inbox.current.get().store_time,
            )
            .returning(GrantRow)
        )
        for row in rows:
            outbox.add(session, self._deleted(row), workspace_id=row.workspace_id)

    async def on_team_deleted(self, session: AsyncSession, event: TeamDeleted) -> None:
        """Takes the team's grants back. They are void already: no id of a team is used twice."""
        rows = await session.scalars(
            delete(GrantRow)
            .where(
                GrantRow.workspace_id == event.workspace_id,
                GrantRow.resource_type == self._resource.type,
                GrantRow.subject_type == rights.TEAM,
                GrantRow.subject_id == event.team_id,
            )
            .returning(GrantRow)
        )
        for row in rows:
            outbox.add(session, self._deleted(row), workspace_id=row.workspace_id)

    def _on(self, resource_id: str) -> tuple[ColumnElement[bool], ...]:
        return (
            GrantRow.workspace_id == auth.caller().workspace_id,
            GrantRow.resource_type == self._resource.type,
            GrantRow.resource_id == resource_id,
        )

    async def _hold(self, session: AsyncSession, resource_id: str) -> None:
        """Keeps the resource from being deleted before the transaction ends. Raises NOT_FOUND when it has been."""
        found = await session.scalar(
            select(self._resource.resource_id)
            .where(
                self._resource.workspace_id == auth.caller().workspace_id,
                self._resource.resource_id == resource_id,
            )
            .with_for_update(read=True, key_share=True)
        )
        if found is None:
            raise self._resource.absent()

    async def _repeated(self, session: AsyncSession, resource_id: str, request_id: str) -> GrantRow:
        """The grant that an earlier call with this `request_id` made; "" is that of none."""
        row: GrantRow | None = await session.scalar(
            select(GrantRow).where(
                *self._on(resource_id),
                GrantRow.creator_id == auth.caller().user_id,
                GrantRow.request_id == request_id,
            )
        )
        if row is None:
            raise errors.already_exists("GRANT_EXISTS", f"The {self._resource.type} has this grant already.")
        return row

    async def _require_subject(self, subject_type: str, subject_id: str | None) -> None:
        """Raises INVALID_ARGUMENT unless the subject is of the caller's workspace, as user_svc says."""
        if subject_id is None:
            return
        known = await self._users.CheckSubjects(
            CheckSubjectsRequest(
                workspace_id=auth.caller().workspace_id,
                user_ids=[subject_id] if subject_type == rights.USER else [],
                team_ids=[subject_id] if subject_type == rights.TEAM else [],
            )
        )
        if subject_id not in (*known.user_ids, *known.team_ids):
            raise errors.invalid_argument(
                "SUBJECT_UNKNOWN", f"The workspace has no such {subject_type}.", field="subject"
            )


def grant_to_pb(row: GrantRow) -> grant_pb2.Grant:
    """A grant as a message."""
    return grant_pb2.Grant(
        grant_id=row.grant_id,
        subject=_subject_to_pb(row),
        role=row.role,
        effect=grant_pb2.Grant.Effect.Value(row.effect),
        expire_time=timestamp_of(row.expire_time) if row.expire_time else None,
        create_time=timestamp_of(row.create_time),
    )


def _subject_to_pb(row: GrantRow) -> grant_pb2.Subject:
    match row.subject_type, row.subject_id:
        case rights.USER, str(user_id):
            return grant_pb2.Subject(user_id=user_id)
        case rights.TEAM, str(team_id):
            return grant_pb2.Subject(team_id=team_id)
        case _:
            return grant_pb2.Subject(workspace=True)


def _subject_of(subject: grant_pb2.Subject) -> tuple[str, str | None]:
    """The type and the id of a subject, as its row has them."""
    match subject.WhichOneof("subject"):
        case "user_id":
            return rights.USER, subject.user_id.lower()
        case "team_id":
            return rights.TEAM, subject.team_id.lower()
        case _:
            return rights.WORKSPACE, None
