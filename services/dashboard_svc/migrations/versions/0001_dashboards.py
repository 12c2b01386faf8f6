"""Dashboards, their widgets, and the tables of the chassis."""

from alembic import op

from services.chassis.db import create_chassis_tables

revision = "0001"
down_revision = None


def upgrade() -> None:
    create_chassis_tables(op)
    op.execute("""
        CREATE TABLE dashboards (
            workspace_id uuid NOT NULL,
            dashboard_id uuid NOT NULL,
            title text NOT NULL,
            description text NOT NULL,
            version bigint NOT NULL,
            creator_id uuid NOT NULL,
            request_id text,
            create_time timestamptz NOT NULL,
            update_time timestamptz NOT NULL,
            PRIMARY KEY (workspace_id, dashboard_id),
            CONSTRAINT dashboards_request_once UNIQUE (workspace_id, creator_id, request_id)
        )
    """)
    op.execute("""
        CREATE TABLE widgets (
            workspace_id uuid NOT NULL,
            dashboard_id uuid NOT NULL,
            widget_id uuid NOT NULL,
            title text NOT NULL,
            kind smallint NOT NULL,
            query bytea NOT NULL,
            x integer NOT NULL,
            y integer NOT NULL,
            width integer NOT NULL,
            height integer NOT NULL,
            version bigint NOT NULL,
            creator_id uuid NOT NULL,
            request_id text,
            create_time timestamptz NOT NULL,
            update_time timestamptz NOT NULL,
            PRIMARY KEY (workspace_id, dashboard_id, widget_id),
            FOREIGN KEY (workspace_id, dashboard_id) REFERENCES dashboards ON DELETE CASCADE,
            CONSTRAINT widgets_request_once UNIQUE (workspace_id, dashboard_id, creator_id, request_id)
        )
    """)
