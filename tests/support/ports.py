"""TCP ports for a test's own cluster, never shared by two tests at once.

All are below 10000, since tgt keeps four digits of a port.
"""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from pathlib import Path

FIRST, LAST, BLOCK = 7100, 9700, 20  # a test's cluster has at most 20 nodes


class PortBlock:
    """BLOCK consecutive free ports, ours until `close`: a lock on a file keeps other test runs of this machine away."""

    def __init__(self, start: int = FIRST) -> None:
        """The first free block at or after port `start`."""
        directory = Path(tempfile.gettempdir()) / f"sheepdog-test-ports-{os.getuid()}"
        directory.mkdir(exist_ok=True)
        for first in range(start, LAST, BLOCK):
            descriptor = os.open(directory / str(first), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                continue
            if all(_free(port) for port in range(first, first + BLOCK)):
                self.first = first
                self._descriptor = descriptor
                return
            os.close(descriptor)
        raise AssertionError(f"no {BLOCK} free ports between {start} and {LAST}")

    def __getitem__(self, index: int) -> int:
        assert 0 <= index < BLOCK
        return self.first + index

    def close(self) -> None:
        os.close(self._descriptor)


def _free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
