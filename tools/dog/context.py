"""What every command gets: its words, where the gateway is, connections made when they are needed."""

from __future__ import annotations

import os
import socket
from functools import cached_property

from sheepdog.cluster.client.address import Address, describe
from sheepdog.cluster.client.connection import Connection
from sheepdog.cluster.core.errors import PeerError
from sheepdog.cluster.core.ids import Member, NodeId, format_address
from sheepdog.tools.dog.options import USAGE_ERROR, Failure, UsageFailure
from sheepdog.tools.dog.output import reason, warn

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = "7000"
CONNECT_ATTEMPTS = 2  # as often as the original tries; scripts see both messages


class Unreachable(Failure):
    """No sheep at the address; stderr says so already."""

    def __init__(self) -> None:
        super().__init__(code=2)


class Context:
    """One run of one command."""

    def __init__(self, options: dict[str, str], arguments: list[str]) -> None:
        self._options = options
        self._arguments = arguments
        self._connections: dict[tuple[str, int], Connection] = {}
        self._nodes: list[Member] | None = None
        self.epoch = 0  # known once the nodes are
        # What was typed is checked at once, what the environment says when a sheep is asked.
        if {"address", "port"} & options.keys():
            self._check()

    def _check(self) -> tuple[str, int]:
        return self.host, self.port

    @cached_property
    def host(self) -> str:
        """Where the gateway is. Failure for a wrong one."""
        return check_host(self._options.get("address", os.environ.get("SHEEPDOG_DOG_ADDR") or DEFAULT_HOST))

    @cached_property
    def port(self) -> int:
        return check_port(self._options.get("port", os.environ.get("SHEEPDOG_DOG_PORT") or DEFAULT_PORT))

    # -- words

    def flag(self, long: str) -> bool:
        return long in self._options

    def value(self, long: str, default: str = "") -> str:
        return self._options.get(long, default)

    @property
    def raw(self) -> bool:
        return "raw" in self._options

    @property
    def verbose(self) -> bool:
        return "verbose" in self._options

    @property
    def json(self) -> bool:
        return "json" in self._options

    def argument(self, position: int, missing: str = "") -> str:
        """A word that must be there: usage and `missing` otherwise."""
        if position < len(self._arguments):
            return self._arguments[position]
        raise UsageFailure(missing)

    def optional(self, position: int) -> str | None:
        return self._arguments[position] if position < len(self._arguments) else None

    def rest(self, position: int) -> list[str]:
        return self._arguments[position:]

    # -- the cluster

    def gateway(self) -> Connection:
        """The node given with -a and -p."""
        return self.connect(self.host, self.port)

    def node(self, node: NodeId) -> Connection:
        """A node of the list."""
        return self.connect(format_address(node.address), node.port)

    def connect(self, host: str, port: int) -> Connection:
        """One connection per node and command."""
        connection = self._connections.get((host, port))
        if connection is None:
            connection = self._connections[host, port] = dial((host, port))
        return connection

    def nodes(self) -> list[Member]:
        """The node list, fetched once; `epoch` is the cluster's from then on."""
        from sheepdog.cluster.client.admin import epoch_log, node_list

        if self._nodes is None:
            try:
                connection = self.gateway()
                nodes = node_list(connection)
                self.epoch = epoch_log(connection, 0).epoch
            except (OSError, PeerError, Unreachable) as error:
                why = "" if isinstance(error, Unreachable) else f": {reason(error)}"
                raise Failure(f"Failed to get node list{why}", 2) from error
            if not nodes:
                raise Failure("There are no active sheep daemons", 2)
            self._nodes = nodes
        return self._nodes


def dial(address: Address) -> Connection:
    """A connection without patience: a command says what is wrong and ends."""
    where = describe(address)
    for _ in range(CONNECT_ATTEMPTS):
        try:
            return Connection(address, patience_s=0, on_silence=lambda: warn(f"no answer from {where} yet; waiting"))
        except OSError as error:
            warn(f"failed to connect to {where}: {error.strerror or error}")
    raise Unreachable


def check_host(text: str) -> str:
    """An IPv4 or IPv6 address, or a name that can be resolved."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, text)
        except OSError:
            continue
        return text
    try:
        if not text:
            raise OSError
        return str(socket.getaddrinfo(text, None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError) as error:
        raise Failure(f"Invalid ip address {text}", 1) from error


def check_port(text: str) -> int:
    if text.isascii() and text.isdigit() and 0 < int(text) < 1 << 16:
        return int(text)
    raise Failure(f"Invalid port number '{text}'", USAGE_ERROR)
