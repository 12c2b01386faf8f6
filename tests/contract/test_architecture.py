"""Who may import whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SERVICES = Path(__file__).parents[2] / "services"


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", sorted(SERVICES.rglob("*.py")), ids=lambda p: str(p.relative_to(SERVICES)))
def test_services_import_the_chassis_and_no_other_service(path: Path):
    own = path.relative_to(SERVICES).parts[0]
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "services" and len(parts) > 1:
            assert parts[1] in {own, "chassis"}, f"{path} imports {name}"
        assert parts[0] not in {"cli", "tests", "bench"}, f"{path} imports {name}"
        if parts[0] == "nats":
            assert path == SERVICES / "chassis" / "bus.py", f"{path} imports nats; only the bus does"
