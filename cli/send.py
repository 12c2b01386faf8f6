"""The command `send`: files of events and access logs into a source, through the gateway."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from cli.gateway import checked_url, gateway_url, secret_from
from cli.operate import data_option, output_option

KEY_VARIABLE = "MESHBOARD_WRITE_KEY"
FORMATS = ("ndjson", "csv", "parquet", "combined", "json-log")
# Exit codes beside 0.
STOPPED, REFUSED = 1, 3
_SHOWN_REFUSALS = 10


@click.command(
    epilog="Example: ./dev send --key-file shop.key --set event=order --map distinct_id=customer orders.csv"
)
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option(
    "--format", "form", type=click.Choice(FORMATS), help="Form of the files.  [default: told by each]"
)
@click.option("--url", help="Address of the gateway.  [default: that of the mesh on --data]")
@data_option
@click.option(
    "--key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help=f"File with the write key of the source.  [default: the environment, {KEY_VARIABLE}]",
)
@click.option("--map", "named", multiple=True, metavar="FIELD=COLUMN", help="Where a field of the event is.")
@click.option("--set", "fixed", multiple=True, metavar="FIELD=VALUE", help="What a field of every event is.")
@click.option(
    "--text", "texts", multiple=True, metavar="COLUMN", help="Keep what looks like a number as text."
)
@click.option("--delimiter", default="", help="Between the cells of CSV.  [default: a comma; a tab in .tsv]")
@click.option("--name", default="", help="Another name sends files anew that were sent under the first.")
@click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder that remembers what was sent.  [default: one for each gateway and key in ~/.local/state/meshboard]",
)
@click.option(
    "--patience",
    type=click.FloatRange(min=0),
    default=300,
    show_default=True,
    help="Seconds to wait for the gateway.",
)
@output_option
def send(
    *,
    files: tuple[Path, ...],
    form: str | None,
    url: str | None,
    data: Path,
    key_file: Path | None,
    named: tuple[str, ...],
    fixed: tuple[str, ...],
    texts: tuple[str, ...],
    delimiter: str,
    name: str,
    state: Path | None,
    patience: float,
    output: str,
) -> None:
    """Send the events in FILES, each once: a second run goes on where the first one ended.

    Files are NDJSON, CSV with a header, Parquet, or access logs in the combined format or JSON; gzipped or not. A
    column, or a name in JSON, that is a field of the event (event, distinct_id, time, url, referrer, user_agent,
    insert_id, previous_id, ip) becomes this field; all others become properties.

    Exit code 0: all is sent. 1: it stopped, run it again. 3: all is sent, but some records were refused.
    """
    records = importlib.import_module("cli.records")
    write_key = secret_from(key_file, KEY_VARIABLE, "write key", "--key-file")
    url = checked_url(url or gateway_url(data), "write key")
    columns = records.Columns(
        _pairs(named, "--map", records.FIELD_NAMES),
        _pairs(fixed, "--set", records.FIELD_NAMES),
        frozenset(texts),
    )
    folder = state or _state_folder(url, write_key)

    def opener(path: Path) -> Callable[[], Any]:
        return lambda: records.Records(path, form or "", columns, delimiter=delimiter)

    sending = _Sending(url, write_key, folder, name, patience)
    report = asyncio.run(sending.run({path: opener(path) for path in files}))
    if output == "json":
        click.echo(json.dumps(report, indent=2))
    if any("stopped" in file for file in report):
        raise SystemExit(STOPPED)
    if any(file["refused"] for file in report):
        raise SystemExit(REFUSED)


@dataclass(frozen=True, slots=True)
class _Sending:
    """Where files are sent to, and the folder that remembers it."""

    url: str
    write_key: str = field(repr=False)
    folder: Path
    name: str
    patience: float

    async def run(self, files: dict[Path, Callable[[], Any]]) -> list[dict[str, Any]]:
        """Sends the files one after the other; ends at a signal, and at the first that cannot be sent."""
        # Found at the call: other commands need not wait for what they import.
        aiohttp = importlib.import_module("aiohttp")
        delivery = importlib.import_module("cli.delivery")
        records = importlib.import_module("cli.records")
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        report: list[dict[str, Any]] = []
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as http:
            gateway = delivery.Gateway(
                http, self.url, self.write_key, patience=self.patience, waiting=_Waiting()
            )
            for path, opener in files.items():
                outcome, stopped, began = delivery.Outcome(), "", time.monotonic()
                try:
                    with _Bar(path, outcome) as bar:
                        await delivery.send_file(
                            opener, gateway, self.folder, outcome, name=self.name, progress=bar.move
                        )
                except asyncio.CancelledError:
                    task.uncancel()
                    stopped = "interrupted"
                except (delivery.SendStopped, records.FileRefused) as error:
                    stopped = str(error)
                report.append(_report(path, outcome, stopped))
                _tell(path, outcome, stopped, time.monotonic() - began)
                if stopped:
                    break
        return report


class _Bar:
    """How far a file is, on a terminal only."""

    def __init__(self, path: Path, outcome: Any) -> None:
        self._bar: Any = click.progressbar(
            length=path.stat().st_size,
            label=path.name,
            file=sys.stderr,
            hidden=not sys.stderr.isatty(),
            item_show_func=lambda _: f"{outcome.accepted:,} sent",
        )

    def __enter__(self) -> _Bar:
        self._bar.__enter__()
        return self

    def move(self, position: int) -> None:
        """Shows how many bytes of the file are done."""
        self._bar.update(max(0, position - self._bar.pos), position)

    def __exit__(self, *_: object) -> None:
        self._bar.__exit__(None, None, None)


class _Waiting:
    """Says why nothing moves, once for each reason."""

    def __init__(self) -> None:
        self._said = ""

    def __call__(self, why: str) -> None:
        if why != self._said:
            self._said = why
            _say(f"Waiting for the gateway: {why}")


def _report(path: Path, outcome: Any, stopped: str) -> dict[str, Any]:
    return {
        "file": str(path),
        "accepted": outcome.accepted,
        "refused": outcome.refused,
        "sent_earlier": outcome.earlier,
        "refusals": [{"line": line, "why": why} for line, why in outcome.refusals],
        **({"stopped": stopped} if stopped else {}),
    }


def _tell(path: Path, outcome: Any, stopped: str, seconds: float) -> None:
    earlier = f", {outcome.earlier:,} sent earlier" if outcome.earlier else ""
    counts = f"{outcome.accepted:,} accepted, {outcome.refused:,} refused{earlier}, in {seconds:.1f} s"
    _say(f"{'✗' if stopped else '✓'} {path.name}: {counts}")
    for line, why in outcome.refusals[:_SHOWN_REFUSALS]:
        _say(f"  line {line}: {why}")
    if outcome.refused > _SHOWN_REFUSALS:
        _say(f"  and {outcome.refused - _SHOWN_REFUSALS:,} more; -o json has the first 1,000")
    if stopped:
        _say(f"Stopped: {stopped.rstrip('.')}.")
        if outcome.accepted or outcome.earlier:
            _say("What is sent is remembered: the same command goes on there.")


def _state_folder(url: str, write_key: str) -> Path:
    base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    # The key is random: its digest tells nothing of it.
    return base / "meshboard" / "send" / hashlib.sha256(f"{url} {write_key}".encode()).hexdigest()[:16]


def _pairs(texts: tuple[str, ...], option: str, known: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if name not in known or not equals or not value:
            raise click.BadParameter(
                f"{text!r} is not of the form FIELD=…, with one of {', '.join(known)}.", param_hint=option
            )
        pairs[name] = value
    return pairs


def _say(line: str) -> None:
    click.echo(line, err=True)
