"""Settings of the three processes of analytics_svc."""

from pathlib import Path

from pydantic import Field

from services.chassis.settings import Settings


class AnalyticsSettings(Settings):
    """Beside the shared ones: where the event store is, and for the store process its directory."""

    event_store_url: str
    # The name of the ClickHouse cluster behind it; empty: one server, or the store process.
    event_store_cluster: str = Field("", pattern=r"^[A-Za-z0-9_.-]{0,100}$")
    store_dir: Path = Path(".data/store")
    # What the event log may take of the disk; what is in it can be read into a new store.
    event_log_bytes: int = 8 << 30
    # An insert waits for so many bytes of the event log, or so many seconds after the first of them.
    flush_bytes: int = Field(8 << 20, ge=1 << 16, le=64 << 20)
    flush_seconds: float = Field(0.15, ge=0, le=10)
    # For the fault test's proof only: counts what is sent twice twice.
    unsafe_no_deduplication: bool = False
