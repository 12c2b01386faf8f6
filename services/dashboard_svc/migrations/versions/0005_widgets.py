"""What widgets of all kinds show, what files call them, and the library."""

from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    # `query` goes into `content`, as the field of a message. The release before writes it still, and reads it: it goes
    # with its trigger, when nobody does any more.
    op.execute("""
        ALTER TABLE widgets
            ALTER COLUMN query SET DEFAULT '',
            ADD COLUMN content bytea NOT NULL DEFAULT '',
            ADD COLUMN library_widget_id uuid,
            ADD COLUMN name text,
            ADD CONSTRAINT widgets_name_once UNIQUE (workspace_id, dashboard_id, name) DEFERRABLE INITIALLY DEFERRED
    """)
    # A meshboard.dashboard.v1.Widget with nothing but its field 5, whose length is a varint.
    op.execute(r"""
        CREATE FUNCTION widgets_content() RETURNS trigger LANGUAGE plpgsql AS $$
        DECLARE
            size int := length(NEW.query);
        BEGIN
            NEW.content := '\x2a';
            WHILE size > 127 LOOP
                NEW.content := NEW.content || set_byte('\x00', 0, size & 127 | 128);
                size := size >> 7;
            END LOOP;
            NEW.content := NEW.content || set_byte('\x00', 0, size) || NEW.query;
            RETURN NEW;
        END $$
    """)
    op.execute("""
        CREATE TRIGGER widgets_content_of_new BEFORE INSERT ON widgets
        FOR EACH ROW WHEN (NEW.query <> '' AND NEW.content = '') EXECUTE FUNCTION widgets_content()
    """)
    op.execute("""
        CREATE TRIGGER widgets_content_of_changed BEFORE UPDATE OF query ON widgets
        FOR EACH ROW WHEN (NEW.query <> '' AND NEW.content = OLD.content) EXECUTE FUNCTION widgets_content()
    """)
    op.execute("UPDATE widgets SET query = query")

    op.execute("""
        CREATE TABLE library_widgets (
            workspace_id uuid NOT NULL,
            library_widget_id uuid NOT NULL,
            title text NOT NULL,
            kind smallint NOT NULL,
            content bytea NOT NULL,
            version bigint NOT NULL,
            creator_id uuid NOT NULL,
            request_id text,
            create_time timestamptz NOT NULL,
            update_time timestamptz NOT NULL,
            PRIMARY KEY (workspace_id, library_widget_id),
            CONSTRAINT library_widgets_request_once UNIQUE (workspace_id, creator_id, request_id)
        )
    """)
    op.execute("""
        CREATE INDEX widgets_by_library ON widgets (workspace_id, library_widget_id, dashboard_id)
        WHERE library_widget_id IS NOT NULL
    """)
    # A dashboard is found by what the library widgets on it say.
    op.execute("""
        CREATE FUNCTION search_library_touch() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO search_queue (index_name, workspace_id, document_id)
            SELECT DISTINCT 'dashboards', workspace_id, dashboard_id
            FROM widgets
            WHERE workspace_id = NEW.workspace_id AND library_widget_id = NEW.library_widget_id;
            RETURN NULL;
        END $$
    """)
    op.execute("""
        CREATE TRIGGER search_library_touch AFTER UPDATE ON library_widgets
        FOR EACH ROW EXECUTE FUNCTION search_library_touch()
    """)
