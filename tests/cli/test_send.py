"""The command `send` against a gateway that fails in every way; tests/mesh/test_send.py has the real one."""

import asyncio
import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from click.testing import CliRunner

from cli import delivery
from cli.main import main
from cli.send import KEY_VARIABLE
from tests.conditions import eventually

KEY = "mbw_secret-of-the-source"


class Gateway:
    """Stands in for the gateway: remembers what it has acknowledged, by `insertId`; `answer` may do otherwise."""

    def __init__(self) -> None:
        self.url = ""
        self.calls = 0
        self.received: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.answer: Callable[[list[dict[str, Any]]], Awaitable[web.Response | None]] | None = None

    @property
    def counted(self) -> dict[str, dict[str, Any]]:
        """What the store would count: the events by their ids."""
        return {event["insertId"]: event for event in self.received}

    async def ingest(self, request: web.Request) -> web.Response:
        self.calls += 1
        self.keys.add(request.headers["X-Write-Key"])
        events = json.loads(await request.read())["events"]
        assert len(events) <= delivery.BATCH_EVENTS
        if self.answer is not None and (answer := await self.answer(events)) is not None:
            return answer
        self.received += events
        return web.json_response({"acceptedCount": len(events), "refused": []})


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    stand_in = Gateway()
    app = web.Application(client_max_size=8 << 20)
    app.router.add_post("/v1/events:ingest", stand_in.ingest)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    stand_in.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield stand_in
    await runner.cleanup()


def error(status: int, message: str, **headers: str) -> web.Response:
    return web.json_response({"code": 3, "message": message, "details": []}, status=status, headers=headers)


async def send(gateway: Gateway, tmp_path: Path, *arguments: Any, key: str = KEY) -> tuple[int, Any, str]:
    """Runs the command in a process of its own: its exit code, what it reports and what it says."""
    process = await start(gateway, tmp_path, *arguments, key=key)
    output, said = await process.communicate()
    assert process.returncode is not None
    return process.returncode, json.loads(output or "[]"), said.decode()


