"""Erasure-coded volumes on six real sheep: written, updated in place, read and rebuilt while nodes come and go."""

from __future__ import annotations

import itertools
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.bench.recovery import restored_bytes
from tests.support.cluster import RUNNING, Cluster, formatted

from sheepdog.cluster.core.erasure import Policy
from sheepdog.cluster.host.coders import best_coder
from sheepdog.cluster.host.trailer import offset_in_file
from sheepdog.frontends.qemu.strips import original_strip

MIB = 1 << 20
SIZE = 12 * MIB
NODES = 6


@pytest.fixture
def cluster(new_cluster: Callable[..., Cluster]) -> Cluster:
    return formatted(new_cluster(NODES))


class Volume:
    """A coded volume and what it must hold."""

    def __init__(self, cluster: Cluster, name: str, policy: str) -> None:
        self.cluster = cluster
        self.name = name
        self.random = random.Random(name)
        self.data = bytearray(self.random.randbytes(SIZE))
        cluster.dog("vdi", "create", "-c", policy, name, str(SIZE))
        self.write(0, bytes(self.data))

    def write(self, offset: int, data: bytes, node: int = 0) -> None:
        self.data[offset : offset + len(data)] = data
        self.cluster.dog("vdi", "write", self.name, str(offset), str(len(data)), stdin=data, node=node)

    def scribble(self, count: int, node: int = 0) -> None:
        """Writes of all sizes at any place."""
        for _ in range(count):
            length = self.random.choice([1, 100, 4096, 5000, 65_536, 70_000, 300_000])
            self.write(self.random.randrange(SIZE - length), self.random.randbytes(length), node)

    def read(self, *options: str, node: int = 0) -> bytes:
        return self.cluster.try_dog("vdi", "read", *options, self.name, "0", str(SIZE), node=node, check=True).stdout

    def check(self, node: int = 0) -> None:
        assert self.read(node=node) == bytes(self.data)


def strips_of(cluster: Cluster, node: int) -> list[Path]:
    return [path for name, path in sorted(cluster.objects(node).items()) if "_" in name]


