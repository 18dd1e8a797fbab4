"""Rot planted in the files of a running cluster: one pass finds all of it, repairs what can be, and names the rest."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.cluster import RUNNING, Cluster
from tests.support.processes import BIN, run, wait_until

from sheepdog.cluster.host import trailer

MIB = 1 << 20
SIZE = 12 * MIB
NODES = 5
PASS_SECONDS = 90.0


def dd(path: Path, block: int) -> None:
    run(["dd", "if=/dev/urandom", f"of={path}", "bs=4096", "count=1", f"seek={block}", "conv=notrunc"])


def status(cluster: Cluster) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(cluster.try_dog("node", "scrub", "status", "-A", "--json").stdout)
    return found


def scrub(cluster: Cluster) -> list[dict[str, Any]]:
    """One pass of all nodes."""
    passes = [one["passes"] for one in status(cluster)]
    cluster.dog("node", "scrub", "start", "-A")

    def ended() -> bool:
        return all(one["passes"] == before + 1 for one, before in zip(status(cluster), passes, strict=True))

    wait_until(ended, PASS_SECONDS, "one pass", step=0.2)
    return status(cluster)


def files(cluster: Cluster, coded: bool) -> list[Path]:
    """Files of data objects."""
    found = [path for node in range(NODES) for name, path in cluster.objects(node).items() if name.startswith("00")]
    return sorted(path for path in found if ("_" in path.name) == coded)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(NODES, tmp_path, options=())
    try:
        made.start()
        made.wait_members(NODES)
        made.format("-c", "3")
        yield made
    finally:
        made.close()


def test_one_pass_finds_all_and_repairs_what_can_be(cluster: Cluster) -> None:
    rng = random.Random(5)
    data = {name: rng.randbytes(SIZE) for name in ("plain", "coded")}
    for name, policy in (("plain", "3"), ("coded", "2:2")):
        cluster.dog("vdi", "create", "-c", policy, name, str(SIZE))
        cluster.dog("vdi", "write", name, "0", str(SIZE), stdin=data[name])
    cluster.dog("node", "scrub", "schedule", "-A", "48", "512")
    assert [(one["hours"], one["rate"]) for one in status(cluster)] == [(48, 512 * MIB)] * NODES
    assert all((one["found"], one["lost"]) == (0, []) for one in scrub(cluster)), "nothing is bad yet"

    planted = 0
    for path in files(cluster, coded=False)[::2]:  # at most two of three copies of any block
        for block in rng.sample(range(500), 3):
            dd(path, block + 500 * (planted % 2))
            planted += 1
    strips = files(cluster, coded=True)
    for path in [path for path in strips if path.name.endswith("_1")]:
        dd(path, 7)
        planted += 1
    result = scrub(cluster)
    assert sum(one["found"] for one in result) == planted
    assert sum(one["repaired"] for one in result) == planted
    assert all(one["lost"] == [] for one in result)
    for name, expected in data.items():
        assert cluster.try_dog("vdi", "read", name, node=2, check=True).stdout == expected

    # One block of one object on all of its copies: that one is lost, by name, and nothing else.
    name = files(cluster, coded=False)[0].name
    victims = [path for path in files(cluster, coded=False) if path.name == name]
    assert len(victims) == 3
    for path in victims:
        dd(path, 100)
    dd(victims[0], 200)
    result = scrub(cluster)
    places = sorted(str(path.parent) for path in victims)
    assert sorted(one["lost"] for one in result if one["lost"]) == [[[name, [100], place]] for place in places]
    assert sum(one["rot"]["bad"] for one in result) == 3
    told = cluster.try_dog("node", "scrub", "status", "-A").stdout.decode()
    logs = "".join(cluster.log(node).read_text() for node in range(NODES))
    for place in places:
        assert f"object {name} in {place}: blocks 100 are lost" in told
        assert f"{name} in {place}: blocks [100] are lost" in logs
    assert cluster.try_dog("node", "scrub", "status", "-A").returncode == 1
    start = int(name[8:], 16) * 4 * MIB
    for block, bad in ((99, False), (100, True), (101, False), (200, False)):
        at = start + block * 4096
        read = cluster.try_dog("vdi", "read", "plain", str(at), "4096")
        assert (read.returncode != 0) == bad, block
        assert bad or read.stdout == data["plain"][at : at + 4096]

    # What lies on the disks is right but for that block.
    cluster.dog("cluster", "shutdown")
    cluster.wait_stopped()
    stores = [str(cluster.store(node)) for node in range(NODES)]
    checked = json.loads(run([str(BIN / "dog"), "store", "check", "--json", *stores], check=False).stdout)
    damaged = [(Path(one["path"]).name, one["blocks"]) for store in checked for one in store["damaged"]]
    assert damaged == [(name, [100])] * 3


def test_a_pass_goes_on_after_a_stop_and_a_restart(cluster: Cluster) -> None:
    cluster.dog("vdi", "create", "-P", "data", str(8 * MIB))
    cluster.dog("vdi", "write", "data", "0", str(8 * MIB), stdin=random.Random(1).randbytes(8 * MIB))
    cluster.dog("node", "scrub", "schedule", "24", "1")
    cluster.dog("node", "scrub", "start")

    def own() -> dict[str, Any]:
        return dict(json.loads(cluster.try_dog("node", "scrub", "status", "--json").stdout)[0])

    wait_until(lambda: own()["blocks"] > 0, PASS_SECONDS, "first blocks")
    cluster.dog("node", "scrub", "stop")
    before = own()
    assert before["state"] == "stopped"
    assert before["left"] > 0
    cluster.kill(0)
    cluster.start(0)
    cluster.wait_members(NODES)
    cluster.wait_status(RUNNING)
    after = own()
    assert (after["state"], after["hours"], after["rate"]) == ("stopped", 24, MIB)
    assert after["began"] == before["began"]
    cluster.dog("node", "scrub", "schedule", "24", "512")
    cluster.dog("node", "scrub", "start")
    wait_until(lambda: own()["state"] == "idle", PASS_SECONDS, "end of the pass")
    assert own()["began"] == before["began"], "it went on"
    assert own()["passes"] == 1


def test_a_strip_that_does_not_fit_the_others_is_made_anew(cluster: Cluster) -> None:
    """Its hashes are right, so that nothing but the parity can tell."""
    data = random.Random(6).randbytes(SIZE)
    cluster.dog("vdi", "create", "-c", "2:2", "coded", str(SIZE))
    cluster.dog("vdi", "write", "coded", "0", str(SIZE), stdin=data)
    cluster.dog("cluster", "shutdown")
    cluster.wait_stopped()
    ends = ("0_2", "0_3", "2_1")  # both parity strips of the first object, a data strip of the third
    victims = [path for end in ends for path in files(cluster, coded=True) if path.name.endswith(end)]
    assert len(victims) == 3
    right = [path.read_bytes() for path in victims]
    for path, content in zip(victims, right, strict=True):
        table = trailer.offset_in_file(len(content)) or 0
        with path.open("r+b") as file:
            file.seek(20 * 4096)
            file.write(b"lost" * 1024)
            file.seek(table + trailer.HEADER_SIZE + 20 * trailer.ENTRY_SIZE)
            file.write(trailer.hash_of(b"lost" * 1024).to_bytes(8, "little"))
    cluster.start()
    cluster.wait_members(NODES)
    cluster.wait_recovered()
    cluster.dog("node", "scrub", "schedule", "-A", "48", "512")
    result = scrub(cluster)
    assert sum(one["misfits"] for one in result) == 3
    assert all((one["found"], one["lost"]) == (0, []) for one in result)
    assert "did not fit the others" in cluster.dog("node", "scrub", "status", "-A")
    cluster.wait_recovered()
    assert sum(one["misfits"] for one in scrub(cluster)) == 0
    for path, content in zip(victims, right, strict=True):
        assert path.read_bytes()[:MIB] == content[:MIB]
    assert cluster.try_dog("vdi", "read", "coded", check=True).stdout == data
    logs = "".join(cluster.log(node).read_text() for node in range(NODES))
    assert logs.count("does not fit the others: it is made anew") == 3