async def start(
    gateway: Gateway, tmp_path: Path, *arguments: Any, key: str = KEY
) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cli.main", "send", "--url", gateway.url, "-o", "json"),
        *(str(argument) for argument in arguments),
        env={**os.environ, KEY_VARIABLE: key, "XDG_STATE_HOME": str(tmp_path / "state")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def lines(count: int, start: int = 0) -> str:
    return "".join(
        json.dumps({"event": "view", "distinctId": "ada", "n": n}) + "\n" for n in range(start, start + count)
    )


def numbers(gateway: Gateway) -> list[int]:
    return sorted(event["properties"]["n"] for event in gateway.received)


async def test_a_second_run_sends_what_is_new(gateway: Gateway, tmp_path: Path):
    file = tmp_path / "a.ndjson"
    file.write_text(lines(2500))
    code, report, said = await send(gateway, tmp_path, file)
    assert (code, report[0]["accepted"], report[0]["sent_earlier"]) == (0, 2500, 0)
    assert "2,500 accepted" in said
    assert numbers(gateway) == list(range(2500))
    assert gateway.keys == {KEY}
    for state in (tmp_path / "state").rglob("*"):
        assert KEY not in str(state)
        assert state.is_dir() or KEY not in state.read_text()
    # Grown, renamed and compressed, it is the same file.
    with gzip.open(tmp_path / "b.gz", "wt") as zipped:
        zipped.write(lines(2600))
    code, report, _ = await send(gateway, tmp_path, tmp_path / "b.gz")
    assert (code, report[0]["accepted"], report[0]["sent_earlier"]) == (0, 100, 2500)
    assert numbers(gateway) == list(range(2600))
    assert len(gateway.counted) == 2600


async def test_the_same_lines_elsewhere_are_other_lines(gateway: Gateway, tmp_path: Path):
    """Lines are told apart by what is before them, not by what they say."""
    (tmp_path / "a").write_text(lines(1) * 3)
    (tmp_path / "b").write_text(lines(1, 7) + lines(1) * 3)
    code, report, _ = await send(gateway, tmp_path, tmp_path / "a", tmp_path / "b")
    assert (code, [each["accepted"] for each in report]) == (0, [3, 4])
    assert len(gateway.counted) == 7
    code, report, _ = await send(gateway, tmp_path, tmp_path / "a", "--name", "once more")
    assert (code, report[0]["accepted"]) == (0, 3)
    assert len(gateway.counted) == 10


async def test_a_line_without_end_may_grow(gateway: Gateway, tmp_path: Path):
    file = tmp_path / "a"
    file.write_text(lines(3) + lines(1, 3)[:10])
    code, report, _ = await send(gateway, tmp_path, file)
    assert (code, report[0]["accepted"], report[0]["refused"]) == (3, 3, 1)
    file.write_text(lines(4).removesuffix("\n"))
    assert (await send(gateway, tmp_path, file))[1][0]["accepted"] == 1
    file.write_text(lines(5))
    assert (await send(gateway, tmp_path, file))[1][0]["accepted"] == 1
    assert numbers(gateway) == list(range(5))


async def test_goes_on_after_kill_9(gateway: Gateway, tmp_path: Path):
    file, rounds = tmp_path / "a", 0
    file.write_text(lines(20_000))
    random.seed(7)
    code = None
    while code is None:
        rounds += 1
        before, more = gateway.calls, random.randrange(1, 7)
        process = await start(gateway, tmp_path, file)
        far = before + more
        await eventually(lambda p=process, far=far: p.returncode is not None or gateway.calls >= far)
        if process.returncode is None and rounds < 6:
            process.kill()
            await process.communicate()
        else:
            await process.communicate()
            code = process.returncode
    assert (code, rounds > 2) == (0, True)
    assert len(gateway.counted) == 20_000
    assert {event["properties"]["n"] for event in gateway.received} == set(range(20_000))
    assert (await send(gateway, tmp_path, file))[1][0]["sent_earlier"] == 20_000


async def test_a_crash_between_acknowledgement_and_state_is_harmless(gateway: Gateway, tmp_path: Path):
    """Without its state it sends everything again, with the same ids."""
    file = tmp_path / "a"
    file.write_text(lines(3000))
    assert (await send(gateway, tmp_path, file, "--state", tmp_path / "one"))[0] == 0
    for state in (tmp_path / "one").glob("*.json"):
        state.write_text("")  # as a machine may leave it that lost power
    assert (await send(gateway, tmp_path, file, "--state", tmp_path / "one"))[1][0]["accepted"] == 3000
    assert (len(gateway.received), len(gateway.counted)) == (6000, 3000)


async def test_an_interrupt_ends_it_at_once(gateway: Gateway, tmp_path: Path):
    file = tmp_path / "a"
    file.write_text(lines(5000))
    hangs = asyncio.Event()

    async def hang(events: list[dict[str, Any]]) -> None:
        if gateway.calls > 2:
            hangs.set()
            await asyncio.sleep(60)

    gateway.answer = hang
    process = await start(gateway, tmp_path, file)
    await hangs.wait()
    process.terminate()
    output, said = await process.communicate()
    assert process.returncode == 1
    assert json.loads(output)[0]["stopped"] == "interrupted"
    assert b"the same command goes on" in said
    gateway.answer = None
    code, report, _ = await send(gateway, tmp_path, file)
    assert (code, report[0]["sent_earlier"] + report[0]["accepted"]) == (0, 5000)
    assert report[0]["sent_earlier"] >= 1000
    assert len(gateway.counted) == 5000


async def test_waits_for_a_gateway_that_is_away(gateway: Gateway, tmp_path: Path):
    file = tmp_path / "a"
    file.write_text(lines(1500))
    failures = iter((503, 429, 502, 504))

    async def fail(events: list[dict[str, Any]]) -> web.Response | None:
        status = next(failures, None)
        return None if status is None else error(status, f"busy {status}", **{"Retry-After": "0"})

    gateway.answer = fail
    code, report, said = await send(gateway, tmp_path, file)
    assert (code, report[0]["accepted"]) == (0, 1500)
    assert "Waiting for the gateway: 503: busy 503" in said


async def test_gives_up_when_waiting_does_not_help(gateway: Gateway, tmp_path: Path):
    file = tmp_path / "a"
    file.write_text(lines(1))

    async def full(events: list[dict[str, Any]]) -> web.Response:
        return error(429, "The source has had its share of this month.", **{"Retry-After": "86400"})

    gateway.answer = full
    code, report, _ = await send(gateway, tmp_path, file)
    assert code == 1
    assert "its share of this month" in report[0]["stopped"]
    url, gateway.url = gateway.url, "http://127.0.0.1:1"
    code, report, _ = await send(gateway, tmp_path, file, "--patience", "0")
    assert (code, "takes nothing now" in report[0]["stopped"]) == (1, True)
    gateway.url, gateway.answer = url, None
    assert (await send(gateway, tmp_path, file))[0] == 0


async def test_a_key_that_is_refused_stops_it(gateway: Gateway, tmp_path: Path):
    file = tmp_path / "a"
    file.write_text(lines(5))

    async def refuse(events: list[dict[str, Any]]) -> web.Response:
        return error(401, "No source has this write key.")

    gateway.answer = refuse
    code, report, said = await send(gateway, tmp_path, file)
    assert (code, report[0]["stopped"]) == (1, "the gateway answers 401: No source has this write key.")
    assert KEY not in said


async def test_follows_no_redirect(gateway: Gateway, tmp_path: Path):
    file = tmp_path / "a"
    file.write_text(lines(1))

    async def elsewhere(events: list[dict[str, Any]]) -> web.Response:
        return web.Response(status=307, headers={"Location": gateway.url + "/v1/events:ingest"})

    gateway.answer = elsewhere
    assert (await send(gateway, tmp_path, file, "--patience", "0"))[0] == 1
    assert gateway.calls == 1


async def test_one_event_at_fault_costs_no_other(gateway: Gateway, tmp_path: Path):
    file = tmp_path / "a"
    file.write_text(lines(1000))

    async def judge(events: list[dict[str, Any]]) -> web.Response | None:
        for index, event in enumerate(events):
            if event["properties"]["n"] in {3, 500, 999}:  # with the place, as the transcoder says it
                return error(400, f"events[{index}].time: invalid")
            if event["properties"]["n"] in {7, 8}:  # without
                return error(400, "the body cannot be read")
        return None

    gateway.answer = judge
    code, report, _ = await send(gateway, tmp_path, file)
    assert (code, report[0]["accepted"], report[0]["refused"]) == (3, 995, 5)
    assert [each["line"] for each in report[0]["refusals"]] == [4, 8, 9, 501, 1000]
    assert numbers(gateway) == [n for n in range(1000) if n not in {3, 7, 8, 500, 999}]


async def test_halves_what_is_too_large(gateway: Gateway, tmp_path: Path):
    file = tmp_path / "a"
    file.write_text(lines(1000))

    async def small(events: list[dict[str, Any]]) -> web.Response | None:
        return error(413, "The body is too large.") if len(events) > 300 else None

    gateway.answer = small
    assert (await send(gateway, tmp_path, file))[1][0]["accepted"] == 1000
    assert numbers(gateway) == list(range(1000))


async def test_tells_which_lines_the_gateway_refused(gateway: Gateway, tmp_path: Path):
    file = tmp_path / "a"
    file.write_text("\n" + lines(20) + "{\n")

    async def refuse(events: list[dict[str, Any]]) -> web.Response:
        gateway.received += events[1:]
        refused = [{"index": 0, "reason": "TIME_INVALID", "message": "time: must be from 1970"}]
        return web.json_response({"acceptedCount": len(events) - 1, "refused": refused})

    gateway.answer = refuse
    code, report, said = await send(gateway, tmp_path, file)
    assert (code, report[0]["accepted"], report[0]["refused"]) == (3, 19, 2)
    assert report[0]["refusals"][0] == {"line": 2, "why": "time: must be from 1970"}
    assert report[0]["refusals"][1]["line"] == 22
    assert "line 2: time: must be from 1970" in said


async def test_a_file_read_in_the_wrong_way_is_not_remembered(gateway: Gateway, tmp_path: Path):
    file = tmp_path / "a.csv"
    file.write_text("who\n" + "ada\n" * 5000)
    code, report, _ = await send(gateway, tmp_path, file)
    assert (code, gateway.received) == (1, [])
    assert "none of the first" in report[0]["stopped"]
    assert "Line 2: it has no event" in report[0]["stopped"]
    right = ("--map", "distinct_id=who", "--set", "event=view")
    assert (await send(gateway, tmp_path, file, *right))[1][0]["accepted"] == 5000
    # Also one that is too short for that.
    (tmp_path / "b.csv").write_text("who\neve\n")
    assert (await send(gateway, tmp_path, tmp_path / "b.csv"))[0] == 3
    assert (await send(gateway, tmp_path, tmp_path / "b.csv", *right))[1][0]["accepted"] == 1


async def test_two_at_once_are_one_too_many(gateway: Gateway, tmp_path: Path):
    file = tmp_path / "a"
    file.write_text(lines(10))
    arrived, go = asyncio.Event(), asyncio.Event()

    async def wait(events: list[dict[str, Any]]) -> None:
        arrived.set()
        await go.wait()

    gateway.answer = wait
    first = await start(gateway, tmp_path, file)
    await arrived.wait()
    code, report, _ = await send(gateway, tmp_path, file)
    assert (code, "another process" in report[0]["stopped"]) == (1, True)
    go.set()
    await first.communicate()
    assert (first.returncode, len(gateway.received)) == (0, 10)


async def test_what_comes_before_damage_is_sent(gateway: Gateway, tmp_path: Path):
    whole = gzip.compress(lines(50_000).encode())
    file = tmp_path / "a.gz"
    file.write_bytes(whole[: len(whole) // 2])
    code, report, _ = await send(gateway, tmp_path, file)
    assert (code, "cut off" in report[0]["stopped"]) == (1, True)
    # Of the half, all but what the decompressor held back.
    assert 20_000 < report[0]["accepted"] < 30_000
    assert numbers(gateway) == list(range(report[0]["accepted"]))
    file.write_bytes(whole)
    code, report, _ = await send(gateway, tmp_path, file)
    assert (code, report[0]["accepted"] + report[0]["sent_earlier"]) == (0, 50_000)
    assert len(gateway.counted) == 50_000


def test_the_key_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    (tmp_path / "a").write_text(lines(1))
    (tmp_path / "key").write_text("two words\n")
    for arguments, why in (([], "No write key"), (["--key-file", str(tmp_path / "key")], "is none")):
        result = CliRunner().invoke(main, ["send", str(tmp_path / "a"), *arguments])
        assert (result.exit_code, why in result.stderr) == (1, True)
    command = main.commands["send"]
    assert not {"--key", "--write-key"} & {name for option in command.params for name in option.opts}


@pytest.mark.parametrize("wrong", ["event", "event=", "evnt=a", "=a"])
def test_refuses_what_is_no_mapping(tmp_path: Path, wrong: str):
    (tmp_path / "a").write_text(lines(1))
    for option in ("--map", "--set"):
        result = CliRunner().invoke(
            main, ["send", str(tmp_path / "a"), option, wrong], env={KEY_VARIABLE: KEY}
        )
        assert (result.exit_code, "FIELD=" in result.stderr) == (2, True)


@pytest.mark.parametrize("url", ["meshboard.example", "ftp://meshboard.example", "http://"])
def test_refuses_what_is_no_address(tmp_path: Path, url: str):
    (tmp_path / "a").write_text(lines(1))
    result = CliRunner().invoke(main, ["send", str(tmp_path / "a"), "--url", url], env={KEY_VARIABLE: KEY})
    assert (result.exit_code, "is no address" in result.stderr) == (2, True)
