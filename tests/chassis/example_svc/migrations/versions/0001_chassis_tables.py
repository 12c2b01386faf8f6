"""The tables of the chassis, and one for the effects of events."""

from alembic import op

from services.chassis.db import create_chassis_tables

revision = "0001"
down_revision = None


def upgrade() -> None:
    create_chassis_tables(op)
    op.execute("CREATE TABLE effects (subject_id text NOT NULL)")
