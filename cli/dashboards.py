"""The commands `export` and `apply`: dashboards as files, through the gateway."""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote
from uuid import UUID

import click

from cli.gateway import checked_url, gateway_url, secret_from
from cli.operate import data_option, output_option

TOKEN_VARIABLE = "MESHBOARD_TOKEN"  # noqa: S105 - the name of a variable
API_KEY_PREFIX = "mba_"
# Exit codes beside 0.
REFUSED, CONFLICT = 1, 2
_SECONDS = 60
_LONGEST_VALUE = 120

Json = dict[str, Any]
T = TypeVar("T")


class CallRefused(Exception):
    """The gateway has refused a call."""

    def __init__(self, status: int, answer: Any) -> None:
        said = answer if isinstance(answer, dict) else {}
        details = [each for each in said.get("details", []) if "reason" in each]
        self.reason = str(details[0]["reason"]) if details else ""
        text = str(said.get("message") or f"the answer has the status {status}")
        super().__init__(f"{text} ({self.reason})" if self.reason else text)


def _calling(command: Callable[..., None]) -> Callable[..., None]:
    """The options of commands that call the gateway as somebody."""
    for option in (
        click.option(
            "--workspace", metavar="ID", help="Workspace to work in.  [default: the one of the token]"
        ),
        click.option(
            "--token-file",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help=f"File with an access token or an API key.  [default: the environment, {TOKEN_VARIABLE}]",
        ),
        data_option,
        click.option("--url", help="Address of the gateway.  [default: that of the mesh on --data]"),
    ):
        command = option(command)
    return command


@click.command(epilog="Example: ./dev export web-traffic -f dashboards/web-traffic.yaml")
@click.argument("dashboard")
@click.option(
    "-f", "--file", type=click.Path(dir_okay=False, path_type=Path), help="File to write.  [default: stdout]"
)
@_calling
def export(
    *,
    dashboard: str,
    file: Path | None,
    url: str | None,
    data: Path,
    token_file: Path | None,
    workspace: str | None,
) -> None:
    """Write DASHBOARD, an id or a name, as a YAML file that `apply` takes, here or elsewhere.

    The file calls sources by their titles, and has no ids of the dashboard and its widgets.
    """

    async def run(gateway: _Gateway) -> tuple[Json, dict[str, str]]:
        dashboard_id = await _dashboard_id(gateway, dashboard)
        exported = await gateway.call("GET", f"/v1/dashboards/{dashboard_id}:export")
        titles = {source["sourceId"]: source["title"] for source in await gateway.sources()}
        return exported, titles

    exported, titles = _run(run, url, data, token_file, workspace)
    text = importlib.import_module("cli.dashboard_files").write(exported["file"], titles)
    if file is None:
        click.echo(text, nl=False)
    else:
        file.write_text(text)
        click.echo(f"✓ {file}", err=True)
    if not exported.get("named"):
        click.echo(
            f"The dashboard has no name yet: to apply the file would make another one. Give it the name"
            f" {exported['file']['name']!r} first.",
            err=True,
        )


@click.command(epilog="Example: ./dev apply -f dashboards/ --dry-run")
@click.option(
    "-f",
    "--file",
    "path",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="File to apply, or folder: then all .yaml and .yml files in it.",
)
@click.option("--dry-run", is_flag=True, help="Change nothing; show what would be changed.")
@click.option(
    "--force", is_flag=True, help="Where it is in conflict with what was changed here, take the file."
)
@click.option("--source", "sources", multiple=True, metavar="NAME=ID", help="Which source a file calls so.")
@click.option("--reason", default="", help="Why, for the list of versions.")
@_calling
@output_option
def apply(
    *,
    path: Path,
    dry_run: bool,
    force: bool,
    sources: tuple[str, ...],
    reason: str,
    url: str | None,
    data: Path,
    token_file: Path | None,
    workspace: str | None,
    output: str,
) -> None:
    """Make dashboards what files say, and show what that changes.

    What was changed on a dashboard since its file was applied last stays, unless the file has changed it too: that is a
    conflict, and nothing is done, unless with --force.

    Exit code 0: all is as the files say. 1: a file was refused. 2: a file is in conflict.
    """
    given = _pairs(sources)
    options = {"dryRun": dry_run, "force": force, "reason": reason}

    async def run(gateway: _Gateway) -> list[Json]:
        known = await gateway.sources()
        return [await _apply(gateway, file, known, given, options) for file in _files(path)]

    reports = _run(run, url, data, token_file, workspace)
    for report in reports:
        _tell(report, dry_run=dry_run)
    if output == "json":
        click.echo(json.dumps(reports, indent=2))
    if any("error" in report for report in reports):
        raise SystemExit(REFUSED)
    if any(report["outcome"] == "REFUSED" for report in reports):
        raise SystemExit(CONFLICT)


class _Gateway:
    """JSON calls through the gateway as the holder of a token."""

    def __init__(self, http: Any, url: str, workspace: str | None) -> None:
        self._http = http
        self._url = url.rstrip("/")
        self._headers = {"X-Workspace-Id": workspace} if workspace else {}

    async def sign_in(self, secret: str) -> None:
        """Takes an access token, or an API key, which is exchanged for one."""
        if secret.startswith(API_KEY_PREFIX):
            answer = await self.call("POST", "/v1/auth:exchangeApiKey", {"apiKey": secret})
            secret = str(answer["accessToken"])
        self._headers["Authorization"] = f"Bearer {secret}"

    async def call(self, method: str, path: str, body: Json | None = None) -> Json:
        """The answer's JSON. Raises CallRefused."""
        request = self._http.request(method, self._url + path, json=body, headers=self._headers)
        async with request as response:
            answer = await response.json(content_type=None)
            if response.status >= 400 or not isinstance(answer, dict):
                raise CallRefused(response.status, answer)
            return answer

    async def sources(self) -> list[Json]:
        """All sources that the caller may see."""
        found: list[Json] = []
        token = ""
        while True:
            page = await self.call("GET", f"/v1/sources?pageSize=1000&pageToken={quote(token)}")
            found += page.get("sources", [])
            token = page.get("nextPageToken", "")
            if not token:
                return found


