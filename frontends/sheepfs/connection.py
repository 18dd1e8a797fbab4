"""The kernel's side of a mount: finding its connection, and raising limits that cannot be set at the start."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from sheepdog.frontends.sheepfs.transport import CONGESTION_THRESHOLD, MAX_BACKGROUND, log

MOUNTINFO = Path("/proc/self/mountinfo")
CONNECTIONS = Path("/sys/fs/fuse/connections")  # fusectl


def connection_number(mountpoint: str, mountinfo: str) -> int | None:
    """The connection of the newest FUSE mount there (the minor of its device). Sends the mount no request."""
    found = None
    for line in mountinfo.splitlines():
        # id parent major:minor root mountpoint options ... - type source options; blanks are escaped in octal
        fields, _, filesystem = line.partition(" - ")
        columns = fields.split(" ")
        if filesystem.startswith("fuse") and _unescape(columns[4]) == mountpoint:
            found = int(columns[2].partition(":")[2])
    return found


def raise_limits(mountpoint: str) -> None:
    """Lift the kernel's 12 requests in flight where we may; else say so and go on."""
    directory = _connection(mountpoint)
    try:
        (directory / "max_background").write_text(str(MAX_BACKGROUND))
        (directory / "congestion_threshold").write_text(str(CONGESTION_THRESHOLD))
    except OSError as problem:
        log.info("at most 12 requests in flight: cannot raise max_background: %s", problem)


def abort(mountpoint: str) -> None:
    """End the connection: every waiting caller gets ECONNABORTED. For a mount whose server no longer answers."""
    (_connection(mountpoint) / "abort").write_text("1")


def _connection(mountpoint: str) -> Path:
    """The directory of this mount in fusectl, which is mounted at its usual place if it is not yet."""
    if os.geteuid() == 0 and not os.path.ismount(CONNECTIONS):
        ctypes.CDLL(None).mount(b"fusectl", os.fsencode(CONNECTIONS), b"fusectl", 0, None)
    return CONNECTIONS / str(connection_number(mountpoint, MOUNTINFO.read_text()))


def _unescape(path: str) -> str:
    """Octal escapes of mountinfo (`\\040` is a blank)."""
    raw = os.fsencode(path)
    parts = raw.split(b"\\")
    result = parts[0]
    for part in parts[1:]:
        result += bytes([int(part[:3], 8)]) + part[3:]
    return os.fsdecode(result)
