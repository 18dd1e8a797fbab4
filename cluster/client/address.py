"""Where a gateway listens, and how to connect to it. Imports no asyncio: `dog` uses it on its fast path."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress
from typing import TypeAlias

from sheepdog.cluster.wire.same_host import BUFFER_BYTES, CREDENTIALS, LOOPBACK, SO_SNDBUFFORCE, local_name

Address: TypeAlias = tuple[str, int] | str
"""(host, port), or the path of a Unix socket (`sock` in a sheep's directory)."""

KEEPALIVE_IDLE_S = 10  # a gateway whose host vanished is noticed within about 20 s, without any traffic of ours
KEEPALIVE_INTERVAL_S = 3
KEEPALIVE_PROBES = 3
UNACKNOWLEDGED_LIMIT_MS = 20_000  # sent bytes that the peer's kernel does not acknowledge; slow answers do not count


def describe(address: Address) -> str:
    """`host:port` or the path, for messages."""
    return address if isinstance(address, str) else f"{address[0]}:{address[1]}"


def candidates(address: Address, without_tcp: bool = False) -> list[tuple[int, tuple[str, int] | str]]:
    """(address family, socket address) to try in turn; OSError if the name cannot be resolved.

    `without_tcp`: by its name first, for a sheep on this host. What connects has to ask `check` whether it may be used.
    """
    if isinstance(address, str):
        return [(socket.AF_UNIX, address)]
    host, port = address
    # Literals skip the resolver, whose libraries cost milliseconds to load.
    try:
        socket.inet_pton(socket.AF_INET, host)
        found = [(int(socket.AF_INET), (host, port))]
    except OSError:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        found = [(int(family), (str(target[0]), int(target[1]))) for family, _, _, _, target in answers]
    ways: list[tuple[int, tuple[str, int] | str]] = []
    for family, target in found:
        if without_tcp and target[0] == LOOPBACK:
            ways.append((socket.AF_UNIX, local_name(port)))
        ways.append((family, target))
    return ways


def prepare(family: int) -> socket.socket:
    """A socket for one candidate, with the options every connection to a gateway wants."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    if family == socket.AF_UNIX:
        widen(sock)
    else:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_LIMIT_MS)
    return sock


def widen(sock: socket.socket) -> None:
    """Room for what a unix socket sends at once; who has no privileges gets as much as the system allows everybody."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    with suppress(PermissionError):
        sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, BUFFER_BYTES)


def check(sock: socket.socket, target: tuple[str, int] | str) -> None:
    """ConnectionRefusedError if it has been connected to a name that another user has taken."""
    if isinstance(target, str) and target.startswith("\0"):
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
        if CREDENTIALS.unpack(credentials)[1] != os.geteuid():
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
