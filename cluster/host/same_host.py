"""Unix sockets between processes of one host and one user; their names are in wire.same_host."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

from sheepdog.cluster.wire.same_host import BUFFER_BYTES, CREDENTIALS, SO_SNDBUFFORCE, local_name


def connect_by_name(port: int) -> socket.socket | None:
    """Connected to our user's sheep that has the name of this port; None if there is none. OSError: out of files."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        widen(sock)
        sock.connect(local_name(port))
        if is_of_our_user(sock):
            return sock
    except OSError:
        pass
    sock.close()
    return None


def widen(sock: socket.socket) -> None:
    """Room for what is sent at once; who has no privileges gets as much as the system allows everybody."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    with suppress(PermissionError):
        sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, BUFFER_BYTES)


def is_of_our_user(sock: socket.socket) -> bool:
    """Whoever is at the other end runs as the same user."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    user: int = CREDENTIALS.unpack(credentials)[1]
    return user == os.geteuid()
