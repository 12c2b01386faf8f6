"""Rows as messages of the contract, and back."""

from meshboard.analytics.v1 import cohort_pb2, source_pb2

from services.analytics_svc.models import Cohort, Source
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
        create_time=timestamp_of(row.create_time),
        update_time=timestamp_of(row.update_time),
        etag=str(row.version),
    )
