"""A cached read (`GetMe`): straight at the service, and through the gateway as gRPC and as JSON.

Baseline and subjects take turns, so that a change of the machine's speed hits all of them. Each has all cores for
itself and for the load; req/s is what comes out with the load always waiting.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import grpc
from meshboard.user.v1.user_service_pb2 import GetMeRequest

from bench import echo, load
from bench.figures import Figure, ratios
from bench.load import Generator, Load, LoadFailedError, Sent
from bench.mesh import Account, Mesh
from bench.processes import Meter

METHOD = "/meshboard.user.v1.UserService/GetMe"
CONCURRENCY = 32
TARGET_RATIO = 0.4
TARGET_CPU_RATIO = 0.6


@dataclass(frozen=True)
class Subject:
    """Who answers, and the processes whose time that costs."""

    load: Load
    pids: Mapping[str, int]


def measure(
    mesh: Mesh, account: Account, *, rounds: int, seconds: float, say: Callable[[str], None]
) -> list[Figure]:
    """Rates, their ratios to the bare echo, and the CPU time of each process for a request."""
    headers = account.authorization()
    answer = _answer(mesh, headers)
    user, envoy = {"user_svc": mesh.pids["user_svc"]}, {"envoy": mesh.pids["envoy"]}
    calls = partial(Load, bodies=_bodies, headers=headers, concurrency=CONCURRENCY)
    with echo.running(answer) as bare:
        subjects = {
            "echo": Subject(calls(protocol="grpc", address=bare.address, path=METHOD), {"echo": bare.pid}),
            "grpc": Subject(calls(protocol="grpc", address=mesh.address("user"), path=METHOD), user),
            "envoy_grpc": Subject(calls(protocol="grpc", address=mesh.gateway, path=METHOD), user | envoy),
            "envoy_json": Subject(
                calls(protocol="json", address=mesh.gateway, path="/v1/users/me"), user | envoy
            ),
        }
        counts = {
            name: max(500, int(_send(one.load, 1000).per_second * seconds)) for name, one in subjects.items()
        }
        rates: dict[str, list[float]] = defaultdict(list)
        spent: dict[tuple[str, str], list[float]] = defaultdict(list)
        for number in range(rounds):
            for name, subject in subjects.items():
                answered = mesh.calls_answered("user", "meshboard.user.v1.UserService.GetMe")
                meter = Meter(subject.pids)
                meter.start()
                sent = _send(subject.load, counts[name])
                for process, cpu in {**meter.stop(), "client": sent.cpu_seconds}.items():
                    spent[name, process].append(cpu / sent.requests * 1e6)
                rates[name].append(sent.per_second)
                answered = mesh.calls_answered("user", "meshboard.user.v1.UserService.GetMe") - answered
                if name != "echo" and answered != sent.requests:
                    raise LoadFailedError(
                        f"{name}: {answered} of {sent.requests} calls were answered with OK"
                    )
                say(f"round {number + 1}: {name} {sent.per_second:,.0f} requests/s")
    return figures(rates, spent)


def figures(
    rates: Mapping[str, Iterable[float]], spent: Mapping[tuple[str, str], Iterable[float]]
) -> list[Figure]:
    """The figures of requests per second by subject, and CPU µs by subject and process, round by round."""
    client = "h2load" if load.has_h2load() else "Python"
    result = []
    for name, values in rates.items():
        result.append(Figure(name=f"reads/{name} rate", rounds=tuple(values), unit="requests/s"))
        if name != "echo":
            target = TARGET_RATIO if name == "grpc" else None
            result.append(
                Figure(
                    name=f"reads/{name} rate to echo",
                    rounds=ratios(values, rates["echo"]),
                    unit="",
                    at_least=target,
                )
            )
        for (subject, process), cpu in spent.items():
            if subject == name:
                note = client if process == "client" else ""
                result.append(
                    Figure(
                        name=f"reads/{name} CPU of {process}", rounds=tuple(cpu), unit="µs/request", note=note
                    )
                )
    served = spent["grpc", "user_svc"]
    result.append(
        Figure(
            name="reads/grpc requests per CPU second to echo",
            rounds=ratios(spent["echo", "echo"], served),
            unit="",
            at_least=TARGET_CPU_RATIO,
            note="server processes only",
        )
    )
    return result


def _send(one: Load, requests: int) -> Sent:
    if load.has_h2load():
        return load.h2load(one, requests)
    # A generator sends what `bodies` makes; here the same body again and again.
    repeated = Load(**{**vars(one), "bodies": partial(_bodies, requests)})
    with Generator(repeated) as generator:
        generator.start()
        return generator.wait()


def _bodies(count: int = 1) -> list[bytes]:
    return [GetMeRequest().SerializeToString()] * count


def _answer(mesh: Mesh, headers: tuple[tuple[str, str], ...]) -> bytes:
    with grpc.insecure_channel(mesh.address("user")) as channel:
        method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD)
        return method(_bodies()[0], metadata=headers, timeout=10)
