"""Grants on the resources of a service: making, listing and taking them back. `rights` evaluates them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any, Literal, Protocol

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from meshboard.user.v1 import grant_pb2
from meshboard.user.v1.events_pb2 import MemberRemoved, TeamDeleted
from meshboard.user.v1.internal_grant_service_pb2 import (
    GetResourceGrantsRequest,
    GetResourceGrantsResponse,
    ListSubjectGrantsRequest,
    ListSubjectGrantsResponse,
)
from meshboard.user.v1.internal_grant_service_pb2_grpc import InternalGrantServiceServicer
from meshboard.user.v1.internal_user_service_pb2 import CheckSubjectsRequest
from meshboard.user.v1.internal_user_service_pb2_grpc import InternalUserServiceStub
from sqlalchemy import ColumnElement, delete, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import auth, errors, inbox, outbox, resources, rights
from services.chassis.clients import Peer
from services.chassis.db import GrantRow
from services.chassis.paging import Pages
from services.chassis.resources import Resource
from services.chassis.times import time_of, timestamp_of

Context = Any


class NewGrant(Protocol):
    """What the requests to make grants have in common."""

    @property
    def subject(self) -> grant_pb2.Subject: ...
    @property
    def role(self) -> str: ...
    @property
    def effect(self) -> grant_pb2.Grant.Effect.ValueType: ...
    @property
    def expire_time(self) -> Timestamp: ...
    def HasField(self, field_name: Literal["expire_time"], /) -> bool: ...


class CreateRequest(NewGrant, Protocol):
    """What the services' requests to make one grant have in common."""

    @property
    def request_id(self) -> str: ...


