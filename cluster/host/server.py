"""The doors of a sheep: TCP and a UNIX socket. The first byte of a connection tells a peer from a client.

Peers go to `Links.adopt`, clients to the factory of the native protocol. A connection that says nothing is kept for
ever: clients open some long before they need them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable

from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.core.ports import Log
from sheepdog.cluster.host.same_host import is_of_our_user, widen
from sheepdog.cluster.wire.peer import PEER_MAGIC
from sheepdog.cluster.wire.same_host import LOOPBACK, local_name

BACKLOG = 1024  # connections the kernel queues: a thousand clients may reconnect in one second
ACCEPTS_PER_TURN = 64  # then others get their turn
ACCEPT_PAUSE_S = 0.2  # out of files or memory: clients wait in the backlog meanwhile
_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_WARNING = 4

Adopt = Callable[[socket.socket], object]


class Server:
    """Accepts connections; each is handed to one of `adopt_peer` and `new_client`, which then owns the socket."""

    def __init__(self, loop: asyncio.AbstractEventLoop, adopt_peer: Adopt, new_client: Adopt, log: Log) -> None:
        self._loop = loop
        self._adopt_peer = adopt_peer
        self._new_client = new_client
        self._log = log
        self._listeners: list[socket.socket] = []
        self._silent: dict[socket.socket, None] = {}  # connections that have not said anything yet
        self._early: list[socket.socket] | None = []  # clients before `admit_clients`
        self._turning_away = False
        self._unix_path: str | None = None
        self._same_host: list[socket.socket] = []  # of the listeners, those for this daemon's own user only
        self._pauses: dict[socket.socket, asyncio.TimerHandle] = {}

    def listen_tcp(self, address: str | None, port: int) -> None:
        """Listens on one address, or on all; UsageError when that cannot be."""
        self._listen(_tcp_listener(address, port))
        if address in (None, LOOPBACK):
            self._listen_same_host(port)

    def _listen_same_host(self, port: int) -> None:
        """For clients and sheep here, beside TCP; without it they do with that."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(local_name(port))
        except OSError as error:
            self._log(_WARNING, f"clients and sheep on this host use TCP: the name of port {port}: {error.strerror}")
            listener.close()
            return
        self._same_host.append(listener)
        self._listen(listener)

    def listen_unix(self, path: str) -> None:
        """Listens on a UNIX socket; one that a dead sheep left there is replaced. UsageError when that cannot be."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            listener.bind(path)
        except OSError as error:
            listener.close()
            raise UsageError(f"cannot listen on {path}: {error.strerror or error}") from error
        self._unix_path = path
        self._listen(listener)

    def admit_clients(self) -> None:
        """Clients are handed over from now on; those that came before have waited (a node that has not joined yet
        could tell them nothing). Peers are never kept waiting."""
        early, self._early = self._early, None
        self._turning_away = False
        for sock in early or ():
            self._new_client(sock)

    def hold_clients(self) -> None:
        """Clients that come from now on wait for `admit_clients` again."""
        self._early = self._early or []
        self._turning_away = False

    def turn_clients_away(self) -> None:
        """Hangs up on clients that have waited for too long, and on those that come, until they are admitted."""
        early, self._early = self._early, []
        self._turning_away = True
        for sock in early or ():
            sock.close()

    def stop_listening(self) -> None:
        """No new connections; those that a frontend owns go on."""
        for timer in self._pauses.values():
            timer.cancel()
        self._pauses.clear()
        for listener in self._listeners:
            self._loop.remove_reader(listener)
            listener.close()
        self._listeners.clear()
        self._same_host.clear()
        for sock in (*self._silent, *(self._early or ())):
            self._loop.remove_reader(sock)
            sock.close()
        self._silent.clear()
        self._early = None
        if self._unix_path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._unix_path)
            self._unix_path = None

    def _listen(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        listener.listen(BACKLOG)
        self._listeners.append(listener)
        self._loop.add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, _address = listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in _OUT_OF_RESOURCES:
                    self._pause(listener, error)
                    return
                continue  # that connection died in the backlog
            if listener in self._same_host and not is_of_our_user(sock):
                sock.close()
                continue
            sock.setblocking(False)
            with contextlib.suppress(OSError):
                if sock.family == socket.AF_UNIX:
                    widen(sock)
                else:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Most clients have sent their first request before they are accepted.
            self._silent[sock] = None
            self._first_byte(sock)
            if sock in self._silent:
                self._loop.add_reader(sock, self._first_byte, sock)

    def _pause(self, listener: socket.socket, error: OSError) -> None:
        self._log(_WARNING, f"cannot accept connections for now: {error.strerror}")
        self._loop.remove_reader(listener)
        self._pauses[listener] = self._loop.call_later(ACCEPT_PAUSE_S, self._resume, listener)

    def _resume(self, listener: socket.socket) -> None:
        del self._pauses[listener]
        self._loop.add_reader(listener, self._accept, listener)

    def _first_byte(self, sock: socket.socket) -> None:
        try:
            first = sock.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            first = b""
        del self._silent[sock]
        self._loop.remove_reader(sock)
        if not first:
            sock.close()
        elif first == PEER_MAGIC[:1]:
            self._adopt_peer(sock)
        elif self._turning_away:
            sock.close()
        elif self._early is not None:
            self._early.append(sock)
        else:
            self._new_client(sock)


def check_port(address: str | None, port: int) -> None:
    """UsageError when there could be no server now: for a start that somebody still waits for."""
    _tcp_listener(address, port).close()


def _tcp_listener(address: str | None, port: int) -> socket.socket:
    """Bound, on one address or on all; UsageError."""
    where = f"{address or 'any address'} port {port}"
    if address is None and not socket.has_dualstack_ipv6():
        address = "0.0.0.0"
    family = socket.AF_INET6 if address is None or ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address is not None))
        listener.bind((address or "::", port))
    except OSError as error:
        listener.close()
        advice = "; another program, or sheep, has it" if error.errno == errno.EADDRINUSE else ""
        raise UsageError(f"cannot listen on {where}: {error.strerror}{advice}") from error
    return listener
