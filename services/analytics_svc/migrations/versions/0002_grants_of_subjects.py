"""The grants of a subject in the order of their resources."""

from alembic import op

from services.chassis.db import order_grants_of_subjects

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    with op.get_context().autocommit_block():
        order_grants_of_subjects(op)
