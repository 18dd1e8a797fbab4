"""Checks copies against the disk itself, not against what the page cache remembers (`ports.Store.verify`).

With an object's first block its trailer is looked at, too. While the file is open the memory has what it says, so a
rotten one is written again, and told as mended; one that is read from the disk shows when its file is opened, or by
the blocks that do not match it.
"""

from __future__ import annotations

from collections.abc import Callable
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
    """Of a store. `rewrite(copy, done)` writes the trailer again, durably."""

    def __init__(self, copies: Copies, rewrite: Callable[[Copy, Done], None]) -> None:
        self._copies = copies
        self._disk = copies.disk
        self._rewrite = rewrite

    def verify(self, oid: ObjectId, offset: int, length: int, done: Done) -> None:
        self._copies.with_open(oid, lambda copy: self._verify(copy, offset, length, done, 0), done)

    def _verify(self, copy: Copy, offset: int, length: int, done: Done, tries: int) -> None:
        if copy.restoring:
            done(NoObject(f"the copy of {oid_name(copy.oid)} here is being restored"))
            return
        if not in_range(copy, offset, length, done):
            return
        if copy.fd < 0:  # the file is not made yet: nothing can have rotted
            done(None)
            return
        first, span = offset >> 12, (length + _BLOCK_MASK) & ~_BLOCK_MASK
        hole = not any(copy.entries[FIRST_ENTRY + first : FIRST_ENTRY + first + (span >> 12)])
        data = bytearray(0 if hole and self._disk.is_hole(copy.fd, offset, span) else span)
        table = bytearray(0 if offset else len(copy.trailer))
        if not data and not table:
            done(None)
            return
        changes, trailer_writes, fd, place = copy.changes, copy.trailer_writes, copy.fd, copy.table
        still = not copy.pins
        copy.pins += 1

        def read() -> None:
            for part, at in ((data, offset), (table, place)):
                if part:
                    self._disk.drop_cached(fd, at, len(part))
                    self._disk.preadv(fd, (part,), at)

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
                error = self._compare(copy, first, data, copy.changes == changes)
                quiet = still and not copy.pins and copy.trailer_writes == trailer_writes and not copy.touched
                if quiet and table and table != copy.trailer:
                    self._mend(copy, error, done)
                else:
                    done(error)

        self._copies.workers.run(read, finished)

    def _compare(self, copy: Copy, first: int, data: bytearray, quiet: bool) -> StoreError | None:
        """A block that was written all the while is not judged: the next pass will."""
        bad = [first + position for position in trailer.bad_blocks(data, copy.entries, FIRST_ENTRY + first)]
        bad = [block for block in bad if block not in copy.pending]
        return self._copies.corrupt(copy, bad) if bad and quiet else None

    def _mend(self, copy: Copy, error: StoreError | None, done: Done) -> None:
        """The trailer on the disk is not what was written there."""
        self._copies.log(3, f"{copy.path}: the trailer is rotten, and is written again")
        self._copies.rot.mended()
        mended = Corrupt(f"{oid_name(copy.oid)}: its trailer in {copy.home.path} was corrupt", (), copy.home.path, True)
        self._rewrite(copy, lambda failure: done(failure or error or mended))
