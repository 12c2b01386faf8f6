"""What a user may do in a workspace, and how a change of it is made known.

Every change of rights first locks the row of its workspace. So changes of one workspace come one after the other, and
what a change has checked still holds when it commits.
"""

from meshboard.user.v1 import events_pb2
from sqlalchemy import Uuid, bindparam, select, text, update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from services.chassis import errors, outbox
from services.chassis.permissions import RESERVED, permission_set
from services.chassis.rights import PERMISSIONS, ROLES, Fetch, Rights
from services.user_svc.models import Workspace

_GIVABLE = PERMISSIONS - RESERVED

# One statement sees one state: the version is never newer than the roles and the teams that it stands for.
_RIGHTS = text("""
    WITH RECURSIVE above (team_id, parent_team_id) AS (
        SELECT team_id, parent_team_id
        FROM team_members JOIN teams USING (workspace_id, team_id)
        WHERE workspace_id = :workspace_id AND user_id = :user_id
      UNION
        SELECT teams.team_id, teams.parent_team_id
        FROM above JOIN teams ON teams.workspace_id = :workspace_id AND teams.team_id = above.parent_team_id
    )
    SELECT role, rights_version, require_second_factor, ARRAY(SELECT team_id::text FROM above),
        (SELECT json_object_agg(name, permissions) FROM roles WHERE workspace_id = :workspace_id)
    FROM members JOIN workspaces USING (workspace_id)
    WHERE workspace_id = :workspace_id AND user_id = :user_id
""").bindparams(
    bindparam("workspace_id", type_=Uuid(as_uuid=False)), bindparam("user_id", type_=Uuid(as_uuid=False))
)


def rights_of(db: async_sessionmaker[AsyncSession]) -> Fetch:
    """Reads rights from the tables; raises NOT_FOUND for who is not a member."""

    async def fetch(user_id: str, workspace_id: str) -> Rights:
        async with db() as session:
            found = await session.execute(_RIGHTS, {"user_id": user_id, "workspace_id": workspace_id})
        row = found.one_or_none()
        if row is None:
            raise errors.not_found(
                "WORKSPACE_NOT_FOUND", "There is no such workspace.", workspace_id=workspace_id
            )
        role, version, second_factor_required, team_ids, custom = row
        roles = {
            # Without what an older or newer version of this code calls a permission.
            name: permission_set(tuple(sorted(_GIVABLE.intersection(permissions))))
            for name, permissions in (custom or {}).items()
        }
        return Rights(
            user_id,
            workspace_id,
            role,
            ROLES.get(role) or roles.get(role, frozenset()),
            frozenset(team_ids),
            version,
            second_factor_required,
            roles=roles,
        )

    return fetch


async def lock_rights(session: AsyncSession, workspace_id: str) -> None:
    """Has other changes of this workspace's rights wait for the end of the transaction."""
    # NO KEY UPDATE, so that rows which refer to the workspace can be inserted meanwhile.
    await session.execute(
        select(Workspace.workspace_id)
        .where(Workspace.workspace_id == workspace_id)
        .with_for_update(key_share=True)
    )


async def announce_rights(session: AsyncSession, workspace_id: str) -> None:
    """Gives the rights of the workspace a new version, and tells everyone when the transaction commits."""
    version = await session.execute(
        update(Workspace)
        .where(Workspace.workspace_id == workspace_id)
        .values(rights_version=Workspace.rights_version + 1)
        .returning(Workspace.rights_version)
    )
    outbox.add(
        session,
        events_pb2.RightsChanged(workspace_id=workspace_id, version=version.scalar_one()),
        workspace_id=workspace_id,
    )
