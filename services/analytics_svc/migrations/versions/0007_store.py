"""How long events are kept, and which sources are gone: their events go as well."""

from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.execute("ALTER TABLE sources ADD COLUMN IF NOT EXISTS retention_days integer NOT NULL DEFAULT 0")
    op.execute("""
        CREATE TABLE deleted_sources (
            workspace_id uuid NOT NULL,
            source_id uuid NOT NULL,
            delete_time timestamptz NOT NULL DEFAULT now(),
            PRIMARY KEY (workspace_id, source_id)
        )
    """)
    # Whoever deletes a source, by itself or with its workspace, need not think of it.
    op.execute("""
        CREATE FUNCTION note_deleted_source() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO deleted_sources (workspace_id, source_id) VALUES (OLD.workspace_id, OLD.source_id)
            ON CONFLICT DO NOTHING;
            RETURN OLD;
        END
        $$
    """)
    op.execute("""
        CREATE TRIGGER note_deleted_source AFTER DELETE ON sources
        FOR EACH ROW EXECUTE FUNCTION note_deleted_source()
    """)
