"""The object cache behind several doors of one gateway: sheepfs, NBD, native clients and dog see one cache."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
from tests.support import needs
from tests.support.cluster import Cluster
from tests.support.mounts import SheepFs
from tests.support.nbd import NbdServer, nbdsh
from tests.support.processes import wait_until

from sheepdog.cluster.client.blocking import BlockingVolume

MIB = 1 << 20
BLOCK = 4096
OWNER, OTHER = 0, 2
CLAIM_S = 30.0


@pytest.fixture(autouse=True)
def tools() -> None:
    needs.fuse()
    needs.root()


@pytest.fixture
def cluster(new_cluster: Callable[..., Cluster]) -> Cluster:
    cluster = new_cluster(3)
    cluster.start(extra={OWNER: ("-w", "object:size=64M")})
    cluster.wait_members(3)
    cluster.format("-c", "2")
    cluster.dog("vdi", "create", "-P", "guest", "16M")
    return cluster


def info(cluster: Cluster) -> dict[str, int]:
    found = json.loads(cluster.dog("vdi", "cache", "info", "--json", node=OWNER))
    return {key: value for key, value in found.items() if isinstance(value, int)}


def claim(cluster: Cluster, volume: BlockingVolume) -> None:
    """The first requests go past the cache, until all nodes know whose the volume is."""

    def is_claimed() -> bool:
        volume.write(0, b"0" * BLOCK)
        return info(cluster)["local_writes"] > 0

    wait_until(is_claimed, CLAIM_S, "the claim")


def test_what_one_door_wrote_the_others_read(
    cluster: Cluster, directory: Path, teardown: ExitStack, mount_sheepfs: Callable[..., SheepFs]
) -> None:
    """Each writes a block and flushes nothing; all see it at once, and another gateway too."""
    file = mount_sheepfs(cluster, OWNER, "-o").volume("guest")
    native = BlockingVolume.open(("127.0.0.1", cluster.port(OWNER)), "guest")
    teardown.callback(native.close)
    claim(cluster, native)

    def by_sheepfs(offset: int) -> bytes:
        with file.open("rb", buffering=0) as opened:
            return os.pread(opened.fileno(), BLOCK, offset)

    def by_dog(offset: int) -> bytes:
        return cluster.try_dog("vdi", "read", "guest", str(offset), str(BLOCK), node=OWNER, check=True).stdout

    writers: list[Callable[[int, bytes], object]] = [
        lambda offset, data: os.pwrite(opened, data, offset),
        native.write,
        lambda offset, data: cluster.dog("vdi", "write", "-w", "guest", str(offset), str(len(data)), stdin=data),
    ]
    opened = os.open(file, os.O_RDWR)
    teardown.callback(os.close, opened)
    for number, write in enumerate(writers):
        offset, data = BLOCK * (5 + number), bytes([65 + number]) * BLOCK
        write(offset, data)
        assert info(cluster)["dirty"], f"writer {number}: it was pushed"
        assert [by_sheepfs(offset), bytes(native.read(offset, BLOCK)), by_dog(offset)] == [data] * 3
    os.fsync(opened)  # a flush by one door is one for all
    assert not info(cluster)["dirty"]
    seen = cluster.try_dog("vdi", "read", "guest", str(BLOCK * 5), str(3 * BLOCK), node=OTHER, check=True).stdout
    assert seen == b"A" * BLOCK + b"B" * BLOCK + b"C" * BLOCK


def test_nbd_and_a_native_client(cluster: Cluster, directory: Path, teardown: ExitStack) -> None:
    needs.program("nbdkit", "nbdsh")
    server = NbdServer(cluster, directory, "guest", node=OWNER)
    teardown.callback(server.close)
    native = BlockingVolume.open(("127.0.0.1", cluster.port(OWNER)), "guest")
    teardown.callback(native.close)
    writes = "for _ in range(20): h.pwrite(b'n' * 4096, 8192)"
    nbdsh(server.uri("guest"), writes, "assert h.pread(4096, 8192) == b'n' * 4096")
    assert native.read(8192, BLOCK) == b"n" * BLOCK
    claim(cluster, native)
    native.write(8192, b"m" * BLOCK)
    nbdsh(
        server.uri("guest"),
        "assert h.pread(4096, 8192) == b'm' * 4096",
        "h.pwrite(b'o' * 512, 8192)",
        "assert h.pread(4096, 8192) == b'o' * 512 + b'm' * 3584",
        "h.flush()",
    )
    assert native.read(8192, BLOCK) == b"o" * 512 + b"m" * 3584
    assert not info(cluster)["dirty"]


def read(file: Path) -> None:
    with file.open("rb", buffering=0) as opened:
        assert len(os.pread(opened.fileno(), MIB // 2, 0)) == MIB // 2


def hits_after_a_read(cluster: Cluster, file: Path) -> bool:
    read(file)
    return info(cluster)["hits"] > 0


def test_only_with_o_reads_come_into_the_cache(cluster: Cluster, mount_sheepfs: Callable[..., SheepFs]) -> None:
    cluster.dog("vdi", "write", "guest", "0", "1M", stdin=os.urandom(MIB), node=OTHER)
    sheepfs = mount_sheepfs(cluster, OWNER)
    for cached in (False, True):
        (sheepfs.place / "config/object_cache").write_text(f"{int(cached)}\n")
        file = sheepfs.volume("guest")

        for _ in range(20):
            read(file)
        if cached:
            wait_until(partial(hits_after_a_read, cluster, file), CLAIM_S, "a hit")
        else:
            assert (info(cluster)["hits"], info(cluster)["misses"]) == (0, 0)
        sheepfs.release("guest")