class BatchRequest(Protocol):
    """What the services' requests to change grants together have in common."""

    @property
    def create(self) -> Sequence[grant_pb2.NewGrant]: ...
    @property
    def delete_grant_ids(self) -> Sequence[str]: ...


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

        Raises INVALID_ARGUMENT (ROLE_UNKNOWN, SUBJECT_UNKNOWN, VALIDATION_FAILED), ALREADY_EXISTS (GRANT_EXISTS),
        PERMISSION_DENIED (ROLE_TOO_HIGH).
        """
        now = self._now()
        self._check(request, now)
        await self._require_subjects([request.subject])
        async with self._db.begin() as session:
            await self._hold(session, resource_id)
            await self._require_no_more(session, resource_id, [request], now)
            row = await self._insert(session, resource_id, request, now, request.request_id)
            if row is None:
                return grant_to_pb(await self._repeated(session, resource_id, request.request_id))
        return grant_to_pb(row)

    async def batch_update(self, resource_id: str, request: BatchRequest) -> Sequence[grant_pb2.Grant]:
        """Takes grants back, then makes others: all of it or nothing. Raises what `delete` and `create` do."""
        now = self._now()
        for index, new in enumerate(request.create):
            self._check(new, now, f"create[{index}].")
        await self._require_subjects([new.subject for new in request.create])
        async with self._db.begin() as session:
            await self._hold(session, resource_id)
            await self._require_no_more(session, resource_id, request.create, now)
            for grant_id in request.delete_grant_ids:
                await self._delete(session, resource_id, grant_id)
            made = []
            for index, new in enumerate(request.create):
                row = await self._insert(session, resource_id, new, now)
                if row is None:
                    raise self._exists(index=index)
                made.append(row)
        return [grant_to_pb(row) for row in made]

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
            await self._delete(session, resource_id, grant_id)

    async def _delete(self, session: AsyncSession, resource_id: str, grant_id: str) -> None:
        row = await session.scalar(
            delete(GrantRow).where(*self._on(resource_id), GrantRow.grant_id == grant_id).returning(GrantRow)
        )
        if row is None:
            raise errors.not_found(
                "GRANT_NOT_FOUND", f"The {self._resource.type} has no such grant.", grant_id=grant_id
            )
        outbox.add(session, self._deleted(row), workspace_id=row.workspace_id)

    def _check(self, new: NewGrant, now: datetime, prefix: str = "") -> None:
        caller = auth.caller().rights
        assert caller is not None, "the access stage settles the rights"
        if new.role not in rights.ROLES and new.role not in caller.roles:
            known = ", ".join([*rights.ROLES, *sorted(caller.roles)])
            raise errors.invalid_argument(
                "ROLE_UNKNOWN", "There is no such role.", field=f"{prefix}role", known=known
            )
        if new.HasField("expire_time") and time_of(new.expire_time, f"{prefix}expire_time") <= now:
            raise errors.invalid_fields([(f"{prefix}expire_time", "is not in the future")])

    async def _insert(
        self, session: AsyncSession, resource_id: str, new: NewGrant, now: datetime, request_id: str = ""
    ) -> GrantRow | None:
        """The new grant; None when there is such a one, or an earlier call made it."""
        caller = auth.caller()
        subject_type, subject_id = _subject_of(new.subject)
        await session.execute(
            delete(GrantRow).where(
                *self._on(resource_id),
                GrantRow.subject_type == subject_type,
                GrantRow.subject_id.is_not_distinct_from(subject_id),
                GrantRow.role == new.role,
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
                role=new.role,
                effect=rights.DENY if new.effect == grant_pb2.Grant.DENY else rights.ALLOW,
                expire_time=time_of(new.expire_time, "expire_time") if new.HasField("expire_time") else None,
                creator_id=caller.user_id,
                request_id=request_id or None,
                create_time=now,
            )
            .on_conflict_do_nothing()
            .returning(GrantRow)
        )
        if row is not None:
            outbox.add(session, self._created(row), workspace_id=caller.workspace_id)
        return row

    async def _require_no_more(
        self, session: AsyncSession, resource_id: str, new: Sequence[NewGrant], now: datetime
    ) -> None:
        """Raises PERMISSION_DENIED (ROLE_TOO_HIGH) when a grant would give what the caller has not, on the resource."""
        caller = auth.caller().rights
        assert caller is not None, "the access stage settles the rights"
        given: set[str] = set()
        for grant in new:
            if grant.effect != grant_pb2.Grant.DENY:
                given |= rights.ROLES.get(grant.role) or caller.roles.get(grant.role, frozenset())
        kinds = {f"{kind}s" for kind in (self._resource.type, *self._resource.holds)}
        given = {permission for permission in given if permission.partition(".")[0] in kinds}
        if not given:
            return
        resource_id = resource_id.lower()
        found = await resources.find(
            session,
            self._resource,
            [caller.workspace_id],
            [resource_id],
            [caller.user_id, *caller.team_ids],
        )
        places = found[caller.workspace_id, resource_id]
        levels = resources.levels_for(places, caller.user_id, caller.team_ids, now)
        lacking = sorted(p for p in given if not rights.decide(caller, levels, p))
        if lacking:
            raise errors.permission_denied(
                "ROLE_TOO_HIGH",
                f"The role has permissions that you lack on the {self._resource.type}.",
                permissions=", ".join(lacking),
            )

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
                text(self._resource.is_alive(self._resource.table)),
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
            raise self._exists()
        return row

    def _exists(self, **metadata: object) -> errors.Error:
        return errors.already_exists(
            "GRANT_EXISTS", f"The {self._resource.type} has this grant already.", **metadata
        )

    async def _require_subjects(self, subjects: Sequence[grant_pb2.Subject]) -> None:
        """Raises INVALID_ARGUMENT unless the subjects are of the caller's workspace, as user_svc says."""
        wanted = [_subject_of(subject) for subject in subjects]
        user_ids = {subject_id for kind, subject_id in wanted if kind == rights.USER}
        team_ids = {subject_id for kind, subject_id in wanted if kind == rights.TEAM}
        if not user_ids and not team_ids:
            return
        known = await self._users.CheckSubjects(
            CheckSubjectsRequest(
                workspace_id=auth.caller().workspace_id,
                user_ids=sorted(filter(None, user_ids)),
                team_ids=sorted(filter(None, team_ids)),
            )
        )
        for kind, subject_id in wanted:
            if subject_id is not None and subject_id not in (*known.user_ids, *known.team_ids):
                raise errors.invalid_argument(
                    "SUBJECT_UNKNOWN",
                    f"The workspace has no such {kind}.",
                    field="subject",
                    subject_id=subject_id,
                )


