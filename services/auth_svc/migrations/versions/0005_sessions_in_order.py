"""The sessions of an account in the order of their list."""

from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    with op.get_context().autocommit_block():
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS sessions_of_user")  # left by an attempt that was ended
        op.execute("CREATE INDEX CONCURRENTLY sessions_of_user ON sessions (user_id, session_id)")
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS sessions_by_user")
