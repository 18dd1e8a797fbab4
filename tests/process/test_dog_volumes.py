"""Locks, redundancy, repair, hyper volumes and the smaller commands of `dog` against real sheep."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from tests.support.cluster import Cluster, started
from tests.support.door import Door, vdi
from tests.support.processes import BIN, environment, wait_until

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.wire.header import VDI_RESPONSE
from sheepdog.cluster.wire.opcodes import Opcode

MIB = 1 << 20
NODES = 4


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ExitStack() as stack:
        nodes = Cluster(NODES, tmp_path_factory.mktemp("volumes"))
        stack.callback(nodes.close)
        started(nodes).format("-c", "2", "-l")
        yield nodes


def failed(cluster: Cluster, *words: str, node: int = 0, stdin: bytes = b"") -> tuple[int, str, str]:
    """Status, stdout and stderr."""
    done = cluster.try_dog(*words, node=node, stdin=stdin)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def write(cluster: Cluster, name: str, data: bytes, offset: int = 0) -> None:
    cluster.dog("vdi", "write", name, str(offset), str(len(data)), stdin=data)


def read(cluster: Cluster, *words: str, node: int = 0) -> bytes:
    return cluster.try_dog("vdi", "read", *words, node=node, check=True).stdout


def holders(cluster: Cluster, oid: str) -> list[int]:
    return [node for node in cluster.running_nodes() if oid in cluster.objects(node)]


def lock(cluster: Cluster, node: int, name: bytes, shared: bool = False, snap_id: int = 0) -> tuple[int, int]:
    """Result and vid of LOCK_VDI; the connection is closed at once, as QEMU's is."""
    with Door(cluster.port(node)) as door:
        answer = VDI_RESPONSE.unpack(
            door.ask(vdi(Opcode.LOCK_VDI, [name, b""], lock_type=int(shared), snap_id=snap_id)).head
        )
        return answer.result, answer.vdi_id


def release(cluster: Cluster, node: int, vid: int, shared: bool = False) -> None:
    with Door(cluster.port(node)) as door:
        assert door.ask(vdi(Opcode.RELEASE_VDI, [], base_vdi_id=vid, lock_type=int(shared), version=0)).result == 0


def owner(cluster: Cluster, node: int) -> str:
    return f"IPv4 ip:127.0.0.1 port:{cluster.port(node)}"


def locks(cluster: Cluster) -> list[str]:
    header, *rows = cluster.dog("vdi", "lock", "list").splitlines()
    assert header == "  Name         Id  VDI id  Tag            Owner node(s)"
    return rows


def test_locks(cluster: Cluster) -> None:
    vid = int(cluster.dog("vdi", "create", "locked", "8M", "-v", "-r"), 16)
    assert locks(cluster) == []
    assert lock(cluster, 1, b"locked") == (0, vid)
    assert lock(cluster, 1, b"locked") == (Result.VDI_LOCKED, vid)
    assert lock(cluster, 2, b"locked", shared=True) == (Result.VDI_LOCKED, vid)
    assert locks(cluster) == [f"  locked        0  {vid:6x}  {'':13}  {owner(cluster, 1)}"]
    header, _, *machines = cluster.dog("vm", "list").splitlines()
    assert header == "Name            |Vdi size |Allocated| Shared  | Status"
    assert "locked          |   8.0 MB|   0.0 MB|   0.0 MB| running on 127.0.0.1" in machines
    # A snapshot moves the lock to the volume that goes on; the snapshot is nobody's.
    cluster.dog("vdi", "snapshot", "-s", "t1", "locked")
    heir = vid + 1
    assert locks(cluster) == [f"  locked        0  {heir:6x}  {'':13}  {owner(cluster, 1)}"]
    assert lock(cluster, 2, b"locked", snap_id=1) == (0, vid)
    assert failed(cluster, "vdi", "lock", "unlock", "-s", "t1", "locked") == (
        1, "", f"VDI locked (tag=t1, vid={vid:x}) is not locked\n",
    )  # fmt: skip
    release(cluster, 1, vid)  # by a client that has not noticed
    assert locks(cluster) == []
    assert lock(cluster, 2, b"locked") == (0, heir)
    cluster.dog("vdi", "lock", "unlock", "locked")
    assert failed(cluster, "vdi", "lock", "unlock", "locked") == (1, "", f"VDI locked (vid={heir:x}) is not locked\n")
    assert failed(cluster, "vdi", "lock", "unlock", "nosuch") == (1, "", "Failed to find VDI nosuch: No VDI found\n")
    assert lock(cluster, 1, b"locked", shared=True) == (0, heir)
    assert lock(cluster, 2, b"locked", shared=True) == (0, heir)
    both = f"{owner(cluster, 1)}(modified) {owner(cluster, 2)}(invalidated)"
    assert locks(cluster) == [f"  locked        0  {heir:6x}  {'':13}  {both}"]
    release(cluster, 1, heir, shared=True)
    assert locks(cluster)[0].endswith(f"  {owner(cluster, 2)}(invalidated)")
    release(cluster, 2, heir, shared=True)
    assert f"locked {8 * MIB} 0 0 -" in cluster.dog("vm", "list", "-r").splitlines()


