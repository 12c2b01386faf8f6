"""Apart from the others: both pairs of services take the events of each other's people, whose mails then never come."""

from tests.auth_svc.conftest import Services, bearer, new_email
from tests.auth_svc.test_sign_up_by_invitation import INVALID, sign_up
from tests.auth_svc.test_verify_email import strict, verify
from tests.harness import refused
from tests.mailbox import Mailbox

__all__ = ["strict"]  # the fixture


async def test_works_where_addresses_must_be_verified_first(strict: Services, mailbox: Mailbox):
    owner_email, email = new_email(), new_email()
    await strict.sign_up(owner_email)
    owner = await verify(strict, await mailbox.token(owner_email, "sign-up"))
    token = await strict.invite(owner.workspace.workspace_id, email, bearer(owner.access_token))
    signed_up = await sign_up(strict, email, token)
    assert signed_up.workspace.workspace_id == owner.workspace.workspace_id
    assert signed_up.access_token
    for token in ("mbi_" + "A" * 64, "x"):
        assert await refused(sign_up(strict, owner_email, token)) == INVALID, "nothing is told of accounts"
