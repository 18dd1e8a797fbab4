"""Runs the operation at the head of the queue on the node whose turn it is (see core.operations).

Each script may be run again from its start by another node after a crash at any point:

 alter   the inode is changed where it is, then an epoch begins in which everything has that many copies
 create  the new inode is written, then the base is frozen: that write is what a cold start goes by
 delete  the inode loses its name first, then what it named is freed, then its map is emptied
 late    entries written into a frozen map reach the map of the VDI that goes on; nobody writes that meanwhile
 bury    after a cold start: finishes a deletion, or undoes a snapshot that was never committed
 sweep   core.sweep: frees what deleted VDIs have left behind
 load    after a cold start: the VDI table is collected from the inode objects of all members; and again in each epoch
         while some inodes may be on nodes that are away
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from typing import Any

from sheepdog.cluster.core.attributes import Attribute
from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.copies import Copies
from sheepdog.cluster.core.creation import as_it_is, refusal_of
from sheepdog.cluster.core.erasure import policy_of
from sheepdog.cluster.core.errors import PeerError, Result
from sheepdog.cluster.core.everyone import Everyone
from sheepdog.cluster.core.gateway import Gateway, OperationKey
from sheepdog.cluster.core.hashing import vid_of_name
from sheepdog.cluster.core.ids import (
    ObjectId,
    Vid,
    attribute_oid,
    data_oid,
    inode_oid,
    is_btree,
    vid_of,
    vmstate_oid,
)
from sheepdog.cluster.core.inode import (
    BTREE_HEADER_SIZE,
    HEADER_SIZE,
    SNAP_CTIME_OFFSET,
    TAG_OFFSET,
    InodeHeader,
    btree_children,
    btree_leaves,
    btree_used,
    empty_btree,
    map_offset,
    objects_of,
    pack_map,
    unpack_map,
)
from sheepdog.cluster.core.inode_writes import InodeWrites
from sheepdog.cluster.core.limits import (
    ATTRIBUTE_PROBES,
    ATTRIBUTE_SIZE,
    BTREE_NODE_SIZE,
    INODE_SIZE,
    MAX_MAP_ENTRIES,
    RECLAIM_PARALLEL,
)
from sheepdog.cluster.core.messages import Buffer, Flag, Kind
from sheepdog.cluster.core.script import Script, Step, gather, run
from sheepdog.cluster.core.state import ClusterFlag
from sheepdog.cluster.core.strings import NAME_SIZE, padded, until_nul
from sheepdog.cluster.core.sweep import Sweep
from sheepdog.cluster.core.table_load import TableLoad
from sheepdog.cluster.core.vdi import VdiRecord

Values = dict[str, Any]
_SIZE_OFFSET = 536
_COPIES_OFFSET = 554
_REMOVE_BATCH = 4096  # steps that are in memory at a time
_MAP_CHUNK_ENTRIES = 1 << 16
_NEED_ALL = (
    "create",
    "delete",
    "attribute",
    "sweep",
    "bury",
)  # they take ids that seem free, or free what seems unnamed


class Executor:
    """Of one node."""

    def __init__(
        self,
        context: Context,
        gateway: Gateway,
        everyone: Everyone,
        inodes: InodeWrites,
        freeze_here: Callable[[Vid, OperationKey, Callable[[int, Buffer], None]], None],
        left_dirty: Callable[[Callable[[str, list[Vid]], None]], None],
        copies: Copies,
    ) -> None:
        self._context = context
        self._gateway = gateway
        self._everyone = everyone
        self._inodes = inodes
        self.sweep = Sweep(context, gateway, everyone, inodes, self._erase, copies.lacking)
        self.table = TableLoad(context, gateway, everyone, left_dirty, copies)
        self._freeze_here = freeze_here

    def execute(self, operation: Values) -> None:
        """Runs to the end, then proposes the commit."""
        scripts: dict[str, Callable[[Values], Script[Values]]] = {
            "alter": self._alter,
            "create": self._create,
            "delete": self._delete,
            "attribute": self._attribute,
            "late": self._late,
            "bury": self._bury,
            "load": self.table.load,
            "move": self._move,
            "sweep": self.sweep.run,
        }

        def ended(outcome: Values) -> None:
            name = {"owner": operation["owner"], "number": operation["number"], "op": operation["op"]}
            command = {"t": "commit", "operation": name, "changes": {}, **outcome}
            self._context.machine.propose(command)

        if operation["op"] in _NEED_ALL and self._context.state.partial:
            ended({"result": int(Result.WAIT_FOR_JOIN)})
        else:
            run(scripts[operation["op"]](operation), ended)

    # -- steps -----------------------------------------------------------------------------------------------------

    def _read(self, oid: ObjectId, offset: int, length: int) -> Step:
        return lambda done: self._gateway.raw_read(oid, offset, length, done)

    def _change(
        self, oid: ObjectId, flags: int, offset: int, data: Buffer = b"", length: int = 0, copies: int = 0
    ) -> Step:
        durable = flags | Flag.DURABLE
        return lambda done: self._gateway.change(oid, durable, offset, length, data, copies, done)

    def _freeze(self, vid: Vid, operation: Values) -> Step:
        """No write of the volume is under way on any node, and none begins before the operation ends."""
        by = str(operation["owner"]), int(operation["number"])
        return lambda done: self._everyone.ask(
            Kind.DRAIN,
            inode_oid(vid),
            json.dumps(by).encode(),
            lambda answered: self._freeze_here(vid, by, answered),
            lambda result, _: done(result),
        )

    def _freeze_all(self, vid: Vid, operation: Values) -> Script[int]:
        """As `_freeze`; refused while acknowledged data of the volume is out of reach."""
        claims = self._gateway.claims
        if claims is not None and claims.unreachable(vid):
            return int(Result.VDI_LOCKED)
        result = yield self._freeze(vid, operation)
        return int(result)

    def _flush(self, vid: Vid) -> Step:
        return lambda done: self._gateway.flush(vid, lambda result, _: done(result))

    # -- create ----------------------------------------------------------------------------------------------------

    def _create(self, operation: Values) -> Script[Values]:
        state = self._context.state
        vdis, recycle = state.vdis, bool(state.flags & ClusterFlag.RECYCLE)
        name = operation["name"].encode("latin-1")
        working = vdis.working(name)
        if "tag" in operation and working is not None:
            operation = as_it_is(operation, working)
        base = vdis.get(Vid(operation["base"])) if operation["base"] else None
        refusal = refusal_of(operation, vdis, working, base)
        own = base is not None and base.name == name  # a roll-back
        if not refusal and recycle and working is None and not own and vdis.named(name):
            refusal = Result.VDI_EXIST  # snapshots of a deleted volume keep the name (cli.md 4)
        vid = vdis.allocate(name, recycle)
        if not refusal and vid is None:
            refusal = Result.FULL_VDI
        if refusal or vid is None:
            return {"result": int(refusal)}
        outcome = yield from self._make(operation, vid, working, base)
        if not outcome["result"] or working is None:
            return outcome
        undone = yield from self.sweep.undo_snapshot(working.vid, vid)  # an executor before this may have come further
        return outcome if undone else {**outcome, "changes": {"doubtful": [[working.vid, vid]]}}

    def _make(self, operation: Values, vid: Vid, working: VdiRecord | None, base: VdiRecord | None) -> Script[Values]:
        snapshot = operation["snapshot"]
        header = self._new_header(operation, vid, working, base)
        if self._context.state.flags & ClusterFlag.STRICT and self._context.placement.ring.zones < header.nr_copies:
            return {"result": int(Result.VDI_WRITE)}
        entries = b""
        if snapshot:
            assert working is not None
            frozen_result = yield from self._freeze_all(working.vid, operation)
            if frozen_result:
                return {"result": frozen_result}
            if (yield self._flush(working.vid)):
                return {"result": int(Result.BASE_VDI_READ)}
            if "tag" in operation:
                # A client may have written a size a moment ago that the table does not have yet.
                result, data = yield self._read(inode_oid(working.vid), 0, HEADER_SIZE)
                if result:
                    return {"result": int(Result.BASE_VDI_READ)}
                header.vdi_size = InodeHeader.unpack(data).vdi_size
                base = replace(working, size=header.vdi_size)
        if base is not None:
            result, entries = yield from self._read_map(base)
            if result:
                return {"result": int(Result.BASE_VDI_READ)}
        elif header.store_policy:
            entries = empty_btree()
        body = header.pack() + entries
        epoch = self._context.epoch
        result, _ = yield self._change(inode_oid(vid), Flag.CREATE, 0, body, INODE_SIZE, header.nr_copies)
        if result:
            return {"result": int(Result.NO_SPACE if result == Result.NO_SPACE else Result.VDI_WRITE)}
        put = [VdiRecord.of_inode(header).to_json()]
        changes: Values = {"put": put, "made": [vid, epoch, operation["time"] >> 32]}
        if snapshot:
            assert working is not None
            place, frozen = SNAP_CTIME_OFFSET, operation["time"].to_bytes(8, "little")
            known = {"snap_ctime": operation["time"]}
            if "tag" in operation:
                tag, create_time = operation["tag"].encode("latin-1"), working.create_time.to_bytes(8, "little")
                place, frozen = TAG_OFFSET, padded(tag) + create_time + frozen
                known |= {"tag": operation["tag"], "size": header.vdi_size}
            result, _ = yield self._change(inode_oid(working.vid), 0, place, frozen)
            if result:
                return {"result": int(Result.BASE_VDI_WRITE)}
            put.insert(0, {**working.to_json(), **known})
            changes["move_lock"] = [working.vid, vid]
        return {"result": int(Result.SUCCESS), "vid": vid, "changes": changes}

    def _new_header(
        self, operation: Values, vid: Vid, working: VdiRecord | None, base: VdiRecord | None
    ) -> InodeHeader:
        """protocol.md 8.3: a new inode inherits object size and map form from its base, whatever was asked."""
        state = self._context.state
        name = operation["name"].encode("latin-1")
        if operation["snapshot"]:
            assert working is not None
            snap_id = working.snap_id + 1
        else:
            snap_id = state.vdis.next_snap_id(name)
        coding = policy_of(operation["policy"] or (0 if operation["copies"] else state.policy))
        return InodeHeader(
            name=name,
            create_time=operation["time"],
            vdi_size=operation["size"],
            copy_policy=coding.to_byte() if coding is not None else 0,
            store_policy=base.store_policy if base is not None else operation["store_policy"],
            nr_copies=coding.strips if coding is not None else operation["copies"] or state.copies,
            block_size_shift=base.shift if base is not None else operation["shift"] or state.shift,
            snap_id=snap_id,
            vdi_id=vid,
            parent_vdi_id=base.vid if base is not None else 0,
        )

    def _read_map(self, record: VdiRecord) -> Script[tuple[int, bytes]]:
        """The used part of a volume's object map."""
        count = min(objects_of(record.size, record.shift), MAX_MAP_ENTRIES)
        parts = []
        for start in range(0, count, _MAP_CHUNK_ENTRIES):
            length = 4 * min(_MAP_CHUNK_ENTRIES, count - start)
            result, part = yield self._read(inode_oid(record.vid), map_offset(start), length)
            if result:
                return int(result), b""
            parts.append(bytes(part))
        return 0, b"".join(parts)

    # -- delete ----------------------------------------------------------------------------------------------------

    def _delete(self, operation: Values) -> Script[Values]:
        record = self._context.state.vdis.lookup(
            operation["name"].encode("latin-1"), operation["tag"].encode("latin-1"), operation["snap_id"]
        )
        if isinstance(record, Result):
            return {"result": int(record)}
        refusal = yield from self._freeze_all(record.vid, operation)
        if refusal:
            return {"result": refusal}
        if (yield from self._erase(record)):
            return {"result": int(Result.VDI_WRITE)}
        changes: Values = {"put": [record.tombstone()]}
        if len(self._context.state.vdis.named(record.name)) == 1:
            vid = vid_of_name(record.name)
            changes["attributes"] = [vid, (yield from self._free_attributes(vid, record.name))]
        return {"result": int(Result.SUCCESS), "vid": record.vid, "changes": changes}

    def _bury(self, operation: Values) -> Script[Values]:
        """A cold start found the rest of a deletion or of a snapshot that was never committed."""
        record = self._context.state.vdis.get(Vid(operation["vid"]))
        if record is None or not record.deleted:
            return {"result": int(Result.SUCCESS)}
        if (yield from self._erase(record)):
            return {"result": int(Result.VDI_WRITE)}
        return {"result": int(Result.SUCCESS), "changes": {"put": [record.tombstone()]}}

    def _erase(self, record: VdiRecord) -> Script[int]:
        """The inode loses its name, then what it named is freed, then its map is emptied and its size 0."""
        oid = inode_oid(record.vid)
        result, _ = yield self._change(oid, 0, 0, bytes(256))
        if result:
            return int(result)
        if record.store_policy:
            yield from self._free_tree(record)
        else:
            result, entries = yield from self._read_map(record)
            if not result and entries:
                named: array[int] = unpack_map(entries)
                kept = self._written_by_clients(record.vid)
                dropped = [(Vid(owner), index) for index, owner in enumerate(named) if owner and owner not in kept]
                yield from self._inodes.reclaim(record.vid, dropped)
                yield self._change(oid, Flag.PUNCH, map_offset(0), length=len(entries))
        yield from self._free_vmstate(record)
        result, _ = yield self._change(oid, 0, _SIZE_OFFSET, bytes(8))
        return int(result)

    def _written_by_clients(self, vid: Vid) -> frozenset[int]:
        """The other working VDIs. The rest of a snapshot names what belongs to one: its client may have freed that, and
        may be making it again, which no map shows yet."""
        records = self._context.state.vdis.records()
        return frozenset(one.vid for one in records if one.vid != vid and not one.deleted and not one.is_snapshot)

    def _free_vmstate(self, record: VdiRecord) -> Script[None]:
        """QEMU writes the chunks in order, and only at the end how many they are: an interrupted savevm leaves more."""
        count = objects_of(record.vm_state_size, record.shift)
        while True:
            result, _ = yield self._read(vmstate_oid(record.vid, count), 0, 1)
            if result:
                break
            count += 1
        yield from self._remove(vmstate_oid(record.vid, index) for index in range(count))

    def _free_tree(self, record: VdiRecord) -> Script[None]:
        """The data objects and further nodes of a hyper volume; its root in the inode (protocol.md 7.6) goes last."""
        root, offset = inode_oid(record.vid), map_offset(0)
        leaves, children, used = yield from self._read_node(root, offset)
        for child in children:
            if is_btree(child) and vid_of(child) == record.vid:
                below, _, _ = yield from self._read_node(child, 0)
                yield from self._remove(data_oid(record.vid, index) for index, vid in below if vid == record.vid)
                yield self._change(child, Flag.REMOVE, 0)
        yield from self._remove(data_oid(record.vid, index) for index, vid in leaves if vid == record.vid)
        yield self._change(root, Flag.PUNCH, offset, length=used)

    def _read_node(self, oid: ObjectId, offset: int) -> Script[tuple[list[tuple[int, int]], list[ObjectId], int]]:
        """(entries of a leaf, children of an inner node, bytes used); nothing of what cannot be read."""
        result, head = yield self._read(oid, offset, BTREE_HEADER_SIZE)
        try:
            used = 0 if result else btree_used(head)
            if used <= BTREE_NODE_SIZE and used:
                result, node = yield self._read(oid, offset, used)
                if not result:
                    children = [child for _, child in btree_children(node) or []]
                    return btree_leaves(node) or [], children, used
        except PeerError as error:
            self._context.log(4, f"object {oid:016x}: {error}")
        return [], [], BTREE_HEADER_SIZE

    def _remove(self, oids: Iterable[ObjectId]) -> Script[None]:
        """However many."""
        oids = iter(oids)
        while part := list(islice(oids, _REMOVE_BATCH)):
            yield gather([self._change(oid, Flag.REMOVE, 0) for oid in part], RECLAIM_PARALLEL)

    def _free_attributes(self, vid: Vid, name: bytes) -> Script[list[int]]:
        """Nothing of that name is left; returns the ids of another name with the same hash."""
        left = []
        for place in self._context.state.vdis.attributes.get(vid, ()):
            oid = attribute_oid(vid, place)
            result, field = yield self._read(oid, 0, NAME_SIZE)
            if not result and until_nul(field) not in (b"", name):
                left.append(place)
            else:
                yield self._change(oid, Flag.REMOVE, 0)
        return left

    # -- alter -----------------------------------------------------------------------------------------------------

    def _alter(self, operation: Values) -> Script[Values]:
        record = self._context.state.vdis.get(Vid(operation["vid"]))
        if record is None or record.deleted:
            return {"result": int(Result.NO_VDI)}
        if record.policy:
            return {"result": int(Result.NO_SUPPORT)}
        copies = operation["copies"]
        result, _ = yield self._change(inode_oid(record.vid), 0, _COPIES_OFFSET, bytes([copies]))
        if result:
            return {"result": int(Result.VDI_WRITE)}
        changes = {"put": [{**record.to_json(), "copies": copies}], "epoch": operation["time"]}
        return {"result": int(Result.SUCCESS), "changes": changes}

    def _move(self, operation: Values) -> Script[Values]:
        vid, moves = Vid(operation["vid"]), self._gateway.router.moves
        freeze = self._freeze(vid, operation)
        if "index" not in operation:
            return {"result": (yield from moves.move(vid, freeze))}
        result, owner = yield from moves.move_one(vid, operation["index"], freeze)
        return {"result": result, "vid": owner}

    # -- late map writes -------------------------------------------------------------------------------------------

    def _late(self, operation: Values) -> Script[Values]:
        """protocol.md 8.4: an entry reaches the heir only where that still has what the frozen map had."""
        heir = self._context.state.vdis.heir(Vid(operation["vid"]))
        if heir is None:
            return {"result": int(Result.SUCCESS)}
        yield self._freeze(heir.vid, operation)
        made: list[tuple[int, int]] = operation["made"]
        oid = inode_oid(heir.vid)
        while made:
            low = made[0][0]
            count = 1 + max(index - low for index, _ in made if index - low < _MAP_CHUNK_ENTRIES)
            part, made = (
                [pair for pair in made if pair[0] < low + count],
                [pair for pair in made if pair[0] >= low + count],
            )
            result, data = yield self._read(oid, map_offset(low), 4 * count)
            if result:
                return {"result": int(Result.EIO)}
            entries = unpack_map(data)
            same = [index for index, old in part if entries[index - low] == old]
            for index in same:
                entries[index - low] = operation["vid"]
            if same:
                result, _ = yield self._change(oid, 0, map_offset(low), pack_map(entries))
                if result:
                    return {"result": int(result)}
        return {"result": int(Result.SUCCESS)}

    # -- attributes ------------------------------------------------------------------------------------------------

    def _attribute(self, operation: Values) -> Script[Values]:
        try:
            wanted = Attribute.unpack(bytes.fromhex(operation["payload"]))
        except PeerError:
            return {"result": int(Result.INVALID_PARMS)}
        record = self._context.state.vdis.lookup(wanted.name, wanted.tag, operation["snap_id"])
        if isinstance(record, Result):
            return {"result": int(record)}
        wanted.snap_id = operation["snap_id"]
        wanted.ctime = record.create_time
        vid = vid_of_name(wanted.name)
        place, found = yield from self._find_attribute(vid, wanted)
        if place < 0:
            return {"result": int(Result.FULL_VDI)}
        answer: Values = {"result": int(Result.SUCCESS), "vid": vid, "attribute": place}
        oid = attribute_oid(vid, place)
        if operation["delete"]:
            if not found:
                return {"result": int(Result.NO_OBJ)}
            result, _ = yield self._change(oid, 0, 0, bytes(256))
        elif operation["create"]:
            if found and operation["exclusive"]:
                return {"result": int(Result.VDI_EXIST)}
            result, _ = yield self._change(oid, Flag.CREATE, 0, wanted.pack(), ATTRIBUTE_SIZE)
        else:
            result = Result.SUCCESS if found else Result.NO_OBJ
        if result:
            return {"result": int(result)}
        known = self._context.state.vdis.attributes.get(vid, [])
        if operation["create"] and place not in known:
            answer["changes"] = {"attributes": [vid, [*known, place]]}
        return answer

    def _find_attribute(self, vid: Vid, wanted: Attribute) -> Script[tuple[int, bool]]:
        """(id where the attribute is or may be put, whether it is there); id -1: no place."""
        start, free = wanted.id(), -1
        for step in range(ATTRIBUTE_PROBES):
            place = (start + step) & 0xFFFFFFFF
            result, data = yield self._read(attribute_oid(vid, place), 0, ATTRIBUTE_SIZE)
            if result:
                return (place if free < 0 else free), False
            there = Attribute.unpack(data)
            if (there.name, there.tag, there.snap_id, there.key) == (
                wanted.name,
                wanted.tag,
                wanted.snap_id,
                wanted.key,
            ):
                return place, True
            if not there.name and free < 0:
                free = place
        return free, False
