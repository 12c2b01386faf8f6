"""Which dashboards have to be indexed for the search."""

from alembic import op

from services.chassis.db import create_search

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    create_search(op)
    # A dashboard is found by its widgets too, and its row changes with each change of one of them. Whoever writes, in
    # whatever way, need not think of the index.
    op.execute("""
        CREATE FUNCTION search_dashboards_touch() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO search_queue (index_name, workspace_id, document_id)
            VALUES (
                'dashboards',
                coalesce(NEW.workspace_id, OLD.workspace_id),
                coalesce(NEW.dashboard_id, OLD.dashboard_id)
            );
            RETURN NULL;
        END $$
    """)
    op.execute("""
        CREATE TRIGGER search_dashboards_touch AFTER INSERT OR UPDATE OR DELETE ON dashboards
        FOR EACH ROW EXECUTE FUNCTION search_dashboards_touch()
    """)
