"""user_svc: `python -m services.user_svc`."""

from functools import partial

from meshboard.auth.v1.events_pb2 import AccountDiscarded, EmailChanged, SignedIn
from meshboard.auth.v1.internal_account_service_pb2_grpc import InternalAccountServiceStub
from meshboard.auth.v1.internal_auth_service_pb2_grpc import InternalAuthServiceStub
from meshboard.user.v1.avatar_service_pb2_grpc import add_AvatarServiceServicer_to_server
from meshboard.user.v1.erasure_service_pb2_grpc import add_ErasureServiceServicer_to_server
from meshboard.user.v1.events_pb2 import ProfileUpdated, UserErased, UserErasureRequested, UserUpdated
from meshboard.user.v1.internal_user_service_pb2_grpc import add_InternalUserServiceServicer_to_server
from meshboard.user.v1.invitation_service_pb2_grpc import add_InvitationServiceServicer_to_server
from meshboard.user.v1.managed_user_service_pb2_grpc import add_ManagedUserServiceServicer_to_server
from meshboard.user.v1.profile_service_pb2_grpc import add_ProfileServiceServicer_to_server
from meshboard.user.v1.role_service_pb2_grpc import add_RoleServiceServicer_to_server
from meshboard.user.v1.team_service_pb2_grpc import add_TeamServiceServicer_to_server
from meshboard.user.v1.user_service_pb2 import GetMeResponse
from meshboard.user.v1.user_service_pb2_grpc import add_UserServiceServicer_to_server
from meshboard.user.v1.workspace_service_pb2_grpc import add_WorkspaceServiceServicer_to_server

from services.chassis import auth, db, trust
from services.chassis.access import Access
from services.chassis.bus import Bus
from services.chassis.cache import Cache, CachedMessages
from services.chassis.clients import Peer
from services.chassis.db import new_id
from services.chassis.erasures import erasing
from services.chassis.inbox import Repeatable, consume
from services.chassis.indexing import Indexer
from services.chassis.outbox import Relay
from services.chassis.paging import Pages
from services.chassis.process import until_stopped
from services.chassis.search_engines import engine_of
from services.chassis.server import Server, contracts, main
from services.chassis.settings import Settings
from services.chassis.times import now
from services.user_svc import expirations
from services.user_svc.avatars import AvatarServicer
from services.user_svc.consumers import (
    on_account_discarded,
    on_email_changed,
    on_profile_updated,
    on_signed_in,
    on_user_updated,
)
from services.user_svc.erasures import ErasureServicer, Receipts, erase_user, keep_asking
from services.user_svc.internal_users import InternalUserServicer
from services.user_svc.invitations import Invitations, InvitationServicer, erase_invitations
from services.user_svc.managed_users import ManagedUserServicer
from services.user_svc.member_search import CORPUS, MemberSearch
from services.user_svc.permissions import catalogue
from services.user_svc.pictures import Pictures
from services.user_svc.profiles import ProfileServicer
from services.user_svc.rights import rights_of
from services.user_svc.roles import RoleServicer
from services.user_svc.teams import TeamServicer
from services.user_svc.users import UserServicer
from services.user_svc.workspaces import WorkspaceServicer


async def serve(settings: Settings) -> None:
    """Serves until the process is told to stop."""
    await db.migrate(settings.postgres_url, "services.user_svc")
    sessions = db.connect(settings.postgres_url, settings.postgres_pool_size)
    bus = await Bus.connect(settings.nats_url, "user")
    cache = await Cache.connect(settings.redis_url, bus, "user")
    tokens = auth.ServiceTokens("user", settings.keys_dir)
    auth_peer = Peer("auth", settings.auth_address, tokens)

    fetch_rights = rights_of(sessions)
    rights = await trust.follow_rights(bus, fetch_rights)
    revocations = await trust.follow_revocations(bus, *trust.sessions_of(auth_peer))
    verifier = await trust.follow_keys(bus, settings.public_url, trust.keys_of(auth_peer))
    access = Access(verifier, tokens, revocations, rights)

    pages = Pages(settings.derived_key("page tokens"))
    me = CachedMessages(cache, "me", GetMeResponse)
    engine = engine_of(settings, sessions)
    members = MemberSearch(sessions, engine)
    users = UserServicer(sessions, me, now, pages, members)
    profiles = ProfileServicer(sessions, me, now)
    pictures = Pictures()
    avatars = AvatarServicer(sessions, pictures, me, now)
    accounts = auth_peer.stub(InternalAccountServiceStub)
    managed_users = ManagedUserServicer(sessions, accounts, me, now, new_id)
    erasures = ErasureServicer(sessions, me, now, new_id)
    workspaces = WorkspaceServicer(sessions, pages, now, new_id)
    teams = TeamServicer(sessions, pages, now, new_id)
    roles = RoleServicer(sessions, pages, catalogue(contracts()), now)
    invitations = Invitations(settings.derived_keys("invitations"), now)
    addresses = auth_peer.stub(InternalAuthServiceStub)
    invitation_service = InvitationServicer(sessions, invitations, addresses, pages, now, new_id)
    internal_users = InternalUserServicer(sessions, fetch_rights, me, invitations, now, members)
    server = Server(
        settings,
        [
            lambda server: add_UserServiceServicer_to_server(users, server),
            lambda server: add_ProfileServiceServicer_to_server(profiles, server),
            lambda server: add_AvatarServiceServicer_to_server(avatars, server),
            lambda server: add_ManagedUserServiceServicer_to_server(managed_users, server),
            lambda server: add_ErasureServiceServicer_to_server(erasures, server),
            lambda server: add_WorkspaceServiceServicer_to_server(workspaces, server),
            lambda server: add_TeamServiceServicer_to_server(teams, server),
            lambda server: add_RoleServiceServicer_to_server(roles, server),
            lambda server: add_InvitationServiceServicer_to_server(invitation_service, server),
            lambda server: add_InternalUserServiceServicer_to_server(internal_users, server),
        ],
        access,
        ready=[lambda: db.ready(sessions)],
    )
    try:
        await server.start()
        await until_stopped(
            Relay(settings.postgres_url, bus, "user").run(),
            Indexer(settings.postgres_url, sessions, engine, CORPUS).run(),
            keep_asking(sessions, now),
            consume(
                bus,
                sessions,
                "user",
                {
                    SignedIn: Repeatable(partial(on_signed_in, sessions)),
                    AccountDiscarded: on_account_discarded,
                    EmailChanged: on_email_changed,
                    UserUpdated: partial(on_user_updated, me),
                    ProfileUpdated: partial(on_profile_updated, me),
                    UserErasureRequested: erasing("user", erase_invitations, erase_user),
                    UserErased: Receipts(tokens, now).on_user_erased,
                },
            ),
            expirations.run(sessions, now),
        )
    finally:
        await server.stop()
        pictures.close()
        await auth_peer.close()
        await engine.close()
        await cache.close()
        await bus.close()
        await db.engine(sessions).dispose()


if __name__ == "__main__":
    main("user", Settings, serve)
