"""One mesh on this machine: its folder, ports, secrets and parts."""

from __future__ import annotations

import base64
import json
import os
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cli import envoy_config, parts
from cli.envoy_config import DEFAULT_PORT, REPOSITORY
from cli.parts import SERVICES, Part

DATA_VERSION = "1"  # of the layout of a data folder; migrations of the databases do not change it

PORTS = {  # distance from the gateway's port
    "gateway": 0,
    "envoy_admin": 1,
    "envoy_internal": 2,
    "auth": 3,
    "user": 4,
    "dashboard": 5,
    "analytics": 6,
    "auth_private": 7,
    "user_private": 8,
    "dashboard_private": 9,
    "analytics_private": 10,
    "pipeline_private": 11,
    "store_private": 12,
    "nats": 13,
    "mails": 14,
}
REPLACEABLE = (
    "MESHBOARD_POSTGRES_URL",
    "MESHBOARD_REDIS_URL",
    "MESHBOARD_NATS_URL",
    "MESHBOARD_CLICKHOUSE_URL",
)


class DataFolderRefused(Exception):
    """The data folder cannot be used. The message names the remedy."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What `up` was asked for.

    Attributes:
        data_dir: absolute; everything the mesh writes is in it.
        host: the address the gateway listens on; all else listens on 127.0.0.1.
        port: the gateway's port; the others follow it, see PORTS.
        workers: processes of each service.
        limits: whether the gateway limits rates.
        environment: settings of the caller; those of REPLACEABLE stand for a part that is not started.
    """

    data_dir: Path
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    workers: int = 1
    limits: bool = True
    environment: Mapping[str, str]

    @property
    def run_dir(self) -> Path:
        return self.data_dir / "run"

    @property
    def master_key_file(self) -> Path:
        return self.data_dir / "secrets" / "master.key"

    @property
    def socket_dir(self) -> Path:
        return parts.socket_directory(self.run_dir)

    @property
    def mails_dir(self) -> Path:
        return self.data_dir / "mails"

    @property
    def gateway_url(self) -> str:
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host  # noqa: S104 - compared, not bound
        return f"http://{host}:{self.port}"

    @property
    def public_url(self) -> str:
        return self.environment.get("MESHBOARD_PUBLIC_URL") or self.gateway_url

    def port_of(self, name: str) -> int:
        return self.port + PORTS[name]

    def check_data_dir(self) -> None:
        """Raises DataFolderRefused when the data folder holds something else than our data."""
        version_file = self.data_dir / "VERSION"
        if version_file.exists():
            version = version_file.read_text().strip()
            if version != DATA_VERSION:
                raise DataFolderRefused(
                    f"{self.data_dir} holds data of format {version}; this version of Meshboard reads format "
                    f"{DATA_VERSION}. Run the version that wrote it, or choose another folder with --data."
                )
        elif self.data_dir.exists() and any(self.data_dir.iterdir()):
            raise DataFolderRefused(
                f"{self.data_dir} is not empty and not made by Meshboard. Choose another folder with --data."
            )

    def open_data_dir(self) -> None:
        """Makes the data folder, unless check_data_dir refuses it."""
        self.check_data_dir()
        # Open to pass through, for a PostgreSQL that runs as another account; what is inside is private.
        parts.private_directory(self.data_dir, mode=0o711)
        (self.data_dir / "VERSION").write_text(f"{DATA_VERSION}\n")
        parts.private_directory(self.data_dir / "store")
        parts.private_directory(self.run_dir, mode=0o711)
        parts.private_directory(self.socket_dir, mode=0o711)

    def parts(self) -> list[Part]:
        """Returns the parts in the order of starting. Writes the secrets that are missing."""
        passwords = self._passwords()
        replaced = {name: self.environment.get(name, "") for name in REPLACEABLE}
        result: list[Part] = []

        admin_url = replaced["MESHBOARD_POSTGRES_URL"]
        if not admin_url:
            sockets = self.socket_dir / "postgres"
            admin_url = parts.postgres_url(sockets, "postgres", passwords["postgres"], "postgres")
            data = self.data_dir / "postgres"
            result.append(
                parts.postgres(data, sockets, passwords["postgres"], prime=self._provision(admin_url))
            )
        nats_url = replaced["MESHBOARD_NATS_URL"]
        if not nats_url:
            port, token = self.port_of("nats"), passwords["nats"]
            nats_url = f"nats://{token}@127.0.0.1:{port}"
            result.append(parts.nats(self.data_dir / "nats", self.run_dir / "nats.json", port, token))
        redis_url = replaced["MESHBOARD_REDIS_URL"]
        if not redis_url:
            redis_url = f"unix://{self.socket_dir}/valkey.sock"
            result.append(parts.valkey(self.socket_dir / "valkey.sock"))

        smtp_url = self.environment.get("MESHBOARD_SMTP_URL")
        if not smtp_url:
            smtp_url = f"smtp://127.0.0.1:{self.port_of('mails')}"
            result.append(parts.mails(self.mails_dir, self.port_of("mails")))

        event_store_url = replaced["MESHBOARD_CLICKHOUSE_URL"] or f"http+unix://{self.socket_dir}/store.sock"
        shared = {
            # What the caller set, such as MESHBOARD_LOG_LEVEL; no service is to see the administrator's URL.
            # The mail server's URL has a password that auth_svc alone needs.
            **{
                name: value
                for name, value in self.environment.items()
                if name not in {*REPLACEABLE, "MESHBOARD_SMTP_URL", "MESHBOARD_ELASTICSEARCH_URL"}
            },
            "MESHBOARD_REDIS_URL": redis_url,
            "MESHBOARD_NATS_URL": nats_url,
            "MESHBOARD_EVENT_STORE_URL": event_store_url,
            "MESHBOARD_WORKERS": str(self.workers),
            "MESHBOARD_KEYS_DIR": str(self.data_dir / "secrets" / "keys"),
            "MESHBOARD_MASTER_KEY_FILE": str(self.master_key_file),
            "MESHBOARD_PUBLIC_URL": self.public_url,
            **{f"MESHBOARD_{name.upper()}_ADDRESS": f"127.0.0.1:{self.port_of(name)}" for name in SERVICES},
        }

        def service(name: str, owner: str, private: str, *arguments: str, after: tuple[str, ...]) -> Part:
            serves = name == f"{owner}_svc"
            own = {
                "MESHBOARD_POSTGRES_URL": parts.service_url(admin_url, owner, passwords[owner], owner),
                "MESHBOARD_LISTEN": f"127.0.0.1:{self.port_of(owner)}",
                "MESHBOARD_PRIVATE_LISTEN": f"127.0.0.1:{self.port_of(private)}",
            }
            if owner == "auth":
                own["MESHBOARD_SMTP_URL"] = smtp_url
            if owner in {"user", "dashboard"}:
                own["MESHBOARD_ELASTICSEARCH_URL"] = self.environment.get("MESHBOARD_ELASTICSEARCH_URL", "")
            if owner == "analytics":
                own["MESHBOARD_STORE_DIR"] = str(self.data_dir / "store")
            return parts.service(
                name,
                f"services.{owner}_svc",
                *arguments,
                env={**shared, **own},
                private_port=self.port_of(private),
                grpc_port=self.port_of(owner) if serves else None,
                after=after,
            )

        if not replaced["MESHBOARD_CLICKHOUSE_URL"]:
            store = service("store", "analytics", "store_private", "--role", "store", after=())
            result.append(replace(store, stop_seconds=Part.stop_seconds))  # it stops with the servers
        servers = tuple(part.name for part in result)
        small = tuple(name for name in servers if name != "store")
        result += [
            service("auth_svc", "auth", "auth_private", after=small),
            service("user_svc", "user", "user_private", after=small),
            service("analytics_svc", "analytics", "analytics_private", after=servers),
            service("pipeline", "analytics", "pipeline_private", "--role", "pipeline", after=servers),
            service("dashboard_svc", "dashboard", "dashboard_private", after=small),
        ]
        services = tuple(part.name for part in result if part.name not in servers)
        listens = (
            (self.host, self.port_of("gateway")),
            ("127.0.0.1", self.port_of("envoy_admin")),
            ("127.0.0.1", self.port_of("envoy_internal")),
        )
        result.append(
            parts.envoy(self.run_dir / "envoy.yaml", listens, self.port_of("envoy_admin"), after=services)
        )
        return result

    def write_secrets(self) -> None:
        """Writes the keys that are missing."""
        folder = parts.private_directory(self.data_dir / "secrets" / "keys")
        for name in SERVICES:
            if not (folder / f"{name}.pub.pem").exists():
                write_key(folder, name)
        if not self.master_key_file.exists():
            parts.write_private(self.master_key_file, base64.b64encode(secrets.token_bytes(32)).decode())

    def write_gateway(self) -> None:
        """Writes the gateway's configuration for this mesh."""
        envoy_config.write(
            REPOSITORY / "edge" / "envoy.yaml",
            self.run_dir / "envoy.yaml",
            base_port=self.port,
            host=self.host,
            public_url=self.public_url,
            otlp=self.environment.get("MESHBOARD_OTLP_ENDPOINT", ""),
            limits=self.limits,
        )

    def _provision(self, admin_url: str) -> Callable[[], Awaitable[None]]:
        passwords = self._passwords()
        return partial(parts.provision, admin_url, {name: passwords[name] for name in SERVICES})

    async def provision_replaced(self) -> None:
        """Makes roles and databases on the PostgreSQL that stands for our own, if one does."""
        if admin_url := self.environment.get("MESHBOARD_POSTGRES_URL"):
            await self._provision(admin_url)()

    def _passwords(self) -> dict[str, str]:
        """Returns the passwords of the roles of PostgreSQL and the token of NATS, made at the first start."""
        file = parts.private_directory(self.data_dir / "secrets") / "passwords.json"
        if not file.exists():
            made = {name: secrets.token_hex(16) for name in ("postgres", "nats", *SERVICES)}
            parts.write_private(file, json.dumps(made, indent=2))
        passwords: dict[str, str] = json.loads(file.read_text())
        return passwords


