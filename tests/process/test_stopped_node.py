"""A node that is stopped (SIGSTOP, a hung host) is alive to the engine and dead to everybody who waits for it.

The others expel it and go on (cluster/core/vigil.py); when it wakes it must not answer from what it knew before
(promise P6), and comes back as a new member with the data that it missed.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from tests.support.cluster import Cluster, started
from tests.support.door import Door, plain
from tests.support.processes import wait_until

from sheepdog.cluster.core.hashing import vid_of_name
from sheepdog.cluster.core.ids import ObjectId, Vid, data_oid
from sheepdog.cluster.wire.opcodes import Opcode

OBJECTS, BLOCK = 24, 4096
STOPPED = 3
EXPELLED_SECONDS = 60.0  # silence, grace and a slow machine
VID = Vid(vid_of_name(b"v"))


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return started(Cluster(4, tmp_path))


def write(door: Door, oid: ObjectId, value: bytes) -> None:
    answer = door.ask(plain(Opcode.WRITE_OBJ, payload=value * BLOCK, oid=oid))
    assert answer.result == 0


def read(door: Door, oid: ObjectId) -> bytes:
    answer = door.ask(plain(Opcode.READ_OBJ, room=BLOCK, oid=oid))
    assert answer.result == 0
    return answer.data[:1]


def test_a_stopped_node_is_expelled_and_never_answers_from_old_knowledge(cluster: Cluster) -> None:
    try:
        cluster.format("-c", "3")
        cluster.dog("vdi", "create", "v", "1G")
        oids = [data_oid(VID, index) for index in range(OBJECTS)]
        with Door(cluster.port(0)) as door, Door(cluster.port(STOPPED)) as asleep:
            door.socket.settimeout(EXPELLED_SECONDS)
            for oid in oids:
                assert door.ask(plain(Opcode.CREATE_AND_WRITE_OBJ, payload=b"a" * BLOCK, oid=oid)).result == 0
            assert [read(asleep, oid) for oid in oids] == [b"a"] * OBJECTS
            cluster.wait_recovered()
            cluster.kill(STOPPED, signal.SIGSTOP)
            for oid in oids:  # some of them have a copy on the stopped node: these wait until it is expelled
                write(door, oid, b"b")
            cluster.wait_members(3, nodes=[0, 1, 2])
            # What a client asked of the sleeper meanwhile may be answered late, or not at all, but never with the past.
            asleep.socket.settimeout(EXPELLED_SECONDS)
            for oid in oids:
                asleep.send(plain(Opcode.READ_OBJ, room=BLOCK, oid=oid))
            cluster.kill(STOPPED, signal.SIGCONT)
            seen = []
            try:
                for _ in oids:
                    answer = asleep.answer()
                    seen.append(answer.data[:1] if answer.result == 0 else b"error")
            except (ConnectionError, AssertionError, EOFError):
                pass  # hung up on
            assert b"a" not in seen
            cluster.wait_members(4, seconds=EXPELLED_SECONDS)
            cluster.wait_recovered()
        wait_until(lambda: answers(cluster.port(STOPPED)), EXPELLED_SECONDS, "the woken node serves")
        with Door(cluster.port(STOPPED)) as awake:
            assert [read(awake, oid) for oid in oids] == [b"b"] * OBJECTS
    finally:
        cluster.close()


def test_a_pause_shorter_than_the_limit_costs_time_and_nothing_else(cluster: Cluster) -> None:
    try:
        cluster.format("-c", "3")
        cluster.dog("vdi", "create", "v", "1G")
        oid = data_oid(VID, 0)
        with Door(cluster.port(0)) as door:
            door.socket.settimeout(EXPELLED_SECONDS)
            assert door.ask(plain(Opcode.CREATE_AND_WRITE_OBJ, payload=b"a" * BLOCK, oid=oid)).result == 0
            for _ in range(3):
                cluster.kill(STOPPED, signal.SIGSTOP)
                time.sleep(1.0)
                cluster.kill(STOPPED, signal.SIGCONT)
                write(door, oid, b"c")
            assert read(door, oid) == b"c"
        cluster.wait_members(4)
        assert cluster.dog("cluster", "info", "-r").splitlines()[-1].split()[1] == "1"  # no new epoch
    finally:
        cluster.close()


def answers(port: int) -> bool:
    try:
        with Door(port) as door:
            return door.ask(plain(Opcode.READ_OBJ, room=BLOCK, oid=data_oid(VID, 0))).result == 0
    except (TimeoutError, OSError, AssertionError):
        return False
