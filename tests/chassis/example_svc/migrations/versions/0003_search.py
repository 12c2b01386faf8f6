"""The tables of the search."""

from alembic import op

from services.chassis.db import create_search

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    create_search(op)
