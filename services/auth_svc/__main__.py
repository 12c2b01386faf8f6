"""auth_svc: `python -m services.auth_svc`."""

import asyncio
from functools import partial

from meshboard.auth.v1.access_service_pb2_grpc import add_AccessServiceServicer_to_server
from meshboard.auth.v1.account_service_pb2_grpc import add_AccountServiceServicer_to_server
from meshboard.auth.v1.audit_service_pb2_grpc import add_AuditServiceServicer_to_server
from meshboard.auth.v1.auth_service_pb2_grpc import add_AuthServiceServicer_to_server
from meshboard.auth.v1.factor_service_pb2_grpc import add_FactorServiceServicer_to_server
from meshboard.auth.v1.impersonation_service_pb2_grpc import add_ImpersonationServiceServicer_to_server
from meshboard.auth.v1.internal_account_service_pb2_grpc import (
    add_InternalAccountServiceServicer_to_server,
)
from meshboard.auth.v1.internal_auth_service_pb2 import CheckSessionResponse
from meshboard.auth.v1.internal_auth_service_pb2_grpc import add_InternalAuthServiceServicer_to_server
from meshboard.auth.v1.service_account_service_pb2_grpc import add_ServiceAccountServiceServicer_to_server
from meshboard.auth.v1.session_service_pb2_grpc import add_SessionServiceServicer_to_server
from meshboard.auth.v1.usable_key_pb2 import UsableKey
from meshboard.user.v1.events_pb2 import (
    InvitationCreated,
    InvitationResent,
    MemberRemoved,
    MemberUpdated,
    RoleUpdated,
    UserCreated,
    UserErasureRequested,
    UserStateChanged,
    UserUpdated,
    WorkspaceDeleted,
)
from meshboard.user.v1.internal_grant_service_pb2_grpc import InternalGrantServiceStub
from meshboard.user.v1.internal_user_service_pb2_grpc import InternalUserServiceStub
from redis.asyncio import Redis

from services.auth_svc import mails as mail_sending
from services.auth_svc import reaper
from services.auth_svc.access import AccessServicer
from services.auth_svc.accounts import AccountServicer
from services.auth_svc.accounts_of_users import AccountsOfUsers
from services.auth_svc.audit_chain import Sealer, chain_keys
from services.auth_svc.audit_entries import AuditServicer
from services.auth_svc.audited_events import audited
from services.auth_svc.consumers import on_user_updated
from services.auth_svc.factors import FactorServicer
from services.auth_svc.guesses import Guesses
from services.auth_svc.impersonations import ImpersonationServicer
from services.auth_svc.internal_accounts import InternalAccountServicer
from services.auth_svc.internal_sessions import InternalAuthServicer
from services.auth_svc.invitation_mails import InvitationMails
from services.auth_svc.mails import Mails
from services.auth_svc.memberships import Memberships
from services.auth_svc.own_sessions import SessionServicer
from services.auth_svc.password_resets import PasswordResets
from services.auth_svc.second_factors import SecondFactors
from services.auth_svc.service_accounts import ServiceAccountServicer
from services.auth_svc.sessions import exchange_newest, sessions_in_table
from services.auth_svc.settings import AuthSettings
from services.auth_svc.sign_ins import AuthServicer
from services.auth_svc.sign_ups import SignUps
from services.auth_svc.signing_keys import SigningKeys
from services.auth_svc.tickets import Tickets
from services.auth_svc.tokens import Tokens
from services.auth_svc.usable_keys import REMEMBER_SECONDS, UsableKeys
from services.chassis import auth, completions, db, trust
from services.chassis.access import Access
from services.chassis.bus import Bus
from services.chassis.cache import Cache, CachedMessages
from services.chassis.clients import Peer
from services.chassis.db import new_id
from services.chassis.erasures import erasing
from services.chassis.inbox import consume
from services.chassis.outbox import Relay
from services.chassis.paging import Pages
from services.chassis.passwords import Passwords
from services.chassis.process import until_stopped
from services.chassis.sealing import Seals
from services.chassis.server import Server, main
from services.chassis.times import now
from services.chassis.together import Together


