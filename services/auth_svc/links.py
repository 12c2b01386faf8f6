"""The mails that auth_svc writes, each as its subject and text.

Their links begin with the configured address of the installation, whatever a request says of its host. The token stands
behind `#`: browsers keep that part to themselves, so that no log of a server or proxy has it.
"""

from services.auth_svc.settings import AuthSettings

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


def _link(settings: AuthSettings, what: str, token: str) -> str:
    return f"{settings.public_url}/account#{what}={token}"


def _letter(subject: str, *paragraphs: str) -> Letter:
    return subject, "\n\n".join(paragraphs) + "\n"
