"""Five machines on a real engine whose network breaks: two from three, and in one direction only.

Whoever goes on, it is one side: what the other one has answered it has answered before, and it has no part in what is
acknowledged, even where it holds all copies.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from tests.support import trees
from tests.support.door import Door, plain
from tests.support.machines import Machines, engine_fixtures
from tests.support.pauses import Pauses
from tests.support.watch import Watch

from sheepdog.cluster.core.hashing import vid_of_name
from sheepdog.cluster.core.ids import ObjectId, Vid, data_oid
from sheepdog.cluster.wire.opcodes import Opcode

MACHINES = 5
EVERYBODY = range(MACHINES)
BLOCK = 4096
SIZE = 4 << 20
STEP_SECONDS = 0.3  # between asking for a lease and taking it: two answers under way, and the engine's own beat
DETECT_SECONDS = 30.0  # until the others go on: 8 s with ZooKeeper's leader among the silent
STEADY_SECONDS = 12.0  # twice as long as a member may be silent
OVER_SECONDS = 2.0  # what should not happen has happened by then


site, machines = engine_fixtures(MACHINES)


def read(oid: ObjectId) -> bytes:
    """Of a block that nobody writes: a machine with a copy answers it alone, held by nothing but its lease."""
    return plain(Opcode.READ_OBJ, room=BLOCK, oid=oid, offset=BLOCK)


def write(oid: ObjectId) -> bytes:
    return plain(Opcode.WRITE_OBJ, payload=b"x" * BLOCK, oid=oid)


def new_object(machines: Machines, name: str, copies: int) -> ObjectId:
    machines.dog("vdi", "create", "-c", str(copies), name, str(SIZE))
    oid = data_oid(Vid(vid_of_name(name.encode())), 0)
    with Door(machines.socket(0)) as door:
        assert door.ask(plain(Opcode.CREATE_AND_WRITE_OBJ, payload=bytes(BLOCK), oid=oid)).result == 0
    return oid


@pytest.fixture
def watch(machines: Machines, teardown: ExitStack) -> Callable[..., Watch]:
    def start(request: Callable[[ObjectId], bytes], node: int, oid: ObjectId) -> Watch:
        made = Watch(machines.socket(node), request(oid))
        teardown.callback(made.close)
        made.goes_on()
        return made

    return start


def holders(machines: Machines, oid: ObjectId) -> list[int]:
    return [node for node in EVERYBODY if f"{oid:016x}" in machines.objects(node)]


def order(machines: Machines, name: str) -> list[int]:
    """The machines with a volume's first object: the one that orders its writes comes first."""
    said = json.loads(machines.dog("vdi", "object", "location", name, "-i", "0", "--json"))["expected"]
    return [machines.network.addresses.index(node.rpartition(":")[0]) for node in said]


def test_two_of_five_are_a_minority(machines: Machines, watch: Callable[..., Watch]) -> None:
    """They have all copies of an object, and each other: nothing but the engine keeps them from serving it."""
    theirs, of_all = new_object(machines, "theirs", 2), new_object(machines, "v", MACHINES)
    away = holders(machines, theirs)
    assert len(away) == 2
    here = [node for node in EVERYBODY if node not in away]
    readers = [watch(read, node, oid) for node in away for oid in (theirs, of_all)]
    writers = [watch(write, node, theirs) for node in away]
    other = watch(write, here[0], of_all)
    with Pauses() as pauses:
        machines.network.split(*away)
        cut = time.monotonic()
        first = other.goes_on(DETECT_SECONDS)
        new = trees.pattern(1, SIZE)
        machines.dog("vdi", "write", "v", "0", str(SIZE), node=here[1], stdin=new)
        time.sleep(OVER_SECONDS)
    for one in (*readers, *writers):
        assert one.last < first
        one.check_ended(cut + machines.lease_seconds, STEP_SECONDS, pauses)
    other.close()
    machines.network.unite()
    for one in (*readers, *writers):
        one.goes_on()
    machines.healthy()
    for node in EVERYBODY:
        shown = machines.try_dog("vdi", "read", "v", "0", str(SIZE), node=node, check=True).stdout
        assert shown[BLOCK:] == new[BLOCK:]


@pytest.mark.parametrize("deaf", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_the_packets_of_one_direction_are_lost(machines: Machines, watch: Callable[..., Watch], deaf: bool) -> None:
    """What a machine sends, or what is sent to it. With ZooKeeper it is the one with the leader."""
    oid = new_object(machines, "v", MACHINES)
    alone = machines.leader()
    reader, writer = watch(read, alone, oid), watch(write, (alone + 1) % MACHINES, oid)
    ways = (EVERYBODY, [alone]) if deaf else ([alone], EVERYBODY)
    machines.network.lose(*ways)
    first = writer.goes_on(DETECT_SECONDS)
    time.sleep(OVER_SECONDS)
    assert reader.last < first
    machines.network.lose_no_more(*ways)
    reader.goes_on()
    machines.healthy()


@pytest.mark.soak
def test_two_members_do_not_reach_each_other(machines: Machines, watch: Callable[..., Watch]) -> None:
    """What one sends to the other is lost, all else arrives: one of them is given up, until the network is whole.

    Neither has ZooKeeper's leader: a server that does not reach it loses sessions of others.
    """
    leader = machines.leader()
    for name in ("v", "w", "x"):
        oid = new_object(machines, name, MACHINES)
        machines.dog("vdi", "write", name, "0", str(BLOCK), stdin=b"x" * BLOCK)  # now the inode names it, too
        first, *others = order(machines, name)
        if first != leader:
            break
    second, third = [node for node in others if node != leader][:2]
    writer = watch(write, third, oid)
    machines.network.lose([first], [second])
    lost = time.monotonic()
    writer.goes_on(DETECT_SECONDS)
    assert writer.since(lost)[0].ended - lost > OVER_SECONDS, "all writes wait for the two"
    time.sleep(STEADY_SECONDS)  # by now it would have come back and been silent again
    writer.goes_on(OVER_SECONDS)
    machines.network.lose_no_more([first], [second])
    machines.wait_members(MACHINES, EVERYBODY, DETECT_SECONDS)
    machines.healthy()
