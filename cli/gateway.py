"""The gateway, for commands that call it: its address, and the secret to call it with."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

import click

from cli.envoy_config import DEFAULT_PORT
from cli.stack import read_state


def gateway_url(data: Path) -> str:
    """Where the gateway of the mesh on this data folder is; the usual place when none runs there."""
    state = read_state(data)
    return str(state["gateway_url"]) if state else f"http://127.0.0.1:{DEFAULT_PORT}"


def checked_url(url: str, secret: str) -> str:
    """The address as it was given. Warns when the `secret` would travel unencrypted."""
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise click.BadParameter(
            f"{url!r} is no address such as https://meshboard.example.", param_hint="--url"
        )
    if parts.scheme == "http" and parts.hostname not in {"localhost", "127.0.0.1", "::1"}:
        click.echo(
            f"Warning: the {secret} travels to {parts.hostname} unencrypted. Better use https.", err=True
        )
    return url


def secret_from(file: Path | None, variable: str, secret: str, option: str) -> str:
    """The secret in the file, else in the environment: never from the command line, which others can read."""
    try:
        found = file.read_text().strip() if file else os.environ.get(variable, "").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise click.ClickException(f"{file} cannot be read: {error}") from None
    if not found:
        raise click.ClickException(
            f"No {secret}. Put it into a file and name that with {option}, or into {variable}."
        )
    if not (found.isascii() and found.isprintable()) or " " in found:
        raise click.ClickException(
            f"What stands for the {secret} is none: it has characters that no {secret.rsplit(maxsplit=1)[-1]} has."
        )
    return found