class InternalGrantServicer(InternalGrantServiceServicer):
    """Answers auth_svc about the grants on all resources of a service."""

    def __init__(
        self,
        db: async_sessionmaker[AsyncSession],
        owned: Iterable[Resource],
        pages: Pages,
        now: Callable[[], datetime],
    ) -> None:
        self._db = db
        self._owned = {resource.type: resource for resource in owned}
        self._pages = pages
        self._now = now

    async def GetResourceGrants(
        self, request: GetResourceGrantsRequest, context: Context
    ) -> GetResourceGrantsResponse:
        """Finds the levels, then reads their grants."""
        resource = self._owned.get(request.resource_type)
        if resource is None:
            raise errors.invalid_fields([("resource_type", "is none of this service")])
        workspace_id, user_id = request.workspace_id.lower(), request.user_id.lower()
        resource_ids, team_ids = [[*map(str.lower, ids)] for ids in (request.resource_ids, request.team_ids)]
        async with self._db() as session:
            found = await resources.find(
                session, resource, [workspace_id], resource_ids, [user_id, *team_ids]
            )
            levels = {
                resource_id: resources.levels_for(places, user_id, team_ids, self._now())
                for (_, resource_id), places in found.items()
                if places[0].alive
            }
            grant_ids = {
                grant.grant_id for each in levels.values() for level in each for grant in level.grants
            }
            rows = await session.scalars(
                select(GrantRow).where(
                    GrantRow.workspace_id == workspace_id, GrantRow.grant_id.in_(grant_ids)
                )
            )
        grants = {row.grant_id: grant_to_pb(row) for row in rows}
        return GetResourceGrantsResponse(
            resources=[
                GetResourceGrantsResponse.Resource(
                    resource_id=resource_id,
                    levels=[
                        GetResourceGrantsResponse.Level(
                            resource_type=level.resource_type,
                            resource_id=level.resource_id,
                            grants=[grants[g.grant_id] for g in level.grants if g.grant_id in grants],
                        )
                        for level in each
                    ],
                )
                for resource_id, each in levels.items()
            ]
        )

    async def ListSubjectGrants(
        self, request: ListSubjectGrantsRequest, context: Context
    ) -> ListSubjectGrantsResponse:
        """Lists in the order of making."""
        workspace_id = request.workspace_id.lower()
        page = self._pages.open(request, workspace_id)
        subject_type, subject_id = _subject_of(request.subject)
        async with self._db() as session:
            rows = await session.scalars(
                select(GrantRow)
                .where(
                    GrantRow.workspace_id == workspace_id,
                    GrantRow.subject_type == subject_type,
                    GrantRow.subject_id == subject_id if subject_id else GrantRow.subject_id.is_(None),
                    GrantRow.resource_type.in_(sorted(self._owned)),
                    page.after(GrantRow.grant_id),
                )
                .order_by(GrantRow.grant_id)
                .limit(page.limit)
            )
        grants, next_page_token = page.close(rows.all(), lambda row: (row.grant_id,))
        return ListSubjectGrantsResponse(
            grants=[
                grant_pb2.ResourceGrant(
                    resource_type=row.resource_type, resource_id=row.resource_id, grant=grant_to_pb(row)
                )
                for row in grants
            ],
            next_page_token=next_page_token,
        )


def levels_from_pb(resource: GetResourceGrantsResponse.Resource) -> list[rights.Level]:
    """The levels of a decision, from what an owner of resources says."""
    return [
        rights.Level(
            [
                rights.Grant(
                    _subject_of(grant.subject)[0],
                    grant.role,
                    grant_pb2.Grant.Effect.Name(grant.effect),
                    grant.grant_id,
                )
                for grant in level.grants
            ],
            level.resource_type,
            level.resource_id,
        )
        for level in resource.levels
    ]


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
