"""Rows as messages of the contract, and back."""

from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp
from meshboard.analytics.v1 import source_pb2
from meshboard.user.v1 import grant_pb2

from services.analytics_svc.models import Source
from services.chassis import errors, rights
from services.chassis.db import GrantRow


def source_to_pb(row: Source) -> source_pb2.Source:
    """The source."""
    return source_pb2.Source(
        source_id=row.source_id,
        workspace_id=row.workspace_id,
        title=row.title,
        write_key_prefix=row.write_key_prefix,
        create_time=_timestamp(row.create_time),
        update_time=_timestamp(row.update_time),
        etag=str(row.version),
    )


def grant_to_pb(row: GrantRow) -> grant_pb2.Grant:
    """The grant."""
    return grant_pb2.Grant(
        grant_id=row.grant_id,
        subject=_subject_to_pb(row),
        role=row.role,
        effect=grant_pb2.Grant.Effect.Value(row.effect),
        expire_time=_timestamp(row.expire_time) if row.expire_time else None,
        create_time=_timestamp(row.create_time),
    )


def _subject_to_pb(row: GrantRow) -> grant_pb2.Subject:
    match row.subject_type, row.subject_id:
        case rights.USER, str(user_id):
            return grant_pb2.Subject(user_id=user_id)
        case rights.TEAM, str(team_id):
            return grant_pb2.Subject(team_id=team_id)
        case _:
            return grant_pb2.Subject(workspace=True)


def subject_of(subject: grant_pb2.Subject) -> tuple[str, str | None]:
    """The type and the id of a grant's subject, as its row has them."""
    match subject.WhichOneof("subject"):
        case "user_id":
            return rights.USER, subject.user_id.lower()
        case "team_id":
            return rights.TEAM, subject.team_id.lower()
        case _:
            return rights.WORKSPACE, None


def time_of(timestamp: Timestamp, field: str) -> datetime:
    """An instant between the years 1 and 9999; raises INVALID_ARGUMENT naming the field."""
    try:
        return timestamp.ToDatetime(UTC)
    except (ValueError, OverflowError) as error:
        raise errors.invalid_fields([(field, "is not between the years 1 and 9999")]) from error


def _timestamp(time: datetime) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromDatetime(time)
    return timestamp
