"""Addresses: with `sheep -i` the traffic between nodes has a network of its own, and goes the other way while that is
out of reach; a node that listens on one address (-b) is known by it."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from tests.support import needs
from tests.support.cluster import Cluster
from tests.support.netns import NetworkNamespace
from tests.support.processes import run, wait_until

NODES = 3
SIZE = 8 << 20
RETURN_SECONDS = 30.0  # the other network is looked for every 5 s
ESTABLISHED = "01"


def address(node: int) -> str:
    return f"10.88.0.{node + 1}"


def ways(network: NetworkNamespace, cluster: Cluster) -> set[str]:
    """The addresses at which connections from one node to another arrive."""
    nodes = {cluster.port(node) for node in range(NODES)}
    found = set()
    for line in run([*network.enter, "cat", "/proc/net/tcp"]).stdout.decode().splitlines()[1:]:
        local, remote, state = line.split()[1:4]
        host, port = local.split(":")
        if state == ESTABLISHED and int(port, 16) in nodes and remote != local:
            found.add(".".join(str(byte) for byte in reversed(bytes.fromhex(host))))
    return found


@pytest.mark.timeout(240)
def test_nodes_talk_by_their_io_addresses(
    private_network: NetworkNamespace, new_cluster: Callable[..., Cluster]
) -> None:
    needs.network_namespaces()
    network = private_network

    def ip(*words: str) -> None:
        run([*network.enter, "ip", *words])

    for node in range(NODES):
        ip("addr", "add", f"{address(node)}/32", "dev", "lo")
    cluster = new_cluster(NODES, prefix=network.enter)
    own = {node: ("-b", "127.0.0.1", "-i", f"host={address(node)},port={cluster.port(node)}") for node in range(NODES)}
    cluster.start(extra=own)
    cluster.wait_members(NODES)
    cluster.format()
    by_io = {address(1), address(2)}  # the smaller one of two nodes dials

    wait_until(lambda: ways(network, cluster) == by_io, RETURN_SECONDS, "all traffic between nodes by -i")
    cluster.dog("vdi", "create", "a", str(SIZE))
    for round_number in range(3):
        data = os.urandom(SIZE)
        if round_number == 1:
            ip("addr", "del", f"{address(2)}/32", "dev", "lo")
        if round_number == 2:
            ip("addr", "add", f"{address(2)}/32", "dev", "lo")
            wait_until(lambda: ways(network, cluster) == by_io, RETURN_SECONDS, "return to the I/O address")
        cluster.dog("vdi", "write", "a", "0", str(SIZE), stdin=data)  # no error, whatever the network does
        for node in range(NODES):
            assert cluster.try_dog("vdi", "read", "a", node=node, check=True).stdout == data
        if round_number == 1:
            assert ways(network, cluster) == {address(1)}, "sheep of one address need no TCP"
            assert f"{address(2)}:{cluster.port(2)} is out of reach, fallback to " in cluster.log(0).read_text()
    assert [line.split()[1] for line in cluster.dog("node", "list", "-r").splitlines()] == [
        f"127.0.0.1:{cluster.port(node)}" for node in range(NODES)
    ]
    assert len(cluster.dog("cluster", "info", "-r").splitlines()) == 3, "no node was given up: one epoch"


@pytest.mark.parametrize(("bound", "announced"), [("127.0.0.5", "127.0.0.5"), ("::1", "::1"), ("0.0.0.0", "127.0.0.1")])
def test_a_node_that_listens_on_one_address_announces_it(
    new_cluster: Callable[..., Cluster], bound: str, announced: str
) -> None:
    """It was known by an address on which nobody listened."""
    cluster = new_cluster(2, options=("-n", "-b", bound))
    cluster.start()
    cluster.wait_members(2)
    rows = cluster.dog("node", "list", "-r", "-a", announced).splitlines()
    assert [row.split()[1] for row in rows] == [f"{announced}:{cluster.port(node)}" for node in range(2)]
    cluster.dog("cluster", "format", "-c", "2", "-a", announced)
    cluster.dog("vdi", "create", "-P", "v", "4M", "-a", announced)
    assert all(len(cluster.objects(node)) == 2 for node in range(2))
