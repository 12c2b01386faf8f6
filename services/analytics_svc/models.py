"""The tables of analytics_svc in Postgres; events are in the event store, see tables.py."""

from sqlalchemy import BigInteger, Index, LargeBinary, Text, UniqueConstraint, func, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from services.chassis.db import Id, Time


class Table(DeclarativeBase):
    """Tables that only analytics_svc reads and writes."""


class Source(Table):
    """Where events come from. Of the write key there is the SHA-256, and the prefix that people know it by."""

    __tablename__ = "sources"
    __table_args__ = (
        UniqueConstraint("write_key_hash", name="sources_write_key_once"),
        UniqueConstraint("workspace_id", "creator_id", "request_id", name="sources_request_once"),
    )

    workspace_id: Mapped[Id] = mapped_column(primary_key=True)
    source_id: Mapped[Id] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(Text)
    write_key_hash: Mapped[bytes] = mapped_column(LargeBinary)
    write_key_prefix: Mapped[str] = mapped_column(Text)
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
    replaced by an empty one, whose sequences begin again.
    """

    __tablename__ = "log_positions"

    log: Mapped[str] = mapped_column(Text, primary_key=True)
    epoch: Mapped[int] = mapped_column(server_default=text("1"))
    last_sequence: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    planned_sequence: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))


class FailedEvent(Table):
    """An accepted event that the store refuses, as a serialized LoggedBatch of one; or a message that is none."""

    __tablename__ = "failed_events"
    __table_args__ = (Index("failed_events_by_source", "workspace_id", "source_id", "failed_event_id"),)

    failed_event_id: Mapped[Id] = mapped_column(primary_key=True)
    workspace_id: Mapped[Id | None]
    source_id: Mapped[Id | None]
    sequence: Mapped[int] = mapped_column(BigInteger)
    batch: Mapped[bytes] = mapped_column(LargeBinary)
    error: Mapped[str] = mapped_column(Text)
    create_time: Mapped[Time] = mapped_column(server_default=func.now())
