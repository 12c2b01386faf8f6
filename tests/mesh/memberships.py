"""How people become members of a workspace in tests of the whole mesh: by the link in their mail."""

from __future__ import annotations

from typing import Any

from tests.mesh.people import Person
from tests.mesh.test_account import link_in, mail_to
from tests.parts import Mesh


async def invite(mesh: Mesh, owner: Person, guest: Person, role: str = "viewer") -> str:
    """Invites a person to the owner's workspace, and gives the token out of the mail."""
    await owner.post(f"/v1/workspaces/{owner.workspace_id}/invitations", {"email": guest.email, "role": role})
    return link_in(await mail_to(mesh, guest, "You are invited")).partition("#invitation=")[2]


async def admit(mesh: Mesh, owner: Person, guest: Person, role: str = "viewer") -> Any:
    """Makes a person who has an account a member of the owner's workspace."""
    if not (await guest.get("/v1/auth/account"))["account"]["emailVerified"]:
        link = link_in(await mail_to(mesh, guest, "Confirm your address"))
        await guest.post("/v1/auth:verifyEmail", {"token": link.partition("=")[2]})
    return await guest.post("/v1/invitations:accept", {"token": await invite(mesh, owner, guest, role)})
