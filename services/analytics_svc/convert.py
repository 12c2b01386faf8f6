"""Rows as messages of the contract, and back."""

from meshboard.analytics.v1 import failed_event_pb2, source_pb2
from meshboard.analytics.v1.event_log_pb2 import LoggedBatch
from meshboard.analytics.v1.ingest_service_pb2 import Event

from services.analytics_svc.models import FailedEvent, Source
from services.chassis.times import timestamp_of


def source_to_pb(row: Source) -> source_pb2.Source:
    """The source."""
    return source_pb2.Source(
        source_id=row.source_id,
        workspace_id=row.workspace_id,
        title=row.title,
        write_key_prefix=row.write_key_prefix,
        create_time=timestamp_of(row.create_time),
        update_time=timestamp_of(row.update_time),
        etag=str(row.version),
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
