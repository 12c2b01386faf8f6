"""Settings of the three processes of analytics_svc."""

from pathlib import Path

from services.chassis.settings import Settings


class AnalyticsSettings(Settings):
    """Beside the shared ones: where the event store is, and for the store process its directory."""

    event_store_url: str
    store_dir: Path = Path(".data/store")
    # For the fault test's proof only: counts what is sent twice twice.
    unsafe_no_deduplication: bool = False
