"""What auth_svc needs to know."""

import os

from services.chassis.settings import Settings


class AuthSettings(Settings):
    """The settings of all services, and those of accounts, sessions and keys."""

    access_token_seconds: int = 600
    # A session ends when it has not been refreshed for this long.
    session_seconds: int = 30 * 86_400
    # A sign-up that has not finished after this long is cleared away.
    pending_account_seconds: int = 3600
    signing_key_seconds: int = 90 * 86_400

    # argon2id as the OWASP password storage cheat sheet has it: 19 MiB, two passes, one lane.
    password_memory_kib: int = 19 * 1024
    password_passes: int = 2
    password_lanes: int = 1
    password_threads: int = max(1, (os.cpu_count() or 1) // 2)
    # Passwords that wait for a thread; more are refused at the door.
    password_queue: int = 64

    # Failed sign-ins of one account from one address that are free; each further one doubles the delay.
    sign_in_free_failures: int = 5
    sign_in_longest_delay_seconds: int = 900
