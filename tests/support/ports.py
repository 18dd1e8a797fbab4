"""TCP ports for a test's own cluster, never shared by two tests at once.

All are below 10000, since tgt keeps four digits of a port.
"""

from __future__ import annotations

import socket

FIRST, LAST, BLOCK = 7100, 9700, 20  # a test's cluster has at most 20 nodes


class PortBlock:
    """BLOCK consecutive free ports, ours until `close`.

    The lock on a block is an abstract unix socket: like a port it belongs to the network namespace and goes with us.
    """

    def __init__(self, start: int = FIRST) -> None:
        """The first free block at or after port `start`."""
        for first in range(start, LAST, BLOCK):
            lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                lock.bind(f"\0sheepdog-test-ports-{first}")
            except OSError:
                lock.close()
                continue
            if all(_free(port) for port in range(first, first + BLOCK)):
                self.first = first
                self._lock = lock
                return
            lock.close()
        raise AssertionError(f"no {BLOCK} free ports between {start} and {LAST}")

    def __getitem__(self, index: int) -> int:
        assert 0 <= index < BLOCK
        return self.first + index

    def close(self) -> None:
        self._lock.close()


def _free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
