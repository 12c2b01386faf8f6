"""The mails of invitations: user_svc has the invitations, mails are sent from here."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from meshboard.user.v1.events_pb2 import InvitationCreated, InvitationResent
from meshboard.user.v1.internal_user_service_pb2 import GetInvitationMailRequest
from meshboard.user.v1.internal_user_service_pb2_grpc import InternalUserServiceStub
from sqlalchemy.ext.asyncio import AsyncSession

from services.auth_svc import links
from services.auth_svc.mails import Mails
from services.auth_svc.settings import AuthSettings
from services.chassis import errors


@dataclass(frozen=True)
class InvitationMails:
    """Consumes events of invitations. `users` gives the links, which stand in no event."""

    settings: AuthSettings
    users: InternalUserServiceStub
    mails: Mails
    now: Callable[[], datetime]

    async def on_invitation_created(self, session: AsyncSession, event: InvitationCreated) -> None:
        """Mails the link."""
        await self._mail(session, event.invitation.workspace_id, event.invitation.invitation_id)

    async def on_invitation_resent(self, session: AsyncSession, event: InvitationResent) -> None:
        """Mails the new link."""
        await self._mail(session, event.workspace_id, event.invitation_id)

    async def _mail(self, session: AsyncSession, workspace_id: str, invitation_id: str) -> None:
        # Asked before the handler has locked anything but the event's own row in the inbox.
        try:
            mail = await self.users.GetInvitationMail(
                GetInvitationMailRequest(workspace_id=workspace_id, invitation_id=invitation_id)
            )
        except errors.Error as error:
            if error.reason == "INVITATION_INVALID":  # answered or revoked meanwhile
                return
            raise
        self.mails.add(session, self.now(), mail.email, *links.invitation(self.settings, mail))
