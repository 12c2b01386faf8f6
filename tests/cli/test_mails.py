"""The sink of mails, as a process and as a folder, and the command that shows them."""

import json
import os
import smtplib
import stat
import subprocess
import sys
from email.message import EmailMessage
from pathlib import Path

from click.testing import CliRunner

from cli import mails, parts
from cli.main import main
from cli.supervisor import Supervisor
from tests.parts import free_port


def mail(subject: str, to: str = "ada@example.org") -> EmailMessage:
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "meshboard@localhost", to, subject
    message.set_content("Open this link:\n\nhttp://127.0.0.1:8080/account#verify-email=mbt_x\n")
    return message


def shown(data: Path, *arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["mails", *arguments, "--data", str(data)])
    return result.exit_code, result.stdout, result.stderr


async def test_keeps_what_arrives_in_private(tmp_path: Path) -> None:
    folder, port = tmp_path / "mails", free_port()
    async with Supervisor([parts.mails(folder, port)], tmp_path):
        with smtplib.SMTP("127.0.0.1", port) as client:
            client.send_message(mail("One"))
            client.send_message(mail("Two"))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = list(folder.iterdir())
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert [landed.subject for landed in mails.read(folder)] == ["Two", "One"]


def test_listens_to_this_machine_alone(tmp_path: Path) -> None:
    argv = parts.mails(tmp_path, 8094).argv
    assert "--host" not in argv
    refused = subprocess.run(
        [sys.executable, "-m", "cli.mails", "--host", "0.0.0.0"],
        cwd=parts.mails(tmp_path, 8094).cwd,
        capture_output=True,
        check=False,
        env={**os.environ},
    )
    assert refused.returncode == 2


def test_the_newest_stay(tmp_path: Path) -> None:
    folder = parts.private_directory(tmp_path / "mails")
    for number in range(12):
        mails.keep(folder, mail(str(number)).as_bytes(), kept=10)
    assert [landed.subject for landed in mails.read(folder)] == [str(n) for n in range(11, 1, -1)]
    assert mails.KEPT == 500


def test_shows_them_newest_first(tmp_path: Path) -> None:
    folder = parts.private_directory(tmp_path / "mails")
    mails.keep(folder, mail("Older", "ada@example.org").as_bytes())
    mails.keep(folder, mail("Newer", "bob@example.org").as_bytes())
    code, output, said = shown(tmp_path)
    first, second = output.splitlines()
    assert (code, said) == (0, "")
    assert first.split()[0] == "1"
    assert first.split()[3:] == ["bob@example.org", "Newer"]
    assert second.split()[3:] == ["ada@example.org", "Older"]
    listed = json.loads(shown(tmp_path, "-o", "json")[1])
    assert [(each["to"], each["subject"]) for each in listed] == [
        ("bob@example.org", "Newer"),
        ("ada@example.org", "Older"),
    ]
    assert listed[0]["time"].endswith("+00:00")


def test_shows_one_whole(tmp_path: Path) -> None:
    folder = parts.private_directory(tmp_path / "mails")
    mails.keep(folder, mail("Hello").as_bytes().replace(b"\n", b"\r\n"))
    code, output, _ = shown(tmp_path, "show", "1")
    assert code == 0
    assert output.startswith("To: ada@example.org\nSubject: Hello\n\nOpen this link:\n")
    assert output.splitlines()[-1] == "http://127.0.0.1:8080/account#verify-email=mbt_x"
    told = json.loads(shown(tmp_path, "show", "1", "-o", "json")[1])
    assert "mbt_x" in told["text"]
    before = CliRunner().invoke(main, ["mails", "--data", str(tmp_path), "show", "1"])
    assert before.stdout == output
    code, output, said = shown(tmp_path, "show", "2")
    assert (code, output) == (1, "")
    assert "There are 1 mails" in said


def test_says_when_there_are_none(tmp_path: Path) -> None:
    code, output, said = shown(tmp_path)
    assert (code, output) == (0, "")
    assert "No mails" in said
    assert shown(tmp_path, "-o", "json")[1] == "[]\n"


def test_help_has_an_example() -> None:
    for words in (["mails", "--help"], ["mails", "show", "--help"]):
        assert "Example: ./dev mails show 1" in CliRunner().invoke(main, words).stdout
