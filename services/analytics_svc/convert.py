"""Rows as messages of the contract, and back."""

from typing import Any, cast

from meshboard.analytics.v1 import (
    cohort_pb2,
    failed_event_pb2,
    source_pb2,
    source_service_pb2,
    write_key_pb2,
)
from meshboard.analytics.v1.event_log_pb2 import LoggedBatch
from meshboard.analytics.v1.ingest_service_pb2 import Event

from services.analytics_svc.models import Cohort, FailedEvent, Source, SourceUsage, WriteKey
from services.chassis.times import timestamp_of


def cohort_to_pb(row: Cohort) -> cohort_pb2.Cohort:
    """The cohort."""
    return cohort_pb2.Cohort(
        cohort_id=row.cohort_id,
        workspace_id=row.workspace_id,
        title=row.title,
        description=row.description,
        definition=cohort_pb2.CohortDefinition.FromString(row.definition),
        create_time=timestamp_of(row.create_time),
        update_time=timestamp_of(row.update_time),
        etag=str(row.version),
    )


def source_to_pb(row: Source) -> source_pb2.Source:
    """The source."""
    return source_pb2.Source(
        source_id=row.source_id,
        workspace_id=row.workspace_id,
        title=row.title,
        write_key_prefix=row.write_key_prefix,
        allowed_origins=row.allowed_origins,
        allowed_events=row.allowed_events,
        property_types=map(source_pb2.PropertyType.FromString, row.property_types),
        redacted_properties=row.redacted_properties,
        redacted_patterns=map(source_pb2.RedactedPattern.FromString, row.redacted_patterns),
        sample_rate=row.sample_rate,
        robots=cast("source_pb2.Source.Robots.ValueType", row.robots),
        retention_days=row.retention_days,
        events_per_day=row.events_per_day,
        events_per_month=row.events_per_month,
        create_time=timestamp_of(row.create_time),
        update_time=timestamp_of(row.update_time),
        etag=str(row.version),
    )


def column_of(source: source_pb2.Source, field: str) -> Any:
    """What a row of Source holds for a field."""
    value = getattr(source, field)
    match field:
        case "property_types" | "redacted_patterns":
            return [message.SerializeToString() for message in value]
        case "allowed_origins" | "allowed_events" | "redacted_properties":
            return list(value)
        case _:
            return value


def usage_to_pb(row: SourceUsage) -> source_service_pb2.SourceUsage:
    """How many events a source has taken on a day."""
    return source_service_pb2.SourceUsage(date=row.day.isoformat(), event_count=row.event_count)


def write_key_to_pb(row: WriteKey) -> write_key_pb2.WriteKey:
    """What is known of a write key."""
    return write_key_pb2.WriteKey(
        write_key_id=row.write_key_id,
        source_id=row.source_id,
        workspace_id=row.workspace_id,
        title=row.title,
        prefix=row.prefix,
        create_time=timestamp_of(row.create_time),
        expire_time=timestamp_of(row.expire_time) if row.expire_time else None,
        last_use_time=timestamp_of(row.last_use_time) if row.last_use_time else None,
    )


def failed_event_to_pb(row: FailedEvent) -> failed_event_pb2.FailedEvent:
    """The failed event, as the application would send it."""
    batch = LoggedBatch.FromString(row.batch)
    event = Event.FromString(batch.events[0].SerializeToString())
    event.DiscardUnknownFields()  # what the pipeline has found out
    return failed_event_pb2.FailedEvent(
        failed_event_id=row.failed_event_id,
        workspace_id=row.workspace_id or "",
        source_id=row.source_id or "",
        event=event,
        step=failed_event_pb2.FailedEvent.Step.Value(row.step.upper()),
        error=row.error,
        attempt_count=row.attempt_count,
        retrying=row.retry_id is not None,
        receive_time=batch.receive_time,
        create_time=timestamp_of(row.create_time),
        update_time=timestamp_of(row.update_time),
        etag=str(row.version),
    )
