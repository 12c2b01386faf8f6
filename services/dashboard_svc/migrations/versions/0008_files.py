"""What files said when they were applied last."""

from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.execute("""
        CREATE TABLE applied_files (
            workspace_id uuid NOT NULL,
            dashboard_id uuid NOT NULL,
            content bytea NOT NULL,
            PRIMARY KEY (workspace_id, dashboard_id),
            FOREIGN KEY (workspace_id, dashboard_id) REFERENCES dashboards ON DELETE CASCADE
        )
    """)
