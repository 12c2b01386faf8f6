"""Which versions files were made of, and when and where files were applied."""

from alembic import op

revision = "0010"
down_revision = "0008"


def upgrade() -> None:
    op.execute("ALTER TABLE versions ADD COLUMN exported boolean NOT NULL DEFAULT false")
    op.execute("""
        ALTER TABLE applied_files
            ADD COLUMN number bigint NOT NULL DEFAULT 0,
            ADD COLUMN folder text[]
    """)
