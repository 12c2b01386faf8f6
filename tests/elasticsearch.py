"""Elasticsearch for the tests of the search: the server that its makers publish for tests, from Maven Central.

It needs Java 21 or later and, unless it was fetched before, Maven. A machine that lacks them fails the tests, for an
engine that nobody tries does not work.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import zipfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from cli.parts import Part, http_ok
from cli.supervisor import Supervisor
from tests.parts import free_port

VERSION = "9.2.0"
SHA256 = "bf44938a0490ba2a303d39c9cb64b38963dd08c812ce93e10816e878585bcb6b"
COORDINATES = f"org.elasticsearch.distribution.integ-test-zip:elasticsearch:{VERSION}:zip"
FOLDER = "org/elasticsearch/distribution/integ-test-zip/elasticsearch"
ARCHIVE = Path.home() / ".m2" / "repository" / FOLDER / VERSION / f"elasticsearch-{VERSION}.zip"
JAVA = 21
START_SECONDS = 300.0  # a quarter of a minute, where nobody else computes
# For what waits for it: it starts when the first test asks, and once.
ON_ELASTICSEARCH = [pytest.mark.xdist_group("elasticsearch"), pytest.mark.timeout(600)]


class ElasticsearchMissing(Exception):
    """The machine cannot run Elasticsearch. The message says what it lacks."""


@dataclass(frozen=True)
class Elastic:
    """A running Elasticsearch, and the supervisor that can stop it."""

    url: str
    supervisor: Supervisor


@asynccontextmanager
async def running_elasticsearch() -> AsyncIterator[Elastic]:
    """Runs one node without security on 127.0.0.1. It takes half a minute and 800 MB."""
    java, port, transport_port = java_home(), free_port(), free_port()
    # Not in a folder of pytest's, which is closed to the account that it runs as.
    folder = Path(tempfile.mkdtemp(prefix="meshboard-elasticsearch-"))
    try:
        await asyncio.to_thread(unpack, folder)
        home = folder / f"elasticsearch-{VERSION}"
        account = "nobody" if os.geteuid() == 0 else ""  # it refuses to run as root
        if account:
            give(folder, account)
        settings = {
            "discovery.type": "single-node",
            "xpack.security.enabled": "false",
            "http.host": "127.0.0.1",
            "http.port": str(port),
            "transport.host": "127.0.0.1",
            "transport.port": str(transport_port),
            # A test machine's disk may be fuller than it likes.
            "cluster.routing.allocation.disk.threshold_enabled": "false",
        }

        async def ready() -> bool:
            return await http_ok("127.0.0.1", port, "/_cluster/health?wait_for_status=yellow&timeout=1s")

        part = Part(
            name="elasticsearch",
            argv=(
                shutil.which("bash") or "/bin/bash",
                str(home / "bin" / "elasticsearch"),
                *(word for name, value in settings.items() for word in ("-E", f"{name}={value}")),
            ),
            ready=ready,
            env={
                "ES_JAVA_HOME": str(java),
                # Compiled once and quickly: it lives for minutes.
                "ES_JAVA_OPTS": "-Xms256m -Xmx256m -XX:TieredStopAtLevel=1",
                "CLI_JAVA_OPTS": "-Xmx32m -XX:TieredStopAtLevel=1",
                "HOME": str(folder),
            },
            listens=(("127.0.0.1", port),),
            stop_signal=signal.SIGTERM,
            cwd=home,
            account=account,
        )
        own = folder / "supervisor"
        async with Supervisor([part], own, ready_seconds=START_SECONDS) as supervisor:
            yield Elastic(f"http://127.0.0.1:{port}", supervisor)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def unpack(folder: Path) -> None:
    """Unpacks the server, which Maven fetches when nobody has."""
    if not ARCHIVE.exists():
        maven = shutil.which("mvn")
        if maven is None:
            raise ElasticsearchMissing(
                "The tests of the search need Elasticsearch from Maven Central. Install Maven: apt install maven"
            )
        fetch = [maven, "-q", "-B", "dependency:get", f"-Dartifact={COORDINATES}", "-Dtransitive=false"]
        done = subprocess.run(fetch, capture_output=True, text=True, check=False)
        if done.returncode or not ARCHIVE.exists():
            raise ElasticsearchMissing(f"Maven could not fetch {COORDINATES}: {done.stdout[-2000:]}")
    with ARCHIVE.open("rb") as archive:
        if hashlib.file_digest(archive, "sha256").hexdigest() != SHA256:
            raise ElasticsearchMissing(f"{ARCHIVE} is not what it should be. Remove it, and try again.")
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(folder)


def give(folder: Path, account: str) -> None:
    """Gives a folder and all in it to an account."""
    entry = pwd.getpwnam(account)
    for path in (folder, *folder.rglob("*")):
        os.chown(path, entry.pw_uid, entry.pw_gid, follow_symlinks=False)


def java_home() -> Path:
    """The newest Java on this machine that will do."""
    found = {home: version for home in java_homes() if (version := java_version(home)) >= JAVA}
    if not found:
        raise ElasticsearchMissing(
            f"The tests of the search need Java {JAVA} or later and found none. Install one, for example: "
            "apt install openjdk-25-jre-headless, or set JAVA_HOME."
        )
    return max(found, key=lambda home: found[home])


def java_homes() -> Iterator[Path]:
    """Where Java may be."""
    if home := os.environ.get("JAVA_HOME"):
        yield Path(home)
    if java := shutil.which("java"):
        yield Path(java).resolve().parents[1]
    for folder in ("/usr/lib/jvm", "/Library/Java/JavaVirtualMachines"):
        for found in Path(folder).glob("*"):
            yield from (found, found / "Contents" / "Home")


def java_version(home: Path) -> int:
    """The major version of a Java; 0 when there is none."""
    try:
        told = subprocess.run(
            [str(home / "bin" / "java"), "-version"], capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return 0
    found = re.search(r'version "(\d+)', told.stderr)
    return int(found[1]) if found else 0
