"""Which versions files were made of, when and where files were applied, and what they call library widgets."""

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
    # Of those with one title the first is called by it; the others have the end of their ids behind it.
    op.execute("ALTER TABLE library_widgets ADD COLUMN name text")
    op.execute("""
        UPDATE library_widgets SET name = named.name || CASE WHEN place = 1 THEN '' ELSE '-' || named.ending END
        FROM (
            SELECT workspace_id, library_widget_id, slug AS name, right(library_widget_id::text, 12) AS ending,
                row_number() OVER (PARTITION BY workspace_id, slug ORDER BY library_widget_id) AS place
            FROM (
                SELECT *, coalesce(
                    nullif(trim(BOTH '-' FROM left(regexp_replace(lower(title), '[^a-z0-9]+', '-', 'g'), 80)), ''),
                    'widget'
                ) AS slug
                FROM library_widgets
            ) AS slugs
        ) AS named
        WHERE library_widgets.workspace_id = named.workspace_id
            AND library_widgets.library_widget_id = named.library_widget_id
    """)
    op.execute("CREATE UNIQUE INDEX library_widgets_name_once ON library_widgets (workspace_id, name)")
