"""Commands for whoever operates a mesh: its audit log, accounts, keys and search.

Most of them run in a process with the settings of auth_svc, which reads and writes its database. What is secret goes to
it by files and environment.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from uuid import UUID

import click

from cli import parts
from cli.envoy_config import REPOSITORY
from cli.stack import DataFolderRefused, Stack, read_state, settings_of, stack_of

data_option = click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path, resolve_path=True),
    default=REPOSITORY / ".data",
    show_default=".data in the repository",
    envvar="MESHBOARD_DATA",
    help="Folder of the data, logs and secrets.",
)
output_option = click.option(
    "-o", "--output", type=click.Choice(["text", "json"]), default="text", help="Form of the answer."
)


def operate(data: Path, *arguments: str) -> None:
    """Runs services.auth_svc.operator with the settings of this mesh, and ends with its exit code."""
    raise SystemExit(run_beside(data, "auth_svc", "services.auth_svc.operator", *arguments).returncode)


def run_beside(
    data: Path, service: str, module: str, *arguments: str, capture: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs a module in a process with the settings of one of the mesh's services, and gives its end."""
    state = read_state(data)
    stack = stack_of(data, state) if state else Stack(data_dir=data, environment=settings_of(os.environ))
    check_mesh(stack)
    if state is None and not stack.environment.get("MESHBOARD_POSTGRES_URL"):
        raise click.ClickException(
            f"Nothing runs on {data}, and this needs its PostgreSQL. Start it with: up --data {data}"
        )
    part = next(part for part in stack.parts() if part.name == service)
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=REPOSITORY,
        env={**parts.surroundings(), **part.env},
        check=False,
        stdout=subprocess.PIPE if capture else None,
        text=True,
    )


def check_mesh(stack: Stack) -> None:
    """Raises ClickException when the folder is not that of a mesh."""
    try:
        stack.check_data_dir()
    except DataFolderRefused as error:
        raise click.ClickException(str(error)) from None
    if not stack.master_key_file.exists():
        raise click.ClickException(f"{stack.data_dir} is not the data folder of a mesh. Name it with --data.")


# --- the audit log ----------------------------------------------------------------------------------------


@click.group()
def audit() -> None:
    """Verify or export the audit log."""


@audit.command(epilog="Example: ./dev audit verify -o json | jq .good")
@data_option
@output_option
def verify(data: Path, output: str) -> None:
    """Find what was changed, removed or inserted in the audit log.

    Exit code 0: all is well. 1: the log is damaged. 2: it is well as far as can be told, but not whether its end was
    cut off, because NATS does not answer or has no head of the chain. 3: PostgreSQL does not answer.
    """
    operate(data, "audit", "verify", "-o", output)


@audit.command(epilog="Example: ./dev audit export --since 2026-01-01 > audit.ndjson")
@data_option
@click.option("--since", default="", metavar="TIME", help="Not before this time (ISO 8601; UTC by default).")
@click.option("--until", default="", metavar="TIME", help="Before this time.")
@click.option("--workspace", type=click.UUID, help="Of this workspace only.")
def export(data: Path, since: str, until: str, workspace: UUID | None) -> None:
    """Write the sealed entries as JSON, one a line, in the order of the chain."""
    chosen = {"--since": since, "--until": until, "--workspace": workspace}
    operate(data, "audit", "export", *(f"{name}={value}" for name, value in chosen.items() if value))


# --- accounts ---------------------------------------------------------------------------------------------


@click.group()
def accounts() -> None:
    """Disable or enable an account."""


@accounts.command(epilog="Example: ./dev accounts disable ada@example.org")
@click.argument("email")
@data_option
@output_option
def disable(email: str, data: Path, output: str) -> None:
    """End all sessions of the account with the address EMAIL, and let it begin no other."""
    operate(data, "accounts", "disable", "-o", output, "--", email)


@accounts.command(epilog="Example: ./dev accounts enable ada@example.org")
@click.argument("email")
@data_option
@output_option
def enable(email: str, data: Path, output: str) -> None:
    """Let the account with the address EMAIL sign in again."""
    operate(data, "accounts", "enable", "-o", output, "--", email)


# --- events -----------------------------------------------------------------------------------------------


@click.group()
def events() -> None:
    """Look at what could not be read in the event log."""


@events.group()
def unreadable() -> None:
    """List, show or discard messages of the event log that could not be read.

    Which source such a message is of is not known, so no page and no call shows it.
    """


def unread(data: Path, *arguments: str) -> None:
    """Runs services.analytics_svc.unreadable_messages, and ends with its exit code."""
    module = "services.analytics_svc.unreadable_messages"
    raise SystemExit(run_beside(data, "analytics_svc", module, *arguments).returncode)