def test_two_nodes_die_one_after_another(cluster: Cluster) -> None:
    """The promise of 4:2, with writes in between, and again after everything is rebuilt."""
    volume = Volume(cluster, "vol", "4:2")
    volume.scribble(6)
    volume.check(node=3)
    for dying in ((5, 4), (0, 1)):
        for number, node in enumerate(dying):
            alive = next(other for other in range(NODES) if other not in dying)
            cluster.kill(node)
            cluster.wait_members(NODES - 1 - number, [alive])
            volume.scribble(4, node=alive)
            volume.check(node=alive)
        for node in dying:
            cluster.start(node)
        cluster.wait_members(NODES)
        volume.scribble(3)
        cluster.wait_recovered()
        volume.check()
        assert all(len(strips_of(cluster, node)) == SIZE // (4 * MIB) for node in range(NODES))
    every_decoding_is_equal(cluster, volume)


def every_decoding_is_equal(cluster: Cluster, volume: Volume) -> None:
    """Any four of the six strips on the disks give every object."""
    for node in range(NODES):
        cluster.kill(node, signal.SIGTERM)  # what is in the journal goes to the files
    coder, policy = best_coder(lambda level, text: None), Policy(4, 2)
    objects: dict[str, dict[int, bytes]] = {}
    for node in range(NODES):
        for path in strips_of(cluster, node):
            name, _, strip = path.name.partition("_")
            objects.setdefault(name, {})[int(strip)] = path.read_bytes()[:MIB]
    assert len(objects) == SIZE // (4 * MIB)
    for index, (_, strips) in enumerate(sorted(objects.items())):
        data = bytes(volume.data[4 * MIB * index : 4 * MIB * (index + 1)])
        for chosen in itertools.combinations(range(6), 4):
            decoded = coder.decode(policy, {strip: strips[strip] for strip in chosen}, range(4))
            units = [bytes(unit)[at : at + 65_536] for at in range(0, MIB, 65_536) for unit in decoded]
            assert b"".join(units) == data, f"object {index} from strips {chosen}"


def test_a_node_that_was_away_is_given_what_it_missed(cluster: Cluster) -> None:
    """Blocks of its strips, not whole strips; it had been killed, so it knows from META/undo what it had written."""
    volume = Volume(cluster, "vol", "4:2")
    for number in range(4):
        volume.write(number * 65_536, volume.random.randbytes(4096), node=1)
    cluster.kill(2)
    cluster.wait_members(NODES - 1, [0])
    for number in range(4):  # all data strips
        volume.write(number * (65_536 + 4096), volume.random.randbytes(4096), node=1)
    cluster.start(2)
    cluster.wait_members(NODES)
    cluster.wait_recovered()
    assert 0 < restored_bytes(cluster) <= 8 * 4096
    volume.check(node=2)
    every_decoding_is_equal(cluster, volume)


def test_snapshots_clones_and_a_full_restart(cluster: Cluster) -> None:
    volume = Volume(cluster, "vol", "4:2")
    cluster.dog("vdi", "snapshot", "-s", "tag", "vol")
    frozen = bytes(volume.data)
    volume.scribble(5)
    volume.check()
    assert volume.read("-s", "tag") == frozen
    cluster.dog("vdi", "clone", "-s", "tag", "vol", "copy")
    cluster.dog("vdi", "write", "copy", "4096", "4096", stdin=b"z" * 4096)
    expected = frozen[:4096] + b"z" * 4096 + frozen[8192:]
    for node in range(NODES):
        cluster.kill(node)
    cluster.start()
    cluster.wait_members(NODES)
    cluster.wait_status(RUNNING)
    cluster.wait_recovered()
    volume.check(node=5)
    assert cluster.try_dog("vdi", "read", "copy", "0", str(SIZE), check=True).stdout == expected


def test_space_is_one_and_a_half_times(cluster: Cluster) -> None:
    before = sum(path.stat().st_blocks * 512 for node in range(NODES) for path in cluster.objects(node).values())
    Volume(cluster, "vol", "4:2")
    used = sum(path.stat().st_blocks * 512 for node in range(NODES) for path in strips_of(cluster, node))
    assert 1.5 * SIZE <= used <= 1.55 * SIZE
    assert before < MIB


@pytest.mark.parametrize("policy", ["2:1", "2:4", "4:1"])
def test_other_policies_lose_what_they_may(cluster: Cluster, policy: str) -> None:
    volume = Volume(cluster, "vol", policy)
    lost = int(policy.split(":")[1])
    for node in range(lost):
        cluster.kill(node)
        cluster.wait_members(NODES - 1 - node, [5])
        volume.scribble(2, node=5)
    volume.check(node=5)


def test_the_default_of_a_cluster_may_be_coded(tmp_path: Path) -> None:
    cluster = Cluster(3, tmp_path)
    try:
        cluster.start()
        cluster.wait_members(3)
        cluster.format("-c", "2:1")
        cluster.dog("vdi", "create", "vol", "8M")
        cluster.dog("vdi", "write", "vol", "0", "8192", stdin=b"ab" * 4096)
        assert "2:1" in cluster.dog("cluster", "info")
        assert "2:1" in cluster.dog("vdi", "list")
        assert all(strips_of(cluster, node) for node in range(3))
        assert cluster.try_dog("vdi", "read", "vol", "0", "8192").stdout == b"ab" * 4096
        for wanted, old in (("3", "2:1"), ("2", "3"), ("2:1", "2")):
            done = cluster.try_dog("cluster", "alter-copy", "-f", "-c", wanted, check=True)
            assert f"redundancy level is set to {wanted}, the old one was {old}.\n" in done.stderr.decode()
            cluster.dog("vdi", "create", f"of{wanted}", "8M")
            cluster.dog("vdi", "write", f"of{wanted}", "0", "8192", stdin=b"cd" * 4096)
            assert f" {wanted} " in cluster.dog("vdi", "list", f"of{wanted}").splitlines()[-1]
        cluster.dog("cluster", "shutdown")
        cluster.wait_stopped()
        cluster.start()
        cluster.wait_status(RUNNING)
        for name, data in (("vol", b"ab"), ("of3", b"cd"), ("of2:1", b"cd")):
            assert cluster.try_dog("vdi", "read", name, "0", "8192").stdout == data * 4096
        assert "2:1" in cluster.dog("cluster", "info")
    finally:
        cluster.close()


def test_check_finds_a_strip_that_rotted_or_is_wrong(cluster: Cluster) -> None:
    """`dog vdi check` reads every strip on its node, and what is not right is made anew."""
    volume = Volume(cluster, "vol", "4:2")
    assert "fixed" not in cluster.dog("vdi", "check", "vol")
    good = {}
    for node in (1, 4):
        path = strips_of(cluster, node)[0]
        size = offset_in_file(path.stat().st_size)
        good[path] = path.read_bytes()[:size]
        with path.open("r+b") as file:
            file.seek(70_000)
            file.write(b"rot" * 100)
    assert "fixed missing" in cluster.dog("vdi", "check", "vol")  # reading the first may have repaired the second
    assert "fixed" not in cluster.dog("vdi", "check", "vol")
    for path, data in good.items():
        assert path.read_bytes()[: len(data)] == data
    volume.check(node=1)


def test_strips_in_the_layout_of_the_original() -> None:
    """READ_PEER is answered with stripes of 512 bytes, from which the original's dog decodes."""
    coder, policy = best_coder(lambda level, text: None), Policy(4, 2)
    data = random.Random(5).randbytes(8192)
    strips = [bytes(original_strip(coder, policy, data, index)) for index in range(6)]
    assert [len(strip) for strip in strips] == [2048] * 6
    assert strips[1][:128] == data[128:256]
    assert strips[1][128:256] == data[640:768]
    assert [bytes(unit) for unit in coder.encode(policy, strips[:4])] == strips[4:]