def test_a_lock_ends_with_the_node_that_held_it(new_cluster: Callable[..., Cluster]) -> None:
    cluster = started(new_cluster(3))
    cluster.format("-c", "2", "-l")
    vid = int(cluster.dog("vdi", "create", "v", "4M", "-v", "-r"), 16)
    assert lock(cluster, 2, b"v") == (0, vid)
    cluster.kill(2)
    wait_until(lambda: lock(cluster, 0, b"v") == (0, vid), 30, "the lock of a dead node ends")
    assert lock(cluster, 1, b"v")[0] == Result.VDI_LOCKED
    cluster.start(2)
    cluster.wait_members(3)
    assert lock(cluster, 2, b"v")[0] == Result.VDI_LOCKED  # survives the restart of other nodes


def test_snapshots_at_the_same_time(cluster: Cluster) -> None:
    """Each has its tag, and none takes the volume back to an earlier one."""
    cluster.dog("vdi", "create", "busy", "8M")
    write(cluster, "busy", b"first")
    rounds = [[f"{letter}{number}" for letter in "abcd"] for number in range(2)]
    with ThreadPoolExecutor(4) as pool:
        for number, tags in enumerate(rounds):
            taken = [pool.submit(cluster.dog, "vdi", "snapshot", "-s", tag, "busy") for tag in tags]
            data = b"round%d" % number
            write(cluster, "busy", data)
            assert [one.result() for one in taken] == [""] * len(tags)
            assert read(cluster, "busy", "0", str(len(data))) == data
    rows = [row.split(" ") for row in cluster.dog("vdi", "list", "-r", "busy").splitlines()]
    assert sorted(row[9] for row in rows) == sorted(["", *rounds[0], *rounds[1]])


def test_redundancy_changes(cluster: Cluster) -> None:
    data = random.Random(1).randbytes(9 * MIB)
    vid = cluster.dog("vdi", "create", "b", "12M", "-v", "-r").strip().zfill(6)
    write(cluster, "b", data)
    oids = [f"80{vid}00000000", *(f"00{vid}{index:08x}" for index in range(3))]

    def counts() -> list[int]:
        return [len(holders(cluster, oid)) for oid in oids]

    assert counts() == [2] * 4
    for copies, old in ((3, 2), (4, 3), (1, 4), (2, 1)):
        done = cluster.try_dog("vdi", "alter-copy", "-f", "b", "-c", str(copies), check=True)
        assert done.stderr.decode() == f"b's redundancy level is set to {copies}, the old one was {old}.\n"
        assert read(cluster, "b", "0", str(len(data)), node=copies % NODES) == data
        wait_until(lambda: counts() == [copies] * 4, 60, f"{copies} copies of everything")  # noqa: B023
        assert cluster.dog("vdi", "list", "-r", "b").split(" ")[8] == str(copies)
        assert cluster.dog("vdi", "check", "b") == "finish check&repair b\n"
    assert failed(cluster, "vdi", "alter-copy", "-f", "b", "-c", "2") == (
        1, "", "b's redundancy level is already set to 2, nothing changed.\n",
    )  # fmt: skip
    assert cluster.dog("cluster", "info", "-d").count("[]") == 4  # epochs without a change of members
    done = cluster.try_dog("cluster", "alter-copy", "-f", "-c", "3", check=True)
    assert done.stderr.decode() == "The cluster's redundancy level is set to 3, the old one was 2.\n"
    later = cluster.dog("vdi", "create", "later", "4M", "-v", "-r").strip().zfill(6)
    assert len(holders(cluster, f"80{later}00000000")) == 3
    assert counts() == [2] * 4
    cluster.dog("cluster", "alter-copy", "-f", "-c", "2")