@unreadable.command("list", epilog="Example: ./dev events unreadable list -o json | jq .count")
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True, help="How many.")
@data_option
@output_option
def list_unreadable(limit: int, data: Path, output: str) -> None:
    """Show when each came, its size and why it could not be read, the newest first."""
    unread(data, "list", f"--limit={limit}", "-o", output)


@unreadable.command("show", epilog="Example: ./dev events unreadable show 01a221ac-d70f-… > message.bin")
@click.argument("failed_event_id", type=click.UUID)
@data_option
@output_option
def show_unreadable(failed_event_id: UUID, data: Path, output: str) -> None:
    """Write the message, byte for byte; with `-o json` in base64. Exit code 1: there is none."""
    unread(data, "show", "-o", output, str(failed_event_id))


@unreadable.command("discard", epilog="Example: ./dev events unreadable discard 01a221ac-d70f-…")
@click.argument("failed_event_ids", type=click.UUID, nargs=-1, required=True)
@data_option
@output_option
def discard_unreadable(failed_event_ids: tuple[UUID, ...], data: Path, output: str) -> None:
    """Give messages up for good. Exit code 1: none of them is there."""
    unread(data, "discard", "-o", output, *map(str, failed_event_ids))


# --- keys -------------------------------------------------------------------------------------------------


@click.group()
def keys() -> None:
    """Change the keys that sign access tokens, and the master key."""


@keys.command("list", epilog="Example: ./dev keys list -o json | jq -r '.keys[].key_id'")
@data_option
@output_option
def list_keys(data: Path, output: str) -> None:
    """Show the signing keys: which one signs, which is next, which verify what they have signed."""
    operate(data, "keys", "list", "-o", output)


@keys.command(epilog="Example: ./dev keys rotate")
@data_option
@output_option
def rotate(data: Path, output: str) -> None:
    """Make the next signing key. It signs in an hour, when all who verify know it."""
    operate(data, "keys", "rotate", "-o", output)


@keys.command(epilog="Example: ./dev keys retire 01997e0c-5f0e-7b6a-9f60-4d2c8f6b1a11")
@click.argument("key_id")
@data_option
@output_option
def retire(key_id: str, data: Path, output: str) -> None:
    """Take the signing key KEY_ID away at once, because it has leaked. Its tokens are refused.

    People get new ones by refreshing. Refused for the only key: `keys rotate` makes the next one, which then signs at
    once. The gateway learns of a new key within a minute: make it a minute before, if that can wait.
    """
    operate(data, "keys", "retire", "-o", output, "--", key_id)


@keys.command(epilog="Example: ./dev keys new-master && ./dev down && ./dev up --detach && ./dev keys reseal")
@data_option
def new_master(data: Path) -> None:
    """Write a new first line into the master key file. Services take it at their next start.

    The older lines stay: they open what was encrypted before, until `keys reseal` has encrypted it anew, and they
    verify the older part of the audit log for ever.
    """
    stack = Stack(data_dir=data, environment=settings_of(os.environ))
    check_mesh(stack)
    file = stack.master_key_file
    made = base64.b64encode(secrets.token_bytes(32)).decode()
    # Written beside it and renamed: a service that starts meanwhile reads the old file or the new one.
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        parts.write_private(beside, f"{made}\n{file.read_text()}")
        with beside.open() as written:
            os.fsync(written.fileno())
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
    click.echo(f"{file} has a new first line. Restart the mesh, then: keys reseal", err=True)


@keys.command(epilog="Example: ./dev keys reseal -o json")
@data_option
@output_option
def reseal(data: Path, output: str) -> None:
    """Encrypt anew what an older master key has encrypted. May be interrupted and repeated."""
    operate(data, "keys", "reseal", "-o", output)


# --- the search -------------------------------------------------------------------------------------------

INDEXED = {"dashboards": "dashboard_svc", "users": "user_svc"}


@click.command(epilog="Example: ./dev reindex dashboards -o json | jq '.indexes[0].documents'")
@click.argument("names", nargs=-1, type=click.Choice(list(INDEXED)))
@data_option
@output_option
def reindex(names: tuple[str, ...], data: Path, output: str) -> None:
    """Build what is searched anew, all of it or NAMES, while the mesh goes on. Searches use the old one until it is
    done.

    Exit code 1: somebody else is doing it. 3: PostgreSQL or Elasticsearch does not answer.
    """
    outcomes = []
    for name in names or INDEXED:
        module = f"services.{INDEXED[name]}.reindex"
        done = run_beside(data, INDEXED[name], module, "-o", output, capture=output == "json")
        if done.returncode:
            raise SystemExit(done.returncode)
        if output == "json":
            outcomes.append({**json.loads(done.stdout), "index": name})
    if output == "json":
        click.echo(json.dumps({"indexes": outcomes}, indent=2))
