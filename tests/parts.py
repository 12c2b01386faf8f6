"""The real servers that tests use, started by the same supervisor as `up`."""

from __future__ import annotations

import os
import random
import secrets
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import asyncpg

from cli import parts
from cli.stack import PORTS, Stack, about
from cli.supervisor import Supervisor, is_free

_given: set[int] = set()


@dataclass(frozen=True)
class Parts:
    """Addresses of a running PostgreSQL, Valkey and NATS, and the supervisor that can stop them.

    Attributes:
        admin_url: the superuser's URL of PostgreSQL.
    """

    supervisor: Supervisor
    admin_url: str
    redis_url: str
    nats_url: str
    passwords: dict[str, str]

    def postgres_url(self, service: str) -> str:
        """Returns the URL of the service's own database, which all tests of a run share."""
        return parts.service_url(self.admin_url, service, self.passwords[service], service)

    async def fresh_database(self, service: str) -> str:
        """Returns the URL of a new empty database that the service's role owns."""
        name = f"{service}_{uuid4().hex[:12]}"
        admin = await asyncpg.connect(self.admin_url)
        try:
            await parts.create_database(admin, name, owner=service)
        finally:
            await admin.close()
        await parts.create_extensions(self.admin_url, name)
        return parts.service_url(self.admin_url, service, self.passwords[service], name)


def free_port() -> int:
    """Returns a TCP port of 127.0.0.1 that nobody listens on now, and no other test of the run is given.

    Two services may listen on one port (SO_REUSEPORT), and would answer each other's calls without a word: who is given
    a port listens later, so that the system may give it twice. Each of the run's processes has ports of its own.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    while True:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port: int = listener.getsockname()[1]
        # Linux prefers ports of one parity for this: what is dealt out is pairs.
        if port // 2 % workers == worker and port not in _given:
            _given.add(port)
            return port


@asynccontextmanager
async def running(data_dir: Path) -> AsyncIterator[Parts]:
    """Runs PostgreSQL (without fsync), NATS and Valkey with their data in `data_dir`."""
    run = parts.private_directory(parts.socket_directory(data_dir / "run"), mode=0o711)
    passwords = {service: secrets.token_hex(16) for service in parts.SERVICES}
    admin_password, nats_token, nats_port = secrets.token_hex(16), secrets.token_hex(16), free_port()
    admin_url = parts.postgres_url(run / "postgres", "postgres", admin_password, "postgres")
    servers = [
        parts.postgres(
            data_dir / "postgres",
            run / "postgres",
            admin_password,
            prime=lambda: parts.provision(admin_url, passwords),
            durable=False,
        ),
        parts.nats(data_dir / "nats", data_dir / "run" / "nats.json", nats_port, nats_token),
        parts.valkey(run / "valkey.sock"),
    ]
    async with Supervisor(servers, data_dir) as supervisor:
        yield Parts(
            supervisor=supervisor,
            admin_url=admin_url,
            redis_url=f"unix://{run}/valkey.sock",
            nats_url=f"nats://{nats_token}@127.0.0.1:{nats_port}",
            passwords=passwords,
        )


@dataclass(frozen=True)
class Mesh:
    """A whole mesh that serves; `supervisor.kill("store")` is how to break it."""

    stack: Stack
    supervisor: Supervisor

    @property
    def gateway_url(self) -> str:
        return self.stack.gateway_url

    def address(self, service: str) -> str:
        """Returns the gRPC address of a service, past the gateway."""
        return f"127.0.0.1:{self.stack.port_of(service)}"


def free_gateway_port() -> int:
    """Returns a port that is free together with those that a mesh takes after it."""
    while True:
        # Below the ports that the system gives to connections, which could take one of them meanwhile.
        base = random.randrange(12_000, 32_000, 20)
        if all(is_free("127.0.0.1", base + distance) for distance in PORTS.values()):
            return base


@asynccontextmanager
async def running_mesh(
    data_dir: Path, *, workers: int = 1, limits: bool = True, settings: Mapping[str, str] | None = None
) -> AsyncIterator[Mesh]:
    """Runs everything that `up` runs, with its data in `data_dir`. `settings` are MESHBOARD_ variables."""
    stack = Stack(
        data_dir=data_dir,
        port=free_gateway_port(),
        workers=workers,
        limits=limits,
        environment=settings or {},
    )
    stack.open_data_dir()
    stack.write_secrets()
    stack.write_gateway()
    async with Supervisor(stack.parts(), data_dir, about=about(stack)) as supervisor:
        yield Mesh(stack, supervisor)
