"""Secrets of CHAP: each in a file that only root can read, on the host that exports.

The text is the first line. It is never printed, logged, put on a command line or stored in the cluster.
"""

from __future__ import annotations

import os
import stat

from sheepdog.cluster.core.errors import UsageError

SHORTEST = 12  # RFC 7143, 9.2.1: 96 bits
LONGEST = 255  # of a value in the kernel's configuration
OWNER = 0


def read_secret(path: str, owner: int = OWNER) -> str:
    """The secret in a file. UsageError naming the file, and never its content, if it is missing or open to others."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UsageError(f"secret file {path}: {error.strerror}") from None
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"secret file {path} is no file")
        if status.st_uid != owner or status.st_mode & 0o077:
            raise UsageError(f"secret file {path} must belong to root and be closed to others (chmod 600)")
        line = file.readline(LONGEST + 2)
    try:
        secret = line.removesuffix(b"\n").decode("ascii")
    except UnicodeDecodeError:
        secret = ""
    if not SHORTEST <= len(secret) <= LONGEST or not secret.isprintable() or secret != secret.strip():
        raise UsageError(
            f"secret file {path}: the first line must be {SHORTEST} to {LONGEST} printable ASCII characters"
        )
    return secret
