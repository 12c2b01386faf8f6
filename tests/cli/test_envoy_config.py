"""The copies of the gateway's configuration, judged by Envoy itself."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.envoy_config import REPOSITORY, validate, write

SOURCE = REPOSITORY / "edge" / "envoy.yaml"


def written(folder: Path, **options: Any) -> dict[str, Any]:
    target = folder / "envoy.yaml"
    write(SOURCE, target, **options)
    assert validate(target) == ""
    config: dict[str, Any] = yaml.safe_load(target.read_text())
    return config


def found(node: Any, key: str) -> list[Any]:
    """Returns all values of `key` below `node`."""
    if isinstance(node, dict):
        return [value for name, value in node.items() if name == key] + found(list(node.values()), key)
    return [value for item in node for value in found(item, key)] if isinstance(node, list) else []


def test_a_copy_has_the_addresses_of_its_mesh(tmp_path: Path) -> None:
    config = written(tmp_path, base_port=9180, host="0.0.0.0", public_url="https://meshboard.example")
    resources = config["static_resources"]
    listeners = {
        listener["name"]: listener["address"]["socket_address"] for listener in resources["listeners"]
    }
    assert listeners["gateway"] == {"address": "0.0.0.0", "port_value": 9180}
    assert listeners["jwks"] == {"address": "127.0.0.1", "port_value": 9182}
    assert config["admin"]["address"]["socket_address"] == {"address": "127.0.0.1", "port_value": 9181}
    upstream = {cluster["name"]: found(cluster, "port_value") for cluster in resources["clusters"]}
    assert upstream == {
        "auth": [9183],
        "user": [9184],
        "dashboard": [9185],
        "analytics": [9186],
        "jwks": [9182],
    }
    assert found(config, "uri") == ["http://127.0.0.1:9182/.well-known/jwks.json"]
    assert found(config, "issuer") == ["https://meshboard.example"]
    assert {"exact": "https://meshboard.example"} in found(config, "allow_origin_string_match")[0]
    assert ":8080" not in (tmp_path / "envoy.yaml").read_text()


def test_limits_can_be_lifted(tmp_path: Path) -> None:
    limited, lifted = written(tmp_path), written(tmp_path, limits=False)
    assert min(bucket["max_tokens"] for bucket in found(limited, "token_bucket")) == 100
    assert {bucket["tokens_per_fill"] for bucket in found(lifted, "token_bucket")} == {1_000_000_000}


@pytest.mark.parametrize("endpoint", ["http://traces.example:4317", "traces.example:4317", "traces.example"])
def test_traces_go_to_the_endpoint(tmp_path: Path, endpoint: str) -> None:
    assert found(written(tmp_path), "tracing") == []
    config = written(tmp_path, otlp=endpoint)
    assert found(config, "tracing")
    otlp = config["static_resources"]["clusters"][-1]
    assert found(otlp, "socket_address") == [{"address": "traces.example", "port_value": 4317}]


def test_validation_names_what_is_wrong(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("static_resources: {listners: []}\n")
    assert "listners" in validate(broken)
