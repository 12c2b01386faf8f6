"""Mails: written in the transaction of what they tell, encrypted until they are sent, and sent by whoever is free."""

import json
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.ext.asyncio import AsyncSession
from uuid_utils.compat import uuid7

from services.auth_svc.models import Mail
from services.chassis.sealing import Seals

_CONTEXT = "mails"


@dataclass(frozen=True)
class Mails:
    """`seals` encrypt mails while they wait."""

    seals: Seals

    def add(self, session: AsyncSession, now: datetime, to: str, subject: str, text: str) -> None:
        """Has a mail sent once the transaction has committed; to "" it is thrown away, at the same cost."""
        content = json.dumps({"to": to, "subject": subject, "text": text})
        session.add(
            Mail(
                mail_id=str(uuid7()),
                sealed_mail=self.seals.seal(content.encode(), _CONTEXT),
                create_time=now,
                try_time=now,
            )
        )
