"""`dog cluster health`, `dog node may-stop`, `dog vdi object explain`, and nodes that are given time to come back."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.support import trees
from tests.support.cluster import RUNNING, WAIT_FOR_JOIN, Cluster, started
from tests.support.processes import wait_until

MIB = 1 << 20
OBJECT = 4 * MIB
OBJECTS = 12
HEALTHY, DEGRADED, HALTED = 0, 1, 2
SECONDS = 60.0
DELAY_S = 300  # longer than this test


def health(cluster: Cluster, node: int = 0) -> tuple[int, dict[str, Any]]:
    done = cluster.try_dog("cluster", "health", "--json", node=node)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def wait_health(cluster: Cluster, status: int, words: str = "", node: int = 0) -> None:
    """Until the health has this status, for a reason with these words."""
    last: list[Any] = []

    def there() -> bool:
        code, found = health(cluster, node)
        last[:] = [code, found]
        return code == status and (not words or any(words in reason["text"] for reason in found["reasons"]))

    try:
        wait_until(there, SECONDS, f"health {status} {words}", step=0.2)
    except AssertionError as error:
        raise AssertionError(f"{error}; last: {last}") from error
    assert cluster.try_dog("cluster", "health", node=node).stdout.split()[0].decode() == last[1]["health"]


def may_stop(cluster: Cluster, which: int, node: int = 0) -> tuple[int, str]:
    done = cluster.try_dog("node", "may-stop", str(which), node=node)
    return done.returncode, done.stdout.decode()


def explained(cluster: Cluster, index: int, node: int = 0) -> dict[str, Any]:
    words = ("object", "explain", "--json", "data", str(index * OBJECT + 5))
    found: dict[str, Any] = json.loads(cluster.dog("vdi", *words, node=node))
    return found


def nodes_of(cluster: Cluster, found: dict[str, Any]) -> list[int]:
    """Numbers of the nodes that hold a current copy of an explained object, the home first."""
    chosen = [step["node"] for step in found["ring"] if step["chosen"]]
    ports = [int(name.rpartition(":")[2]) for name in chosen if any(c["current"] for c in found["held"][name] or [])]
    return [[cluster.port(node) for node in range(cluster.count)].index(port) for port in ports]


def test_a_life_of_a_cluster(new_cluster: Callable[..., Cluster]) -> None:
    cluster = started(new_cluster(4))
    wait_health(cluster, HALTED, "the cluster is not formatted")
    cluster.format("-c", "2", "--recovery-delay", str(DELAY_S))
    data = trees.pattern(1, OBJECTS * OBJECT)
    cluster.dog("vdi", "create", "data", str(len(data) + OBJECT))
    cluster.dog("vdi", "write", "data", "0", str(len(data)), stdin=data)
    wait_health(cluster, HEALTHY)
    assert [may_stop(cluster, node)[0] for node in range(4)] == [0, 0, 0, 0]
    assert cluster.try_dog("node", "may-stop", "4").returncode == 64

    # Why it is where it is.
    found = explained(cluster, 0)
    assert (found["index"], found["offset_in_object"], found["state"], found["redundancy"]) == (0, 5, "clean", "2")
    copies = {name: held for name, held in found["held"].items() if held}
    assert list(copies) == sorted(step["node"] for step in found["ring"] if step["chosen"])
    versions = [held[0]["version"] for held in copies.values()]
    assert len(copies) == 2
    assert versions[0] == versions[1] != [0, 0, 0]
    assert all(held[0]["current"] and held[0]["size"] == OBJECT for held in copies.values())
    text = cluster.dog("vdi", "object", "explain", "data", "5")
    assert found["oid"] in text
    assert "copy 0; home: orders the writes" in text
    assert "copy 1" in text
    assert text.count("current") == 2
    assert "Nothing was ever written there" in cluster.dog("vdi", "object", "explain", "data", str(len(data)))
    assert b"too large" in cluster.try_dog("vdi", "object", "explain", "data", "1T").stderr

    # What if one failed?
    done = cluster.try_dog("simulate", "--from-cluster", "--fail", "node:3", "--seeds", "1", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["nodes"], said["copies"], said["plan"]["unreadable"]) == (4, 2, 0)
    assert 0 < said["plan"]["moved_bytes"] < said["used"]
    assert said["used"] >= OBJECTS * OBJECT * 2
    assert (said["rehearsal"]["seeds"], said["rehearsal"]["violations"]) == (1, [])

    # A node leaves, and is given time to come back.
    cluster.kill(3)
    cluster.wait_members(3)
    wait_health(cluster, DEGRADED, "short of copies; recovery waits")
    recovery = cluster.dog("node", "recovery")
    assert f"Recovery gives 127.0.0.1:{cluster.port(3)} " in recovery
    waits = json.loads(cluster.dog("node", "recovery", "--json"))
    assert any(0 < row.get("waits_s", 0) <= DELAY_S for row in waits)
    assert cluster.try_dog("vdi", "read", "data", "0", str(len(data)), check=True).stdout == data
    short = [index for index in range(OBJECTS) if len(nodes_of(cluster, explained(cluster, index))) == 1]
    assert short, "one of four nodes holds some of 12 objects"
    (alone,) = nodes_of(cluster, explained(cluster, short[0]))
    status, text = may_stop(cluster, alone)
    assert status == 1
    assert "data: " in text
    assert "no other current copy" in text
    cluster.start(3)
    cluster.wait_members(4)
    wait_health(cluster, HEALTHY)

    # More nodes are lost than there are copies.
    gone = nodes_of(cluster, explained(cluster, 0))
    left = next(node for node in range(4) if node not in gone)
    for node in gone:
        cluster.kill(node)
    cluster.wait_members(2)
    wait_health(cluster, HALTED, "until", left)  # without a current copy, or even unknown to the two that are left
    for node in gone:
        cluster.start(node)
    cluster.wait_members(4)
    wait_health(cluster, HEALTHY)

    # All stop, not all come back.
    cluster.dog("cluster", "shutdown")
    cluster.wait_stopped()
    cluster.start(0, 1, 2)
    cluster.wait_status(WAIT_FOR_JOIN)
    wait_health(cluster, HALTED, f"waits for members of its last epoch: 127.0.0.1:{cluster.port(3)}")
    assert may_stop(cluster, 1)[0] == 1
    cluster.start(3)
    cluster.wait_status(RUNNING, range(4))
    wait_health(cluster, HEALTHY)
    assert cluster.try_dog("vdi", "read", "data", "0", str(len(data)), check=True).stdout == data


def test_strict_mode_halts_and_goes_on(new_cluster: Callable[..., Cluster]) -> None:
    cluster = started(new_cluster(3))
    cluster.format("-c", "3", "-t")
    cluster.dog("vdi", "create", "data", str(OBJECT))
    cluster.dog("vdi", "write", "data", "0", "4096", stdin=b"1" * 4096)
    wait_health(cluster, HEALTHY)
    status, text = may_stop(cluster, 2)
    assert status == 1
    assert "strict mode refuses writes" in text
    cluster.kill(2)
    cluster.wait_members(2)
    wait_health(cluster, HALTED, "only 2 zones, writes are refused (strict mode)")
    assert cluster.try_dog("vdi", "write", "data", "0", "4096", stdin=b"2" * 4096).returncode != 0
    assert cluster.try_dog("vdi", "read", "data", "0", "4096", check=True).stdout == b"1" * 4096
    cluster.start(2)
    cluster.wait_members(3)
    wait_health(cluster, HEALTHY)
    cluster.dog("vdi", "write", "data", "0", "4096", stdin=b"3" * 4096)
    assert cluster.try_dog("vdi", "read", "data", "0", "4096", check=True).stdout == b"3" * 4096