async def serve(settings: AuthSettings) -> None:  # noqa: PLR0915 - the composition root
    """Serves until the process is told to stop."""
    await db.migrate(settings.postgres_url, "services.auth_svc")
    sessions = db.connect(settings.postgres_url, settings.postgres_pool_size)
    keys = SigningKeys(sessions, settings, now)
    await keys.load()
    bus = await Bus.connect(settings.nats_url, "auth")
    cache = await Cache.connect(settings.redis_url, bus, "auth")
    redis = Redis.from_url(settings.redis_url, socket_timeout=1, socket_connect_timeout=1)
    service_tokens = auth.ServiceTokens("auth", settings.keys_dir)
    peers = {
        "user": Peer("user", settings.user_address, service_tokens),
        "dashboard": Peer("dashboard", settings.dashboard_address, service_tokens),
        "analytics": Peer("analytics", settings.analytics_address, service_tokens),
    }
    users = peers["user"].stub(InternalUserServiceStub)

    fetch_rights = trust.rights_of(peers["user"])
    rights = await trust.follow_rights(bus, fetch_rights)
    revocations = await trust.follow_revocations(bus, *sessions_in_table(sessions, settings, now))
    verifier = await trust.follow_keys(bus, settings.public_url, keys.public_keys)
    await keys.listen(bus)
    access = Access(verifier, service_tokens, revocations, rights, recent_seconds=settings.recent_seconds)

    passwords = Passwords(settings)
    # Short, because it bounds how long a revocation can be missed when NATS and Redis are both away.
    alive = CachedMessages(cache, "alive", CheckSessionResponse, ttl_seconds=10)
    guesses = Guesses(redis, settings, settings.derived_key("device-tokens"))
    tickets = Tickets(Seals(settings.derived_keys("tickets")), now)
    mails = Mails(Seals(settings.derived_keys("mails")))
    second_factors = SecondFactors(Seals(settings.derived_keys("factors")), settings, mails, now, new_id)
    tokens = Tokens(settings, keys, guesses, settings.derived_keys("refresh-tokens"), now)
    sign_ups = SignUps(sessions, settings, users, passwords, tickets, mails, now, new_id)
    sign_ins = AuthServicer(
        db=sessions,
        settings=settings,
        users=users,
        sign_ups=sign_ups,
        passwords=passwords,
        guesses=guesses,
        tickets=tickets,
        second_factors=second_factors,
        refreshes=Together(partial(exchange_newest, sessions, settings, now), seconds=settings.call_seconds),
        tokens=tokens,
        keys=keys,
        alive=alive,
        now=now,
    )
    pages = Pages(settings.derived_key("page tokens"))
    own_sessions = SessionServicer(sessions, pages, alive, now)
    factors = FactorServicer(
        db=sessions,
        settings=settings,
        pages=pages,
        guesses=guesses,
        tickets=tickets,
        second_factors=second_factors,
        tokens=tokens,
        alive=alive,
        now=now,
    )
    accounts = AccountServicer(
        db=sessions,
        settings=settings,
        sign_ups=sign_ups,
        passwords=passwords,
        guesses=guesses,
        tickets=tickets,
        mails=mails,
        second_factors=second_factors,
        tokens=tokens,
        alive=alive,
        now=now,
        new_id=new_id,
    )
    usable_keys = UsableKeys(
        sessions, CachedMessages(cache, "keys", UsableKey, ttl_seconds=REMEMBER_SECONDS), alive
    )
    service_accounts = ServiceAccountServicer(
        db=sessions,
        users=users,
        guesses=guesses,
        tokens=tokens,
        pages=pages,
        keys=usable_keys,
        now=now,
        new_id=new_id,
    )
    impersonations = ImpersonationServicer(sessions, settings, fetch_rights, tokens, now)
    memberships = Memberships(usable_keys, now)
    invitation_mails = InvitationMails(settings, users, mails, now)
    internal_sessions = InternalAuthServicer(sessions, settings, alive, now)
    internal_accounts = InternalAccountServicer(sessions, now)
    accounts_of_users = AccountsOfUsers(settings, tickets, mails, alive, now)
    audit_entries = AuditServicer(sessions, pages)
    access_answers = AccessServicer(
        rights,
        users,
        {name: peers[name].stub(InternalGrantServiceStub) for name in ("dashboard", "analytics")},
        pages,
    )
    server = Server(
        settings,
        [
            lambda server: add_AuthServiceServicer_to_server(sign_ins, server),
            lambda server: add_SessionServiceServicer_to_server(own_sessions, server),
            lambda server: add_FactorServiceServicer_to_server(factors, server),
            lambda server: add_AccountServiceServicer_to_server(accounts, server),
            lambda server: add_ServiceAccountServiceServicer_to_server(service_accounts, server),
            lambda server: add_ImpersonationServiceServicer_to_server(impersonations, server),
            lambda server: add_InternalAuthServiceServicer_to_server(internal_sessions, server),
            lambda server: add_InternalAccountServiceServicer_to_server(internal_accounts, server),
            lambda server: add_AuditServiceServicer_to_server(audit_entries, server),
            lambda server: add_AccessServiceServicer_to_server(access_answers, server),
        ],
        access,
        ready=[lambda: db.ready(sessions)],
    )
    passwords.mind_calls(server.calls, lambda short: completions.let_gather(not short))
    try:
        await server.start()
        completions.let_gather()
        await until_stopped(
            Relay(settings.postgres_url, bus, "auth").run(),
            consume(
                bus,
                sessions,
                "auth",
                audited(
                    {
                        UserUpdated: on_user_updated,
                        UserCreated: accounts_of_users.on_user_created,
                        UserStateChanged: accounts_of_users.on_user_state_changed,
                        UserErasureRequested: erasing("auth", accounts_of_users.erase),
                        MemberRemoved: memberships.on_member_removed,
                        MemberUpdated: memberships.on_member_updated,
                        RoleUpdated: memberships.on_role_updated,
                        WorkspaceDeleted: memberships.on_workspace_deleted,
                        InvitationCreated: invitation_mails.on_invitation_created,
                        InvitationResent: invitation_mails.on_invitation_resent,
                    }
                ),
            ),
            Sealer(sessions, chain_keys(settings), now).run(),
            keys.follow(),
            mail_sending.run(
                sessions, settings, mails, PasswordResets(settings, tickets, mails, now).write, now
            ),
            reaper.run(sessions, settings, users, now),
        )
    finally:
        await server.stop()
        await usable_keys.close()
        passwords.close()
        await asyncio.gather(*(peer.close() for peer in peers.values()))
        await redis.aclose()
        await cache.close()
        await bus.close()
        await db.engine(sessions).dispose()


if __name__ == "__main__":
    main("auth", AuthSettings, serve)
