"""The `meshboard` command. Data goes to stdout, talk to stderr."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import click

from cli import dashboards, operate, parts
from cli import mails as landed
from cli import send as sending
from cli.envoy_config import DEFAULT_PORT, REPOSITORY
from cli.operate import data_option
from cli.parts import Part, PartMissing
from cli.processes import is_running, memory_bytes
from cli.stack import (
    DATA_VERSION,
    PORTS,
    DataFolderRefused,
    Stack,
    about,
    read_state,
    settings_of,
    stack_of,
)
from cli.supervisor import AlreadyRuns, PortInUse, StartFailed, Supervisor, is_free, sweep

DOWN_SECONDS = 15.0

output_option = click.option(
    "-o", "--output", type=click.Choice(["text", "json"]), default="text", help="Form of the answer."
)


def say(line: str) -> None:
    click.echo(line, err=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """Meshboard: product analytics and live dashboards on a gRPC service mesh."""


# --- up and down ------------------------------------------------------------------------------------------


@main.command(epilog="Example: ./dev up --demo --detach --port 9080 --data /srv/meshboard")
@click.option("--demo", is_flag=True, help="Send a real access log and make a dashboard of it.")
@click.option("--detach", is_flag=True, help="Return once all is ready, and leave it running.")
@click.option(
    "--port",
    type=click.IntRange(1, 65535 - max(PORTS.values())),
    default=DEFAULT_PORT,
    show_default=True,
    help=f"Port of the gateway; the {max(PORTS.values())} ports after it are used as well.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address the gateway listens on.")
@data_option
@click.option(
    "--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="Processes a service."
)
@click.option("--no-limits", is_flag=True, help="Lift the rate limits of the gateway, to measure.")
def up(*, demo: bool, detach: bool, port: int, host: str, data: Path, workers: int, no_limits: bool) -> None:
    """Start the mesh and wait until all of it is ready. Ctrl-C stops it; the data stays."""
    stack = Stack(
        data_dir=data,
        host=host,
        port=port,
        workers=workers,
        limits=not no_limits,
        environment=settings_of(os.environ),
    )
    try:
        stack.open_data_dir()
        if detach:
            start_detached(stack)
            if demo:
                asyncio.run(run_demo(stack))
        else:
            raise_file_limit()
            asyncio.run(run(stack, demo=demo))
    except PortInUse as error:
        free = free_port(port)
        raise click.ClickException(
            f"{error} Stop what uses it, or choose other ports: --port {free}"
        ) from None
    except AlreadyRuns as error:
        raise click.ClickException(f"{error} Stop it with: down --data {data}") from None
    except (PartMissing, DataFolderRefused, StartFailed) as error:
        raise click.ClickException(str(error)) from None


async def run(stack: Stack, *, demo: bool) -> None:
    """Runs the mesh until a signal asks it to stop."""
    task = asyncio.current_task()
    stopping = False

    def stop() -> None:
        nonlocal stopping
        if not stopping and task is not None:  # a second signal must not interrupt the stopping
            stopping = True
            say("Stopping …")
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    began = time.monotonic()
    try:
        stack.write_secrets()
        stack.write_gateway()
        await stack.provision_replaced()
        async with Supervisor(stack.parts(), stack.data_dir, say=say, about=about(stack)):
            hint = " Ctrl-C stops it." if sys.stderr.isatty() else ""
            say(f"All ready in {time.monotonic() - began:.1f} s.{hint}")
            click.echo(stack.gateway_url)
            if demo:
                await run_demo(stack)
            await asyncio.Event().wait()
    except asyncio.CancelledError:
        say(f"Stopped. The data stays in {stack.data_dir}")


def start_detached(stack: Stack) -> None:
    """Starts the same command in the background and relays what it says until all is ready."""
    log = parts.private_directory(stack.data_dir / "logs") / "supervisor.log"
    arguments = ["up", "--port", str(stack.port), "--host", stack.host, "--data", str(stack.data_dir)]
    arguments += ["--workers", str(stack.workers), *([] if stack.limits else ["--no-limits"])]
    with log.open("ab") as output:
        offset = output.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", *arguments],
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=output,
            start_new_session=True,
        )
    try:
        with log.open("r", errors="replace") as told:
            told.seek(offset)
            ready = False
            while not ready and process.poll() is None:
                time.sleep(0.05)
                state = read_state(stack.data_dir)
                ready = bool(state and state["ready"] and state["supervisor"]["pid"] == process.pid)
                click.echo(told.read(), nl=False, err=True)
            click.echo(told.read(), nl=False, err=True)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    if process.returncode is not None:
        raise SystemExit(process.returncode or 1)
    process.returncode = 0  # it goes on without us
    say(f"Stop it with: down --data {stack.data_dir}")
    click.echo(stack.gateway_url)


async def run_demo(stack: Stack) -> None:
    # Found at the call: only `--demo` needs what it imports.
    demo = importlib.import_module("cli.demo")
    try:
        await demo.run(stack.gateway_url, stack.data_dir)
    except demo.DemoFailedError as error:
        raise click.ClickException(f"The demo failed: {error}") from None


@main.command(epilog="Example: ./dev down --data /srv/meshboard")
@data_option
def down(data: Path) -> None:
    """Stop the mesh that runs on this data folder. The data stays."""
    state = read_state(data)
    if state is None:
        say(f"Nothing runs on {data}.")
        return
    supervisor = state["supervisor"]
    began = time.monotonic()
    if is_running(supervisor["pid"], supervisor["start_time"]):
        os.kill(supervisor["pid"], signal.SIGTERM)
        while is_running(supervisor["pid"], supervisor["start_time"]):
            if time.monotonic() - began > DOWN_SECONDS:
                os.kill(supervisor["pid"], signal.SIGKILL)
                break
            time.sleep(0.05)
    sweep(data / "run" / "state.json")
    say(f"Stopped in {time.monotonic() - began:.1f} s. The data stays in {data}")


@main.command(
    epilog='Example: curl -H "Authorization: Bearer $(./dev token)" http://127.0.0.1:8080/v1/users/me'
)
@data_option
def token(data: Path) -> None:
    """Sign the demo account in and print an access token, valid for ten minutes."""
    state = read_state(data)
    if state is None:
        raise click.ClickException(f"Nothing runs on {data}. Start it with: up --demo --data {data}")
    demo = importlib.import_module("cli.demo")
    try:
        click.echo(asyncio.run(demo.sign_in(state["gateway_url"], data)))
    except demo.DemoFailedError as error:
        raise click.ClickException(str(error)) from None


main.add_command(operate.audit)
main.add_command(operate.accounts)
main.add_command(operate.events)
main.add_command(operate.keys)
main.add_command(operate.reindex)
main.add_command(sending.send)
main.add_command(dashboards.export)
main.add_command(dashboards.apply)


# --- looking at it ----------------------------------------------------------------------------------------


@main.command(epilog="Example: ./dev status -o json | jq '.parts[].memory_bytes'")
@data_option
@output_option
def status(data: Path, output: str) -> None:
    """Show each part and whether it is ready. Exit code 1 when one is not, or nothing runs."""
    report = status_of(data)
    if output == "json":
        click.echo(json.dumps(report, indent=2))
    else:
        click.echo(f"{report['gateway_url'] or 'not running'}   {data}")
        for part in report["parts"]:
            mark = "✓" if part["ready"] else "✗"
            mebibytes = part["memory_bytes"] / 2**20
            restarts = f"   restarted {part['restarts']} times" if part["restarts"] else ""
            addresses = " ".join(part["addresses"])
            process = f"pid {part['pid'] or '-':>7} {mebibytes:6.0f} MiB"
            click.echo(f"{mark} {part['name']:14} {process}  {addresses}{restarts}")
    if not report["ready"]:
        raise SystemExit(1)


def status_of(data: Path) -> dict[str, Any]:
    """Returns what `status -o json` prints."""
    state = read_state(data)
    if state is None or not is_running(state["supervisor"]["pid"], state["supervisor"]["start_time"]):
        return {"ready": False, "gateway_url": None, "data_dir": str(data), "version": None, "parts": []}
    running = [part for part in stack_of(data, state).parts() if part.name in state["parts"]]
    ready = asyncio.run(readiness(running))
    shown = []
    for part, part_ready in zip(running, ready, strict=True):
        known = state["parts"][part.name]
        shown.append(
            {
                "name": part.name,
                "ready": part_ready,
                "pid": known["pid"],
                "restarts": known["restarts"],
                "ready_seconds": known["ready_seconds"],
                "memory_bytes": memory_bytes(known["pid"]) if known["pid"] else 0,
                "addresses": [f"{host}:{port}" for host, port in part.listens],
                "log": str(data / "logs" / f"{part.name}.log"),
            }
        )
    return {
        "ready": bool(shown) and all(ready),
        "gateway_url": state["gateway_url"],
        "data_dir": str(data),
        "version": state["version"],
        "parts": shown,
    }


async def readiness(mesh: list[Part]) -> list[bool]:
    return list(await asyncio.gather(*(part.ready() for part in mesh)))


@main.command(epilog="Example: ./dev logs analytics_svc -f")
@click.argument("service")
@data_option
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written from now on.")
@click.option(
    "-n", "--lines", type=click.IntRange(min=0), default=100, show_default=True, help="Lines to show."
)
def logs(service: str, data: Path, follow: bool, lines: int) -> None:
    """Show the last lines that SERVICE wrote: a part of the mesh as `status` names it."""
    known = sorted(path.stem for path in (data / "logs").glob("*.log"))
    names = {name.removesuffix("_svc"): name for name in known} | {name: name for name in known}
    if service not in names:
        raise click.ClickException(f"No log of {service} in {data}. There are: {', '.join(known) or 'none'}")
    path = data / "logs" / f"{names[service]}.log"
    file = path.open(errors="replace")
    click.echo("".join(deque(file, maxlen=lines)), nl=False)
    try:
        while follow:
            if new := file.read():
                click.echo(new, nl=False)
                continue
            time.sleep(0.2)
            if (
                path.exists() and path.stat().st_ino != os.fstat(file.fileno()).st_ino
            ):  # moved away at a restart
                file.close()
                file = path.open(errors="replace")
    except KeyboardInterrupt:
        say("")
    finally:
        file.close()


@main.group(
    invoke_without_command=True,
    epilog="Example: ./dev mails show 1   # the newest; `./dev mails -o json` lists them for programs",
)
@data_option
@output_option
@click.pass_context
def mails(context: click.Context, *, data: Path, output: str) -> None:
    """List the mails of a mesh that has no mail server, the newest first."""
    if context.invoked_subcommand:
        return
    found = landed.read(Stack(data_dir=data, environment={}).mails_dir)
    if output == "json":
        click.echo(json.dumps([mail.summary() for mail in found], indent=2))
        return
    if not found:
        say(f"No mails in {data}.")
    for number, mail in enumerate(found, 1):
        click.echo(f"{number:>3}  {mail.time:%Y-%m-%d %H:%M:%S}  {mail.to:32}  {mail.subject}")


@mails.command(epilog="Example: ./dev mails show 1 | grep -o 'http[^ ]*'")
@click.argument("number", type=click.IntRange(min=1))
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path, resolve_path=True),
    show_default="that of `mails`",
    help="Folder of the data, logs and secrets.",
)
@output_option
@click.pass_context
def show(context: click.Context, *, number: int, data: Path | None, output: str) -> None:
    """Print the mail that `mails` lists as NUMBER: 1 is the newest."""
    assert context.parent is not None
    folder = data or context.parent.params["data"]
    found = landed.read(Stack(data_dir=folder, environment={}).mails_dir)
    if number > len(found):
        raise click.ClickException(f"There are {len(found)} mails in {folder}. List them with: mails")
    mail = found[number - 1]
    if output == "json":
        click.echo(json.dumps({**mail.summary(), "text": mail.text}, indent=2))
    else:
        click.echo(f"To: {mail.to}\nSubject: {mail.subject}\n\n{mail.text}", nl=False)


@main.command(epilog="Example: ./dev doctor --port 9080")
@click.option("--port", type=int, default=DEFAULT_PORT, show_default=True, help="Port of the gateway.")
@data_option
def doctor(port: int, data: Path) -> None:
    """Check this machine: wheels, ports, folders, limits. Exit code 1 when something is missing."""
    healthy = True
    stack = Stack(data_dir=data, port=port, environment=settings_of(os.environ))

    def check(good: bool, found: str, remedy: str = "") -> None:
        nonlocal healthy
        healthy = healthy and good
        click.echo(f"✓ {found}" if good else f"✗ {found}. {remedy}")

    version = sys.version_info[:2]
    check(
        (3, 11) <= version <= (3, 13), f"Python {platform.python_version()}", "Use Python 3.11, 3.12 or 3.13."
    )
    for name, find in parts.BINARIES.items():
        try:
            shown = subprocess.run(
                [find(), "--version"], capture_output=True, text=True, check=True, timeout=20
            )
            check(True, f"{name}: {shown.stdout.strip().splitlines()[0]}")
        except (PartMissing, OSError, subprocess.SubprocessError) as error:
            check(False, f"{name} does not start", str(error))
    state = read_state(data)
    if state is not None:
        check(True, f"A mesh runs on {data}: {state['gateway_url']}")
    else:
        used = [stack.port_of(name) for name in PORTS if not is_free("127.0.0.1", stack.port_of(name))]
        ports = f"ports {port} to {port + max(PORTS.values())}"
        check(not used, f"{ports}: {f'{used} in use' if used else 'free'}", f"Use --port {free_port(port)}")
    try:
        stack.check_data_dir()
        check(True, f"data folder {data}, format {DATA_VERSION}")
        existing = next(folder for folder in (data, *data.parents) if folder.exists())
        gibibytes = shutil.disk_usage(existing).free / 2**30
        check(gibibytes >= 1, f"{gibibytes:.1f} GiB free for data", "Free 1 GiB, or choose another folder.")
    except (DataFolderRefused, OSError) as error:
        check(False, f"data folder {data}", str(error))
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    check(
        files == resource.RLIM_INFINITY or files >= 4096, f"{files} open files", "Raise it: ulimit -Hn 65536"
    )
    if not healthy:
        raise SystemExit(1)


@main.command(epilog="Example: ./dev bench --quick reads ingest")
@click.argument(
    "names",
    nargs=-1,
    type=click.Choice(
        ["reads", "auth", "access", "ingest", "visible", "queries", "dashboards", "live", "startup", "soak"]
    ),
)
@click.option(
    "--quick", is_flag=True, help="One short round of each: to see that it works, not how fast it is."
)
@click.option(
    "--data",
    type=click.Path(file_okay=False, exists=True, path_type=Path, resolve_path=True),
    help="Measure the mesh that runs on this folder (started with --no-limits) instead of one of its own.",
)
@output_option
def bench(*, names: tuple[str, ...], quick: bool, data: Path | None, output: str) -> None:
    """Measure a mesh: rates, delays, start-up and memory; all of them, or those in NAMES.

    Everything runs on this machine, the load too, in about half an hour; soak, which is ten minutes of load, only
    when it is named. The figures are also written to bench/results.
    """
    suite = importlib.import_module("bench.suite")
    figures = importlib.import_module("bench.figures")
    try:
        measured, file = suite.run(names or suite.NAMES, quick=quick, data_dir=data, say=say)
    except (suite.mesh.MeshFailedError, suite.load.LoadFailedError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(file.read_text() if output == "json" else figures.table(measured))
    say(f"Written to {file}")


def free_port(start: int) -> int:
    """Returns a gateway port above `start` whose ports are all free."""
    for base in range(start + 100, 65535 - max(PORTS.values()), 100):
        if all(is_free("127.0.0.1", base + distance) for distance in PORTS.values()):
            return base
    raise click.ClickException("No range of free ports.")


def raise_file_limit() -> None:
    """Gives the parts as many open files as the system allows: each watcher of a dashboard is one or two."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    main()
