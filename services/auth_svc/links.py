"""The mails that auth_svc writes, each as its subject and text.

Their links begin with the configured address of the installation, whatever a request says of its host. The token stands
behind `#`: browsers keep that part to themselves, so that no log of a server or proxy has it.
"""

from meshboard.auth.v1.factor_pb2 import Factor
from meshboard.user.v1.internal_user_service_pb2 import GetInvitationMailResponse

from services.auth_svc.settings import AuthSettings
from services.chassis import errors

Letter = tuple[str, str]


def sign_up(settings: AuthSettings, token: str) -> Letter:
    """Finishes a sign-up."""
    return _letter(
        "Confirm your address to finish signing up",
        "Someone has signed up for Meshboard with this address. If it was you, open this link within 24 hours:",
        _link(settings, "sign-up", token),
        "If it was not you, do nothing: there will be no account.",
    )


def account_exists(settings: AuthSettings) -> Letter:
    """Says to the owner of an account that somebody has tried to sign up with its address."""
    return _letter(
        "You have a Meshboard account already",
        "Someone has tried to sign up for Meshboard with this address, which has an account already.",
        f"If it was you, sign in at {settings.public_url}, or ask there for a new password.",
        "If it was not you, do nothing.",
    )


def verify_email(settings: AuthSettings, token: str) -> Letter:
    """Proves that an address belongs to who signed up with it."""
    return _letter(
        "Confirm your address",
        "Someone has signed up for Meshboard with this address. If it was you, open this link within 24 hours:",
        _link(settings, "verify-email", token),
        "If it was not you, do nothing.",
    )


def reset_password(settings: AuthSettings, token: str) -> Letter:
    """Lets the owner of an account choose a new password."""
    return _letter(
        "Choose a new password",
        "Someone has asked for a new password for your Meshboard account.",
        "If it was you, open this link within an hour:",
        _link(settings, "reset-password", token),
        "If it was not you, do nothing: your password stays as it is.",
    )


def first_password(settings: AuthSettings, token: str) -> Letter:
    """Lets somebody for whom an admin has made an account choose a password."""
    return _letter(
        "Your Meshboard account",
        "An admin of a workspace has made a Meshboard account with this address, and manages it.",
        "Open this link within 7 days to choose a password; then sign in with it:",
        _link(settings, "reset-password", token),
        f"If the link does not work any more, ask for a new password at {settings.public_url}.",
    )


def password_changed(settings: AuthSettings) -> Letter:
    """Tells the owner of an account that its password is another one."""
    return _letter(
        "Your password was changed",
        "The password of your Meshboard account was changed, and its other sessions have ended.",
        f"If it was not you, ask at {settings.public_url} for a new password at once, and tell who runs it.",
    )


def approve_email(settings: AuthSettings, token: str, new_email: str) -> Letter:
    """Asks at the present address of an account whether it may have another one."""
    return _letter(
        "Approve the new address of your account",
        f"Someone who is signed in to your Meshboard account wants its address to be {new_email}.",
        "If it was you, open this link within 24 hours, and the one that we have mailed to the new address:",
        _link(settings, "approve-email", token),
        "If it was not you, do not open it, and change your password: the address stays as it is.",
    )


def confirm_email(settings: AuthSettings, token: str) -> Letter:
    """Proves that the new address of an account belongs to the person."""
    return _letter(
        "Confirm your new address",
        "Someone wants to use this address for their Meshboard account.",
        "If it was you, open this link within 24 hours, and the one that we have mailed to your present address:",
        _link(settings, "confirm-email", token),
        "If it was not you, do nothing.",
    )


def email_in_use(settings: AuthSettings) -> Letter:
    """Says to the owner of an account that somebody wants its address for another one."""
    return _letter(
        "Your address has a Meshboard account already",
        "Someone wants to use this address for another Meshboard account. It has one already, so that cannot be.",
        f"If it was you, sign in to the account of this address at {settings.public_url}.",
        "If it was not you, do nothing.",
    )


def email_changed(settings: AuthSettings) -> Letter:
    """Tells at the former address of an account that it has another one."""
    return _letter(
        "The address of your account was changed",
        "Your Meshboard account has another address, which was approved from this one. Sign in with the new one.",
        f"If it was not you, tell who runs {settings.public_url} at once.",
    )


def invitation(settings: AuthSettings, mail: GetInvitationMailResponse) -> Letter:
    """Invites somebody to a workspace. What people have chosen stands in quotation marks."""
    return _letter(
        "You are invited to a workspace",
        f"\u201c{mail.inviter_name}\u201d invites you to the Meshboard workspace \u201c{mail.workspace_title}\u201d, "
        f"as {mail.role}.",
        f"To accept or to decline, open this link before {mail.expire_time.ToDatetime():%d %B %Y, %H:%M} UTC:",
        _link(settings, "invitation", mail.token),
        "If you do not know who this is, do nothing.",
    )


def invalid() -> errors.Error:
    """What is answered to a link that does not work, whatever the cause."""
    return errors.unauthenticated(
        "LINK_INVALID", "The link does not work, or not any more: ask for another mail."
    )


def _link(settings: AuthSettings, what: str, token: str) -> str:
    return f"{settings.public_url}/account#{what}={token}"


def _letter(subject: str, *paragraphs: str) -> Letter:
    return subject, "\n\n".join(paragraphs) + "\n"


def factor_added(settings: AuthSettings, kind: Factor.Kind.ValueType) -> Letter:
    """Tells that an account has another second factor."""
    return _letter(
        "A second factor was added to your account",
        f"{_FACTORS[kind]} was added to your Meshboard account as a second factor.",
        _if_not_you(settings),
    )


def factor_removed(settings: AuthSettings, kind: Factor.Kind.ValueType) -> Letter:
    """Tells that an account has a second factor less."""
    return _letter(
        "A second factor was removed from your account",
        f"{_FACTORS[kind]} was removed from your Meshboard account. It is no second factor any more.",
        _if_not_you(settings),
    )


def recovery_code_used(settings: AuthSettings, left: int) -> Letter:
    """Tells that somebody has signed in with a recovery code."""
    return _letter(
        "A recovery code of your account was used",
        "Someone has signed in to your Meshboard account with its password and a recovery code.",
        f"Recovery codes that are left: {left}. You can replace them in the settings of your account.",
        _if_not_you(settings),
    )


def recovery_codes_replaced(settings: AuthSettings) -> Letter:
    """Tells that the recovery codes on paper are of no use any more."""
    return _letter(
        "The recovery codes of your account were replaced",
        "Your Meshboard account has ten new recovery codes. The old ones do not work any more.",
        _if_not_you(settings),
    )


_FACTORS = {Factor.TOTP: "An authenticator app", Factor.PASSKEY: "A passkey"}


def _if_not_you(settings: AuthSettings) -> str:
    return f"If it was not you, change your password at {settings.public_url}, and look at your second factors there."
