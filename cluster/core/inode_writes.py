"""What a client's write into an inode means beyond its bytes (protocol.md 7.4, 7.5).

header  the client may change tag, vm_clock, vm_state_size, size (growing) while it is no snapshot; all nodes learn it.
        Copies change with a new epoch only (ALTER_VDI_COPY): a client writes back what it read at some time
map     entries that change drop their reference to the data object they named; an object that nobody
        names any more is freed before the client is answered, so that it may create it again at once.
        A client that has not noticed a snapshot yet still writes the frozen map: its new objects must
        reach the volume that goes on (8.4), or an acknowledged write is gone when it is opened again
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from functools import partial

from sheepdog.cluster.core.coherence import Coherence
from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.errors import PeerError, Result
from sheepdog.cluster.core.gateway import Gateway, IoDone
from sheepdog.cluster.core.ids import NO_VID, ObjectId, Vid, data_oid, index_of, inode_oid, vid_of
from sheepdog.cluster.core.inode import (
    HEADER_SIZE,
    MAP_END,
    MAP_ENTRY_SIZE,
    MAP_OFFSET,
    InodeHeader,
    entries_written,
    map_offset,
    pack_map,
    unpack_map,
)
from sheepdog.cluster.core.limits import INODE_SIZE, RECLAIM_PARALLEL
from sheepdog.cluster.core.map_writes import Ended, MapWrites
from sheepdog.cluster.core.messages import Flag
from sheepdog.cluster.core.moves import went_back
from sheepdog.cluster.core.operations import Operations
from sheepdog.cluster.core.ports import Buffer
from sheepdog.cluster.core.script import Script, Step, gather, run
from sheepdog.cluster.core.vdi import VdiRecord

# Of an object that is to become zeros: it has, or is not there, or stays with a snapshot.
_NOTHING_LEFT = (Result.SUCCESS, Result.NO_OBJ, Result.READONLY, Result.NO_VDI)


def _are_own(record: VdiRecord, offset: int, data: Buffer) -> bool:
    """Whole entries of the map of a volume that is no snapshot, all of which name objects of its own."""
    if record.is_snapshot or (offset - MAP_OFFSET) % MAP_ENTRY_SIZE or len(data) % MAP_ENTRY_SIZE:
        return False
    return data == record.vid.to_bytes(MAP_ENTRY_SIZE, "little") * (len(data) // MAP_ENTRY_SIZE)


class InodeWrites:
    """Takes client writes to inode objects from the gateway."""

    def __init__(self, context: Context, gateway: Gateway, operations: Operations, coherence: Coherence) -> None:
        self._context = context
        self._coherence = coherence
        self._gateway = gateway
        self._operations = operations
        self._map_writes = MapWrites(self._begin_map_write)

    def write(self, oid: ObjectId, offset: int, data: Buffer, durable: bool, done: IoDone) -> None:
        record = self._context.state.vdis.get(vid_of(oid))
        if record is None or record.deleted:
            done(Result.EIO if record is None and self._context.state.partial else Result.NO_VDI, b"")
            return
        end = offset + len(data)
        if data and offset < HEADER_SIZE:
            run(self._write_header(oid, offset, data, durable), lambda result: done(result, b""))
        elif data and end <= MAP_END and not record.store_policy:
            self._map_writes.write(oid, offset, data, durable, lambda result: done(result, b""))
        else:
            self._gateway.change(oid, Flag.DURABLE if durable else 0, offset, 0, data, 0, done)

    def create(self, oid: ObjectId, offset: int, data: Buffer, durable: bool, done: IoDone) -> None:
        """A whole inode (`dog cluster snapshot load`), for a vid that was registered and has none yet."""
        record = self._context.state.vdis.get(vid_of(oid))
        try:
            made = VdiRecord.of_inode(InodeHeader.unpack(data)) if not offset else None
        except PeerError:
            made = None
        if record is None or made is None or made.vid != record.vid or not record.may_become(made):
            done(Result.INVALID_PARMS, b"")
            return
        working = self._context.state.vdis.working(made.name)
        if working is not None and working.vid != made.vid and not made.is_snapshot:
            done(Result.VDI_EXIST, b"")
            return
        run(self._create(oid, data, durable, made), lambda result: done(result, b""))

    def _create(self, oid: ObjectId, data: Buffer, durable: bool, made: VdiRecord) -> Script[int]:
        flags = Flag.CREATE | (Flag.DURABLE if durable else 0)
        result, _ = yield lambda done: self._gateway.change(oid, flags, 0, INODE_SIZE, data, made.copies, done)
        if result:
            return int(result)
        command = {"t": "inode", "record": made.to_json()}
        answer = yield lambda done: self._context.machine.propose(command, done)
        return int(answer)

    def _read(self, oid: ObjectId, offset: int, length: int) -> Step:
        return lambda done: self._gateway.raw_read(oid, offset, length, done)

    def _change(self, oid: ObjectId, flags: int, offset: int, data: Buffer) -> Step:
        return lambda done: self._gateway.change(oid, flags, offset, 0, data, 0, done)

    def _read_to_change(self, oid: ObjectId, offset: int, length: int) -> Script[tuple[int, Buffer]]:
        """Reads what the caller changes at once. The read is no write, so a snapshot may have begun meanwhile: it
        would copy the inode without the change, and be undone by it. Then the read comes again after it."""
        vid = vid_of(oid)
        while True:
            result, data = yield self._read(oid, offset, length)
            if not self._gateway.is_frozen(vid):
                return int(result), data
            self._context.probe("inode.frozen_while_read")
            yield lambda done: self._gateway.when_thawed(vid, done)

    def _write_header(self, oid: ObjectId, offset: int, data: Buffer, durable: bool) -> Script[int]:
        result, old = yield from self._read_to_change(oid, 0, HEADER_SIZE)
        if result:
            return int(result)
        wanted = bytearray(old)
        inside = min(len(data), HEADER_SIZE - offset)
        wanted[offset : offset + inside] = data[:inside]
        try:
            header, asked = InodeHeader.unpack(old), InodeHeader.unpack(wanted)
        except PeerError:
            return int(Result.INVALID_PARMS)
        size = max(header.vdi_size, asked.vdi_size)
        before, after = (header.tag, header.vm_state_size, header.vdi_size), (asked.tag, asked.vm_state_size, size)
        if header.is_snapshot and before != after:
            return int(Result.READONLY)  # whoever asks has not noticed that it was frozen
        header.tag = asked.tag
        header.vm_clock_nsec = asked.vm_clock_nsec
        header.vm_state_size = asked.vm_state_size
        header.vdi_size = size
        header.btree_counter = asked.btree_counter
        body = header.pack() + bytes(data[inside:])
        result, _ = yield self._change(oid, Flag.DURABLE if durable else 0, 0, body)
        if result:
            return int(result)
        command = {
            "t": "header",
            "vid": header.vdi_id,
            "tag": header.tag.decode("latin-1"),
            "size": header.vdi_size,
            "vm_state_size": header.vm_state_size,
        }
        answer = yield lambda done: self._context.machine.propose(command, done)
        return int(answer)

    def _begin_map_write(self, oid: ObjectId, offset: int, data: Buffer, durable: bool, ended: Ended) -> None:
        """One that names objects of a volume without a parent is a write like any other: its entries were empty or
        named the same before, so nothing becomes free."""
        vid = vid_of(oid)
        record = self._context.state.vdis.get(vid)
        if (
            record is not None
            and not record.parent
            and _are_own(record, offset, data)
            and not self._coherence.is_shared(vid)
            and not self._gateway.is_frozen(vid)  # since the write was let in
        ):
            flags = Flag.DURABLE if durable else 0
            self._gateway.change(oid, flags, offset, 0, data, 0, partial(self._named, vid, ended))
        else:
            run(self._write_coherently(oid, offset, data, durable), ended)

    def _named(self, vid: Vid, ended: Ended, result: int, _: Buffer) -> None:
        """The map has the names. Nobody shared the volume when they were written; who does by now may have read the map
        before, and has to read it again."""
        if not result and self._coherence.is_shared(vid):
            self._context.probe("inode.shared_while_written")
            run(self._coherence.claim(vid), ended)
        else:
            ended(result)

    def _write_coherently(self, oid: ObjectId, offset: int, data: Buffer, durable: bool) -> Script[int]:
        """A map write through one of several gateways. The others learn that their maps are old before it, and once
        more after it if one of them has read the map meanwhile (protocol.md 8.6)."""
        vid = vid_of(oid)
        result = yield from self._coherence.claim(vid)
        if not result and self._gateway.is_among_others(oid):
            result = yield from self._empty(oid, offset, data, durable)
        if not result:
            result = yield from self._write_map(oid, offset, data, durable)
        if not result:
            result = yield from self._coherence.claim(vid)
        return result

    def _empty(self, oid: ObjectId, offset: int, data: Buffer, durable: bool) -> Script[int]:
        """The objects that a map write gives back become zeros before it.

        Should this node die before they are removed, a client behind another gateway that makes one of them again finds
        it, and takes it for one that somebody else has made just now (`Gateway.create`). So it does with one that could
        neither be emptied nor removed, because its nodes were away: that one is not given back.
        """
        vid, entries = vid_of(oid), entries_written(offset, len(data))
        start = map_offset(entries.start)
        result, before = yield self._read(oid, start, 4 * len(entries))
        if result:
            return int(result)
        after = bytearray(before)
        after[offset - start : offset - start + len(data)] = data
        pairs = zip(entries, unpack_map(before), unpack_map(after), strict=True)
        given_back = [data_oid(vid, index) for index, old, new in pairs if old == vid and new == NO_VID]
        answers = yield gather([self._zero(one, durable) for one in given_back], RECLAIM_PARALLEL)
        return next((int(result) for result, _ in answers if result not in _NOTHING_LEFT), int(Result.SUCCESS))

    def _zero(self, oid: ObjectId, durable: bool) -> Step:
        return lambda done: self._gateway.zero(oid, 0, self._context.size_of(oid), durable, done)

    def _write_map(self, oid: ObjectId, offset: int, data: Buffer, durable: bool) -> Script[int]:
        vid = vid_of(oid)
        while self._gateway.is_frozen(vid):  # since the write was let in
            self._context.probe("inode.frozen_while_waiting")
            yield lambda done: self._gateway.when_thawed(vid, done)
        record = self._context.state.vdis.get(vid)
        if record is not None and _are_own(record, offset, data):
            return (yield from self._write_own_entries(oid, offset, data, durable))
        entries = entries_written(offset, len(data))
        start, length = map_offset(entries.start), 4 * len(entries)
        result, before = yield from self._read_to_change(oid, start, length)
        if result:
            return int(result)
        after = bytearray(before)
        after[offset - start : offset - start + len(data)] = data
        old, new = unpack_map(before), unpack_map(after)
        record = self._context.state.vdis.get(vid)
        if record is not None and (stale := went_back(self._context.state.vdis, record, old, new)):
            self._context.probe("inode.old_map_written")
            for i in stale:
                new[i] = old[i]
            after = bytearray(pack_map(new))
            data = after[offset - start : offset - start + len(data)]
        if record is not None and record.is_snapshot:
            # The heir first: a client that asks again, because this node died in between, finds the old entries here.
            made = [(entries.start + i, old[i]) for i in range(len(old)) if old[i] != new[i] == record.vid]
            if made:
                self._context.probe("inode.late_map_write")
                result = yield lambda done: self._operations.late_map_write(record.vid, made, done)
                if result:
                    return int(result)
        dropped = [(Vid(old[i]), entries.start + i) for i in range(len(old)) if old[i] and old[i] != new[i]]
        # What is removed is gone durably: the map must not name it again after a loss of power.
        result, _ = yield self._change(oid, Flag.DURABLE if durable or dropped else 0, offset, data)
        if not result and dropped:
            yield from self.reclaim(vid, dropped)
        return int(result)

    def _write_own_entries(self, oid: ObjectId, offset: int, data: Buffer, durable: bool) -> Script[int]:
        """Objects that the volume has made itself: whatever the map named there, they are its objects now.

        So what was there is only asked for, at the same time, to free what nobody names any more. It may have been read
        late, so this volume's map is looked at for that as well.
        """
        vid, first = vid_of(oid), entries_written(offset, len(data)).start
        read, change = yield gather(
            [
                self._read(oid, offset, len(data)),
                self._change(oid, Flag.DURABLE if durable else 0, offset, data),
            ],
            2,
        )
        if change[0] or read[0]:  # not known what was there: a later sweep finds what nothing names (core.sweep)
            return int(change[0])
        old = unpack_map(read[1])
        dropped = [(Vid(owner), first + i) for i, owner in enumerate(old) if owner not in (NO_VID, vid)]
        if dropped:
            yield from self.reclaim(NO_VID, dropped, NO_VID if durable else vid)
        return int(Result.SUCCESS)

    def reclaim(self, writer: Vid, dropped: list[tuple[Vid, int]], unflushed: Vid = NO_VID) -> Script[None]:
        """Removes those of the data objects (owner, index) that no inode names any more.

        `writer` has dropped them already. Only their owner and what was branched off it can name them. The map of
        `unflushed` must not name them again after a loss of power: where it cannot be made durable, a sweep frees them.
        """
        vdis = self._context.state.vdis
        objects = [data_oid(owner, index) for owner, index in dropped if vdis.get(owner) is not None]
        named = yield from self.named(objects, writer)
        free = [oid for oid in objects if oid not in named]
        if free and unflushed:
            result, _ = yield partial(self._gateway.flush, unflushed)
            if result:
                return
        yield gather([self._change(oid, Flag.REMOVE, 0, b"") for oid in free], RECLAIM_PARALLEL)

    def named(self, objects: Iterable[ObjectId], writer: Vid = NO_VID) -> Script[dict[ObjectId, None]]:
        """Those of the data objects that the map of a living VDI names, or may name because it cannot be read now.

        `writer` has dropped them already: its map is not looked at.
        """
        vdis = self._context.state.vdis
        by_owner: dict[Vid, list[int]] = {}
        for oid in objects:
            by_owner.setdefault(vid_of(oid), []).append(index_of(oid))
        named: dict[ObjectId, None] = {}
        for owner, indexes in by_owner.items():
            family = [owner, *vdis.descendants(owner)]
            living = [vid for vid in family if vid != writer and (r := vdis.get(vid)) is not None and not r.deleted]
            left = dict.fromkeys(indexes)
            for vid in living:
                if not left:
                    break
                yield from self._strike_named(vid, owner, left)
            named.update((data_oid(owner, index), None) for index in indexes if index not in left)
        return named

    def _strike_named(self, vid: Vid, owner: Vid, indexes: dict[int, None]) -> Script[None]:
        """Takes out of `indexes` those whose entry in the map of `vid` names `owner`."""
        low, high = min(indexes), max(indexes)
        result, part = yield self._read(inode_oid(vid), map_offset(low), 4 * (high - low + 1))
        if result:
            # Not known to be free: keep them. A later sweep finds what nothing names (core.sweep).
            self._context.probe("reclaim.map_unreadable")
            indexes.clear()
            return
        entries: array[int] = unpack_map(part)
        for index in [index for index in indexes if entries[index - low] == owner]:
            del indexes[index]
