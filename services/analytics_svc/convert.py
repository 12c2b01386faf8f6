"""Rows as messages of the contract, and back."""

from meshboard.analytics.v1 import source_pb2

from services.analytics_svc.models import Source
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
