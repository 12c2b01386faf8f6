"""What a service needs to know of the world, from the environment (`MESHBOARD_*`); checked once, at the start."""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Settings that all services share; the defaults are those of `up` on its default port."""

    model_config = SettingsConfigDict(env_prefix="MESHBOARD_", frozen=True, extra="ignore")

    postgres_url: str = ""
    postgres_pool_size: int = 10
    redis_url: str
    nats_url: str
    listen: str
    private_listen: str
    workers: int = 1
    auth_address: str = "127.0.0.1:8083"
    user_address: str = "127.0.0.1:8084"
    dashboard_address: str = "127.0.0.1:8085"
    analytics_address: str = "127.0.0.1:8086"
    keys_dir: Path
    master_key_file: Path
    public_url: str = "http://127.0.0.1:8080"
    otlp_endpoint: str = ""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    # Calls under way at once in one process; more are refused at the door.
    max_calls: int = 1000
    call_seconds: float = 15.0

    def derived_key(self, purpose: str) -> bytes:
        """32 bytes for one purpose, derived from the master key (HKDF-SHA256, RFC 5869)."""
        # Imported here: 20 MB that the event store can do without.
        from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF  # noqa: PLC0415

        master = base64.b64decode(self.master_key_file.read_text().strip(), validate=True)
        if len(master) != 32:
            raise ValueError(f"{self.master_key_file} must hold 32 bytes as base64")
        return HKDF(algorithm=SHA256(), length=32, salt=None, info=f"meshboard {purpose}".encode()).derive(
            master
        )


S = TypeVar("S", bound=Settings)


def load(kind: type[S]) -> S:
    """Reads the settings; ends the process with a line for each variable that is missing or wrong."""
    try:
        return kind()
    except ValidationError as error:
        for problem in error.errors():
            name = "MESHBOARD_" + "_".join(str(part) for part in problem["loc"]).upper()
            print(f"{name}: {problem['msg']}", file=sys.stderr)
        raise SystemExit(2) from None
