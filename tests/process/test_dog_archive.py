"""Whole volumes and clusters in and out: `dog cluster snapshot`, `dog vdi export|import`."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.support import needs
from tests.support.cluster import Cluster, started
from tests.support.processes import run

MIB = 1 << 20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ExitStack() as stack:
        nodes = Cluster(2, tmp_path_factory.mktemp("archive"))
        stack.callback(nodes.close)
        started(nodes).format("-c", "2")
        yield nodes


def write(cluster: Cluster, name: str, data: bytes, offset: int = 0) -> None:
    cluster.dog("vdi", "write", name, str(offset), str(len(data)), stdin=data)


def read(cluster: Cluster, *words: str) -> bytes:
    return cluster.try_dog("vdi", "read", *words, check=True).stdout


def listed(cluster: Cluster) -> list[list[str]]:
    """Rows of `dog vdi list -r` without sizes in use and times."""
    rows = [line.split(" ") for line in cluster.dog("vdi", "list", "-r").splitlines()]
    return [[*row[:4], *row[7:]] for row in rows]


def chunks(path: Path) -> dict[str, int]:
    return {entry.name: entry.stat().st_size for entry in (path / "chunks").glob("*/*")}


def test_a_cluster_in_a_directory(cluster: Cluster, new_cluster: Callable[..., Cluster], directory: Path) -> None:
    chance = random.Random(1)
    path = directory / "saved"
    empty = cluster.try_dog("cluster", "snapshot", "save", "s1", str(path))
    assert (empty.returncode, empty.stderr.decode()) == (
        2,
        "Cannot execute. It may be caused by:\n1. The cluster is empty.\n"
        "2. All VDIs of the cluster don't have snapshots.\n",
    )
    assert cluster.dog("cluster", "snapshot", "list", str(path)) == "Index\t\tTag\t\tSnapshot Time\n"
    first, second = chance.randbytes(5 * MIB), chance.randbytes(MIB)
    cluster.dog("vdi", "create", "web", "20M")
    write(cluster, "web", first)
    cluster.dog("vdi", "snapshot", "-s", "one", "web")
    write(cluster, "web", second, 3 * MIB)
    cluster.dog("vdi", "clone", "-s", "one", "web", "twin")
    write(cluster, "twin", b"twin", 8 * MIB)
    cluster.dog("vdi", "snapshot", "-s", "t", "twin")
    cluster.dog("vdi", "create", "big", "70M", "-z", "25")
    write(cluster, "big", second, 31 * MIB + MIB // 2)
    cluster.dog("vdi", "snapshot", "-s", "b", "big")
    assert cluster.dog("cluster", "snapshot", "save", "s1", str(path)) == ""
    small = chunks(path)
    assert sum(small.values()) < 8 * MIB
    cluster.dog("vdi", "snapshot", "-s", "two", "web")
    cluster.dog("cluster", "snapshot", "save", "-m", "s2", str(path))
    more = {name: size for name, size in chunks(path).items() if name not in small}
    assert sum(more.values()) < 4 * MIB + 1000  # one object of 4 MiB was written between
    for words, text in (
        (
            ("save", "s1", str(path)),
            "Snapshot tag has already been used for another snapshot, please, use another one.\n"
            f"Fail to save snapshot to path: {path}.\n",
        ),
        (("show", "zz", str(path)), "Snapshot index or tag does not exist.\nFail to show snapshot\n"),
    ):
        failed = cluster.try_dog("cluster", "snapshot", *words)
        assert (failed.returncode, failed.stderr.decode()) == (2, text)
    shown = cluster.try_dog("cluster", "snapshot", "show", "2", str(path), check=True).stderr.decode().splitlines()
    assert sorted(line.split("name: ")[1] for line in shown) == [
        "big, tag: b", "twin, tag: t", "web, tag: one", "web, tag: two",
    ]  # fmt: skip
    rows = cluster.dog("cluster", "snapshot", "list", str(path)).splitlines()
    assert [line.split("\t\t")[:2] for line in rows[1:]] == [
        ["1", "s1"], ["2", "s2"],
    ]  # fmt: skip
    cluster.dog("vdi", "delete", "-s", "one", "web")  # the others still share its objects
    cluster.dog("cluster", "snapshot", "save", "s3", str(path), "web", "twin")
    before = listed(cluster)
    other = started(new_cluster(3))
    for tag, names in (("s2", []), ("s3", ["twin"])):
        assert other.dog("cluster", "snapshot", "load", "-f", tag, str(path), *names) == "using backend plain store\n"
        assert read(other, "twin", "0", str(5 * MIB)) == first
        assert read(other, "twin", str(8 * MIB), "4") == b"twin"
        if names:
            assert {row[1] for row in listed(other)} == set(names)
            assert [row for row in listed(other) if row[0] == "s"] == [
                row for row in before if row[0] == "s" and row[1] in names
            ]
            continue
        assert read(other, "-s", "one", "web", "0", str(5 * MIB)) == first
        assert read(other, "web", str(3 * MIB), str(MIB)) == second
        assert read(other, "-s", "two", "web", "0", str(3 * MIB)) == first[: 3 * MIB]
        assert read(other, "big", str(31 * MIB + MIB // 2), str(MIB)) == second
        write(other, "web", b"goes on")
        assert read(other, "-s", "two", "web", "0", "7") == first[:7]
    other.dog("cluster", "shutdown")
    other.wait_stopped()
    started(other)
    assert read(other, "twin", str(8 * MIB), "4") == b"twin"
    for row in listed(other):
        other.dog("vdi", "delete", *(["-s", row[2]] if row[0] == "s" else []), row[1])
    assert all(name.startswith("80") for node in range(3) for name in other.objects(node))
    _damage(other, path, small)


def _damage(cluster: Cluster, path: Path, small: dict[str, int]) -> None:
    """A saved state that is not whole is refused before anything is discarded; deleting one keeps the others."""
    cluster.dog("vdi", "create", "precious", "4M")
    for name in ("s1", "3"):
        cluster.dog("cluster", "snapshot", "delete", name, str(path))
    left = chunks(path)
    assert len(left) < len(small) + 3
    victim = max(left, key=lambda name: left[name])
    place = path / "chunks" / victim[:2] / victim
    whole = place.read_bytes()
    for broken in (whole[:-1], whole[:200] + b"?" + whole[201:], b""):
        place.write_bytes(broken)
        failed = cluster.try_dog("cluster", "snapshot", "load", "-f", "s2", str(path))
        assert (failed.returncode, failed.stdout) == (2, b"")
        assert failed.stderr.decode() == f"{place} is corrupt\nFail to load snapshot\n"
    place.write_bytes(whole)
    assert [row[1] for row in listed(cluster)] == ["precious"]
    states = json.loads(cluster.dog("cluster", "snapshot", "list", "--json", str(path)))
    assert [(state["index"], state["tag"], state["snapshots"]) for state in states] == [(2, "s2", 4)]
    cluster.dog("cluster", "snapshot", "load", "-f", "s2", str(path))
    assert {row[1] for row in listed(cluster)} == {"web", "twin", "big"}


def test_export_and_import(cluster: Cluster, directory: Path) -> None:
    needs.program("qemu-img")
    data = random.Random(2).randbytes(3 * MIB + 512)
    cluster.dog("vdi", "create", "disk", "40M")
    write(cluster, "disk", data, 6 * MIB)
    whole = bytes(6 * MIB) + data + bytes(40 * MIB - 6 * MIB - len(data))
    raw, qcow2 = directory / "disk.raw", directory / "disk.qcow2"
    assert cluster.try_dog("vdi", "export", "disk", "-", check=True).stdout == whole
    cluster.dog("vdi", "export", "disk", str(raw))
    assert raw.read_bytes() == whole
    assert raw.stat().st_blocks * 512 <= 8 * MIB
    cluster.dog("vdi", "export", "disk", str(qcow2))
    assert json.loads(run(["qemu-img", "info", "--output=json", str(qcow2)]).stdout)["format"] == "qcow2"
    for number, (source, stdin) in enumerate(((str(raw), b""), (str(qcow2), b""), ("-", whole))):
        name = f"copy{number}"
        cluster.dog("vdi", "import", name, source, stdin=stdin)
        assert read(cluster, name) == whole
        row = next(row for row in cluster.dog("vdi", "list", "-r", name).splitlines())
        assert row.split(" ")[3:5] == [str(40 * MIB), str(8 * MIB)]
    failed = cluster.try_dog("vdi", "import", "copy0", str(raw))
    assert (failed.returncode, failed.stderr) == (1, b"Failed to create VDI copy0: VDI exists already\n")
    qcow2.write_bytes(b"no image")
    assert cluster.try_dog("vdi", "import", "other", str(qcow2)).returncode == 1
    missing = cluster.try_dog("vdi", "export", "nosuch", str(directory / "none"))
    assert missing.returncode == 1
    assert sorted(entry.name for entry in directory.iterdir()) == ["disk.qcow2", "disk.raw"]
    assert cluster.dog("vdi", "list", "-r", "other") == ""
