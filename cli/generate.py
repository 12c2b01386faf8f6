"""Generates `gen/` from `proto/`: one descriptor set, and Python stubs made from it.

The descriptor set is made first and everything else is made from it, so that every surface (stubs, the gateway's
transcoder, reflection) says the same.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GEN = ROOT / "gen"
# Python stubs of these come from googleapis-common-protos.
FOREIGN = ("google/",)


def generate(out: Path) -> None:
    """Writes `descriptor.binpb` and `python/` below `out`."""
    python = out / "python"
    python.mkdir(parents=True)
    descriptor = out / "descriptor.binpb"
    _run("buf", "build", "--as-file-descriptor-set", "-o", str(descriptor))
    from google.protobuf import descriptor_pb2  # noqa: PLC0415 - needs no import for --breaking

    files = descriptor_pb2.FileDescriptorSet.FromString(descriptor.read_bytes())
    names = [f.name for f in files.file if not f.name.startswith(FOREIGN)]
    _run(
        "python",
        "-m",
        "grpc_tools.protoc",
        f"--descriptor_set_in={descriptor}",
        f"--python_out={python}",
        f"--mypy_out=quiet:{python}",
        *names,
    )
    services = [f.name for f in files.file if f.service and not f.name.startswith(FOREIGN)]
    _run(
        "python",
        "-m",
        "grpc_tools.protoc",
        f"--descriptor_set_in={descriptor}",
        f"--grpc_python_out={python}",
        f"--mypy_grpc_out=quiet,only_async:{python}",
        *services,
    )
    for folder in python.rglob("*"):
        if folder.is_dir() and any(folder.glob("*.py")):
            (folder / "__init__.py").touch()


def _run(program: str, *arguments: str) -> None:
    """Runs a program of the virtual environment; its own words reach the terminal when it fails."""
    bin_dir = Path(sys.executable).parent
    # protoc finds its plugins on the path.
    environment = {**os.environ, "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([str(bin_dir / program), *arguments], cwd=ROOT, check=True, env=environment)


def _differences(old: Path, new: Path) -> list[str]:
    before = {str(p.relative_to(old)) for p in old.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    after = {str(p.relative_to(new)) for p in new.rglob("*") if p.is_file()}
    changed = [n for n in before & after if not filecmp.cmp(old / n, new / n, shallow=False)]
    return sorted([*(before ^ after), *changed])


def check() -> int:
    """Says which files of `gen/` are not what `proto/` would give; 0 when all are."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder) / "gen")
        stale = _differences(GEN, Path(folder) / "gen")
    for name in stale:
        print(f"gen/{name} is not up to date: run `make gen`", file=sys.stderr)
    return 1 if stale else 0


def breaking() -> int:
    """Compares the contracts with those of `main`, or, on `main` itself, with those before its last commit.

    0 when no caller breaks, or there are none to compare with.
    """
    head = _commit("HEAD:buf.yaml") and _commit("HEAD")
    for ref in ("origin/main", "main", "HEAD~1"):
        commit = _commit(f"{ref}:buf.yaml") and _commit(ref)
        if commit and commit != head:
            print(f"comparing with {ref}", file=sys.stderr)
            buf = Path(sys.executable).parent / "buf"
            return subprocess.run(
                [buf, "breaking", "--against", f".git#ref={commit}"], cwd=ROOT, check=False
            ).returncode
    print("no earlier contracts to compare with", file=sys.stderr)
    return 0


def _commit(revision: str) -> str:
    """The id of what a revision names; empty when there is nothing."""
    done = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", revision],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: python -m cli.generate --check")
    parser.add_argument("--check", action="store_true", help="only say whether gen/ is up to date")
    parser.add_argument("--breaking", action="store_true", help="compare the contracts with those of main")
    arguments = parser.parse_args()
    if arguments.breaking:
        return breaking()
    if arguments.check:
        return check()
    shutil.rmtree(GEN, ignore_errors=True)
    generate(GEN)
    return 0


if __name__ == "__main__":
    sys.exit(main())
