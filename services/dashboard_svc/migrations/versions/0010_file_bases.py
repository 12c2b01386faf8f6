"""What files were made of, when and where they were applied, what they call library widgets; the order of lists."""

from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.execute("ALTER TABLE versions ADD COLUMN exported boolean NOT NULL DEFAULT false")
    op.execute("""
        ALTER TABLE applied_files
            ADD COLUMN base_version text,
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
    # What lists are ordered by where there is a draft. The title is the first field of the content, behind its length.
    op.execute(
        "ALTER TABLE dashboards ADD COLUMN published_title text, ADD COLUMN published_update_time timestamptz"
    )
    op.execute("""
        UPDATE dashboards SET
            published_update_time = versions.create_time,
            published_title = convert_from(
                CASE WHEN get_byte(versions.content, 1) < 128
                    THEN substring(versions.content FROM 3 FOR get_byte(versions.content, 1))
                    ELSE substring(
                        versions.content FROM 4
                        FOR get_byte(versions.content, 1) - 128 + 128 * get_byte(versions.content, 2)
                    )
                END,
                'UTF8'
            )
        FROM versions
        WHERE versions.workspace_id = dashboards.workspace_id
            AND versions.dashboard_id = dashboards.dashboard_id
            AND versions.number = dashboards.published_version
            AND get_byte(versions.content, 0) = 10
    """)
    # The release before this leaves these columns as they are when a draft ends.
    for name, column in (("title", "lower({})"), ("update_time", "{}")):
        shown = f"CASE WHEN published_version IS NULL THEN {name} ELSE coalesce(published_{name}, {name}) END"
        op.execute(
            f"CREATE INDEX dashboards_by_{name} ON dashboards (workspace_id, ({column.format(shown)}), dashboard_id)"
        )