def test_repair(cluster: Cluster) -> None:
    data = random.Random(2).randbytes(8 * MIB)
    vid = cluster.dog("vdi", "create", "rots", "8M", "-c", "3", "-v", "-r").strip().zfill(6)
    write(cluster, "rots", data)
    cluster.dog("vdi", "snapshot", "-s", "t", "rots")
    oid = f"00{vid}00000001"
    for node in holders(cluster, oid):
        with open(cluster.objects(node)[oid], "r+b") as file:
            file.seek(12345)
            file.write(b"rotten")
        assert cluster.dog("vdi", "check", "-s", "t", "rots") == f"fixed replica {oid}\nfinish check&repair rots\n"
        assert cluster.dog("vdi", "check", "-s", "t", "rots") == "finish check&repair rots\n"
        assert cluster.objects(node)[oid].read_bytes()[: 4 * MIB] == data[4 * MIB :]
    assert cluster.dog("cluster", "check").count("finish check&repair") == len(
        cluster.dog("vdi", "list", "-r").splitlines()
    )


def test_hyper_volumes(cluster: Cluster) -> None:
    size = 16 << 50
    refused = failed(cluster, "vdi", "create", "huge", "5T")
    assert refused[0] == 64
    assert refused[2] == (
        "VDI size is larger than 4.0 TB bytes, please use '-y' to create a hyper volume with size up to 16 PB bytes "
        "or use '-z' to create larger object size volume\n"
    )
    vid = cluster.dog("vdi", "create", "-y", "huge", "1P", "-v", "-r").strip().zfill(6)
    pieces = {0: b"first", (1 << 50) - 7: b"last", 777 << 40: b"x" * (5 * MIB)}
    for offset, data in pieces.items():
        write(cluster, "huge", data, offset)
    for offset, data in pieces.items():
        assert read(cluster, "huge", str(offset), str(len(data)), node=1) == data
    assert read(cluster, "huge", str(5 << 40), "4096") == bytes(4096)
    cluster.dog("vdi", "create", "-y", "large", "1T")
    write(cluster, "large", b"in the middle", 1 << 39)
    exported = cluster.directory / "large"
    cluster.dog("vdi", "export", "large", str(exported))
    with exported.open("rb") as file:
        assert file.seek(0, 2) == 1 << 40
        file.seek(1 << 39)
        assert file.read(20) == b"in the middle".ljust(20, b"\0")
    assert exported.stat().st_blocks * 512 <= 8 * MIB
    exported.unlink()
    cluster.dog("vdi", "delete", "large")
    row = cluster.dog("vdi", "list", "-r", "huge").split(" ")
    assert row[3:6] == [str(1 << 50), str(4 * 4 * MIB), "0"]
    indexes = [0, 777 << 18, (777 << 18) + 1, (1 << 28) - 1]
    assert cluster.dog("vdi", "object", "map", "huge").splitlines()[1:] == [
        f"{index:08d} {int(vid, 16):8x}" for index in indexes
    ]
    cluster.dog("vdi", "resize", "huge", "16P")
    write(cluster, "huge", b"end", size - 3)
    assert read(cluster, "huge", str(size - 3), "3") == b"end"
    assert failed(cluster, "vdi", "snapshot", "-s", "no", "huge")[::2] == (
        1, "creating a snapshot of hypervolume is not supported\n",
    )  # fmt: skip
    assert cluster.dog("vdi", "check", "huge") == "finish check&repair huge\n"
    cluster.dog("vdi", "delete", "huge")
    left = [name for node in range(NODES) for name in cluster.objects(node) if name[2:8] == vid]
    assert set(left) == {f"80{vid}00000000"}
    assert cluster.dog("vdi", "list", "-r", "huge") == ""


