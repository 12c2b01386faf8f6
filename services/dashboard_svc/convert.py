"""Rows as messages of the contract, and back."""

from __future__ import annotations

from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp
from meshboard.analytics.v1 import query_pb2
from meshboard.dashboard.v1 import dashboard_pb2
from meshboard.user.v1 import grant_pb2

from services.chassis import errors, rights
from services.chassis.db import GrantRow
from services.dashboard_svc.models import Dashboard, Widget


def dashboard_to_pb(row: Dashboard) -> dashboard_pb2.Dashboard:
    """A dashboard."""
    return dashboard_pb2.Dashboard(
        dashboard_id=row.dashboard_id,
        workspace_id=row.workspace_id,
        title=row.title,
        description=row.description,
        creator_id=row.creator_id,
        create_time=_timestamp(row.create_time),
        update_time=_timestamp(row.update_time),
        etag=str(row.version),
    )


def widget_to_pb(row: Widget) -> dashboard_pb2.Widget:
    """A widget."""
    return dashboard_pb2.Widget(
        widget_id=row.widget_id,
        dashboard_id=row.dashboard_id,
        title=row.title,
        kind=dashboard_pb2.Widget.Kind.ValueType(row.kind),
        query=query_pb2.Query.FromString(row.query),
        layout=dashboard_pb2.Layout(x=row.x, y=row.y, width=row.width, height=row.height),
        create_time=_timestamp(row.create_time),
        update_time=_timestamp(row.update_time),
        etag=str(row.version),
    )


def grant_to_pb(row: GrantRow) -> grant_pb2.Grant:
    """A grant."""
    return grant_pb2.Grant(
        grant_id=row.grant_id,
        subject=_subject_to_pb(row.subject_type, row.subject_id or ""),
        role=row.role,
        effect=grant_pb2.Grant.Effect.Value(row.effect),
        expire_time=_timestamp(row.expire_time) if row.expire_time else None,
        create_time=_timestamp(row.create_time),
    )


def _subject_to_pb(subject_type: str, subject_id: str) -> grant_pb2.Subject:
    match subject_type:
        case rights.USER:
            return grant_pb2.Subject(user_id=subject_id)
        case rights.TEAM:
            return grant_pb2.Subject(team_id=subject_id)
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
