"""Several write keys for a source, what it says of its events, and how many it has taken."""

from alembic import op

revision = "0003"
down_revision = "0002"

# Code from before this migration writes its only key into `sources`. The trigger carries that over, so that a key which
# it has made is known to the code that comes after it. `write_key_hash` can go when no such code is left.
_OLD_CODE = """
CREATE FUNCTION carry_over_write_key() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'UPDATE' THEN
        DELETE FROM write_keys WHERE key_hash = OLD.write_key_hash;
    END IF;
    INSERT INTO write_keys (
        workspace_id, source_id, write_key_id, title, prefix, key_hash, creator_id, create_time
    ) VALUES (
        NEW.workspace_id, NEW.source_id, gen_random_uuid(), 'First', NEW.write_key_prefix, NEW.write_key_hash,
        NEW.creator_id, NEW.update_time
    );
    RETURN NEW;
END
$$
"""


def upgrade() -> None:
    op.execute("""
        CREATE TABLE write_keys (
            workspace_id uuid NOT NULL,
            source_id uuid NOT NULL,
            write_key_id uuid NOT NULL,
            title text NOT NULL,
            prefix text NOT NULL,
            key_hash bytea NOT NULL,
            expire_time timestamptz,
            last_use_time timestamptz,
            creator_id uuid NOT NULL,
            request_id text,
            create_time timestamptz NOT NULL,
            PRIMARY KEY (workspace_id, source_id, write_key_id),
            FOREIGN KEY (workspace_id, source_id) REFERENCES sources ON DELETE CASCADE,
            CONSTRAINT write_keys_hash_once UNIQUE (key_hash),
            CONSTRAINT write_keys_request_once UNIQUE (workspace_id, source_id, creator_id, request_id)
        )
    """)
    op.execute("""
        INSERT INTO write_keys (
            workspace_id, source_id, write_key_id, title, prefix, key_hash, creator_id, create_time
        )
        SELECT workspace_id, source_id, gen_random_uuid(), 'First', write_key_prefix, write_key_hash, creator_id,
            create_time
        FROM sources
    """)
    op.execute("ALTER TABLE sources ALTER COLUMN write_key_hash DROP NOT NULL")
    op.execute(_OLD_CODE)
    op.execute("""
        CREATE TRIGGER carry_over_write_key AFTER INSERT OR UPDATE OF write_key_hash ON sources
        FOR EACH ROW WHEN (NEW.write_key_hash IS NOT NULL) EXECUTE FUNCTION carry_over_write_key()
    """)
    op.execute("""
        ALTER TABLE sources
            ADD COLUMN allowed_origins text[] NOT NULL DEFAULT '{}',
            ADD COLUMN allowed_events text[] NOT NULL DEFAULT '{}',
            ADD COLUMN property_types bytea[] NOT NULL DEFAULT '{}',
            ADD COLUMN redacted_properties text[] NOT NULL DEFAULT '{}',
            ADD COLUMN redacted_patterns bytea[] NOT NULL DEFAULT '{}',
            ADD COLUMN sample_rate double precision NOT NULL DEFAULT 0,
            ADD COLUMN robots integer NOT NULL DEFAULT 0,
            ADD COLUMN retention_days integer NOT NULL DEFAULT 0,
            ADD COLUMN events_per_day bigint NOT NULL DEFAULT 0,
            ADD COLUMN events_per_month bigint NOT NULL DEFAULT 0
    """)
    op.execute("""
        CREATE TABLE source_usage (
            workspace_id uuid NOT NULL,
            source_id uuid NOT NULL,
            day date NOT NULL,
            event_count bigint NOT NULL,
            PRIMARY KEY (workspace_id, source_id, day),
            FOREIGN KEY (workspace_id, source_id) REFERENCES sources ON DELETE CASCADE
        )
    """)
