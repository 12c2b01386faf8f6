"""The event store as its own process, as in the mesh, and clients of it."""

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from services.analytics_svc.event_store import EventStore
from services.analytics_svc.tables import create_tables
from tests.parts import free_port


class StoreProcess:
    """`python -m services.analytics_svc --role store` over a directory of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"http+unix://{folder}/store.sock"
        self.port = free_port()
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Starts the process and waits until it answers."""
        placeholders = ("REDIS_URL", "NATS_URL", "LISTEN", "KEYS_DIR", "MASTER_KEY_FILE")
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.analytics_svc",
            "--role",
            "store",
            env={
                **os.environ,
                **{f"MESHBOARD_{name}": "unused" for name in placeholders},
                "MESHBOARD_EVENT_STORE_URL": self.url,
                "MESHBOARD_STORE_DIR": str(self.folder / "data"),
                "MESHBOARD_PRIVATE_LISTEN": f"127.0.0.1:{self.port}",
            },
        )
        store = EventStore(self.url)
        async with asyncio.timeout(30):
            while not await store.ready():
                assert self._process.returncode is None, "the store ended by itself"
                await asyncio.sleep(0.05)
        await store.close()

    async def kill(self) -> None:
        """Ends the process at once, as kill -9 does."""
        assert self._process is not None
        self._process.kill()
        await self._process.wait()

    async def stop(self) -> int:
        """Ends the process as `down` does, and gives its exit code."""
        assert self._process is not None
        if self._process.returncode is None:
            self._process.terminate()
        async with asyncio.timeout(10):
            return await self._process.wait()


@asynccontextmanager
async def running_store() -> AsyncIterator[StoreProcess]:
    """A store of its own for a test that does harm to it."""
    # Paths of unix sockets are short: pytest's own folders are not.
    with tempfile.TemporaryDirectory(prefix="mbs") as folder:
        process = StoreProcess(Path(folder))
        await process.start()
        try:
            yield process
        finally:
            await process.stop()


@pytest.fixture(scope="session")
async def store_process() -> AsyncIterator[StoreProcess]:
    async with running_store() as process:
        yield process


@pytest.fixture(scope="session")
async def store(store_process: StoreProcess) -> AsyncIterator[EventStore]:
    """A client of a store that all tests share, with its tables: each test uses a workspace of its own."""
    client = EventStore(store_process.url)
    await create_tables(client)
    yield client
    await client.close()