@pytest.mark.parametrize("shift", [20, 31])
def test_object_sizes(cluster: Cluster, shift: int) -> None:
    name, unit = f"shift{shift}", 1 << shift
    vid = cluster.dog("vdi", "create", name, str(3 * unit), "-z", str(shift), "-v", "-r").strip().zfill(6)
    write(cluster, name, b"across", unit - 3)
    assert read(cluster, name, str(unit - 4), "8", node=2) == b"\0across\0"
    cluster.dog("vdi", "snapshot", "-s", "s", name)
    write(cluster, name, b"A", unit - 3)
    assert read(cluster, "-s", "s", name, str(unit - 3), "6") == b"across"
    assert read(cluster, name, str(unit - 3), "6", node=3) == b"Across"
    assert cluster.dog("vdi", "list", "-r", name).splitlines()[0].split(" ")[4] == str(2 * unit)
    cluster.dog("vdi", "delete", name)
    cluster.dog("vdi", "delete", "-s", "s", name)
    left = {name for node in range(NODES) for name in cluster.objects(node) if name.startswith(f"00{vid}")}
    assert not left


def test_attributes_go_with_the_last_volume(cluster: Cluster) -> None:
    cluster.dog("vdi", "create", "painted", "4M")
    cluster.dog("vdi", "setattr", "painted", "colour", "blue")
    cluster.dog("vdi", "snapshot", "-s", "s", "painted")
    cluster.dog("vdi", "delete", "painted")

    def attributes() -> set[str]:
        return {name for node in range(NODES) for name in cluster.objects(node) if name.startswith("20")}

    assert attributes()
    cluster.dog("vdi", "delete", "-s", "s", "painted")
    assert not attributes()


def test_smaller_commands(cluster: Cluster) -> None:
    plain = cluster.dog("node", "list").splitlines()
    wide = cluster.dog("node", "list", "-v", node=1).splitlines()
    assert wide[0] == "  Id   Host:Port         V-Nodes       Zone             Node id"
    for number, (row, wider) in enumerate(zip(plain[1:], wide[1:], strict=True)):
        assert re.fullmatch(re.escape(row) + r"    [0-9a-f]{16}" + (r" \*" if number == 1 else ""), wider)
    nodes = json.loads(cluster.dog("node", "list", "--json"))
    assert [node["asked"] for node in nodes] == [True, False, False, False]
    coders = cluster.dog("node", "info", "-v").partition("\nErasure coding by\n")[2].splitlines()
    assert [line.split("\t")[0] for line in coders] == [f"127.0.0.1:{cluster.port(node)}" for node in range(NODES)]
    assert failed(cluster, "benchmark", "io", "nosuch")[0] == 2
    cluster.dog("vdi", "create", "bench", "8M")
    assert failed(cluster, "benchmark", "io", "-f", "bench") == (2, "", "VDI bench has unallocated data\n")
    assert failed(cluster, "benchmark", "io", "-f", "-w", "foo", "bench") == (
        2, "", "unknown workqueue type: foo\nassumed workqueue types: ordered, dynamic\n",
    )  # fmt: skip
    write(cluster, "bench", b"q" * 8 * MIB)
    for words in ((), ("-w", "fixed", "-n", "3"), ("-w", "dynamic")):
        assert cluster.dog("benchmark", "io", "-f", "-t", "7", *words, "bench") == ""
    assert b"q" * 100 not in read(cluster, "bench")
    assert failed(cluster, "benchmark", "io", "-t", "1", "bench", stdin=b"no\n")[::2] == (0, "")


def test_an_interrupted_benchmark_leaves_nothing(cluster: Cluster) -> None:
    """In the middle of filling its volume, which takes longer than the loads on it."""
    before = [cluster.objects(node) for node in range(NODES)]
    command = [str(BIN / "dog"), "benchmark", "run", "-S", "4096", "-p", str(cluster.port(0))]
    measuring = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE)
    try:
        wait_until(lambda: len(cluster.objects(0)) > len(before[0]) + 4, 30, "some objects of the volume")
        measuring.send_signal(signal.SIGINT)
        _, said = measuring.communicate(timeout=30)
    finally:
        measuring.kill()
        measuring.wait()
    assert (measuring.returncode, said) == (130, b"")
    assert "benchmark-" not in cluster.dog("vdi", "list", "-r")
    data = [{name for name in cluster.objects(node) if name not in before[node]} for node in range(NODES)]
    assert not any(name.startswith("00") for names in data for name in names), data
