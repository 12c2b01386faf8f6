"""The documents against what they speak of: links, commands, routes and settings."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path

import click
import pytest
from pydantic_settings import BaseSettings

from cli.dashboards import TOKEN_VARIABLE
from cli.main import main
from cli.send import KEY_VARIABLE
from cli.stack import REPLACEABLE
from tests.contract.gateway import RPCS

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(path for folder in ("docs", "examples") for path in (ROOT / folder).rglob("*.md"))]
)
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in DOCUMENTS}
# `./dev` runs this one itself.
COMMANDS = {"test"} | set(main.commands)
# Read by `./dev`, and not by a service.
FOR_UP = {"MESHBOARD_DATA", KEY_VARIABLE, TOKEN_VARIABLE, *REPLACEABLE}
SETTINGS = (
    "services.chassis.settings.Settings",
    "services.chassis.settings.PasswordSettings",
    "services.auth_svc.settings.AuthSettings",
    "services.dashboard_svc.settings.Settings",
    "services.analytics_svc.settings.AnalyticsSettings",
)


def prose(text: str) -> str:
    """The text without blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def code(text: str) -> list[str]:
    """What is marked as code: the lines of blocks, without their comments, and what stands in the line."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    lines = [re.sub(r"(^|\s)#.*", "", line) for block in blocks for line in block.splitlines()]
    return lines + re.findall(r"`([^`]+)`", prose(text))


def anchors(text: str) -> set[str]:
    """The anchors of headings, as GitHub makes them."""
    titles = re.findall(r"^#+ +(.*)$", prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name: str):
    links = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(TEXTS[name]))
    for link in links:
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name}: {link}"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{name}: {link}"


@pytest.mark.parametrize("name", TEXTS)
def test_paths_exist(name: str):
    """What looks like a file of ours is one; `test_<rpc>.py` and `users.py …` are patterns."""
    for path in re.findall(
        r"`((?:services|tests|cli|proto|gen|edge|docs|bench|third_party)/[\w./-]+)`", TEXTS[name]
    ):
        assert (ROOT / path).exists(), f"{name}: {path}"


@pytest.mark.parametrize("name", TEXTS)
def test_commands_exist(name: str):
    for snippet in code(TEXTS[name]):
        for command, rest in re.findall(r"\./dev ([a-z]+)([^|;&)]*)", snippet):
            assert command in COMMANDS, f"{name}: ./dev {command}"
            if command == "test":
                continue
            found = main.commands[command]
            if isinstance(found, click.Group):
                word = rest.split()[0] if rest.split() else ""
                if word or not found.invoke_without_command:
                    assert word in found.commands, f"{name}: ./dev {command}{rest}"
                    found = found.commands[word]
            known = {
                option for each in found.params if isinstance(each, click.Option) for option in each.opts
            }
            used = set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", rest))
            assert used <= known | {"--help"}, f"{name}: ./dev {command}{rest}"


def test_make_targets_exist():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = set(re.findall(r"^  ([a-z-]+)", shown, flags=re.MULTILINE))
    declared = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert declared is not None
    assert targets == set(declared[1].split())
    for name, text in TEXTS.items():
        for snippet in code(text):
            for target in re.findall(r"(?:^|\s)make ([a-z-]+)", snippet):
                assert target in targets, f"{name}: make {target}"


def test_the_api_lists_every_route_and_no_other():
    known = {f"{verb} {path}" for rpc in RPCS.values() for verb, path in rpc.bindings}
    table = set(re.findall(r"^\| `([A-Z]+ /\S+)` \|", TEXTS["docs/api.md"], flags=re.MULTILINE))
    assert table == known


def test_the_api_shows_routes_that_exist():
    patterns = [
        re.compile(f"{verb} " + re.sub(r"\\{[^}]*\\}", "[^/:]+", re.escape(path)))
        for rpc in RPCS.values()
        for verb, path in rpc.bindings
    ]
    shown = re.findall(
        r"^(?:`?)((?:GET|POST|PATCH|DELETE) /[^\s?`]*)", TEXTS["docs/api.md"], flags=re.MULTILINE
    ) + re.findall(r"`((?:GET|POST|PATCH|DELETE) /[^\s?`]*)", prose("\n".join(TEXTS.values())))
    assert shown
    for route in shown:
        assert any(pattern.fullmatch(route) or pattern.pattern == re.escape(route) for pattern in patterns), (
            route
        )


def test_settings_are_documented_and_no_others():
    fields: set[str] = set()
    for name in SETTINGS:
        module, _, kind = name.rpartition(".")
        settings: type[BaseSettings] = getattr(importlib.import_module(module), kind)
        fields |= {f"MESHBOARD_{field.upper()}" for field in settings.model_fields}
    documented = set(re.findall(r"MESHBOARD_[A-Z_]*[A-Z]", TEXTS["docs/deployment.md"]))
    assert documented == fields | FOR_UP
    for name, text in TEXTS.items():
        assert set(re.findall(r"MESHBOARD_[A-Z_]*[A-Z]", text)) <= documented, name


def test_every_settings_class_is_looked_at():
    found = {
        f"services.{path.parent.name}.settings.{kind}"
        for path in (ROOT / "services").glob("*/settings.py")
        for kind in re.findall(r"^class (\w*Settings)\(", path.read_text(), flags=re.MULTILINE)
    }
    assert found == set(SETTINGS)


def test_decisions_are_numbered_once_and_listed():
    names = sorted(path.name for path in (ROOT / "docs" / "adr").glob("[0-9]*.md"))
    assert [int(name[:4]) for name in names] == list(range(1, len(names) + 1))
    index = re.findall(r"^(\d+)\. \[(.*)\]\((.*)\)$", TEXTS["docs/adr/README.md"], flags=re.MULTILINE)
    assert [name for _, _, name in index] == names
    for number, title, name in index:
        assert TEXTS[f"docs/adr/{name}"].startswith(f"# {number}. {title}\n")


def test_the_walks_name_code_that_exists():
    """In the walks through the house, `Queries.answer`, `_collect` and `RightsCache` are found where they belong."""
    source = "\n".join(path.read_text() for path in sorted((ROOT / "services").rglob("*.py")))
    others = "\n".join(
        path.read_text() for path in [*(ROOT / "proto").rglob("*.proto"), ROOT / "edge" / "envoy.yaml"]
    )
    named = re.findall(r"`((?:_?[A-Z]\w+)(?:\.\w+)?|_?[a-z]+_[a-z_]+)`", TEXTS["docs/life-of-a-request.md"])
    assert len(named) > 50
    for name in named:
        if name.startswith("MESHBOARD_"):  # settings, held to the code above
            continue
        kind, _, member = name.partition(".")
        assert re.search(rf"\b{kind}\b", source + others), name
        if member:
            body = re.search(rf"^class {kind}\b.*?(?=^\S)", source, flags=re.MULTILINE | re.DOTALL)
            assert body is not None, name
            assert re.search(rf"def {member}\b", body[0]), name
