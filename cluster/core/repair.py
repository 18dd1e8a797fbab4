"""Repair of a copy that is current but cannot be read everywhere: rot, or a disk that fails.

Only what cannot be read is fetched, each range from any copy of the same version that has it good: two copies that are
rotten at different places heal each other. Nothing here changes before all that can be had is in memory; what cannot
be had stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sheepdog.cluster.core.context import Context
from sheepdog.cluster.core.errors import Corrupt, Result, StoreError
from sheepdog.cluster.core.ids import NodeId, ObjectId, Version
from sheepdog.cluster.core.limits import BLOCK_SIZE, MAX_REPAIR_BYTES
from sheepdog.cluster.core.messages import Buffer, Kind, Message


class Repair:
    """Of one copy, whose table of block hashes is right. `used`: its ranges (offset, length) that are no holes.

    `ended` gets the result, unless the epoch ends first; NO_MEM: more is bad than fits into memory.
    """

    def __init__(
        self,
        context: Context,
        oid: ObjectId,
        version: Version,
        sources: Sequence[NodeId],
        used: Sequence[tuple[int, int]],
        ended: Callable[[int], None],
    ) -> None:
        self._context = context
        self._fence = context.fence
        self._oid = oid
        self._version = version
        self._sources = sources
        self._used = list(used)
        self._ended = ended
        self._bad: list[tuple[int, int]] = []
        self._found: list[tuple[int, Buffer]] = []
        self._lacking = int(Result.SUCCESS)  # why some range could not be had from anybody

    def start(self) -> None:
        """Reads the copy, range by range."""
        if self._context.fence != self._fence:
            return
        if self._used:
            offset, length = self._used.pop()
            self._context.store.read(self._oid, offset, length, lambda data: self._read(offset, length, data))
        elif sum(length for _, length in self._bad) > MAX_REPAIR_BYTES:
            self._ended(Result.NO_MEM)
        else:
            self._fetch()

    def _read(self, offset: int, length: int, data: Buffer | StoreError) -> None:
        if isinstance(data, Corrupt) and data.blocks:
            end = offset + length
            starts = [block * BLOCK_SIZE for block in data.blocks]
            self._bad += [(start, min(BLOCK_SIZE, end - start)) for start in starts if offset <= start < end]
        elif isinstance(data, StoreError):
            self._bad.append((offset, length))
        self.start()

    def _fetch(self, source: int = 0) -> None:
        """The next bad range, from the first source that has it."""
        if not self._bad:
            self._write()
            return
        offset, length = self._bad[-1]

        def answered(answer: Message) -> None:
            if self._context.fence != self._fence:
                return
            if not answer.result:
                assert not isinstance(answer.body, list)
                self._found.append((offset, bytes(answer.body)))
                self._bad.pop()
                self._fetch()
            elif source + 1 < len(self._sources):
                self._fetch(source + 1)
            else:  # the rest of the copy need not stay bad with it
                self._lacking = answer.result
                self._bad.pop()
                self._fetch()

        message = Message(Kind.FETCH, self._fence, oid=self._oid, offset=offset, length=length, version=self._version)
        self._context.peers.request(self._sources[source], message, answered)

    def _write(self) -> None:
        store, oid = self._context.store, self._oid
        if not self._found:
            self._ended(self._lacking)  # without an error: it can be read again
            return
        if store.version(oid) != self._version:
            self._ended(Result.STALE_OBJ)
            return
        self._context.probe("repair.blocks")
        store.restore_begin(oid, store.size(oid))
        left, failed = len(self._found), 0

        def written(error: StoreError | None) -> None:
            nonlocal left, failed
            left, failed = left - 1, failed or (0 if error is None else int(error.result))
            if left or self._context.fence != self._fence:
                return
            if failed:
                self._ended(failed)
            else:
                store.restore_finish(
                    oid,
                    self._version,
                    lambda error: self._ended(self._lacking if error is None else error.result),
                )

        for offset, data in self._found:
            store.restore_write(oid, offset, data, written)
