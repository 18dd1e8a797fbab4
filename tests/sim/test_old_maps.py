"""A client that has not read its volume's map for long, while others changed the redundancy and deleted snapshots."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tests.sim.test_late_map_writes import NAME, OBJECTS, create, new_vdi, read_map, running, wait_for, write_map

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import Vid, data_oid
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.moves import MOVED_TAG
from sheepdog.cluster.core.operations import Operations
from sheepdog.cluster.core.vdi import VdiRecord
from sheepdog.cluster.sim.clients import OBJECT_BYTES, SHIFT, block_of
from sheepdog.cluster.sim.cluster import SimCluster

CLONE = b"clone"
CODED = 0x11  # 2:1
Done = Callable[..., None]


class Story:
    """A volume of whole copies, all of whose objects exist; and maybe a clone. Who is altered becomes coded, or copied
    again."""

    def __init__(self) -> None:
        self.cluster: SimCluster = running(1)
        self.first = new_vdi(self.cluster)
        create(self.cluster, self.first, *range(OBJECTS))
        write_map(self.cluster, self.first, 0, *[self.first] * OBJECTS)
        for index in range(OBJECTS):
            self.put(self.first, index, 1000 + index)

    def _ask(self, request: Callable[[Operations, Done], None]) -> None:
        operations = self.cluster.machines[0].node.operations
        answer = wait_for(self.cluster.world, lambda done: request(operations, done))
        result = answer[0] if isinstance(answer, tuple) else answer
        assert not result, Result(result)

    def put(self, vid: Vid, index: int, value: int) -> None:
        gateway = self.cluster.machines[1].node.gateway
        write = partial(gateway.write, data_oid(vid, index), 0, block_of(value), True)
        assert wait_for(self.cluster.world, write)[0] == Result.SUCCESS

    def _record(self, name: bytes) -> VdiRecord:
        record = self.cluster.machines[0].node.cluster.vdis.working(name)
        assert record is not None
        return record

    def working(self, name: bytes = NAME) -> Vid:
        return self._record(name).vid

    def begin_to_alter(self, name: bytes = NAME) -> None:
        policy = CODED - self._record(name).policy
        copies = 3 if policy else 2
        self._ask(lambda operations, done: operations.snapshot_vdi(name, MOVED_TAG, copies, policy, done))

    def alter(self, name: bytes = NAME) -> None:
        self.begin_to_alter(name)
        self._ask(lambda operations, done: operations.move_objects(self.working(name), done))
        assert read_map(self.cluster, self.working(name)) == [self.working(name)] * OBJECTS
        self.delete(MOVED_TAG, name)

    def snapshot(self, tag: bytes) -> None:
        self._ask(lambda operations, done: operations.snapshot_vdi(NAME, tag, 0, 0, done))

    def clone(self) -> None:
        """Of the first snapshot."""
        size = OBJECTS * OBJECT_BYTES
        self._ask(lambda operations, done: operations.create_vdi(CLONE, size, self.first, 0, 0, 0, SHIFT, 0, done))

    def delete(self, tag: bytes, name: bytes = NAME) -> None:
        self._ask(lambda operations, done: operations.delete_vdi(name, tag, 0, done))

    def read(self, vid: Vid, index: int) -> tuple[int, bytes]:
        gateway = self.cluster.machines[2].node.gateway
        result, data = wait_for(self.cluster.world, partial(gateway.read, data_oid(vid, index), 0, BLOCK_SIZE))
        return result, bytes(data)

    def is_followed(self, name: bytes = NAME) -> None:
        """Objects that the first map names are read, and copied before they are written."""
        for index in range(OBJECTS):
            assert self.read(self.first, index) == (Result.SUCCESS, block_of(1000 + index))
        new, gateway = self.working(name), self.cluster.machines[2].node.gateway
        make = partial(gateway.create, data_oid(new, 0), data_oid(self.first, 0), BLOCK_SIZE, block_of(7), True)
        assert wait_for(self.cluster.world, make)[0] == Result.SUCCESS
        assert self.read(new, 0) == (Result.SUCCESS, block_of(1000))


def test_its_objects_are_found_after_two_changes() -> None:
    story = Story()
    for _ in range(2):
        story.alter()
    story.is_followed()


def test_its_objects_are_found_while_a_second_change_is_under_way() -> None:
    """The map names those of the first change, which are to be replaced, too."""
    story = Story()
    story.alter()
    story.begin_to_alter()
    story.is_followed()


def test_its_objects_are_found_when_the_snapshot_is_gone_that_they_belonged_to() -> None:
    story = Story()
    story.snapshot(b"monday")
    story.alter()
    assert story.read(story.first, 0) == (Result.SUCCESS, block_of(1000))
    story.delete(b"monday")
    story.is_followed()


def test_its_objects_are_found_when_they_were_those_of_the_snapshot_that_its_volume_was_cloned_from() -> None:
    story = Story()
    story.snapshot(b"monday")
    story.clone()
    story.delete(b"monday")
    story.delete(b"")
    story.alter(CLONE)
    story.is_followed(CLONE)


def test_clones_do_not_get_the_data_of_each_other() -> None:
    """Nobody can tell whose client asks for an object that they had in common: it gets what all hold, or an error."""
    story = Story()
    story.snapshot(b"monday")
    story.clone()
    story.delete(b"monday")
    story.alter()
    story.alter(CLONE)
    story.is_followed(CLONE)
    story.put(story.working(), 1, 5)
    assert story.read(story.first, 1) == (Result.NO_OBJ, b"")
    assert story.cluster.probes()["moves.in_doubt"]
    assert story.read(story.first, 2) == (Result.SUCCESS, block_of(1002))
    story.delete(b"")
    assert story.read(story.first, 1) == (Result.SUCCESS, block_of(1001))


def test_a_snapshot_that_is_deleted_is_not_read_from_the_volume() -> None:
    """Unless the volume was altered since, nobody but its own readers names its objects."""
    story = Story()
    story.snapshot(b"monday")
    new = story.working()
    for index in range(OBJECTS):
        make = partial(
            story.cluster.machines[1].node.gateway.create,
            data_oid(new, index),
            data_oid(story.first, index),
            0,
            block_of(5),
            True,
        )
        assert wait_for(story.cluster.world, make)[0] == Result.SUCCESS
    write_map(story.cluster, new, 0, *[new] * OBJECTS)
    story.delete(b"monday")
    assert story.read(story.first, 0)[0] == Result.NO_OBJ


def test_what_it_writes_of_its_map_brings_nothing_back() -> None:
    """Objects were moved, and a snapshot was taken since: the volume that goes on shares them with that."""
    story = Story()
    story.snapshot(b"monday")
    story.alter()
    moved = story.working()
    story.snapshot(b"tuesday")
    write_map(story.cluster, story.working(), 0, *[story.first] * OBJECTS, by=0)
    assert read_map(story.cluster, story.working()) == [moved] * OBJECTS
