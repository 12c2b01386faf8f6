from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sqlalchemy import Column, Connection, Index

from services.chassis import db as chassis_db
from services.dashboard_svc.models import Base
from tests.conditions import eventually
from tests.parts import Parts, free_port


async def test_starts_without_its_peers_and_stops_cleanly(parts: Parts, keys: Path, tmp_path: Path) -> None:
    listen, private_listen = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    environment = {
        **os.environ,
        "MESHBOARD_POSTGRES_URL": await parts.fresh_database("dashboard"),
        "MESHBOARD_REDIS_URL": parts.redis_url,
        "MESHBOARD_NATS_URL": parts.nats_url,
        "MESHBOARD_LISTEN": listen,
        "MESHBOARD_PRIVATE_LISTEN": private_listen,
        "MESHBOARD_KEYS_DIR": str(keys),
        "MESHBOARD_MASTER_KEY_FILE": str(keys / "master.key"),
    }
    with (tmp_path / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.dashboard_svc", env=environment, stdout=log, stderr=log
        )
    try:
        async with aiohttp.ClientSession() as client:

            async def is_ready() -> bool:
                assert process.returncode is None, (tmp_path / "log").read_text()
                try:
                    async with client.get(f"http://{private_listen}/readyz") as response:
                        return response.status == 200
                except aiohttp.ClientError:
                    return False

            await eventually(is_ready, 30)
        async with grpc.aio.insecure_channel(listen) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            response = await stub.Check(
                health_pb2.HealthCheckRequest(service="meshboard.dashboard.v1.DashboardService")
            )
            assert response.status == health_pb2.HealthCheckResponse.SERVING
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            assert await process.wait() == 0, (tmp_path / "log").read_text()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert "Traceback" not in (tmp_path / "log").read_text()


def _is_of_columns(index: Index) -> bool:
    """Classes do not have indexes of expressions: Postgres spells these its own way."""
    return all(isinstance(expression, Column) for expression in index.expressions)


async def test_tables_are_as_the_classes_say(database_url: str) -> None:
    def differences(connection: Connection) -> list[object]:
        names = set(Base.metadata.tables)
        context = MigrationContext.configure(
            connection,
            opts={
                "compare_type": True,
                "include_name": lambda name, kind, _: kind != "table" or name in names,
                "include_object": lambda thing, name, kind, *_: kind != "index" or _is_of_columns(thing),
            },
        )
        return list(compare_metadata(context, Base.metadata))

    db = chassis_db.connect(database_url)
    async with chassis_db.engine(db).connect() as connection:
        assert await connection.run_sync(differences) == []
    await chassis_db.engine(db).dispose()
