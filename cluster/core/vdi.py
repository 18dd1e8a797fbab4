"""The table of all VDIs, equal on every node (changed only by ordered events; protocol.md 6.3, 8.1, 8.2).

It is rebuilt from the inode objects at a cold start and handed to joining nodes; lookups touch no disk.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from sheepdog.cluster.core.errors import Result
from sheepdog.cluster.core.hashing import vid_of_name
from sheepdog.cluster.core.ids import (
    NO_VID,
    VID_COUNT,
    Vid,
)
from sheepdog.cluster.core.inode import InodeHeader

BITMAP_SIZE: Final = VID_COUNT // 8


class LockState(enum.IntEnum):
    """protocol.md 14.4."""

    UNLOCKED = 1
    LOCKED = 2
    SHARED = 3


class Sharing(enum.IntEnum):
    """State of a participant of a shared lock (protocol.md 8.6)."""

    MODIFIED = 1
    SHARED = 2
    INVALIDATED = 3


@dataclass
class VdiRecord:
    """What every node knows of one VDI. Times are (seconds << 32) | nanoseconds; `size` in bytes.

    A deleted VDI keeps its vid and parent (protocol.md 6.3: deleted vids stay in use).
    """

    vid: Vid
    name: bytes
    tag: bytes = b""
    create_time: int = 0
    snap_ctime: int = 0  # 0: working VDI
    size: int = 0
    vm_state_size: int = 0
    copies: int = 0
    policy: int = 0
    store_policy: int = 0
    shift: int = 0
    snap_id: int = 0
    parent: Vid = NO_VID
    deleted: bool = False
    lock: int = LockState.UNLOCKED
    owners: list[str] = field(default_factory=list)  # nodes that hold the lock, as hex of address and port
    sharing: list[int] = field(default_factory=list)  # of each owner of a shared lock
    rounds: int = 0  # changes of `sharing` by those who write or read the map
    former_copies: list[list[int]] = field(default_factory=list)  # [epoch, copies before it], ascending

    @property
    def is_snapshot(self) -> bool:
        return self.snap_ctime != 0

    @property
    def fate(self) -> tuple[bytes, int, bool]:
        """What cannot change while no operation is done: name, when it was frozen, deleted."""
        return self.name, self.snap_ctime, self.deleted

    def may_become(self, made: VdiRecord) -> bool:
        """A vid that was only registered gets its inode; or the same once more, when the answer was lost."""
        return not (self.create_time or self.deleted) or (
            (self.name, self.create_time, self.snap_id) == (made.name, made.create_time, made.snap_id)
        )

    def copies_at(self, epoch: int) -> int:
        """Redundancy in an earlier epoch, as far as the cluster has not been stopped since."""
        return next((copies for until, copies in self.former_copies if epoch < until), self.copies)

    def take_lock(self, other: VdiRecord) -> None:
        """The lock of another record, with its owners."""
        self.lock, self.owners, self.sharing, self.rounds = other.lock, other.owners, other.sharing, other.rounds

    def sharing_of(self, owner: str) -> int:
        """What an owner of the shared lock knows of the map; 0 for a node that does not take part."""
        return self.sharing[self.owners.index(owner)] if owner in self.owners else 0

    def others_invalidated(self, owner: str) -> bool:
        """No node but `owner` has a client whose map is thought to be up to date."""
        others = (sharing for node, sharing in zip(self.owners, self.sharing, strict=True) if node != owner)
        return all(sharing == Sharing.INVALIDATED for sharing in others)

    def share(self, owner: str) -> None:
        """One more participant of the shared lock."""
        self.lock = LockState.SHARED
        if owner not in self.owners:
            self.sharing.append(Sharing.INVALIDATED if self.owners else Sharing.MODIFIED)
            self.owners.append(owner)

    def unshare(self, owner: str) -> None:
        """A participant, or the only owner, is gone."""
        position = self.owners.index(owner)
        del self.owners[position]
        if self.lock == LockState.SHARED:
            del self.sharing[position]
        if not self.owners:
            self.lock = LockState.UNLOCKED

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        values["name"] = self.name.decode("latin-1")
        values["tag"] = self.tag.decode("latin-1")
        return values

    def tombstone(self) -> dict[str, Any]:
        """What remains of a deleted VDI, as JSON: its vid stays in use (protocol.md 6.3)."""
        return {**self.to_json(), "name": "", "size": 0, "vm_state_size": 0, "deleted": True}

    @property
    def is_unburied(self) -> bool:
        """Deleted, but its inode may still have the map: the size goes last."""
        return self.deleted and self.size != 0

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> VdiRecord:
        fields = dict(values)
        fields["name"] = fields["name"].encode("latin-1")
        fields["tag"] = fields["tag"].encode("latin-1")
        return cls(**fields)

    @classmethod
    def of_inode(cls, inode: InodeHeader) -> VdiRecord:
        """The record that an inode object describes."""
        return cls(
            vid=Vid(inode.vdi_id),
            name=inode.name,
            tag=inode.tag,
            create_time=inode.create_time,
            snap_ctime=inode.snap_ctime,
            size=inode.vdi_size,
            vm_state_size=inode.vm_state_size,
            copies=inode.nr_copies,
            policy=inode.copy_policy,
            store_policy=inode.store_policy,
            shift=inode.block_size_shift,
            snap_id=inode.snap_id,
            parent=Vid(inode.parent_vdi_id),
            deleted=not inode.name,
        )


@dataclass
class Claim:
    """One gateway caches the data of a volume (core.claims)."""

    owner: str  # hex of address and port
    cache: str  # which contents of its cache: a gateway that lost its disk comes back with others
    dirty: bool  # acknowledged writes may be there and nowhere else
    lost: bool = False  # ... and the owner has come back without that cache


class VdiTable:
    """All VDIs by vid and by name."""

    def __init__(self) -> None:
        self._records: dict[Vid, VdiRecord] = {}
        self._by_name: dict[bytes, list[Vid]] = {}
        self._children: dict[Vid, list[Vid]] = {}
        self._ancestors: dict[Vid, list[Vid]] = {}  # asked for since the last change: every flush asks
        self.attributes: dict[Vid, list[int]] = {}  # ids of attribute objects by the vid in their object ids
        self.claims: dict[Vid, Claim] = {}  # of the volumes that some gateway caches
        self.claim_number = 0  # counts claims taken
        self._in_use = bytearray(BITMAP_SIZE)
        self._deleted = bytearray(BITMAP_SIZE)

    def __len__(self) -> int:
        return len(self._records)

    def get(self, vid: Vid) -> VdiRecord | None:
        return self._records.get(vid)

    def records(self) -> Iterator[VdiRecord]:
        """All records, tombstones included, ascending by vid."""
        for vid in sorted(self._records):
            yield self._records[vid]

    def in_use_bitmap(self) -> bytes:
        """Every vid ever used (protocol.md 3.3.7)."""
        return bytes(self._in_use)

    def deleted_bitmap(self) -> bytes:
        return bytes(self._deleted)

    def put(self, record: VdiRecord) -> None:
        """Adds or replaces a record."""
        old = self._records.get(record.vid)
        if old is not None:
            self._unlink(old)
        self._records[record.vid] = record
        self._by_name.setdefault(record.name, []).append(record.vid)
        if record.parent:
            self._children.setdefault(record.parent, []).append(record.vid)
        self._ancestors.clear()
        if record.deleted or record.is_snapshot:
            self.claims.pop(record.vid, None)  # it does not change any more, or is gone
        self.mark(record.vid, record.deleted)

    def mark(self, vid: Vid, deleted: bool) -> None:
        """Sets the vid's bit in use, and its deleted bit as told."""
        byte, bit = vid >> 3, 1 << (vid & 7)
        self._in_use[byte] |= bit
        if deleted:
            self._deleted[byte] |= bit
        else:
            self._deleted[byte] &= ~bit & 0xFF

    def dead_families(self) -> list[list[Vid]]:
        """The VDIs that descend from each other, where all of them are deleted; ascending."""
        family: dict[Vid, Vid] = {}  # the oldest known ancestor
        for vid in sorted(self._records):
            line = [vid, *self.ancestors(vid)]
            family[vid] = next(one for one in reversed(line) if one in self._records)
        members: dict[Vid, list[Vid]] = {}
        for vid, oldest in family.items():
            members.setdefault(oldest, []).append(vid)
        return [vids for vids in members.values() if all(self._records[vid].deleted for vid in vids)]

    def forget(self, vid: Vid) -> None:
        """A deleted VDI leaves nothing behind: its vid is free."""
        record = self._records.pop(vid, None)
        if record is not None:
            self._unlink(record)
            self._ancestors.clear()
            byte, bit = vid >> 3, 1 << (vid & 7)
            self._in_use[byte] &= ~bit & 0xFF
            self._deleted[byte] &= ~bit & 0xFF

    def _unlink(self, record: VdiRecord) -> None:
        self._by_name[record.name].remove(record.vid)
        if not self._by_name[record.name]:
            del self._by_name[record.name]
        if record.parent:
            self._children[record.parent].remove(record.vid)

    def named(self, name: bytes) -> list[VdiRecord]:
        """The living VDIs of a name in order of creation: snapshots by ascending id, the working one last."""
        records = [self._records[vid] for vid in self._by_name.get(name, ()) if name]
        records.sort(key=lambda record: (not record.is_snapshot, record.snap_id))
        return records

    def working(self, name: bytes) -> VdiRecord | None:
        for vid in reversed(self._by_name.get(name, ())):
            record = self._records[vid]
            if name and not record.is_snapshot:
                return record
        return None

    def lookup(self, name: bytes, tag: bytes, snap_id: int) -> VdiRecord | Result:
        """The VDI that a client means (protocol.md 8.2): NO_VDI or NO_TAG if there is none."""
        working = self.working(name)
        if not tag and not snap_id:
            return working if working is not None else Result.NO_VDI
        for record in reversed(self.named(name)):
            if record.is_snapshot and ((tag and record.tag == tag) or (snap_id and record.snap_id == snap_id)):
                return record
        return Result.NO_VDI if working is None else Result.NO_TAG

    def next_snap_id(self, name: bytes) -> int:
        """Snapshot id of a new working VDI: one above what remains of that name (protocol.md 8.3)."""
        return max((record.snap_id for record in self.named(name)), default=0) + 1

    def allocate(self, name: bytes, lowest: bool = False) -> Vid | None:
        """First free vid at or after the name's hash (protocol.md 6.3), or the `lowest`; None when all are used."""
        start = 1 if lowest else vid_of_name(name) or 1
        return self._first_free(start, VID_COUNT) or self._first_free(1, start)

    def _first_free(self, start: int, end: int) -> Vid | None:
        """First vid in the range that was never used."""
        in_use, vid = self._in_use, start
        while vid < end:
            byte = in_use[vid >> 3]
            if byte == 0xFF:
                vid = (vid | 7) + 1  # families with a thousand snapshots fill whole bytes
            elif byte >> (vid & 7) & 1:
                vid += 1
            else:
                return Vid(vid)
        return None

    def descendants(self, vid: Vid) -> list[Vid]:
        """All VDIs that were branched off `vid`, directly or not, tombstones included."""
        found: list[Vid] = []
        todo = [vid]
        while todo:
            children = self._children.get(todo.pop(), ())
            found.extend(children)
            todo.extend(children)
        return found

    def ancestors(self, vid: Vid) -> list[Vid]:
        """Parent, its parent, and so on, tombstones included."""
        known = self._ancestors.get(vid)
        if known is None:
            found: dict[Vid, None] = {}
            record = self._records.get(vid)
            while record is not None and record.parent and record.parent not in found:
                found[record.parent] = None
                record = self._records.get(record.parent)
            known = self._ancestors[vid] = list(found)
        return known

    def heir(self, vid: Vid) -> VdiRecord | None:
        """The working VDI that goes on where `vid` was frozen, over any number of snapshots; None if it is gone.

        A snapshot gives the frozen VDI's snap_ctime to the VDI that it makes as create_time; no clone has it.
        """
        record = self._records.get(vid)
        while record is not None and record.is_snapshot:
            time = record.snap_ctime
            children = (self._records[child] for child in self._children.get(record.vid, ()))
            record = next((child for child in children if child.create_time == time), None)
        return None if record is None or record.deleted else record

    def unlock_node(self, owner: str) -> None:
        """Locks vanish when their owning gateway node leaves (cli.md 4, "Lock")."""
        for record in self._records.values():
            if owner in record.owners:
                record.unshare(owner)

    def merge(self, found: VdiTable, whole: bool) -> None:
        """Takes over what was not known; and, if nothing is missing any more, the fate of those of which only older
        inodes were found before."""
        for record in found.records():
            known = self._records.get(record.vid)
            if known is None:
                self.put(record)
                if record.vid in found.claims:
                    self.claims[record.vid] = found.claims[record.vid]
            elif whole and known.fate != record.fate:
                if not record.deleted:
                    record.take_lock(known)
                self.put(record)
        for vid, places in found.attributes.items():
            self.attributes[vid] = sorted({*self.attributes.get(vid, ()), *places})

    def to_json(self) -> dict[str, Any]:
        attributes = [[vid, ids] for vid, ids in sorted(self.attributes.items())]
        claims = [[vid, asdict(claim)] for vid, claim in sorted(self.claims.items())]
        return {
            "records": [record.to_json() for record in self.records()],
            "attributes": attributes,
            "claims": claims,
            "claim_number": self.claim_number,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> VdiTable:
        table = cls()
        for value in values["records"]:
            table.put(VdiRecord.from_json(value))
        table.attributes = {Vid(vid): ids for vid, ids in values["attributes"]}
        table.claims = {Vid(vid): Claim(**claim) for vid, claim in values.get("claims", ())}
        table.claim_number = values.get("claim_number", 0)
        return table

    @classmethod
    def of_inodes(cls, inodes: Iterable[InodeHeader]) -> tuple[VdiTable, list[Vid]]:
        """The table that a set of inode objects describes, after a cold start, and the vids that have to be buried.

        Of several working VDIs of one name all but the oldest are rests of snapshots that were never committed (the
        oldest was not frozen yet): nobody ever wrote to them. A deleted VDI of some size is the rest of a deletion.
        """
        table = cls()
        records = [VdiRecord.of_inode(inode) for inode in inodes]
        oldest: dict[bytes, VdiRecord] = {}
        for record in records:
            if not record.is_snapshot and not record.deleted:
                other = oldest.get(record.name)
                if other is None or (record.create_time, record.vid) < (other.create_time, other.vid):
                    oldest[record.name] = record
        unfinished = []
        for record in records:
            rest = not record.is_snapshot and not record.deleted and oldest[record.name] is not record
            if rest:
                record.deleted, record.name = True, b""
            if rest or record.is_unburied:
                unfinished.append(record.vid)
            table.put(record)
        return table, unfinished
