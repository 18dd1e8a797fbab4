"""The store of an object cache: one that can also keep what the cluster has, without its journal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from sheepdog.cluster.core.ids import ObjectId
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.ports import Buffer
from sheepdog.cluster.host.directory import write_all
from sheepdog.cluster.host.object_file import Copy
from sheepdog.cluster.host.object_store import ObjectStore
from sheepdog.cluster.host.trailer import FIRST_ENTRY, block_hashes

_BLOCK_MASK: Final = BLOCK_SIZE - 1


class CacheObjects(ObjectStore):
    """`ports.Store` of a cache."""

    def keep(self, oid: ObjectId, offset: int, data: Buffer) -> bool:
        """The file gets the blocks, the table in memory their hashes, the table on the disk at the next checkpoint.

        A process that dies before that leaves bytes without a hash, which are nothing. With a journal each block would
        be written twice, and its record packed, for what can be had again.
        """
        length = len(data)
        first, last = offset >> 12, offset + length + _BLOCK_MASK >> 12
        copy = self._by_oid.get(oid)
        if copy is None or not _is_free(copy, first, last) or not copy.home.has_room(length):
            return False
        hashes = block_hashes(data)
        copy.changes += 1
        try:
            if length > BLOCK_SIZE or self._disk.pwrite(copy.fd, data, offset) != length:
                write_all(self._disk, copy.fd, data, offset)
        except OSError as error:
            self.copies.write_failed(copy.home, error)
            return False
        entries, grown = copy.entries, 0
        for block in range(first, last):
            if not entries[FIRST_ENTRY + block]:
                grown += BLOCK_SIZE
            entries[FIRST_ENTRY + block] = hashes[block - first]
        self.copies.grow(copy, grown)
        if not copy.touched:
            self._applier.touch(copy)
        if self.copies.rot.bad:
            self.copies.rot.written(oid, first, last - first)
        self.copies.files.used(oid)
        return True

    def when_answered(self, call: Callable[[], None]) -> None:
        self._at_end(call)


def _is_free(copy: Copy, first: int, last: int) -> bool:
    """The copy's file is open, and nothing else is on its way to these blocks."""
    if copy.fd < 0 or copy.busy or copy.gone or copy.restoring:
        return False
    return not copy.pending or not any(block in copy.pending for block in range(first, last))
