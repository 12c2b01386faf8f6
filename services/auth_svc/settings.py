"""What auth_svc needs to know."""

from urllib.parse import urlsplit

from pydantic import SecretStr, field_validator

from services.chassis.settings import PasswordSettings


class AuthSettings(PasswordSettings):
    """The settings of all services, and those of accounts, sessions and keys."""

    access_token_seconds: int = 600
    # A session ends when it has not been refreshed for this long, and this long after it began in any case.
    session_seconds: int = 30 * 86_400
    session_absolute_seconds: int = 90 * 86_400
    # How long ago the caller of a method that wants it to be recent may have proved who they are.
    recent_seconds: int = 900
    # Whether an account begins only when the link that is mailed to its address is opened.
    require_verified_email: bool = False
    # A sign-up that has not finished after this long is cleared away.
    pending_account_seconds: int = 3600
    signing_key_seconds: int = 90 * 86_400

    # Where mails go out, as smtp://user:password@host:port, or smtps:// for TLS from the first byte; and from whom.
    smtp_url: SecretStr = SecretStr("smtp://127.0.0.1:1025")
    mail_from: str = "Meshboard <meshboard@localhost>"

    @field_validator("smtp_url")
    @classmethod
    def _is_mail_server(cls, url: SecretStr) -> SecretStr:
        parts = urlsplit(url.get_secret_value())
        if parts.scheme not in {"smtp", "smtps"} or not parts.hostname:
            raise ValueError("must be smtp://host:port or smtps://host:port")  # the value has a password
        return url
