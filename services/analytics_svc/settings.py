"""Settings of the three processes of analytics_svc."""

from pathlib import Path

from pydantic import Field, FilePath

from services.chassis.settings import Settings


class AnalyticsSettings(Settings):
    """Beside the shared ones: where the event store is, and for the store process its directory."""

    event_store_url: str
    # The name of the ClickHouse cluster behind it; empty: one server, or the store process.
    event_store_cluster: str = Field("", pattern=r"^[A-Za-z0-9_.-]{0,100}$")
    store_dir: Path = Path(".data/store")
    # What the event log may take of the disk; what is in it can be read into a new store.
    event_log_bytes: int = 8 << 30
    # An insert waits for so many bytes of the event log, or so many seconds after the first of them and until the
    # insert before has ended.
    flush_bytes: int = Field(16 << 20, ge=1 << 16, le=64 << 20)
    flush_seconds: float = Field(0.15, ge=0, le=10)
    # A file in MaxMind's format that tells where addresses are. Without it no event has a country, region or city.
    geo_database: FilePath | None = None
    # What one query may take of the event store, and how many of a workspace each process runs at the same time.
    query_seconds: float = 10.0
    query_memory_bytes: int = 1_000_000_000
    query_rows: int = 2_000_000_000
    queries_per_workspace: int = 4
    # Streams of live events: how many a process serves, and how many of them to one workspace.
    tails: int = 400
    tails_per_workspace: int = 50
    heartbeat_seconds: float = 15.0
    watch_seconds: float = 3600.0
    # For the fault tests only: where to end at once, as crash_points.py has it.
    crash_at: str = ""
    # For the fault test's proof only: counts what is sent twice twice.
    unsafe_no_deduplication: bool = False
