"""The sockets of nbdkit's clients, which nbdkit does not show to its plugins."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

from sheepdog.cluster.client.address import widen

_DESCRIPTORS = "/proc/self/fd"


def widen_accepted() -> None:
    """Large answers to this process's clients at unix sockets leave at once, rather than in pieces as they are read.

    The kernel gives an accepted unix socket the system's buffers, not those of the one that listens.
    """
    with suppress(OSError):
        for name in os.listdir(_DESCRIPTORS):
            with suppress(OSError):  # closed meanwhile
                _widen_if_accepted(os.dup(int(name)))


def _widen_if_accepted(descriptor: int) -> None:
    """Closes the descriptor."""
    try:
        sock = socket.socket(fileno=descriptor)
    except OSError:  # it is something else
        os.close(descriptor)
        return
    with sock:
        # What has connected, to a sheep, has no name of its own.
        accepted = sock.getsockname() and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if sock.family == socket.AF_UNIX and accepted:
            widen(sock)
