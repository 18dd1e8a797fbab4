"""Moves the data objects of a volume to another redundancy while it is in use (`dog vdi alter-copy`).

The volume is snapshotted, and goes on under a vid of the new redundancy; a write to an object that the old vid owns
copies it, as after every snapshot. The moves copy the rest, a few objects at a time, each at any time and by anybody.
When the volume owns all its objects, dog deletes the snapshot. It is known by its tag.

An object that is copied in one piece exists when its copy is whole: who comes second, of a move and a client's write,
finds it. One that is copied in several does not tell whether it is whole until the map names it. So in a volume with
such objects all that are not in its map yet are made in the order of operations, those that clients write, too: each
is copied and named, and then the client's data is laid over it (`Gateway.moved_first`).

A client that has not read the map since may ask for an object that went with that snapshot, and gets the one that the
volume has instead of it; what it writes of its old map does not bring that back. If several volumes shared the object
(clones of one snapshot), nobody knows whose client asks: it gets what all of them hold, and an error where they differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.copying import copied_in_pieces
from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.ids import NO_VID, ObjectId, Vid, data_oid, index_of, inode_oid, is_data, vid_of
from sheepdog.cluster.core.inode import map_offset, objects_of, unpack_map
from sheepdog.cluster.core.limits import COPY_CHUNK_BYTES, MAX_MAP_ENTRIES, MOVE_BATCH, MOVE_PARALLEL
from sheepdog.cluster.core.messages import Buffer, Flag
from sheepdog.cluster.core.script import Script, Step, gather, run
from sheepdog.cluster.core.vdi import VdiRecord, VdiTable

if TYPE_CHECKING:
    from array import array

    from sheepdog.cluster.core.router import Router

MOVED_TAG = b"alter-copy"
IoDone: TypeAlias = Callable[[int, Buffer], None]


def went_back(vdis: VdiTable, record: VdiRecord, old: array[int], new: array[int]) -> list[int]:
    """Where a map write would replace an object that was moved by the one before it: positions in `new`.

    It comes from a client that has not read the map since, and writes more of it than it has changed.
    """
    suspects = [i for i, owner in enumerate(new) if owner not in (0, record.vid, old[i]) and old[i]]
    if not suspects:
        return []
    age = {vid: number for number, vid in enumerate([record.vid, *vdis.ancestors(record.vid)])}
    moves = [number for vid, number in age.items() if _was_moved(vdis, vid)]
    return [i for i in suspects if any(age.get(Vid(old[i]), len(age)) < n <= age.get(Vid(new[i]), -1) for n in moves)]


def _was_moved(vdis: VdiTable, vid: Vid) -> bool:
    """The VDI was frozen, and perhaps deleted since, to give the one that went on objects of its own."""
    record = vdis.get(vid)
    return record is not None and record.tag == MOVED_TAG


def is_moving(vdis: VdiTable, vid: Vid) -> bool:
    """Some objects of the volume may still be those of a snapshot that was taken to change its redundancy."""
    ancestors = (vdis.get(ancestor) for ancestor in vdis.ancestors(vid))
    return any(one is not None and one.tag == MOVED_TAG and not one.deleted for one in ancestors)


class Moves:
    """Of one node."""

    def __init__(self, context: Context, router: Router) -> None:
        self._context = context
        self._router = router

    def _read(self, oid: ObjectId, offset: int, length: int) -> Step:
        return lambda done: self._router.read(oid, offset, length, done)

    # -- moving ------------------------------------------------------------------------------------------------

    def move(self, vid: Vid, freeze: Step) -> Script[int]:
        """Gives the volume some objects of its own in place of others' (see MOVE_BATCH), and names them in its map.

        `freeze` holds the volume's writes to the end of the operation. NO_SUPPORT for volumes that cannot be moved.
        """
        vdis = self._context.state.vdis
        record = vdis.get(vid)
        if record is None or record.deleted:
            return int(Result.NO_VDI)
        large = self._is_large(vid)
        if record.is_snapshot or record.store_policy or (large and not is_moving(vdis, vid)):
            return int(Result.NO_SUPPORT)
        result, entries = yield from self._map(record)
        if result:
            return int(result)
        count = 1 if large else MOVE_BATCH
        batch = [(index, Vid(owner)) for index, owner in enumerate(entries) if owner not in (0, vid)][:count]
        return (yield from self._move(vid, batch, freeze))

    def move_one(self, vid: Vid, index: int, freeze: Step) -> Script[tuple[int, Vid]]:
        """Gives the volume this large object. Also says whose it is then: the volume's, or nobody's.

        It stays another's if the change of redundancy is over.
        """
        vdis = self._context.state.vdis
        record = vdis.get(vid)
        if record is None or record.deleted or record.is_snapshot:
            return int(Result.NO_VDI if record is None or record.deleted else Result.READONLY), NO_VID
        result, owner = yield from self._owner(vid, index)
        if result or owner in (NO_VID, vid) or not is_moving(vdis, vid):
            return result, owner
        result = yield from self._move(vid, [(index, owner)], freeze)
        return (result, NO_VID) if result else (yield from self._owner(vid, index))

    def _is_large(self, vid: Vid) -> bool:
        return self._context.size_of(data_oid(vid, 0)) > COPY_CHUNK_BYTES

    def _move(self, vid: Vid, batch: list[tuple[int, Vid]], freeze: Step) -> Script[int]:
        results: list[int] = yield gather([self._copying(vid, index, owner) for index, owner in batch], MOVE_PARALLEL)
        if any(results) or not batch:
            return next((result for result in results if result), int(Result.SUCCESS))
        yield freeze
        results = yield gather([self._naming(vid, index, owner) for index, owner in batch], MOVE_PARALLEL)
        return next((result for result in results if result), int(Result.SUCCESS))

    def _map(self, record: VdiRecord) -> Script[tuple[int, array[int]]]:
        count = min(objects_of(record.size, record.shift), MAX_MAP_ENTRIES)
        result, data = yield self._read(inode_oid(record.vid), map_offset(0), 4 * count)
        return int(result), unpack_map(b"" if result else data)

    def _owner(self, vid: Vid, index: int) -> Script[tuple[int, Vid]]:
        """Whose object the volume's map names."""
        result, entry = yield self._read(inode_oid(vid), map_offset(index), 4)
        return (int(result), NO_VID) if result else (int(Result.SUCCESS), Vid(unpack_map(entry)[0]))

    def _copying(self, vid: Vid, index: int, owner: Vid) -> Step:
        target, source = data_oid(vid, index), data_oid(owner, index)
        if self._is_large(vid):
            size = self._context.size_of(target)
            return lambda done: run(copied_in_pieces(self._router, target, source, Flag.DURABLE, size), done)
        return lambda done: run(self._copy(target, source), done)

    def _copy(self, target: ObjectId, source: ObjectId) -> Script[int]:
        """The source belongs to a snapshot, so it stays as it is. A client may make the target at the same time: it
        has at least the source's bytes then, and is not touched."""
        size = self._context.size_of(target)
        result, data = yield self._read(source, 0, size)
        if result:
            return int(result)
        flags = Flag.CREATE | Flag.ONLY_NEW | Flag.DURABLE
        result, _ = yield lambda done: self._router.change(target, flags, 0, size, data, 0, done)
        return int(result)

    def _naming(self, vid: Vid, index: int, owner: Vid) -> Step:
        return lambda done: run(self._name(vid, index, owner), done)

    def _name(self, vid: Vid, index: int, owner: Vid) -> Script[int]:
        """The map names the own object where it still has the old one; nobody writes meanwhile."""
        oid, own = inode_oid(vid), data_oid(vid, index)
        result, named = yield from self._owner(vid, index)
        if result:
            return result
        if named != owner:
            if named == NO_VID and self._is_large(vid):  # it was discarded while it was copied
                self._context.probe("moves.discarded")
                result, _ = yield lambda done: self._router.change(own, Flag.REMOVE, 0, 0, b"", 0, done)
            return int(result)
        result, _ = yield self._read(own, 0, 1)
        if result:
            return int(result)
        self._context.probe("moves.moved")
        data = (vid).to_bytes(4, "little")
        result, _ = yield lambda done: self._router.change(oid, Flag.DURABLE, map_offset(index), 0, data, 0, done)
        return int(result)

    # -- reads of what was moved -------------------------------------------------------------------------------

    def followed(self, oid: ObjectId, offset: int, length: int, done: IoDone) -> IoDone:
        """`done` of a read of an object that is gone: it gets the one which took its place."""

        def read(result: int, data: Buffer) -> None:
            if result == Result.NO_OBJ and (heirs := self._heirs(oid)):
                self._context.probe("moves.followed")
                run(self._read_in_all(heirs, oid, offset, length), lambda answer: done(*answer))
            else:
                done(result, data)

        return read

    def _heirs(self, oid: ObjectId) -> list[VdiRecord]:
        """The volumes whose redundancy was changed since they shared this object: the one that went on from the
        snapshot it belonged to, and those that were branched off that."""
        vdis = self._context.state.vdis
        record = vdis.get(vid_of(oid)) if is_data(oid) else None
        # Not only once it is deleted: its objects go before all nodes know.
        if record is None or not record.snap_ctime:
            return []
        moved = [vid for vid in (record.vid, *vdis.descendants(record.vid)) if _was_moved(vdis, vid)]
        heirs = {heir.vid: heir for vid in moved if (heir := vdis.heir(vid)) is not None}
        return list(heirs.values())

    def _read_in_all(
        self, heirs: list[VdiRecord], gone: ObjectId, offset: int, length: int
    ) -> Script[tuple[int, Buffer]]:
        """A read does not say whose client asks: what all of them hold. NO_OBJ where they differ, for nobody may get
        the data of another volume."""
        common: Buffer | None = None
        for heir in heirs:
            result, data = yield from self._read_in(heir, gone, offset, length)
            if result:
                return result, b""
            if common is not None and common != data:
                self._context.probe("moves.in_doubt")
                return int(Result.NO_OBJ), b""
            common = data
        return int(Result.SUCCESS), common or b""

    def _read_in(self, record: VdiRecord, gone: ObjectId, offset: int, length: int) -> Script[tuple[int, Buffer]]:
        """Part of the object that took the place of another one, as the volume's map says now. That may be one which a
        later change of redundancy is about to replace, too."""
        index = index_of(gone)
        result, entry = yield self._read(inode_oid(record.vid), map_offset(index), 4)
        if result:
            return int(result), b""
        owner = Vid(unpack_map(entry)[0])
        if not owner:
            return int(Result.SUCCESS), bytes(length)
        if owner == vid_of(gone):
            return int(Result.NO_OBJ), b""  # as the map names it, nothing took its place
        result, data = yield self._read(data_oid(owner, index), offset, length)
        return int(result), data
