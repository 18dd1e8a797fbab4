"""What `-c zookeeper:...` says: the servers, the cluster's place in the ensemble, the session timeout (cli.md 1.4)."""

from __future__ import annotations

import socket

from sheepdog.cluster.core.errors import UsageError
from sheepdog.cluster.core.limits import LEASE_NS

DEFAULT_BASE = "/sheepdog"
DEFAULT_PORT = 2181
DEFAULT_TIMEOUT_MS = 3000  # cli.md 1.4
MIN_TIMEOUT_MS, MAX_TIMEOUT_MS = 100, 600_000  # the ensemble has limits of its own, in between
CONNECT_S = 1.0  # for one server: a host that is off does not refuse
LEASE_PART = 3  # a lease is this part of the timeout: others wait for it after a death, on top of the timeout
MIN_LEASE_NS = 500_000_000  # an ensemble under load answers a write within a few hundred milliseconds


def lease_ns(timeout_ms: int) -> int:
    """How long a member may answer after the servers have last heard of it."""
    return min(max(timeout_ms * 1_000_000 // LEASE_PART, MIN_LEASE_NS), LEASE_NS)


def parse(argument: str) -> tuple[str, str, int]:
    """(servers as HOST:PORT separated by commas, base path, session timeout in ms). UsageError."""
    servers, found, timeout = argument.partition(",timeout=")
    timeout_ms = DEFAULT_TIMEOUT_MS
    if found:
        if not timeout.isascii() or not timeout.isdigit() or not MIN_TIMEOUT_MS <= int(timeout) <= MAX_TIMEOUT_MS:
            raise UsageError(
                f"zookeeper driver: Invalid timeout '{timeout}': "
                f"must be an integer between {MIN_TIMEOUT_MS} and {MAX_TIMEOUT_MS} (ms)"
            )
        timeout_ms = int(timeout)
    servers, _, path = servers.partition("/")
    base = "/" + path.strip("/") if path.strip("/") else DEFAULT_BASE
    if any(part in ("", ".", "..") for part in base[1:].split("/")):
        raise UsageError(f"zookeeper driver: Invalid cluster id '{path}'")
    listed = []
    for server in servers.split(","):
        host, colon, port = server.strip().rpartition(":")
        if not server.strip():
            continue
        if not colon or server.endswith("]"):
            host, port = server.strip(), str(DEFAULT_PORT)
        if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
            raise UsageError(f"zookeeper driver: Invalid server '{server}': HOST:PORT is wanted")
        listed.append(f"{host}:{port}")
    if not listed:
        raise UsageError(
            "zookeeper driver: the list of servers is missing: "
            "-c zookeeper:HOST:PORT[,HOST:PORT...][/CLUSTER_ID][,timeout=MS]"
        )
    return ",".join(listed), base, timeout_ms


def own_address(servers: str) -> str | None:
    """The address by which this host talks to the servers; None if that is its loopback. UsageError: not known now."""
    problem: OSError | None = None
    for server in servers.split(","):
        host, _, port = server.rpartition(":")
        try:
            found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)
            family, _, _, _, target = found[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(target)  # sends nothing: the kernel chooses a route
                address: str = probe.getsockname()[0]
        except OSError as error:
            problem = error
            continue
        if not (address == "::1" or address.startswith("127.")):
            return address
    if problem is not None:  # the network is not up yet, or names are not resolved
        raise UsageError(f"zookeeper driver: {servers}: {problem.strerror}; -y ADDRESS tells it who it is")
    return None


def complaint(servers: str) -> str:
    """Why no session began, as far as it can be seen from here. Blocks, for CONNECT_S for each server at most."""
    for server in servers.split(","):
        host, _, port = server.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
        except OSError as error:
            problem = error.strerror or str(error)
        else:
            return "the servers take connections but begin no session: they have no quorum, or hang"
    return f"no server of the ensemble can be reached: {problem}"
