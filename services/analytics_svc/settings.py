"""Settings of the three processes of analytics_svc."""

from pathlib import Path

from services.chassis.settings import Settings


class AnalyticsSettings(Settings):
    """Beside the shared ones: where the event store is, and for the store process its directory."""

    event_store_url: str
    store_dir: Path = Path(".data/store")
    # What the event log may take of the disk; what is in it can be read into a new store.
    event_log_bytes: int = 8 << 30
    # For the fault tests only: where to end at once, as crash_points.py has it.
    crash_at: str = ""
    # For the fault test's proof only: counts what is sent twice twice.
    unsafe_no_deduplication: bool = False
