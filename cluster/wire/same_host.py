"""Where clients and other sheep on a sheep's own host find it: an abstract unix socket, named after the port.

It carries what the port does, for half of TCP's CPU time. Abstract names belong to a network namespace, as ports do,
and vanish with their process; so whoever has the name of a port has that port of 127.0.0.1 too. Any user may take a
name: both sides use such a connection only if the other one runs as the same user, and go on to TCP otherwise.
"""

from __future__ import annotations

from struct import Struct

LOOPBACK = "127.0.0.1"
BUFFER_BYTES = 1 << 20  # of a unix socket, which the kernel doubles: a large answer leaves in one call and one wake-up
SO_SNDBUFFORCE = 32  # of Linux, which Python does not name: beyond wmem_max, for those who may
CREDENTIALS = Struct("3i")  # SO_PEERCRED: process, user, group


def local_name(port: int) -> str:
    """The abstract address of the sheep that listens on this port of 127.0.0.1."""
    return f"\0sheepdog/{port}"
