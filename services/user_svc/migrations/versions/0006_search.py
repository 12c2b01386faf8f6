"""Which members have to be indexed for the search."""

from alembic import op

from services.chassis.db import create_search

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    create_search(op)
    # A member is found by what its user is called. Whoever writes, in whatever way, need not think of the index.
    op.execute("""
        CREATE FUNCTION search_members_touch() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF TG_TABLE_NAME = 'users' THEN
                INSERT INTO search_queue (index_name, workspace_id, document_id)
                SELECT 'members', workspace_id, user_id FROM members WHERE user_id = NEW.user_id;
            ELSE
                INSERT INTO search_queue (index_name, workspace_id, document_id)
                VALUES (
                    'members',
                    coalesce(NEW.workspace_id, OLD.workspace_id),
                    coalesce(NEW.user_id, OLD.user_id)
                );
            END IF;
            RETURN NULL;
        END $$
    """)
    op.execute("""
        CREATE TRIGGER search_members_touch AFTER INSERT OR DELETE ON members
        FOR EACH ROW EXECUTE FUNCTION search_members_touch()
    """)
    op.execute("""
        CREATE TRIGGER search_members_touch AFTER UPDATE OF display_name, email ON users
        FOR EACH ROW EXECUTE FUNCTION search_members_touch()
    """)