def _run(
    work: Callable[[_Gateway], Coroutine[Any, Any, T]],
    url: str | None,
    data: Path,
    token_file: Path | None,
    workspace: str | None,
) -> T:
    secret = secret_from(token_file, TOKEN_VARIABLE, "access token", "--token-file")
    address = checked_url(url or gateway_url(data), "access token")
    # Found at the call: other commands need not wait for it.
    aiohttp = importlib.import_module("aiohttp")

    async def run() -> T:
        timeout = aiohttp.ClientTimeout(total=_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout) as http:
            gateway = _Gateway(http, address, workspace)
            await gateway.sign_in(secret)
            return await work(gateway)

    try:
        return asyncio.run(run())
    except CallRefused as error:
        raise click.ClickException(str(error)) from None
    except (aiohttp.ClientError, TimeoutError, json.JSONDecodeError) as error:
        raise click.ClickException(f"{address} does not answer as a gateway: {error!r}") from None


async def _dashboard_id(gateway: _Gateway, dashboard: str) -> str:
    try:
        return str(UUID(dashboard))
    except ValueError:
        pass
    found = await gateway.call("GET", f"/v1/dashboards?name={quote(dashboard, safe='')}")
    if not dashboard or not found.get("dashboards"):
        raise click.ClickException(f"No dashboard has the name {dashboard!r}.")
    return str(found["dashboards"][0]["dashboardId"])


async def _apply(
    gateway: _Gateway, path: Path, known: Sequence[Json], given: Mapping[str, str], options: Json
) -> Json:
    """Applies a file; what became of it."""
    files = importlib.import_module("cli.dashboard_files")

    def source_ids(named: Mapping[str, str]) -> Mapping[str, str]:
        return {**{name: given.get(name) or _source(title, known) for name, title in named.items()}, **given}

    report: Json = {"file": str(path)}
    try:
        body = {"file": files.read(path, source_ids), **options}
        report["name"] = body["file"].get("name", "")
        try:
            answer = await gateway.call("POST", "/v1/dashboards:apply", body)
        except CallRefused as error:
            if error.reason != "FILE_CONFLICT":
                raise
            # Asked once more without doing anything, to show what is in conflict.
            answer = await gateway.call("POST", "/v1/dashboards:apply", {**body, "dryRun": True})
            answer["outcome"] = "REFUSED"
    except (files.FileRefused, CallRefused, _SourceUnknown) as error:
        return {**report, "error": str(error)}
    return {
        **report,
        "outcome": answer["outcome"],
        "dashboardId": (answer.get("dashboard") or {}).get("dashboardId", ""),
        "changes": answer.get("changes", []),
        "conflicts": answer.get("conflicts", []),
    }


class _SourceUnknown(Exception):
    """No source, or more than one, has a title that a file names."""


def _source(title: str, known: Sequence[Json]) -> str:
    found = [source["sourceId"] for source in known if source["title"] == title]
    if len(found) != 1:
        many = f"{len(found)} sources are" if found else "No source that you can see is"
        raise _SourceUnknown(f"{many} called {title!r}. Say which is meant with --source NAME=ID.")
    return str(found[0])


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(each for each in path.rglob("*") if each.suffix in {".yaml", ".yml"} and each.is_file())
    if not found:
        raise click.ClickException(f"{path} has no .yaml files.")
    return found


def _pairs(texts: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, _, source_id = text.partition("=")
        try:
            pairs[name] = str(UUID(source_id))
        except ValueError:
            raise click.BadParameter(f"{text!r} is not of the form NAME=ID.", param_hint="--source") from None
    return pairs


_SAID = {
    "CREATED": ("created", "would be created"),
    "CHANGED": ("changed", "would be changed"),
    "UNCHANGED": ("nothing to change", "nothing to change"),
    "REFUSED": ("refused: it is in conflict", "would be refused: it is in conflict"),
}


def _tell(report: Json, *, dry_run: bool) -> None:
    """Shows on stderr what became of a file."""
    if "error" in report:
        _say(f"✗ {report['file']}: {_printable(report['error'])}", "red")
        return
    good = report["outcome"] != "REFUSED"
    said = _SAID[report["outcome"]][dry_run]
    _say(f"{'✓' if good else '✗'} {report['file']}: {said}", "green" if good else "red")
    if good:
        for change in report["changes"]:
            _say(*_line(change))
    for change in report["conflicts"]:
        _say(
            f"  ! {_printable(change['path'])}: here {_value(change, 'before')},"
            f" in the file {_value(change, 'after')}",
            "magenta",
        )


def _line(change: Json) -> tuple[str, str]:
    path = _printable(change["path"])
    if change.get("before") is None:
        return f"  + {path}: {_value(change, 'after')}", "green"
    if change.get("after") is None:
        return f"  - {path}: {_value(change, 'before')}", "red"
    return f"  ~ {path}: {_value(change, 'before')} → {_value(change, 'after')}", "yellow"


def _value(change: Json, side: str) -> str:
    value = change.get(side)
    text = "nothing" if value is None else _printable(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def _printable(text: str) -> str:
    """The text without what a terminal would take for commands."""
    return "".join(each if each.isprintable() else f"\\u{ord(each):04x}" for each in str(text))


def _say(line: str, colour: str) -> None:
    click.secho(line, fg=colour, err=True)
