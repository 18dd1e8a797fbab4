"""Checks copies against the disk itself, not against what the page cache remembers (`ports.Store.verify`)."""

from __future__ import annotations

from typing import Final

from sheepdog.cluster.core.errors import Corrupt, DiskError, NoObject, StoreError
from sheepdog.cluster.core.ids import ObjectId, oid_name
from sheepdog.cluster.core.limits import BLOCK_SIZE
from sheepdog.cluster.core.ports import Done
from sheepdog.cluster.host import trailer
from sheepdog.cluster.host.copies import Copies
from sheepdog.cluster.host.object_file import Copy
from sheepdog.cluster.host.reading import READ_RETRIES, in_range
from sheepdog.cluster.host.trailer import FIRST_ENTRY

_BLOCK_MASK: Final = BLOCK_SIZE - 1


class Verifying:
    """Of a store."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._disk = copies.disk

    def verify(self, oid: ObjectId, offset: int, length: int, done: Done) -> None:
        self._copies.with_open(oid, lambda copy: self._verify(copy, offset, length, done, 0), done)

    def _verify(self, copy: Copy, offset: int, length: int, done: Done, tries: int) -> None:
        if copy.restoring:
            done(NoObject(f"the copy of {oid_name(copy.oid)} here is being restored"))
            return
        if not in_range(copy, offset, length, done):
            return
        first, span = offset >> 12, (length + _BLOCK_MASK) & ~_BLOCK_MASK
        if not any(copy.entries[FIRST_ENTRY + first : FIRST_ENTRY + first + (span >> 12)]) and self._disk.is_hole(
            copy.fd, offset, span
        ):
            done(None)
            return
        data = bytearray(span)
        changes, fd = copy.changes, copy.fd
        copy.pins += 1

        def read() -> None:
            self._disk.drop_cached(fd, offset, span)
            self._disk.preadv(fd, (data,), offset)

        def finished(result: OSError | None) -> None:
            copy.pins -= 1
            if isinstance(result, OSError):
                done(self._copies.fail(copy.home, result))
            elif copy.gone:
                self._copies.files.close_if_unused(copy)
                done(NoObject(f"the copy of {oid_name(copy.oid)} is gone"))
            elif copy.fd < 0:
                done(DiskError(f"{copy.home.path} is out of service"))
            elif copy.changes != changes and tries < READ_RETRIES:
                self._verify(copy, offset, length, done, tries + 1)
            else:
                done(self._compare(copy, first, data, copy.changes == changes))

        self._copies.workers.run(read, finished)

    def _compare(self, copy: Copy, first: int, data: bytearray, quiet: bool) -> StoreError | None:
        """A block that was written all the while is not judged: the next pass will."""
        bad = [first + position for position in trailer.bad_blocks(data, copy.entries, FIRST_ENTRY + first)]
        bad = [block for block in bad if block not in copy.pending]
        if not bad or not quiet:
            return None
        self._copies.log(3, f"{copy.path}: blocks {bad} do not match their hashes")
        return Corrupt(f"{oid_name(copy.oid)}: blocks {bad} are corrupt here", tuple(bad))
