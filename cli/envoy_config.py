"""The gateway's configuration for one mesh: a copy of edge/envoy.yaml with other addresses, issuer and limits.

`python -m cli.envoy_config --validate edge/envoy.yaml` lets Envoy itself judge a file.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from cli import parts

REPOSITORY = Path(__file__).parents[1]
DEFAULT_PORT = 8080  # of the gateway in edge/envoy.yaml; the other ports of a mesh follow it
LAST_PORT = DEFAULT_PORT + 13
DEFAULT_URL = f"http://127.0.0.1:{DEFAULT_PORT}"
UNLIMITED = 1_000_000_000


def write(
    source: Path,
    target: Path,
    *,
    base_port: int = DEFAULT_PORT,
    host: str = "127.0.0.1",
    public_url: str = DEFAULT_URL,
    otlp: str = "",
    limits: bool = True,
) -> None:
    """Writes `target`, the configuration `source` for a mesh whose gateway listens on `host`:`base_port`.

    Args:
        public_url: the issuer of tokens, and the one origin whose pages may use the session cookie.
        otlp: address of an OTLP receiver for traces over gRPC, `http://host:4317` or `host:4317`; empty: no traces.
        limits: False lifts the rate limits.
    """
    template = yaml.load(source.read_text(), yaml.CSafeLoader)
    config: dict[str, Any] = _placed(template, base_port=base_port, public_url=public_url)
    listeners = {listener["name"]: listener for listener in config["static_resources"]["listeners"]}
    gateway = listeners["gateway"]
    gateway["address"]["socket_address"]["address"] = host
    connection_manager = gateway["filter_chains"][0]["filters"][0]["typed_config"]
    if not limits:
        for limit in connection_manager["http_filters"]:
            if limit["name"] == "envoy.filters.http.local_ratelimit":
                _lift(limit["typed_config"])
    if otlp:
        _trace(config, connection_manager, otlp)
    parts.write_private(target, yaml.dump(config, Dumper=_Dumper, sort_keys=False, width=1000))


class _Dumper(yaml.CSafeDumper):
    """Writes what several places share in each of them, as Envoy's own tools show it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _placed(node: Any, *, base_port: int, public_url: str) -> Any:
    """Returns a copy of `node` with ports moved, and with the public URL and the places of the files set."""
    url = urlsplit(public_url)

    def moved(port: int) -> int:
        return port - DEFAULT_PORT + base_port if DEFAULT_PORT <= port <= LAST_PORT else port

    def walk(node: Any) -> Any:
        if isinstance(node, Mapping):
            copy = {key: walk(value) for key, value in node.items()}
            if "port_value" in copy:
                copy["port_value"] = moved(copy["port_value"])
            if "issuer" in copy:
                copy["issuer"] = public_url
            return copy
        if isinstance(node, list):
            return [walk(item) for item in node]
        if node in {"gen/descriptor.binpb", "edge/account.html"}:
            return str(REPOSITORY / node)
        if node == DEFAULT_URL:
            return f"{url.scheme}://{url.netloc}"  # as an origin
        if isinstance(node, str):
            return re.sub(
                r"^(http://127\.0\.0\.1):(\d+)(?=/)", lambda found: f"{found[1]}:{moved(int(found[2]))}", node
            )
        return node

    return walk(node)


def _lift(limit: dict[str, Any]) -> None:
    for bucket in (limit, *limit["descriptors"]):
        bucket["token_bucket"].update(max_tokens=UNLIMITED, tokens_per_fill=UNLIMITED)


def _trace(config: dict[str, Any], connection_manager: dict[str, Any], otlp: str) -> None:
    """Adds a span for each request, sent to `otlp`. A caller's `traceparent` (W3C) is continued."""
    address = urlsplit(otlp if "://" in otlp else f"//{otlp}")
    connection_manager["tracing"] = {
        "spawn_upstream_span": True,
        # Named by the route; of the URL no path and no query, which may have tokens and what people look for.
        "operation": "%ROUTE_NAME%",
        "max_path_tag_length": 0,
        "provider": {
            "name": "envoy.tracers.opentelemetry",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig",
                "grpc_service": {"envoy_grpc": {"cluster_name": "otlp"}, "timeout": "2s"},
                "service_name": "gateway",
            },
        },
    }
    grpc = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    endpoint = {
        "address": {"socket_address": {"address": address.hostname, "port_value": address.port or 4317}}
    }
    config["static_resources"]["clusters"].append(
        {
            "name": "otlp",
            "type": "STRICT_DNS",
            "connect_timeout": "2s",
            "load_assignment": {
                "cluster_name": "otlp",
                "endpoints": [{"lb_endpoints": [{"endpoint": endpoint}]}],
            },
            "typed_extension_protocol_options": {
                grpc: {
                    "@type": f"type.googleapis.com/{grpc}",
                    "explicit_http_config": {"http2_protocol_options": {}},
                }
            },
        }
    )


def validate(config: Path) -> str:
    """Returns what Envoy finds wrong with `config`, "" when nothing is."""
    envoy = parts.BINARIES["envoy"]()
    judged = subprocess.run(
        [envoy, "--mode", "validate", "--log-level", "error", "-c", str(config)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return "" if judged.returncode == 0 else judged.stderr + judged.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--validate", type=Path, required=True, metavar="FILE", help="the configuration to judge"
    )
    source: Path = parser.parse_args().validate
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "envoy.yaml"
        write(source, copy, base_port=9080, otlp="127.0.0.1:4317", limits=False)
        for config in (source, copy):
            if wrong := validate(config.resolve()):
                sys.exit(f"{config}: {wrong}")
    print(f"{os.path.relpath(source)} and its copy for another mesh are valid")


if __name__ == "__main__":
    main()
