"""The audit log: what happened that matters to security. Rows are added in the transaction of the act."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import structlog
from sqlalchemy.ext.asyncio import AsyncSession
from uuid_utils.compat import uuid7

from services.auth_svc.models import AuditEntryRow
from services.auth_svc.origins import Origin
from services.chassis import auth

log = structlog.get_logger("audit", log="audit")

DONE, REFUSED = "DONE", "REFUSED"


def record(
    session: AsyncSession,
    kind: str,
    origin: Origin,
    now: datetime,
    *,
    reason: str = "",
    actor_id: str | None = None,
    subject_id: str = "",
    workspace_id: str | None = None,
    session_id: str | None = None,
    **details: str | int | bool | list[str],
) -> None:
    """Adds an entry of this kind, such as `session.begun`.

    A `reason`, that of the error, says that the act was refused. Who acts, in which session and workspace, is the
    caller if nothing else is said. Details hold no secrets and no addresses of mail.
    """
    claims = auth.caller().claims
    if actor_id is None:
        actor_id = claims.user_id if claims else ""
    if session_id is None:
        session_id = claims.session_id if claims else ""
    if workspace_id is None:
        workspace_id = auth.caller().workspace or (claims.workspace_id if claims else "")
    entry: dict[str, Any] = {
        "kind": kind,
        "outcome": REFUSED if reason else DONE,
        "reason": reason,
        "actor_id": actor_id,
        "impersonator_id": claims.impersonator_id if claims else "",
        "subject_id": subject_id,
        "workspace_id": workspace_id or None,
        "session_id": session_id,
        "address": origin.address,
        "details": details,
    }
    session.add(AuditEntryRow(audit_entry_id=str(uuid7()), time=now, **entry))
    log.info(kind, **{name: value for name, value in entry.items() if name != "kind"})
