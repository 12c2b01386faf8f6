"""The audit log: what happened that matters to security. Rows are added in the transaction of the act."""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple

import structlog
from meshboard.auth.v1.audit_pb2 import AuditEntry
from uuid_utils.compat import uuid7

from services.auth_svc.models import AuditEntryRow, AuditUnsealed
from services.auth_svc.origins import Origin
from services.chassis import auth
from services.chassis.db import Adds
from services.chassis.times import timestamp_of

log = structlog.get_logger("audit", log="audit")

DONE, REFUSED = "DONE", "REFUSED"


class Entry(NamedTuple):
    """An entry that is read past the ORM; the fields are the columns of `AuditEntryRow`."""

    audit_entry_id: str
    time: datetime
    kind: str
    outcome: str
    reason: str
    actor_id: str
    impersonator_id: str
    subject_id: str
    workspace_id: str | None
    session_id: str
    address: str
    details: dict[str, Any]


def record(
    session: Adds,
    kind: str,
    origin: Origin,
    now: datetime,
    *,
    reason: str = "",
    actor_id: str | None = None,
    impersonator_id: str | None = None,
    subject_id: str = "",
    workspace_id: str | None = None,
    session_id: str | None = None,
    logged: bool = True,
    **details: str | int | bool | list[str],
) -> AuditEntryRow:
    """Adds an entry of this kind, such as `session.begun`, and logs it, unless that is left to a later `to_log`.

    A `reason`, that of the error, says that the act was refused. Who acts, in which session and workspace, is the
    caller if nothing else is said. Details hold no secrets and no addresses of mail.
    """
    caller = auth.caller()
    claims = caller.claims
    if actor_id is None:
        actor_id = claims.user_id if claims else f"service:{caller.service}" if caller.service else ""
    if impersonator_id is None:
        impersonator_id = claims.impersonator_id if claims else ""
    if session_id is None:
        session_id = claims.session_id if claims else ""
    if workspace_id is None:
        workspace_id = caller.workspace or (claims.workspace_id if claims else "")
    entry = AuditEntryRow(
        audit_entry_id=str(uuid7()),
        time=now,
        kind=kind,
        outcome=REFUSED if reason else DONE,
        reason=reason,
        actor_id=actor_id,
        impersonator_id=impersonator_id,
        subject_id=subject_id,
        workspace_id=workspace_id or None,
        session_id=session_id,
        address=origin.address,
        details=details,
    )
    session.add(entry)
    session.add(AuditUnsealed(audit_entry_id=entry.audit_entry_id))
    if logged:
        to_log(entry)
    return entry


def to_log(entry: AuditEntryRow) -> None:
    """Writes the entry to the log of the process."""
    log.info(
        entry.kind,
        outcome=entry.outcome,
        reason=entry.reason,
        actor_id=entry.actor_id,
        impersonator_id=entry.impersonator_id,
        subject_id=entry.subject_id,
        workspace_id=entry.workspace_id,
        session_id=entry.session_id,
        address=entry.address,
        details=entry.details,
    )


def entry_to_pb(row: AuditEntryRow | Entry, position: int | None) -> AuditEntry:
    """The entry at its position in the chain; None when it has none yet."""
    entry = AuditEntry(
        audit_entry_id=row.audit_entry_id,
        position=position or 0,
        time=timestamp_of(row.time),
        kind=row.kind,
        outcome=AuditEntry.Outcome.Value(row.outcome),
        reason=row.reason,
        actor_id=row.actor_id,
        impersonator_id=row.impersonator_id,
        subject_id=row.subject_id,
        workspace_id=row.workspace_id or "",
        session_id=row.session_id,
        address=row.address,
    )
    entry.details.update(row.details)
    return entry
