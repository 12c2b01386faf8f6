"""What the operator of a mesh does to its accounts, keys and audit log: `python -m services.auth_svc.operator`.

It needs the settings of auth_svc and its database, no running service. Answers go to stdout, talk to stderr. The exit
code is 0 when all is done or well, 1 when damage is found or something is refused, 2 when the end of the audit log
could not be checked, 3 when Postgres does not answer.
"""

import argparse
import asyncio
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import structlog
from google.protobuf.json_format import MessageToDict
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.auth_svc import audit, audit_chain, resealing
from services.auth_svc.internal_sessions import set_disabled
from services.auth_svc.models import Account, AuditEntryRow, AuditSeal
from services.auth_svc.origins import Origin
from services.auth_svc.settings import AuthSettings
from services.auth_svc.signing_keys import LastKey, SigningKeys
from services.chassis import db, outbox
from services.chassis.bus import Bus, BusError
from services.chassis.emails import email_key
from services.chassis.sealing import WrongKey
from services.chassis.settings import load
from services.chassis.times import now

OPERATOR = "operator"
DONE, DAMAGED, TAIL_UNKNOWN, AWAY = 0, 1, 2, 3
REFUSED = 1
_CHUNK = 500
_STATEMENT_SECONDS = 300

Sessions = async_sessionmaker[AsyncSession]


def say(line: str) -> None:
    """Talk."""
    print(line, file=sys.stderr)


def answer(value: Any) -> None:
    """An answer that a program reads."""
    print(json.dumps(value, indent=2))


async def verify(sessions: Sessions, settings: AuthSettings, arguments: argparse.Namespace) -> int:
    """Holds the audit log against its chain."""
    try:
        bus = await Bus.connect(settings.nats_url, "operator", timeout=5)
    except BusError:
        bus = None
    try:
        report = await audit_chain.verify(sessions, audit_chain.chain_keys(settings), bus)
    finally:
        if bus is not None:
            await bus.close()
    good = not report.problem_count and not report.tail_unknown
    if arguments.output == "json":
        answer({**dataclasses.asdict(report), "seal": report.seal.hex(), "good": good})
    else:
        for problem in report.problems:
            print(problem)
        if report.problem_count > len(report.problems):
            print(f"… and {report.problem_count - len(report.problems)} more")
        print(
            f"{report.positions} positions, {report.heads} published heads, {report.problem_count} problems"
        )
        if report.tail_unknown:
            print(f"Whether entries at the end were removed cannot be told: {report.tail_unknown}")
    if report.problem_count:
        return DAMAGED
    return TAIL_UNKNOWN if report.tail_unknown else DONE


async def export(sessions: Sessions, settings: AuthSettings, arguments: argparse.Namespace) -> int:
    """Writes sealed entries in the order of the chain, one a line, each with its seal."""
    conditions = [AuditSeal.position > 0]
    if arguments.since:
        conditions.append(AuditEntryRow.time >= arguments.since)
    if arguments.until:
        conditions.append(AuditEntryRow.time < arguments.until)
    if arguments.workspace:
        conditions.append(AuditEntryRow.workspace_id == arguments.workspace)
    last = 0
    while True:
        async with sessions() as session:
            pairs = (
                await session.execute(
                    select(AuditEntryRow, AuditSeal)
                    .join(AuditSeal, AuditSeal.audit_entry_id == AuditEntryRow.audit_entry_id)
                    .where(*conditions, AuditSeal.position > last)
                    .order_by(AuditSeal.position)
                    .limit(_CHUNK)
                )
            ).all()
        for row, seal in pairs:
            entry = MessageToDict(audit.entry_to_pb(row, seal.position))
            # int64 is text in protobuf's JSON; a position is a number to whoever sorts by it.
            print(json.dumps({**entry, "position": seal.position, "seal": seal.seal.hex()}))
        if len(pairs) < _CHUNK:
            return DONE
        last = pairs[-1][1].position


async def set_account(sessions: Sessions, settings: AuthSettings, arguments: argparse.Namespace) -> int:
    """Disables or enables an account, by its address."""
    disabled = arguments.command == "disable"
    async with sessions.begin() as session:
        account = await session.scalar(
            select(Account).where(
                Account.email_key == email_key(arguments.email), Account.activate_time.is_not(None)
            )
        )
        if account is None:
            say("No account has this address.")
            return REFUSED
        ended = await set_disabled(session, account.user_id, disabled, now(), Origin(), actor_id=OPERATOR)
    state = "disabled" if disabled else "enabled"
    if arguments.output == "json":
        answer({"user_id": account.user_id, "state": state, "ended_sessions": len(ended or [])})
    else:
        print(f"{state}: {account.user_id}, {len(ended or [])} sessions ended")
    return DONE


async def list_keys(sessions: Sessions, settings: AuthSettings, arguments: argparse.Namespace) -> int:
    """Shows the signing keys."""
    keys = await SigningKeys(sessions, settings, now).stored()
    present = now()
    signs = max((key.activate_time for key in keys if key.activate_time <= present), default=None)

    def state_of(activate_time: datetime) -> str:
        if activate_time > present:
            return "next"
        return "signs" if activate_time == signs else "verifies"

    shown = [
        {
            "key_id": key.key_id,
            "state": state_of(key.activate_time),
            "activate_time": key.activate_time.isoformat(timespec="seconds"),
        }
        for key in keys
    ]
    if arguments.output == "json":
        answer({"keys": shown})
    for key in shown if arguments.output == "text" else []:
        print(f"{key['key_id']}  {key['state']:8}  from {key['activate_time']}")
    return DONE


