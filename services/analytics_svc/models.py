"""The tables of analytics_svc in Postgres; events are in the event store, see tables.py."""

from datetime import date

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ForeignKeyConstraint,
    Index,
    LargeBinary,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from services.chassis.db import Id, Time


class Table(DeclarativeBase):
    """Tables that only analytics_svc reads and writes."""


class Source(Table):
    """Where events come from, and what is taken of them; what is no text or number is a serialized message."""

    __tablename__ = "sources"
    __table_args__ = (
        UniqueConstraint("workspace_id", "creator_id", "request_id", name="sources_request_once"),
    )

    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    source_id: Mapped[Id] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(Text)
    write_key_prefix: Mapped[str] = mapped_column(Text)
    # Where code from before several write keys looks for the only one.
    write_key_hash: Mapped[bytes | None] = mapped_column(LargeBinary)
    allowed_origins: Mapped[list[str]] = mapped_column(ARRAY(Text), server_default="{}")
    allowed_events: Mapped[list[str]] = mapped_column(ARRAY(Text), server_default="{}")
    property_types: Mapped[list[bytes]] = mapped_column(ARRAY(LargeBinary), server_default="{}")
    redacted_properties: Mapped[list[str]] = mapped_column(ARRAY(Text), server_default="{}")
    redacted_patterns: Mapped[list[bytes]] = mapped_column(ARRAY(LargeBinary), server_default="{}")
    sample_rate: Mapped[float] = mapped_column(server_default=text("0"))
    robots: Mapped[int] = mapped_column(server_default=text("0"))
    retention_days: Mapped[int] = mapped_column(server_default=text("0"))
    events_per_day: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    events_per_month: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    version: Mapped[int] = mapped_column(server_default=text("1"))
    creator_id: Mapped[Id]
    request_id: Mapped[str | None] = mapped_column(Text)
    create_time: Mapped[Time]
    update_time: Mapped[Time]


class WriteKey(Table):
    """A write key of a source, as its SHA-256, and the prefix that people know it by."""

    __tablename__ = "write_keys"
    __table_args__ = (
        ForeignKeyConstraint(
            ["workspace_id", "source_id"], ["sources.workspace_id", "sources.source_id"], ondelete="CASCADE"
        ),
        UniqueConstraint("key_hash", name="write_keys_hash_once"),
        UniqueConstraint(
            "workspace_id", "source_id", "creator_id", "request_id", name="write_keys_request_once"
        ),
    )

    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    source_id: Mapped[Id] = mapped_column(primary_key=True)
    write_key_id: Mapped[Id] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(Text)
    prefix: Mapped[str] = mapped_column(Text)
    key_hash: Mapped[bytes] = mapped_column(LargeBinary)
    expire_time: Mapped[Time | None]
    last_use_time: Mapped[Time | None]
    creator_id: Mapped[Id]
    request_id: Mapped[str | None] = mapped_column(Text)
    create_time: Mapped[Time]


class SourceUsage(Table):
    """How many events a source has taken on a day of UTC, with those that a process has set aside room for."""

    __tablename__ = "source_usage"
    __table_args__ = (
        ForeignKeyConstraint(
            ["workspace_id", "source_id"], ["sources.workspace_id", "sources.source_id"], ondelete="CASCADE"
        ),
    )

    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    source_id: Mapped[Id] = mapped_column(primary_key=True)
    day: Mapped[date] = mapped_column(primary_key=True)
    event_count: Mapped[int] = mapped_column(BigInteger)


class Cohort(Table):
    """A saved description of people. `definition` is a serialized meshboard.analytics.v1.CohortDefinition."""

    __tablename__ = "cohorts"
    __table_args__ = (
        UniqueConstraint("workspace_id", "creator_id", "request_id", name="cohorts_request_once"),
    )

    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    cohort_id: Mapped[Id] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(Text)
    description: Mapped[str] = mapped_column(Text)
    definition: Mapped[bytes] = mapped_column(LargeBinary)
    version: Mapped[int] = mapped_column(server_default=text("1"))
    creator_id: Mapped[Id]
    request_id: Mapped[str | None] = mapped_column(Text)
    create_time: Mapped[Time]
    update_time: Mapped[Time]


class DeletedSource(Table):
    """A source that was deleted; a trigger writes it. Its events are removed from the store, also late ones."""

    __tablename__ = "deleted_sources"

    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    source_id: Mapped[Id] = mapped_column(primary_key=True)
    delete_time: Mapped[Time] = mapped_column(server_default=func.now())


class Watermark(Table):
    """How far the event log has been read for a source: the highest sequence with an event of it in the store."""

    __tablename__ = "watermarks"

    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    source_id: Mapped[Id] = mapped_column(primary_key=True)
    watermark: Mapped[int] = mapped_column(BigInteger)


class LogPosition(Table):
    """How far the pipeline has come in the event log.

    Everything up to `last_sequence` is in the store. `planned_sequence` is the end of the range that is being inserted:
    after a crash exactly that range is inserted again, so that its token is the same. `epoch` grows when the log was
    replaced by an empty one, whose sequences begin again. `log_create_time` tells one log from another; it is absent
    until a pipeline has found the log.
    """

    __tablename__ = "log_positions"

    log: Mapped[str] = mapped_column(Text, primary_key=True)
    epoch: Mapped[int] = mapped_column(server_default=text("1"))
    last_sequence: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    planned_sequence: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    log_create_time: Mapped[Time | None]


class FailedEvent(Table):
    """An accepted event that a step refuses, as a serialized LoggedBatch of one; or a message that is none.

    `identity` is the event's `insert_id`, so that it is here once however often it comes; for a message its place in
    the log. `retry_id` is set while the event is on its way to the store again.
    """

    __tablename__ = "failed_events"
    __table_args__ = (
        Index("failed_events_by_source", "workspace_id", "source_id", "failed_event_id"),
        UniqueConstraint(
            "source_id", "identity", name="failed_events_once", postgresql_nulls_not_distinct=True
        ),
        Index("failed_events_by_retry", "retry_id", postgresql_where=text("retry_id IS NOT NULL")),
    )

    failed_event_id: Mapped[Id] = mapped_column(primary_key=True)
    workspace_id: Mapped[Id | None]
    source_id: Mapped[Id | None]
    identity: Mapped[bytes] = mapped_column(LargeBinary)
    sequence: Mapped[int] = mapped_column(BigInteger)
    batch: Mapped[bytes] = mapped_column(LargeBinary)
    step: Mapped[str] = mapped_column(Text)
    error: Mapped[str] = mapped_column(Text)
    attempt_count: Mapped[int] = mapped_column(server_default=text("1"))
    retry_id: Mapped[Id | None]
    version: Mapped[int] = mapped_column(server_default=text("1"))
    create_time: Mapped[Time] = mapped_column(server_default=func.now())
    update_time: Mapped[Time] = mapped_column(server_default=func.now())


class CatalogueEntry(Table):
    """What people say about an event name or a property of a source; nothing is said where there is no row."""

    __tablename__ = "catalogue_entries"
    __table_args__ = (
        ForeignKeyConstraint(
            ["workspace_id", "source_id"], ["sources.workspace_id", "sources.source_id"], ondelete="CASCADE"
        ),
    )

    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    source_id: Mapped[Id] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(Text, primary_key=True)
    name: Mapped[str] = mapped_column(Text, primary_key=True)
    description: Mapped[str] = mapped_column(Text)
    tags: Mapped[list[str]] = mapped_column(ARRAY(Text))
    hidden: Mapped[bool]
    update_time: Mapped[Time]
