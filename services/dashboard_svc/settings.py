"""What dashboard_svc needs to know of the world."""

from __future__ import annotations

from pydantic import Field

from services.chassis.settings import PasswordSettings


class Settings(PasswordSettings):
    """The shared settings, and those of live and shared dashboards. Times in seconds."""

    # A live dashboard is a call under way for as long as someone looks at it.
    max_calls: int = 10_000
    heartbeat_seconds: float = 15.0
    # A stream ends after this long, so that streams spread over replicas again.
    watch_seconds: float = 3600.0
    # A dashboard stays in the bin for so long.
    bin_days: int = 30
    # What the answers that are kept in a process may take.
    answer_cache_bytes: int = Field(64 << 20, ge=0)
    # How many calls for the data of one workspace's dashboards a process has under way.
    data_calls_per_workspace: int = Field(64, ge=1)
    # How long whoever knew the password of a share link may go on without it.
    share_ticket_seconds: float = 43_200.0