async def rotate_keys(sessions: Sessions, settings: AuthSettings, arguments: argparse.Namespace) -> int:
    """Makes the next signing key, unless there is one."""
    async with sessions.begin() as session:
        key, is_new = await SigningKeys(sessions, settings, now).rotate(session)
        if is_new:
            audit.record(
                session, "signing_key.created", Origin(), now(), actor_id=OPERATOR, key_id=key.key_id
            )
    signs_from = key.activate_time.isoformat(timespec="seconds")
    if not is_new:
        say("The next key was there already.")
    if arguments.output == "json":
        answer({"key_id": key.key_id, "activate_time": signs_from, "is_new": is_new})
    else:
        print(f"{key.key_id} signs from {signs_from}")
    return DONE


async def retire_key(sessions: Sessions, settings: AuthSettings, arguments: argparse.Namespace) -> int:
    """Takes a signing key away at once."""
    try:
        async with sessions.begin() as session:
            successor = await SigningKeys(sessions, settings, now).retire(session, arguments.key_id)
            if successor is not None:
                audit.record(
                    session,
                    "signing_key.retired",
                    Origin(),
                    now(),
                    actor_id=OPERATOR,
                    key_id=arguments.key_id,
                )
    except LastKey:
        say("This is the only signing key. Make the next one first: keys rotate")
        return REFUSED
    if successor is None:
        say("There is no such signing key: see keys list")
        return REFUSED
    if arguments.output == "json":
        answer({"retired": arguments.key_id, "signs": successor.key_id})
    else:
        print(f"{arguments.key_id} is gone, {successor.key_id} signs")
    return DONE


async def reseal(sessions: Sessions, settings: AuthSettings, arguments: argparse.Namespace) -> int:
    """Encrypts anew what an older master key has encrypted."""
    counts = await resealing.reseal(sessions, settings)
    resealed = {table: count.resealed for table, count in counts.items()}
    if any(resealed.values()):
        async with sessions.begin() as session:
            audit.record(
                session,
                "secrets.resealed",
                Origin(),
                now(),
                actor_id=OPERATOR,
                tables=[f"{table} {number}" for table, number in resealed.items()],
            )
    if arguments.output == "json":
        answer({table: dataclasses.asdict(count) for table, count in counts.items()})
    else:
        for table, count in counts.items():
            print(
                f"{table:14}{count.resealed} sealed anew, {count.current} were current,"
                f" {count.unreadable} cannot be opened"
            )
    return REFUSED if any(count.unreadable for count in counts.values()) else DONE


Command = Callable[[Sessions, AuthSettings, argparse.Namespace], Awaitable[int]]


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def parser() -> argparse.ArgumentParser:
    """Reads the command line: a noun, a verb, and what the verb needs."""
    result = argparse.ArgumentParser(prog="python -m services.auth_svc.operator", description=__doc__)
    nouns = result.add_subparsers(required=True)

    def noun(name: str) -> Any:
        return nouns.add_parser(name).add_subparsers(dest="command", required=True)

    def verb(verbs: Any, name: str, run: Command, *, output: bool = True) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = verbs.add_parser(name, help=run.__doc__)
        made.set_defaults(run=run)
        if output:
            made.add_argument("-o", "--output", choices=("text", "json"), default="text")
        return made

    of_audit, of_accounts, of_keys = noun("audit"), noun("accounts"), noun("keys")
    verb(of_audit, "verify", verify)
    exporting = verb(of_audit, "export", export, output=False)
    exporting.add_argument("--since", type=_time)
    exporting.add_argument("--until", type=_time)
    exporting.add_argument("--workspace", type=lambda text: str(UUID(text)))
    for name in ("disable", "enable"):
        verb(of_accounts, name, set_account).add_argument("email")
    verb(of_keys, "list", list_keys)
    verb(of_keys, "rotate", rotate_keys)
    verb(of_keys, "retire", retire_key).add_argument("key_id")
    verb(of_keys, "reseal", reseal)
    return result


async def run(settings: AuthSettings, arguments: argparse.Namespace) -> int:
    """Runs one command, and gives its exit code."""
    outbox.actor.set(OPERATOR)
    sessions = db.connect(settings.postgres_url, 2, statement_timeout_seconds=_STATEMENT_SECONDS)
    try:
        code: int = await arguments.run(sessions, settings, arguments)
        return code
    except WrongKey as error:
        say(f"{error}. Is the line of the older master key missing in the file?")
        return REFUSED
    except BrokenPipeError:  # `audit export | head`: nobody reads on, nor what is still buffered
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (OSError, TimeoutError, SQLAlchemyError) as error:
        if not db.is_away(error):
            raise
        say("PostgreSQL does not answer: start the mesh first.")
        return AWAY
    finally:
        await db.engine(sessions).dispose()


def main() -> None:
    """Ends with the command's exit code."""
    arguments = parser().parse_args()
    # stdout is for answers; what was done is in the audit log, and what failed is said plainly.
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    raise SystemExit(asyncio.run(run(load(AuthSettings), arguments)))


if __name__ == "__main__":
    main()
