"""An index that is built outside a transaction, while other replicas wait to migrate."""

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    with op.get_context().autocommit_block():
        op.execute("CREATE INDEX CONCURRENTLY effects_subject_id ON effects (subject_id)")
