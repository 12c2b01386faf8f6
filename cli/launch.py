"""Turns into one part of the mesh: `python -I -S launch.py PARENT SIGNAL ACCOUNT BINARY [ARGUMENT …]`.

A program of its own, and not a `preexec_fn`, because code between fork and exec is not safe in a process with
threads. On Linux the part gets SIGNAL when the process PARENT ends, however that ends. ACCOUNT is the system
account to run as, or empty to keep the present one.
"""

import ctypes
import os
import pwd
import sys

PR_SET_PDEATHSIG = 1
PR_SET_KEEPCAPS = 8
PR_SET_SECUREBITS = 28
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
CAP_DAC_OVERRIDE = 1
CAP_SETPCAP = 8
SECBIT_NO_SETUID_FIXUP = 1 << 2
CAPABILITY_VERSION_3 = 0x20080522


def prctl(option: int, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    words = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]]
    if libc.prctl(option, *words) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}: {os.strerror(ctypes.get_errno())}")


def set_capabilities(effective: int, inheritable: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    head = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)(effective, effective, inheritable, 0, 0, 0)  # permitted is the second
    if libc.capset(ctypes.byref(head), ctypes.byref(sets)) != 0:
        raise OSError(ctypes.get_errno(), f"capset: {os.strerror(ctypes.get_errno())}")


def keep_reach() -> None:
    """Keeps the one right of root that opens folders of others, through the exec (capabilities(7))."""
    reach = 1 << CAP_DAC_OVERRIDE
    set_capabilities(reach | 1 << CAP_SETPCAP, reach)
    prctl(
        PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP
    )  # or access(2), which initdb asks, would not count the right
    set_capabilities(reach, reach)
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_DAC_OVERRIDE)


def become(account: str, binary: str) -> None:
    entry = pwd.getpwnam(account)
    if sys.platform == "linux":
        prctl(PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
    # A clone below /root is closed to other accounts. access(2) asks for the account without capabilities.
    if sys.platform == "linux" and not (os.access(binary, os.X_OK) and os.access(os.getcwd(), os.X_OK)):
        keep_reach()


def main() -> None:
    parent, stop_signal, account, *argv = sys.argv[1:]
    if account:
        become(account, argv[0])
    if sys.platform == "linux":
        prctl(PR_SET_PDEATHSIG, int(stop_signal))  # after setuid, which clears it
        if os.getppid() != int(parent):  # it ended before it could be watched
            sys.exit("the supervisor has ended")
    os.execv(argv[0], argv)  # noqa: S606 - the supervisor's own list of arguments


if __name__ == "__main__":
    main()
