"""The directories of a real cluster without its daemons: damage planted by dd is found, volumes come out whole."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.cluster import Cluster
from tests.support.processes import BIN, run

MIB = 1 << 20
SIZE = 10 * MIB + 12_288
NODES = 6
LEVEL_SECONDS = 3.0  # after the last write: then strips have one version, and any D of them are the object


def dd(path: Path, block: int, size: int = 512) -> None:
    """One block of other bytes, as an administrator would plant it."""
    run(["dd", "if=/dev/urandom", f"of={path}", f"bs={size}", "count=1", f"seek={block}", "conv=notrunc"])


def dog_store(*words: str, status: int = 0) -> subprocess.CompletedProcess[bytes]:
    done = run([str(BIN / "dog"), "store", *words], check=False)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-2000:]
    return done


class Left:
    """What is left of a cluster that was killed, and what its volumes must hold."""

    def __init__(self, cluster: Cluster) -> None:
        rng = random.Random(1)
        self.cluster = cluster
        self.stores = [str(cluster.store(node)) for node in range(NODES)]
        self.data: dict[str, bytearray] = {}
        for name, policy in (("plain", "3"), ("coded", "4:2")):
            data = self.data[name] = bytearray(rng.randbytes(SIZE))
            cluster.dog("vdi", "create", "-c", policy, name, str(SIZE))
            cluster.dog("vdi", "write", name, "0", str(SIZE), stdin=bytes(data))
            if name == "coded":
                cluster.dog("vdi", "snapshot", "-s", "before", name)
                self.data["before"] = bytearray(data)
            for _ in range(4):
                length = rng.choice([1, 512, 5000, 100_000])
                offset = rng.randrange(SIZE - length)
                part = rng.randbytes(length)
                data[offset : offset + length] = part
                cluster.dog("vdi", "write", name, str(offset), str(length), stdin=part)
        time.sleep(LEVEL_SECONDS)
        cluster.dog("cluster", "recover", "disable")  # else those that die last make copies in other places
        for node in range(NODES):
            cluster.kill(node, signal.SIGKILL)

    def files(self, prefix: str, *nodes: int) -> list[Path]:
        """Object files of these nodes, or of all, whose names begin so."""
        found = [path for node in nodes or range(NODES) for path in self.cluster.objects(node).values()]
        return sorted((path for path in found if path.name.startswith(prefix)), key=lambda path: path.name)

    def check(self, status: int) -> list[dict[str, Any]]:
        reports: list[dict[str, Any]] = json.loads(dog_store("check", "--json", *self.stores, status=status).stdout)
        return [damage for report in reports for damage in report["damaged"]]

    def salvage(self, name: str, *options: str, stores: list[str] | None = None, status: int = 0) -> bytes:
        return dog_store("salvage", *(stores or self.stores), "--vdi", name, *options, status=status).stdout


@pytest.fixture
def left(tmp_path: Path) -> Iterator[Left]:
    cluster = Cluster(NODES, tmp_path, options=())  # synced: a torn large write is not mistaken for damage
    try:
        cluster.start()
        cluster.wait_members(NODES)
        cluster.format("-c", "3")
        yield Left(cluster)
    finally:
        cluster.close()


def test_damage_is_found_and_volumes_come_out_whole(left: Left, tmp_path: Path) -> None:
    assert left.check(0) == []
    listed = json.loads(dog_store("salvage", "--json", *left.stores).stdout)
    assert sorted((one["name"], one["tag"]) for one in listed) == [("coded", ""), ("coded", "before"), ("plain", "")]

    # in the stores that are left out below: what is left has to be enough there
    strips = [path for path in left.files("00", 0, 1) if "_" in path.name]
    copies = [path for path in left.files("00", 4, 5) if "_" not in path.name]
    planted = {str(path) for path in (strips[0], strips[-1], copies[0], copies[-1])}
    for path in sorted(planted):
        dd(Path(path), 20, 4096)
    dd(left.cluster.store(1) / "superblock", 0)
    dd(left.cluster.store(2) / "epoch" / "00000001", 0)
    found = left.check(1)
    assert {one["path"] for one in found if one["object"]} == planted
    assert all(one["blocks"] == [20] for one in found if one["object"])
    others = {one["path"] for one in found if not one["object"]}
    assert others == {str(left.cluster.store(1) / "superblock"), str(left.cluster.store(2) / "epoch" / "00000001")}

    assert left.salvage("plain") == left.data["plain"]
    assert left.salvage("coded") == left.data["coded"]
    assert left.salvage("coded", "-s", "before") == left.data["before"]
    # two strips and two copies of everything may be missing, in any place
    assert left.salvage("coded", stores=left.stores[2:]) == left.data["coded"]
    assert left.salvage("plain", stores=left.stores[:4]) == left.data["plain"]
    assert left.check(1) == found, "looking changes nothing"
    lost_is_named(left, listed)
    refused(left, tmp_path)


def lost_is_named(left: Left, listed: list[dict[str, Any]]) -> None:
    """Zeros in the image, never other bytes."""
    for volume, tag, options in (("plain", "", ()), ("coded", "before", ("-s", "before"))):
        vid = next(int(one["vdi_id"], 16) for one in listed if (one["name"], one["tag"]) == (volume, tag))
        name = f"{vid << 32 | 1:016x}"
        for path in left.files(name):
            dd(path, 3, 4096)
        done = dog_store("salvage", *left.stores, "--vdi", volume, *options, status=1)
        assert f"object {name}".encode() in done.stderr
        assert b"are lost" in done.stderr
        image, data = done.stdout, left.data[tag or volume]
        wrong = [start for start in range(0, SIZE, 4096) if image[start : start + 4096] != data[start : start + 4096]]
        assert 1 <= len(wrong) <= 4  # one block of the copies, or of each data strip
        assert all(not any(image[start : start + 4096]) for start in wrong)


def refused(left: Left, tmp_path: Path) -> None:
    """A store in use, a directory that is none, a volume that is not there."""
    left.cluster.start(0)
    left.cluster.wait_status(0x17, [0])
    failed = dog_store("check", left.stores[0], status=2)
    assert b"another sheep daemon is using" in failed.stderr
    assert dog_store("check", str(tmp_path), status=2).stderr == (
        f"{tmp_path} is not the metadata directory of a sheep\n".encode()
    )
    assert b"no volume other" in dog_store("salvage", left.stores[1], "--vdi", "other", status=2).stderr
