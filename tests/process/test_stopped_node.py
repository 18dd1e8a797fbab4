"""A node that is stopped (SIGSTOP, a hung host) is alive to the engine and dead to everybody who waits for it.

The others expel it and go on (cluster/core/vigil.py); when it wakes it must not answer from what it knew before
(promise P6), and comes back as a new member with the data that it missed.
"""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import pytest
from tests.support.cluster import Cluster, started
from tests.support.door import Door, plain
from tests.support.processes import readable, send_signal, wait_until

from sheepdog.cluster.core.hashing import vid_of_name
from sheepdog.cluster.core.ids import ObjectId, Vid, data_oid
from sheepdog.cluster.wire.opcodes import Opcode

OBJECTS, BLOCK = 24, 4096
STOPPED = 3
EXPELLED_SECONDS = 60.0  # silence, grace and a slow machine
SLOW_STOP_SECONDS, SLOW_RUN_SECONDS, SLOW_SECONDS = 0.05, 0.01, 8.0
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


class _Slowed(threading.Thread):
    """Stops a node for most of the time, a moment each: it answers everything, and everything late."""

    def __init__(self, cluster: Cluster, node: int) -> None:
        super().__init__(daemon=True)
        self._pids = cluster.pids(node)
        self.stops = 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            for number, seconds in ((signal.SIGSTOP, SLOW_STOP_SECONDS), (signal.SIGCONT, SLOW_RUN_SECONDS)):
                for pid in self._pids:
                    send_signal(pid, number)
                time.sleep(seconds)
            self.stops += 1

    def __enter__(self) -> _Slowed:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()


def holders(cluster: Cluster, oid: ObjectId) -> list[int]:
    return [node for node in range(4) if f"{oid:016x}" in cluster.objects(node)]


def test_a_slow_node_is_no_dead_one(cluster: Cluster) -> None:
    """Far longer than silence is borne: it stays a member, nothing fails, and only its own objects wait for it."""
    try:
        cluster.format("-c", "3")
        cluster.dog("vdi", "create", "v", "1G")
        oids = [data_oid(VID, index) for index in range(OBJECTS)]
        with Door(cluster.port(0)) as door, Door(cluster.port(0)) as other:
            for one in (door, other):
                one.socket.settimeout(EXPELLED_SECONDS)
            for oid in oids:
                assert door.ask(plain(Opcode.CREATE_AND_WRITE_OBJ, payload=b"a" * BLOCK, oid=oid)).result == 0
            cluster.wait_recovered()
            slow = [oid for oid in oids if STOPPED in holders(cluster, oid)]
            fast = [oid for oid in oids if STOPPED not in holders(cluster, oid)]
            assert slow, fast
            written, overtaken, begin = 0, 0, time.monotonic()
            with _Slowed(cluster, STOPPED) as slowed:
                while time.monotonic() - begin < SLOW_SECONDS:
                    value = bytes([ord("b") + written % 20])
                    door.send(plain(Opcode.WRITE_OBJ, payload=value * BLOCK, oid=slow[written % len(slow)]))
                    while not readable(door.socket):  # the others go on meanwhile
                        write(other, fast[overtaken % len(fast)], value)
                        overtaken += 1
                    assert door.answer().result == 0
                    assert read(door, slow[written % len(slow)]) == value
                    written += 1
            assert slowed.stops > SLOW_SECONDS / (SLOW_STOP_SECONDS + SLOW_RUN_SECONDS) / 4
            assert written > 10
            assert overtaken > written
        cluster.wait_members(4)
        assert cluster.dog("cluster", "info", "-r").splitlines()[-1].split()[1] == "1"  # no new epoch
    finally:
        cluster.close()


def test_nobody_waits_for_a_stopped_coordinator(cluster: Cluster) -> None:
    """The oldest node lets others in and strikes out the dead: the others notice that it does not, also without I/O."""
    try:
        cluster.format("-c", "3")
        cluster.wait_recovered()
        cluster.kill(0, signal.SIGSTOP)
        cluster.kill(STOPPED)
        cluster.start(STOPPED)
        cluster.wait_members(3, nodes=[1, 2, STOPPED], seconds=EXPELLED_SECONDS)
        cluster.kill(0, signal.SIGCONT)
        cluster.wait_members(4, seconds=EXPELLED_SECONDS)
    finally:
        cluster.close()


def answers(port: int) -> bool:
    try:
        with Door(port) as door:
            return door.ask(plain(Opcode.READ_OBJ, room=BLOCK, oid=data_oid(VID, 0))).result == 0
    except (TimeoutError, OSError, AssertionError):
        return False
