"""Volumes out of the bare stores of several nodes, no daemon running and no membership known.

A block counts if it matches its hash; of several such the one of the newest copy. Erasure-coded objects are decoded:
the newest state of which enough strips are there, or, when all data strips are there, each as it is (a block is on one
strip only). What cannot be had is zeros in the image, and is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Protocol

from sheepdog.cluster.core.erasure import Coder, Policy, policy_of
from sheepdog.cluster.core.errors import PeerError, UsageError
from sheepdog.cluster.core.ids import (
    NO_VERSION,
    ObjectId,
    Version,
    Vid,
    data_oid,
    inode_oid,
    is_inode,
    oid_name,
    strip_of,
)
from sheepdog.cluster.core.inode import (
    BTREE_HEADER_SIZE,
    HEADER_SIZE,
    MAP_ENTRY_SIZE,
    MAP_OFFSET,
    InodeHeader,
    btree_children,
    btree_leaves,
    btree_used,
    unpack_map,
)
from sheepdog.cluster.core.limits import BLOCK_SIZE, BTREE_NODE_SIZE
from sheepdog.cluster.core.striping import UNIT, strip_size, stripe_size
from sheepdog.cluster.host.bare_store import BareStore, Say, ranges
from sheepdog.cluster.host.coders import best_coder
from sheepdog.cluster.host.object_file import Copy
from sheepdog.cluster.host.trailer import ZERO_BLOCK

_NO_OBJECT: Final = ObjectId(0)


class Image(Protocol):
    """Where a volume goes; what is never put reads as zeros."""

    def put(self, offset: int, data: bytes) -> None:
        """Offsets ascend."""


class Salvage:
    """See the module. `lost`: what could not be had, as text."""

    def __init__(self, paths: Sequence[str], say: Say, journal_directories: Sequence[str | None] = ()) -> None:
        """`journal_directories`: of each store, if not in META. UsageError, OSError."""
        self._say = say
        self._stores: list[BareStore] = []
        self._coder: Coder | None = None
        self.lost: list[str] = []
        journals = [*journal_directories, *[None] * len(paths)]
        try:
            for path, journal in zip(paths, journals, strict=False):
                self._stores.append(BareStore(path, say, journal))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for store in self._stores:
            store.close()

    def volumes(self) -> Iterator[InodeHeader]:
        """Every inode of which a copy can be read, ascending vid; also deleted ones (without a name)."""
        oids = {oid: None for store in self._stores for oid in store.copies.by_oid if is_inode(oid)}
        for oid in sorted(oids):
            header = self._header(oid)
            if header is not None:
                yield header

    def _header(self, oid: ObjectId) -> InodeHeader | None:
        data = self._read(oid, HEADER_SIZE)
        try:
            return None if data is None else InodeHeader.unpack(data)
        except PeerError as error:
            self._say(f"{oid:016x}: {error}")
            return None

    def find(self, name: bytes, snapshot: str = "") -> InodeHeader:
        """The working volume of this name, or its snapshot with this tag or number; UsageError."""
        for header in self.volumes():
            if header.name != name:
                continue
            if not snapshot and not header.is_snapshot:
                return header
            if snapshot and header.is_snapshot and snapshot.encode() in (header.tag, b"%d" % header.snap_id):
                return header
        what = name.decode(errors="replace") + (f" with the snapshot {snapshot}" if snapshot else "")
        raise UsageError(f"no volume {what} in these stores")

    def write_volume(self, header: InodeHeader, image: Image) -> bool:
        """Puts all blocks of the volume that are not zero; False when parts are lost."""
        lost_before = len(self.lost)
        policies: dict[int, Policy | None] = {header.vdi_id: policy_of(header.copy_policy)}
        for index, vid in self._tree(header) if header.store_policy else self._map(header):
            if vid not in policies:  # an object of the snapshot that this was made from
                owner = self._header(inode_oid(Vid(vid)))
                policies[vid] = policy_of((owner or header).copy_policy)
            start = index << header.block_size_shift
            length = min(header.object_size, header.vdi_size - start)
            self._write_object(data_oid(Vid(vid), index), header.object_size, policies[vid], start, length, image)
        return len(self.lost) == lost_before

    def _map(self, header: InodeHeader) -> Iterator[tuple[int, int]]:
        """(index, vid) of the volume's objects, ascending."""
        data = self._read(inode_oid(Vid(header.vdi_id)), MAP_OFFSET + MAP_ENTRY_SIZE * header.object_count)
        if data is None:
            raise UsageError(f"no whole object map of {header.name.decode(errors='replace')} is left in these stores")
        return ((index, vid) for index, vid in enumerate(unpack_map(data[MAP_OFFSET:])) if vid)

    def _tree(self, header: InodeHeader) -> Iterator[tuple[int, int]]:
        """The same of a hyper volume. What a lost leaf of its tree named is lost with it."""
        root = self._node(inode_oid(Vid(header.vdi_id)), MAP_OFFSET)
        if root is None:
            raise UsageError(f"no whole index of {header.name.decode(errors='replace')} is left in these stores")
        last = -1
        children = btree_children(root)
        for highest, oid in [(0, _NO_OBJECT)] if children is None else children:
            node = root if children is None else self._node(oid, 0)
            if node is None:
                self.lost.append(f"object {oid:016x} (the index of objects up to {highest}) is lost, and what it names")
                self._say(self.lost[-1])
                continue
            for index, vid in btree_leaves(node) or ():
                if index > last and vid:  # a split that was interrupted leaves the same entries in two leaves
                    last = index
                    yield index, vid

    def _node(self, oid: ObjectId, offset: int) -> bytes | None:
        """A node of the tree; None when it cannot be had as a whole, or is none."""
        try:
            head = self._read(oid, offset + BTREE_HEADER_SIZE)
            used = 0 if head is None else btree_used(head[offset:])
            data = self._read(oid, offset + used) if 0 < used <= BTREE_NODE_SIZE else None
        except PeerError:
            return None
        return None if data is None else data[offset:]

    def _write_object(
        self, oid: ObjectId, size: int, policy: Policy | None, start: int, length: int, image: Image
    ) -> None:
        blocks = self._blocks(oid, length) if policy is None else self._coded_blocks(oid, size, policy, length)
        lost = []
        for offset, block in blocks:
            if block is None:
                lost.append(offset // BLOCK_SIZE)
            elif block != ZERO_BLOCK:
                image.put(start + offset, block[: length - offset])
        if lost:
            self.lost.append(f"object {oid:016x} (from byte {start}): blocks {ranges(lost)} are lost")
            self._say(self.lost[-1])

    def _copies(self, oid: ObjectId) -> list[tuple[BareStore, Copy]]:
        """Readable copies, the newest version first; those of an unfinished restore last."""
        found = []
        for store in self._stores:
            copy = store.copies.by_oid.get(oid)
            if copy is not None and store.opened(copy) is None:
                found.append((store, copy))
        found.sort(key=lambda entry: entry[1].version, reverse=True)
        return found

    def _read(self, oid: ObjectId, length: int) -> bytes | None:
        """The object's first bytes; None when they cannot all be had."""
        data = bytearray()
        for _, block in self._blocks(oid, length):
            if block is None:
                return None
            data += block
        return bytes(data[:length]) if len(data) >= length else None

    def _blocks(self, oid: ObjectId, length: int) -> Iterator[tuple[int, bytes | None]]:
        """(offset, bytes) of the object's blocks; None for a block that no copy has."""
        copies = self._copies(oid)
        try:
            for offset in range(0, length, BLOCK_SIZE):
                yield offset, _first_good(copies, offset)
        finally:
            for store, copy in copies:
                store.release(copy)

    # -- erasure-coded objects ---------------------------------------------------------------------------------------

    def _coded_blocks(
        self, oid: ObjectId, size: int, policy: Policy, length: int
    ) -> Iterator[tuple[int, bytes | None]]:
        if self._coder is None:
            self._coder = best_coder(lambda level, text: None)
        strips = _Strips(
            {strip: self._copies(strip_of(oid, strip)) for strip in range(policy.strips)}, policy, self._coder
        )
        if not strips.is_decodable:
            self._say(f"object {oid_name(oid)}: its strips have different versions, each data strip counts as it is")
        try:
            for offset in range(0, min(length, size), BLOCK_SIZE):
                stripe, rest = divmod(offset, stripe_size(policy))
                strip, within = divmod(rest, UNIT)
                at = stripe * UNIT + within
                yield offset, strips.block(strip, at) if at < strip_size(policy, size) else ZERO_BLOCK
        finally:
            strips.release()


class _Strips:
    """The strips of one object that could be opened."""

    def __init__(self, copies: dict[int, list[tuple[BareStore, Copy]]], policy: Policy, coder: Coder) -> None:
        self._policy = policy
        self._coder = coder
        self._copies = copies
        held: dict[Version, dict[int, list[tuple[BareStore, Copy]]]] = {}
        for strip, found in copies.items():
            for entry in found:
                held.setdefault(entry[1].version, {}).setdefault(strip, []).append(entry)
        state = max((v for v in held if v != NO_VERSION and len(held[v]) >= policy.data), default=None)
        self._state = held[state] if state is not None else {}

    @property
    def is_decodable(self) -> bool:
        return bool(self._state)

    def block(self, strip: int, offset: int) -> bytes | None:
        """A block of a data strip: of the chosen state, else as some strip has it."""
        found = _first_good(self._state.get(strip, ()), offset) or self._decode(strip, offset)
        return found or _first_good(self._copies[strip], offset)

    def _decode(self, strip: int, offset: int) -> bytes | None:
        units: dict[int, bytes] = {}
        for other, copies in self._state.items():
            block = _first_good(copies, offset) if other != strip else None
            if block is not None:
                units[other] = block
            if len(units) == self._policy.data:
                return bytes(self._coder.decode(self._policy, units, [strip])[0])
        return None

    def release(self) -> None:
        for found in self._copies.values():
            for store, copy in found:
                store.release(copy)


def _first_good(copies: Sequence[tuple[BareStore, Copy]], offset: int) -> bytes | None:
    for store, copy in copies:
        block = store.block(copy, offset)
        if block is not None:
            return block
    return None