def write_key(folder: Path, name: str) -> None:
    """Writes a new key pair for ES256 as `name`.key.pem and `name`.pub.pem."""
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    parts.write_private(folder / f"{name}.key.pem", private.decode())
    parts.write_private(folder / f"{name}.pub.pem", public.decode())


def settings_of(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the settings of Meshboard in `environment`."""
    return {name: value for name, value in environment.items() if name.startswith("MESHBOARD_")}


def stack_of(data_dir: Path, state: Mapping[str, Any]) -> Stack:
    """Returns the stack that wrote `state` (see about)."""
    return Stack(
        data_dir=data_dir,
        host=state["host"],
        port=state["port"],
        workers=state["workers"],
        limits=state["limits"],
        environment=settings_of(os.environ),
    )


def read_state(data: Path) -> dict[str, Any] | None:
    """Returns the content of state.json, None when nothing runs on the folder."""
    try:
        state: dict[str, Any] = json.loads((data / "run" / "state.json").read_text())
    except FileNotFoundError:
        return None
    return state


def about(stack: Stack) -> dict[str, object]:
    """Returns what state.json tells of a stack, besides its processes."""
    return {
        "version": DATA_VERSION,
        "gateway_url": stack.gateway_url,
        "host": stack.host,
        "port": stack.port,
        "workers": stack.workers,
        "limits": stack.limits,
    }
