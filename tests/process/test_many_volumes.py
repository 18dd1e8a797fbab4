"""What an administrator's commands cost does not depend on how many volumes and snapshots there are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.support.cluster import Cluster, started

from sheepdog.cluster.client import admin
from sheepdog.cluster.client.connection import Connection
from sheepdog.cluster.core.ids import Vid
from sheepdog.cluster.wire.opcodes import Opcode
from sheepdog.cluster.wire.structures import STATISTICS, Statistics

SIZE = 4 << 20
MANY, SOAK_MANY = 150, 1000


def counters(connection: Connection) -> Statistics:
    return STATISTICS.unpack(admin.plain(connection, Opcode.STAT, limit=STATISTICS.size))


def cost(cluster: Cluster, connection: Connection, *words: str) -> tuple[int, ...]:
    """Requests, reads, writes, bytes to and from the gateway of a command."""
    before = counters(connection)
    cluster.dog(*words)
    after = counters(connection)
    names = ("total", "read", "write", "rx_bytes", "tx_bytes")
    return tuple(getattr(after, f"gateway_{name}") - getattr(before, f"gateway_{name}") for name in names)


def costs(cluster: Cluster, connection: Connection, mark: str) -> dict[str, tuple[int, ...]]:
    """Of each command; `one` is the volume with the snapshots."""
    every = {
        "create": ("vdi", "create", f"new{mark}", str(SIZE)),
        "list": ("vdi", "list", "other"),
        "open": ("vdi", "read", "one", "0", "512"),
        "snapshot": ("vdi", "snapshot", "-s", f"tag{mark}", "one"),
        "open a snapshot": ("vdi", "read", "-s", "first", "one", "0", "512"),
        "delete": ("vdi", "delete", f"new{mark}"),
    }
    found = {name: cost(cluster, connection, *words) for name, words in every.items()}
    found["locks"] = cost(cluster, connection, "vdi", "lock", "list")[:-1]  # the states are told, no inode is read
    return found


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("many", [MANY, pytest.param(SOAK_MANY, marks=pytest.mark.soak)])
def test_costs_do_not_grow(many: int, new_cluster: Callable[..., Cluster]) -> None:
    cluster = started(new_cluster(1))
    cluster.format("-c", "1")
    for name in ("one", "other"):
        cluster.dog("vdi", "create", name, str(SIZE))
    cluster.dog("vdi", "write", "one", "0", "512", stdin=bytes(512))
    cluster.dog("vdi", "snapshot", "-s", "first", "one")
    connection = Connection(("127.0.0.1", cluster.port(0)))
    few = costs(cluster, connection, "1")
    vid: Vid = admin.find(connection, b"one").vid
    for number in range(many):
        admin.new_volume(connection, b"volume%d" % number, SIZE)
        vid = admin.new_volume(connection, b"one", SIZE, vid, True).vid
    assert len(cluster.dog("vdi", "list", "-r", "one").splitlines()) == many + 3
    assert len(cluster.dog("vdi", "list", "-r").splitlines()) == 2 * many + 4
    assert costs(cluster, connection, "2") == few
    connection.close()
