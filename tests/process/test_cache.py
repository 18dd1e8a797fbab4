"""The object cache with real processes: what users rely on, and what is left when things go wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator

import pytest
from tests.support.cluster import RUNNING, Cluster
from tests.support.processes import wait_until

from sheepdog.cluster.client.blocking import BlockingVolume

MIB = 1 << 20
SIZE = 16 * MIB
CACHE = ("-w", "object:size=64M,directio")
OWNER, OTHER = 0, 1


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(3, tmp_path_factory.mktemp("cache"))
    try:
        cluster.start(extra={OWNER: CACHE})
        cluster.wait_members(3)
        cluster.format("-c", "2")
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def cluster(machines: Cluster) -> Iterator[Cluster]:
    """All nodes run, and there is a new volume `guest`."""
    machines.dog("vdi", "create", "-P", "guest", "16M")
    yield machines
    machines.dog("vdi", "delete", "guest", node=OTHER)


def start_owner(cluster: Cluster) -> None:
    cluster.start(OWNER, extra={OWNER: CACHE})
    cluster.wait_members(3)


def opened(cluster: Cluster, node: int) -> BlockingVolume:
    return BlockingVolume.open(("127.0.0.1", cluster.port(node)), "guest")


def dirty_bytes(cluster: Cluster) -> int:
    found = json.loads(cluster.dog("vdi", "cache", "info", "--json", node=OWNER))
    return sum(volume["dirty"] for volume in found["volumes"])


def contents(cluster: Cluster, node: int) -> bytes:
    volume = opened(cluster, node)
    try:
        return b"".join(bytes(volume.read(offset, MIB)) for offset in range(0, SIZE, MIB))
    finally:
        volume.close()


def write_back(cluster: Cluster) -> bytes:
    """Fills the volume, flushes, then overwrites some of it without a flush; what is in it then."""
    volume = opened(cluster, OWNER)
    data = bytearray(os.urandom(SIZE))
    for offset in range(0, SIZE, MIB):
        volume.write(offset, data[offset : offset + MIB])
    volume.flush()

    def overwritten() -> bool:
        for offset in (4096, 5 * MIB, 5 * MIB + 8192, 9 * MIB - 512, SIZE - 100):
            piece = os.urandom(100 if offset == SIZE - 100 else 4096)
            data[offset : offset + len(piece)] = piece
            volume.write(offset, piece)
        return bool(dirty_bytes(cluster))

    wait_until(overwritten, 30, "writes that stay in the cache")
    return bytes(data)


def test_another_gateway_sees_what_is_dirty(cluster: Cluster) -> None:
    data = write_back(cluster)
    assert contents(cluster, OWNER) == data
    assert contents(cluster, OTHER) == data
    assert not dirty_bytes(cluster)


def test_dog_controls_the_cache(cluster: Cluster) -> None:
    data = write_back(cluster)
    text = cluster.dog("vdi", "cache", "info")
    assert text.startswith("Name\tTag\tTotal\tDirty\tClean\nguest\t\t") and "Cache size 64 MB, used " in text
    assert text.endswith(", directio\n")
    cluster.dog("vdi", "cache", "flush", "guest", node=OTHER)
    assert not dirty_bytes(cluster)
    assert "guest" in cluster.dog("vdi", "cache", "info")
    cluster.dog("vdi", "cache", "delete", "guest", node=OTHER)
    assert "guest" not in cluster.dog("vdi", "cache", "info")
    failed = cluster.try_dog("vdi", "cache", "info", node=OTHER)
    assert failed.returncode == 1 and "failed to get cache information: No cache object found" in failed.stderr.decode()
    assert contents(cluster, OTHER) == data


def test_a_snapshot_has_what_was_dirty(cluster: Cluster) -> None:
    data = write_back(cluster)
    cluster.dog("vdi", "snapshot", "-s", "one", "guest", node=OTHER)
    assert contents(cluster, OTHER) == data
    cluster.dog("vdi", "clone", "-s", "one", "guest", "twin", node=OTHER)
    assert cluster.try_dog("vdi", "read", "twin", "0", "16M", node=OTHER).stdout == data


def test_a_rollback_is_not_undone_by_what_was_dirty(cluster: Cluster) -> None:
    data = write_back(cluster)
    cluster.dog("vdi", "snapshot", "-s", "back", "guest", node=OTHER)
    for node in (OTHER, OWNER):
        write_back(cluster)
        cluster.dog("vdi", "rollback", "-f", "-s", "back", "guest", node=node)
        assert contents(cluster, OTHER) == contents(cluster, OWNER) == data


def test_a_resized_volume_has_what_was_dirty(cluster: Cluster) -> None:
    data = write_back(cluster)
    cluster.dog("vdi", "resize", "guest", "20M", node=OTHER)
    assert cluster.try_dog("vdi", "read", "guest", node=OTHER).stdout == data + bytes(4 * MIB)


def test_dirty_data_survives_a_kill_of_the_gateway(cluster: Cluster) -> None:
    data = write_back(cluster)
    cluster.kill(OWNER)
    cluster.wait_members(2, [1, 2])
    failed = cluster.try_dog("vdi", "read", "guest", node=OTHER)
    assert failed.returncode == 1 and not failed.stdout.startswith(data[:8192])
    for words in (("snapshot", "-s", "two", "guest"), ("delete", "guest")):
        assert b"locked" in cluster.try_dog("vdi", *words, node=OTHER).stderr
    assert "is away or has lost it" in cluster.log(OTHER).read_text()
    start_owner(cluster)
    assert contents(cluster, OTHER) == data
    assert contents(cluster, OWNER) == data


def test_dirty_data_survives_a_kill_of_everybody(cluster: Cluster) -> None:
    data = write_back(cluster)
    for node in range(3):
        cluster.kill(node)
    cluster.start(extra={OWNER: CACHE})
    cluster.wait_members(3)
    cluster.wait_status(RUNNING)
    assert contents(cluster, OTHER) == data


def test_a_lost_cache_takes_only_what_was_not_flushed(cluster: Cluster) -> None:
    volume = opened(cluster, OWNER)
    flushed = os.urandom(SIZE)
    for offset in range(0, SIZE, MIB):
        volume.write(offset, flushed[offset : offset + MIB])
    volume.write(4096, flushed[:4096])
    volume.write(4096, flushed[4096:8192])
    volume.flush()
    assert not dirty_bytes(cluster)
    volume.write(0, b"lost" * 1024)
    cluster.kill(OWNER)
    shutil.rmtree(cluster.store(OWNER) / "cache")
    cluster.wait_members(2, [1, 2])
    start_owner(cluster)
    for node in (OWNER, OTHER):
        assert cluster.try_dog("vdi", "read", "guest", node=node).returncode == 1
    for verb, *rest in (["read"], ["snapshot", "-s", "t"], ["resize", "1G"], ["delete"]):
        told = cluster.try_dog("vdi", verb, "guest", *rest, node=OTHER)
        assert b"VDI is already locked: acknowledged writes are in the cache of a node that is away" in told.stderr
    health = cluster.try_dog("cluster", "health", node=OTHER)
    assert (health.returncode, b"volume guest: refused" in health.stdout) == (2, True)
    cluster.dog("vdi", "cache", "purge", "guest", node=OTHER)
    assert b"guest" not in cluster.try_dog("cluster", "health", node=OTHER).stdout
    for node in (OWNER, OTHER):
        assert contents(cluster, node) == flushed


def test_an_orderly_end_leaves_nothing_behind(cluster: Cluster) -> None:
    data = write_back(cluster)
    cluster.kill(OWNER, signal.SIGTERM)
    cluster.wait_members(2, [1, 2])
    assert contents(cluster, OTHER) == data
    start_owner(cluster)
