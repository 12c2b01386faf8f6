"""What a service needs to know of the world, from the environment (`MESHBOARD_*`); checked once, at the start."""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, SecretStr, ValidationError
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
    # 32 bytes as base64, a key a line: the first one encrypts, the others are earlier ones. Or the same as a variable.
    master_key_file: Path | None = None
    master_key: SecretStr = SecretStr("")
    public_url: str = "http://127.0.0.1:8080"
    otlp_endpoint: str = ""
    # Where Elasticsearch is, `https://name:password@host:9200`; without it Postgres is the search engine.
    elasticsearch_url: SecretStr = SecretStr("")
    # What the names of its indices begin with.
    elasticsearch_prefix: str = Field("meshboard", pattern=r"^[a-z0-9][a-z0-9_-]{0,40}$")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    # Calls under way at once in one process; more are refused at the door.
    max_calls: int = 1000
    call_seconds: float = 15.0

    def derived_key(self, purpose: str) -> bytes:
        """32 bytes for one purpose, derived from the present master key."""
        return self.derived_keys(purpose)[0]

    def derived_keys(self, purpose: str) -> list[bytes]:
        """The keys for one purpose, of the present master key and of earlier ones (HKDF-SHA256, RFC 5869)."""
        # Imported here: 20 MB that the event store can do without.
        from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF  # noqa: PLC0415

        info = f"meshboard {purpose}".encode()
        return [
            HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(key)
            for key in self._master_keys()
        ]

    def _master_keys(self) -> list[bytes]:
        text = self.master_key.get_secret_value()
        where = "MESHBOARD_MASTER_KEY"
        if self.master_key_file:
            text, where = self.master_key_file.read_text(), str(self.master_key_file)
        try:
            keys = [base64.b64decode(line, validate=True) for line in text.split()]
        except ValueError:
            keys = []
        if not keys or any(len(key) != 32 for key in keys):
            raise ValueError(f"{where} must hold 32 bytes as base64, a key a line")
        return keys


class PasswordSettings(Settings):
    """Of services that ask for passwords: how they are hashed, and how guesses are slowed down."""

    # argon2id as the OWASP password storage cheat sheet has it: 19 MiB, two passes, one lane.
    password_memory_kib: int = 19 * 1024
    password_passes: int = 2
    password_lanes: int = 1
    password_threads: int = max(1, (os.cpu_count() or 1) // 2)
    # Passwords that wait for a thread; more are refused at the door.
    password_queue: int = 64

    # Failures that are free: of an account from one address or known device, of an account, of an address. Each further
    # one doubles a delay.
    guess_free_failures: int = 5
    guess_free_failures_of_account: int = 20
    guess_free_failures_of_address: int = 50
    guess_longest_delay_seconds: int = 900
    # Of an account as a whole less: strangers cause it, and the owner on a new device has to wait for it.
    guess_longest_delay_of_account_seconds: int = 60


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
