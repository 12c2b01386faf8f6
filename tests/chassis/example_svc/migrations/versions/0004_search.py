"""The tables of the search, and something to be found."""

from alembic import op

from services.chassis.db import create_search

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    create_search(op)
    op.execute("""
        CREATE TABLE things (
            workspace_id uuid NOT NULL,
            thing_id uuid NOT NULL,
            parent_id uuid,
            title text NOT NULL,
            body text NOT NULL DEFAULT '',
            PRIMARY KEY (workspace_id, thing_id)
        )
    """)
    op.execute("""
        CREATE FUNCTION search_things_touch() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO search_queue (index_name, workspace_id, document_id)
            VALUES (
                'things', coalesce(NEW.workspace_id, OLD.workspace_id), coalesce(NEW.thing_id, OLD.thing_id)
            );
            RETURN NULL;
        END $$
    """)
    op.execute("""
        CREATE TRIGGER search_things_touch AFTER INSERT OR UPDATE OR DELETE ON things
        FOR EACH ROW EXECUTE FUNCTION search_things_touch()
    """)
