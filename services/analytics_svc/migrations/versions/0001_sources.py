"""Sources, and what the pipeline remembers."""

from alembic import op

from services.chassis.db import create_chassis_tables

revision = "0001"
down_revision = None


def upgrade() -> None:
    create_chassis_tables(op)
    op.execute("""
        CREATE TABLE sources (
            workspace_id uuid NOT NULL,
            source_id uuid NOT NULL,
            title text NOT NULL,
            write_key_hash bytea NOT NULL,
            write_key_prefix text NOT NULL,
            version integer NOT NULL DEFAULT 1,
            creator_id uuid NOT NULL,
            request_id text,
            create_time timestamptz NOT NULL,
            update_time timestamptz NOT NULL,
            PRIMARY KEY (workspace_id, source_id),
            CONSTRAINT sources_write_key_once UNIQUE (write_key_hash),
            CONSTRAINT sources_request_once UNIQUE (workspace_id, creator_id, request_id)
        )
    """)
    op.execute("""
        CREATE TABLE watermarks (
            workspace_id uuid NOT NULL,
            source_id uuid NOT NULL,
            watermark bigint NOT NULL,
            PRIMARY KEY (workspace_id, source_id)
        )
    """)
    op.execute("""
        CREATE TABLE log_positions (
            log text PRIMARY KEY,
            epoch integer NOT NULL DEFAULT 1,
            last_sequence bigint NOT NULL DEFAULT 0,
            planned_sequence bigint NOT NULL DEFAULT 0
        )
    """)
    op.execute("""
        CREATE TABLE failed_events (
            failed_event_id uuid PRIMARY KEY,
            workspace_id uuid,
            source_id uuid,
            sequence bigint NOT NULL,
            batch bytea NOT NULL,
            error text NOT NULL,
            create_time timestamptz NOT NULL DEFAULT now()
        )
    """)
    op.execute(
        "CREATE INDEX failed_events_by_source ON failed_events (workspace_id, source_id, failed_event_id)"
    )
